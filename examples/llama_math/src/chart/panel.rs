//! A panel: curves over one pair of axes, with their names at their ends.

use std::fmt::Write;

use super::axis::{Axis, Scale};
use super::style::{COLORS, LEFT, LETTER, TEXT, WIDTH, escaped, picture, plain};

/// Height of a panel.
pub(super) const HEIGHT: f64 = 372.0;
/// Around the plot. On the right there is room for the names.
const TOP: f64 = 64.0;
const BOTTOM: f64 = 68.0;

/// How a curve is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stroke {
    /// A line.
    Line,
    /// A line with a dot at every point.
    Dotted,
    /// The dots alone.
    Dots,
    /// A dashed line.
    Dashed,
    /// A broad grey line for a reference.
    Reference,
}

/// A line through points.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Its name; an empty name is not drawn.
    pub name: String,
    /// Its colour, by number.
    pub color: usize,
    /// How it is drawn.
    pub stroke: Stroke,
    /// The points, by growing `x`. Those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
    /// Intervals around the points, drawn as a band: `x`, least, most.
    pub band: Vec<(f64, f64, f64)>,
}

/// A plot.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Its title.
    pub title: String,
    /// The names of `x` and `y`.
    pub labels: [String; 2],
    /// The scales of `x` and `y`.
    pub scales: [Scale; 2],
    /// The curves.
    pub curves: Vec<Curve>,
}

impl Panel {
    fn can_show(&self, x: f64, y: f64) -> bool {
        // Larger values overflow in the computation of positions.
        let fits = |value: f64, scale| match scale {
            Scale::Logarithmic | Scale::PowersOfTwo => value > 0.0 && value < 1e12,
            Scale::Linear | Scale::Count | Scale::FromZero => value.abs() < 1e12,
        };
        fits(x, self.scales[0]) && fits(y, self.scales[1])
    }

    /// The panel as an element of a page that has [`STYLE`](super::STYLE).
    pub fn inline(&self) -> String {
        let mut content = String::new();
        self.draw(0.0, &mut content);
        picture(HEIGHT, &self.title, &self.described(), "", &content)
    }

    /// The points of a curve that have a place.
    fn shown(&self, curve: &Curve) -> Vec<(f64, f64)> {
        let points = curve.points.iter().copied();
        points.filter(|&(x, y)| self.can_show(x, y)).collect()
    }

    /// What the panel shows, in words.
    pub(super) fn described(&self) -> String {
        let [x, y] = &self.labels;
        let curves = self.curves.iter().filter_map(|curve| {
            let points = self.shown(curve);
            let (first, last) = (points.first()?, points.last()?);
            let name = match curve.name.as_str() {
                "" => "from",
                name => name,
            };
            let [from, to] =
                [first, last].map(|point| format!("{} at {}", plain(point.1), plain(point.0)));
            Some(format!("{name} {from} to {to}"))
        });
        let curves: Vec<String> = curves.collect();
        format!("{}: {y}, by {x}: {}.", self.title, curves.join("; "))
    }

    pub(super) fn draw(&self, top: f64, svg: &mut String) {
        let shown: Vec<Vec<(f64, f64)>> =
            self.curves.iter().map(|curve| self.shown(curve)).collect();
        let bands: Vec<Vec<(f64, f64, f64)>> = self
            .curves
            .iter()
            .map(|curve| {
                let both = |&(x, low, high): &(f64, f64, f64)| {
                    self.can_show(x, low) && self.can_show(x, high)
                };
                curve.band.iter().copied().filter(both).collect()
            })
            .collect();
        let longest = self.curves.iter().map(|curve| curve.name.chars().count());
        let right = WIDTH - longest.max().unwrap_or(0) as f64 * LETTER - 24.0;
        let (first, last) = (top + TOP, top + HEIGHT - BOTTOM);
        let values = || shown.iter().flatten().copied();
        let edges = bands.iter().flatten();
        let edges = edges.flat_map(|&(_, low, high)| [low, high]);
        let x = Axis::new(self.scales[0], values().map(|point| point.0), [LEFT, right]);
        let of_y = values().map(|point| point.1).chain(edges);
        let y = Axis::new(self.scales[1], of_y, [last, first]);

        let _ = writeln!(
            svg,
            "<text x=\"4\" y=\"{:.1}\" font-weight=\"bold\">{}</text>",
            top + 18.0,
            escaped(&self.title)
        );
        let _ = writeln!(
            svg,
            "<text x=\"4\" y=\"{:.1}\">{}</text>",
            top + 42.0,
            escaped(&self.labels[1])
        );
        for (value, text) in y.ticks() {
            let place = y.place(value);
            let _ = writeln!(
                svg,
                "<path class=\"grid\" d=\"M{LEFT} {place:.1}H{right:.1}\"/><text x=\"{:.1}\" \
                 y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
                LEFT - 7.0,
                place + 6.5
            );
        }
        let mut free = f64::NEG_INFINITY;
        for (value, text) in x.ticks() {
            let place = x.place(value);
            let _ = writeln!(
                svg,
                "<path class=\"grid\" d=\"M{place:.1} {first}V{:.1}\"/>",
                last + 5.0
            );
            let half = text.chars().count() as f64 * LETTER / 2.0;
            if place - half >= free {
                free = place + half + LETTER / 2.0;
                let _ = writeln!(
                    svg,
                    "<text x=\"{place:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
                    last + 25.0
                );
            }
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            (LEFT + right) / 2.0,
            last + 50.0,
            escaped(&self.labels[0])
        );

        for ((curve, points), band) in self.curves.iter().zip(&shown).zip(&bands) {
            let color = curve.color % COLORS;
            if !band.is_empty() {
                let above = band.iter().map(|&(at, _, high)| (at, high));
                let below = band.iter().rev().map(|&(at, low, _)| (at, low));
                let path = path(above.chain(below), &x, &y);
                let _ = writeln!(svg, "<path class=\"band c{color}\" d=\"{path}Z\"/>");
            }
            let class = match curve.stroke {
                Stroke::Reference => Some("reference".to_string()),
                Stroke::Dashed => Some(format!("curve dashed c{color}")),
                Stroke::Line | Stroke::Dotted => Some(format!("curve c{color}")),
                Stroke::Dots => None,
            };
            if let Some(class) = class {
                let line = path(points.iter().copied(), &x, &y);
                let _ = writeln!(svg, "<path class=\"{class}\" d=\"{line}\"/>");
            }
            if let Stroke::Dotted | Stroke::Dots = curve.stroke {
                for &(at, value) in points {
                    let _ = writeln!(
                        svg,
                        "<circle class=\"dot c{color}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\"/>",
                        x.place(at),
                        y.place(value)
                    );
                }
            }
        }
        let named = self.curves.iter().zip(&shown);
        let mut names: Vec<Name<'_>> = named
            .filter(|(curve, _)| !curve.name.is_empty())
            .filter_map(|(curve, points)| {
                let &(at, value) = points.last()?;
                let end = (x.place(at), y.place(value));
                Some(Name {
                    text: &curve.name,
                    color: curve.color % COLORS,
                    end,
                    place: end.1,
                })
            })
            .collect();
        spread(&mut names, first, last);
        for Name {
            text,
            color,
            end,
            place,
        } in names
        {
            let _ = writeln!(
                svg,
                "<path class=\"leader c{color}\" d=\"M{:.1} {:.1}L{:.1} {place:.1}\"/>\
                 <text class=\"name c{color}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                end.0 + 2.0,
                end.1,
                right + 9.0,
                right + 11.0,
                place + 6.5,
                escaped(text)
            );
        }
    }
}

fn path(points: impl Iterator<Item = (f64, f64)>, x: &Axis, y: &Axis) -> String {
    let mut path = String::new();
    for (index, (at, value)) in points.enumerate() {
        let command = if index == 0 { 'M' } else { 'L' };
        let _ = write!(path, "{command}{:.1} {:.1}", x.place(at), y.place(value));
    }
    path
}

/// The name of a curve, next to its end.
struct Name<'a> {
    text: &'a str,
    color: usize,
    /// Where the curve ends.
    end: (f64, f64),
    /// The height of the name.
    place: f64,
}

/// Moves overlapping names apart, within the plot if it is high enough.
fn spread(names: &mut [Name<'_>], first: f64, last: f64) {
    const GAP: f64 = TEXT + 2.0;
    names.sort_by(|a, b| a.place.total_cmp(&b.place));
    let mut least = first;
    for name in names.iter_mut() {
        name.place = name.place.max(least);
        least = name.place + GAP;
    }
    let mut most = last;
    for name in names.iter_mut().rev() {
        name.place = name.place.min(most);
        most = name.place - GAP;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(name: &str, points: &[(f64, f64)]) -> Curve {
        Curve {
            name: name.into(),
            color: 0,
            stroke: Stroke::Line,
            points: points.to_vec(),
            band: Vec::new(),
        }
    }

    fn panel(scales: [Scale; 2], curves: Vec<Curve>) -> Panel {
        Panel {
            title: "a panel".into(),
            labels: ["step".into(), "loss".into()],
            scales,
            curves,
        }
    }

    #[test]
    fn names_of_curves_that_end_together_do_not_cover_each_other() {
        let name = |place| Name {
            text: "a",
            color: 0,
            end: (0.0, place),
            place,
        };
        let mut names = [name(99.0), name(98.0), name(5.0), name(98.5)];
        spread(&mut names, 0.0, 100.0);
        let places: Vec<f64> = names.iter().map(|name| name.place).collect();
        assert_eq!(places, [5.0, 58.0, 79.0, 100.0]);
    }

    #[test]
    fn text_is_large_enough_on_a_phone_and_stands_inside() {
        // The book's pages leave 360 px of a phone's 390.
        const { assert!(TEXT * 360.0 / WIDTH >= 14.0) };
        let title = "The rate and the result by the number of shards";
        let wrapped = super::super::style::lines(title, 36);
        assert_eq!(wrapped.join(" "), title);
        assert!(wrapped.iter().all(|line| line.len() <= 36), "{wrapped:?}");
        let rates = [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2].map(|rate| (rate, rate));
        let narrow = curve("a name of twenty let", &rates);
        let scales = [Scale::Logarithmic, Scale::Linear];
        let svg = super::super::svg(title, &[panel(scales, vec![narrow])]);
        let marked = svg.split("text-anchor=\"middle\">").skip(1);
        let marked: Vec<&str> = marked.map(|rest| rest.split('<').next().unwrap()).collect();
        assert_eq!(marked, ["0.001", "0.005", "0.02", "step"]);
    }

    #[test]
    fn a_chart_holds_its_texts_and_only_places_that_are_numbers() {
        let odd = [
            (1.0, f64::NAN),
            (2.0, f64::INFINITY),
            (3.0, f64::MAX),
            (4.0, 2.0),
            (5.0, -1.0),
        ];
        let scales = [
            Scale::Linear,
            Scale::Count,
            Scale::FromZero,
            Scale::Logarithmic,
            Scale::PowersOfTwo,
        ];
        for scale in scales {
            let empty = panel([Scale::Linear, scale], vec![curve("none", &[])]);
            let constant = [(1.0, 3.0), (2.0, 3.0)];
            let mut banded = curve("R < 8 & more", &constant);
            banded.band = vec![(1.0, 2.0, 4.0), (2.0, 3.0, f64::NAN)];
            let full = panel([Scale::Linear, scale], vec![curve("odd", &odd), banded]);
            let svg = super::super::svg("a title", &[empty, full]);
            for text in [
                "a title",
                "a panel",
                "step",
                "loss",
                "odd",
                "R &lt; 8 &amp; more",
            ] {
                assert!(svg.contains(text), "{text}");
            }
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert_eq!(svg.matches("class=\"band").count(), 1);
        }
    }
}
