//! Charts as SVG: panels below each other, curves with their names at their ends.
//!
//! A page that includes a chart as SVG gives it its colour of text; a chart as a file follows the
//! reader's light or dark scheme. Colours of curves are those of Okabe and Ito, which people with a
//! colour vision deficiency can distinguish, and stand out on both. Text has 14 px on a phone of
//! 390 px. A description repeats in words what the chart shows.

use std::fmt::Write;

/// Width of a chart, and height of a panel.
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 372.0;
/// Around the plot of a panel. On the right there is room for the names.
const LEFT: f64 = 64.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 68.0;
/// Heights of text, and about the widths of their letters.
const TITLE: f64 = 22.0;
const TITLE_LETTER: f64 = 12.5;
const TEXT: f64 = 19.0;
const LETTER: f64 = 11.0;

/// How values become positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// From the smallest value to the largest.
    Linear,
    /// From 0 to the largest value.
    FromZero,
    /// By ratio; values that are not above 0 are left out.
    Logarithmic,
    /// The same, marked at powers of two.
    PowersOfTwo,
}

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

/// The chart as the text of an SVG file.
pub fn svg(title: &str, panels: &[Panel]) -> String {
    let lines = lines(title, ((WIDTH - 8.0) / TITLE_LETTER) as usize);
    let head = 16.0 + 28.0 * lines.len() as f64;
    let height = head + HEIGHT * panels.len() as f64;
    let described: Vec<String> = panels.iter().map(Panel::described).collect();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" style=\"max-width:100%;height:auto\" role=\"img\" \
         font-family=\"system-ui, sans-serif\" font-size=\"{TEXT}\" fill=\"currentColor\">\n\
         <title>{}</title>\n<desc>{}</desc>\n<style>\n{STYLE}</style>\n",
        escaped(title),
        escaped(&described.join(" "))
    );
    for (index, line) in lines.iter().enumerate() {
        let _ = writeln!(
            svg,
            "<text x=\"4\" y=\"{}\" font-size=\"{TITLE}\" font-weight=\"bold\">{}</text>",
            26.0 + 28.0 * index as f64,
            escaped(line)
        );
    }
    for (index, panel) in panels.iter().enumerate() {
        panel.draw(head + HEIGHT * index as f64, &mut svg);
    }
    svg + "</svg>\n"
}

/// The text in lines of at most so many letters, unless a word has more.
fn lines(text: &str, most: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= most => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.into()),
        }
    }
    lines
}

/// Colours of curves are `c0`, `c1`, ...
const STYLE: &str = "\
svg.chart:root { color: #1b1b1b; background: #fff }
@media (prefers-color-scheme: dark) { svg.chart:root { color: #e8e8e8; background: #16181c } }
.chart .c0 { color: #0072b2 } .chart .c1 { color: #d55e00 } .chart .c2 { color: #009e73 }
.chart .c3 { color: #b08a00 } .chart .c4 { color: #cc79a7 } .chart .c5 { color: #808080 }
.chart .c6 { color: #3a8fc4 }
.chart .grid { stroke: currentColor; stroke-width: 1; opacity: 0.2 }
.chart .curve { fill: none; stroke: currentColor; stroke-width: 2.5; stroke-linejoin: round }
.chart .dashed { stroke-dasharray: 7 4 }
.chart .reference { fill: none; stroke: currentColor; stroke-width: 10; opacity: 0.25 }
.chart .dot, .chart .name, .chart .band { fill: currentColor }
.chart .band { opacity: 0.2 }
.chart .leader { stroke: currentColor; stroke-width: 1; opacity: 0.6 }
";
/// Number of colours in [`STYLE`].
const COLORS: usize = 7;

/// One axis: values and their positions.
struct Axis {
    scale: Scale,
    /// Least and most, in the units of the scale.
    range: [f64; 2],
    places: [f64; 2],
}

impl Axis {
    fn new(scale: Scale, values: impl Iterator<Item = f64>, places: [f64; 2]) -> Self {
        let scaled = values.map(|value| scaled(scale, value));
        let (mut low, mut high) = scaled
            .fold((f64::INFINITY, f64::NEG_INFINITY), |range, value| {
                (range.0.min(value), range.1.max(value))
            });
        if scale == Scale::FromZero {
            (low, high) = (0.0, high.max(0.0));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        let room = match scale {
            Scale::FromZero if high == 0.0 => [0.0, 1.0],
            Scale::FromZero => [0.0, 0.04 * high],
            _ if high == low => [0.5; 2],
            _ => [0.0; 2],
        };
        Self {
            scale,
            range: [low - room[0], high + room[1]],
            places,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let [low, high] = self.range;
        let [first, last] = self.places;
        first + (scaled(self.scale, value) - low) / (high - low) * (last - first)
    }

    /// Values to mark, and their texts.
    fn ticks(&self) -> Vec<(f64, String)> {
        let [low, high] = self.range;
        let margin = 1e-9 * (high - low);
        match self.scale {
            Scale::Logarithmic => {
                let decades = low.floor() as i32..=high.ceil() as i32;
                let of = |digits: &'static [f64]| {
                    let all = decades.clone().flat_map(move |decade| {
                        digits.iter().map(move |digit| digit * 10f64.powi(decade))
                    });
                    let inside = all.filter(|value: &f64| {
                        (low - margin..=high + margin).contains(&value.log10())
                    });
                    inside
                        .map(|value| (value, plain(value)))
                        .collect::<Vec<_>>()
                };
                let (few, some) = (of(&[1.0]), of(&[1.0, 2.0, 5.0]));
                if few.len() >= 4 { few } else { some }
            }
            Scale::PowersOfTwo => {
                let [first, last] = [(low - margin).ceil() as i32, (high + margin).floor() as i32];
                let power = |exponent: i32| (2f64.powi(exponent), plain(2f64.powi(exponent)));
                (first..=last).map(power).collect()
            }
            Scale::Linear | Scale::FromZero => {
                let rough = (high - low) / 5.0;
                let power = 10f64.powf(rough.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
                let step = step.into_iter().find(|&step| step >= rough * 0.999);
                let step = step.unwrap_or(10.0 * power);
                let first = ((low - margin) / step).ceil() as i64;
                let last = ((high + margin) / step).floor() as i64;
                let decimals = (-step.log10().floor()).max(0.0) as usize;
                let tick = |count: i64| {
                    let value = count as f64 * step;
                    (value, format!("{value:.decimals$}"))
                };
                (first..=last).map(tick).collect()
            }
        }
    }
}

fn scaled(scale: Scale, value: f64) -> f64 {
    match scale {
        Scale::Logarithmic => value.log10(),
        Scale::PowersOfTwo => value.log2(),
        Scale::Linear | Scale::FromZero => value,
    }
}

/// A number of few digits: `0.02`, `500`, `2e-5`.
fn plain(value: f64) -> String {
    let rounded: f64 = format!("{value:.3e}").parse().unwrap_or(value);
    match rounded {
        _ if (1e-3..1e5).contains(&rounded) => format!("{rounded}"),
        _ => format!("{rounded:e}"),
    }
}

impl Panel {
    fn can_show(&self, x: f64, y: f64) -> bool {
        // Larger values overflow in the computation of positions.
        let fits = |value: f64, scale| match scale {
            Scale::Logarithmic | Scale::PowersOfTwo => value > 0.0 && value < 1e12,
            Scale::Linear | Scale::FromZero => value.abs() < 1e12,
        };
        fits(x, self.scales[0]) && fits(y, self.scales[1])
    }

    /// The points of a curve that have a place.
    fn shown(&self, curve: &Curve) -> Vec<(f64, f64)> {
        let points = curve.points.iter().copied();
        points.filter(|&(x, y)| self.can_show(x, y)).collect()
    }

    /// What the panel shows, in words.
    fn described(&self) -> String {
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

    fn draw(&self, top: f64, svg: &mut String) {
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

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
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
    fn points_stand_where_their_values_say() {
        let axis = |scale, values: &[f64]| Axis::new(scale, values.iter().copied(), [0.0, 100.0]);
        assert_eq!(axis(Scale::Linear, &[2.0, 4.0]).place(2.5), 25.0);
        // 4 % of room above the largest.
        assert_eq!(axis(Scale::FromZero, &[2.0, 4.0]).place(2.08), 50.0);
        assert_eq!(axis(Scale::PowersOfTwo, &[1.0, 16.0]).place(2.0), 25.0);
        let logarithmic = axis(Scale::Logarithmic, &[0.01, 100.0]);
        assert!((logarithmic.place(0.1) - 25.0).abs() < 1e-9);
        let texts = |axis: &Axis| -> Vec<String> {
            axis.ticks().into_iter().map(|(_, text)| text).collect()
        };
        assert_eq!(texts(&logarithmic), ["0.01", "0.1", "1", "10", "100"]);
        assert_eq!(
            texts(&axis(Scale::PowersOfTwo, &[1.0, 8.0])),
            ["1", "2", "4", "8"]
        );
        let narrow = axis(Scale::Logarithmic, &[0.15, 6.0]);
        assert_eq!(texts(&narrow), ["0.2", "0.5", "1", "2", "5"]);
        assert_eq!(
            texts(&axis(Scale::FromZero, &[0.4])),
            ["0.0", "0.1", "0.2", "0.3", "0.4"]
        );
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
        assert!(TEXT * 360.0 / WIDTH >= 14.0);
        let title = "The rate and the result by the number of shards";
        let wrapped = lines(title, 36);
        assert_eq!(wrapped.join(" "), title);
        assert!(wrapped.iter().all(|line| line.len() <= 36), "{wrapped:?}");
        let rates = [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2].map(|rate| (rate, rate));
        let narrow = curve("a name of twenty let", &rates);
        let scales = [Scale::Logarithmic, Scale::Linear];
        let svg = svg(title, &[panel(scales, vec![narrow])]);
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
            let svg = svg("a title", &[empty, full]);
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
