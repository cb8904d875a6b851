//! A heat map: a number for each row and column, as a shade and as text.

use std::fmt::Write;

use super::style::{LEFT, LETTER, TEXT, WIDTH, escaped, picture, plain};

/// Around the cells.
const TOP: f64 = 52.0;
const BOTTOM: f64 = 104.0;
/// Height of a cell, and of its number.
const CELL: f64 = 30.0;
const NUMBER: f64 = 17.0;
/// The shade of the least value.
const FAINT: f64 = 0.12;

/// A table of numbers.
#[derive(Clone, Debug)]
pub struct HeatMap {
    /// Its title.
    pub title: String,
    /// What the numbers are.
    pub unit: String,
    /// The names of columns and rows.
    pub labels: [String; 2],
    /// The columns.
    pub columns: Vec<String>,
    /// The rows, each with a number for every column, where there is one.
    pub rows: Vec<(String, Vec<Option<f64>>)>,
}

impl HeatMap {
    /// The map as an element of a page that has [`STYLE`](super::STYLE). Every cell has a title with its
    /// row, column and number.
    pub fn inline(&self) -> String {
        let values = self.rows.iter().flat_map(|(_, row)| row).flatten();
        let values = values.copied().filter(|value| value.is_finite());
        let (least, most) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |range, value| {
            (range.0.min(value), range.1.max(value))
        });
        let shade = |value: f64| match least < most {
            true => FAINT + (1.0 - FAINT) * (value - least) / (most - least),
            false => FAINT,
        };
        let width = (WIDTH - LEFT - 4.0) / self.columns.len().max(1) as f64;
        let last = TOP + CELL * self.rows.len() as f64;
        let mut svg = String::new();
        let text = |x: f64, y: f64, size: f64, anchor: &str, bold: bool, text: &str| {
            let weight = if bold { " font-weight=\"bold\"" } else { "" };
            format!(
                "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\"{weight}>{}\
                 </text>\n",
                escaped(text)
            )
        };
        svg += &text(4.0, 18.0, TEXT, "start", true, &self.title);
        svg += &text(4.0, 44.0, TEXT, "start", false, &self.labels[1]);
        for (row, (name, values)) in self.rows.iter().enumerate() {
            let top = TOP + CELL * row as f64;
            svg += &text(LEFT - 7.0, top + 21.0, TEXT, "end", false, name);
            for (column, value) in values.iter().enumerate() {
                let Some(value) = value.filter(|value| value.is_finite()) else {
                    continue;
                };
                let left = LEFT + width * column as f64;
                let shade = shade(value);
                let number = short(value);
                let _ = write!(
                    svg,
                    "<g><title>{}</title><rect class=\"cell c0\" x=\"{:.1}\" y=\"{:.1}\" \
                     width=\"{:.1}\" height=\"{:.1}\" opacity=\"{shade:.2}\"/>",
                    escaped(&format!(
                        "{} {name}, {} {}: {} {}",
                        self.labels[1],
                        self.labels[0],
                        self.columns[column],
                        self.unit,
                        plain(value)
                    )),
                    left + 0.5,
                    top + 0.5,
                    width - 1.0,
                    CELL - 1.0
                );
                if width >= 10.0 * number.len() as f64 {
                    let _ = write!(
                        svg,
                        "<text{} x=\"{:.1}\" y=\"{:.1}\" font-size=\"{NUMBER}\" \
                         text-anchor=\"middle\">{number}</text>",
                        if shade > 0.55 { " class=\"on\"" } else { "" },
                        left + width / 2.0,
                        top + 20.5
                    );
                }
                svg += "</g>\n";
            }
        }
        let mut free = f64::NEG_INFINITY;
        for (column, name) in self.columns.iter().enumerate() {
            let middle = LEFT + width * (column as f64 + 0.5);
            let half = name.chars().count() as f64 * LETTER / 2.0;
            if middle - half < free {
                continue;
            }
            free = middle + half;
            svg += &text(middle, last + 22.0, TEXT, "middle", false, name);
        }
        let middle = (LEFT + WIDTH) / 2.0;
        svg += &text(middle, last + 46.0, TEXT, "middle", false, &self.labels[0]);
        // The shades, from the least to the largest.
        if least <= most {
            const STEPS: usize = 20;
            let (from, length) = (middle - 60.0, 120.0);
            for step in 0..STEPS {
                let share = step as f64 / (STEPS - 1) as f64;
                let _ = writeln!(
                    svg,
                    "<rect class=\"cell c0\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"12\" \
                     shape-rendering=\"crispEdges\" opacity=\"{:.2}\"/>",
                    from + length * step as f64 / STEPS as f64,
                    last + 70.0,
                    length / STEPS as f64,
                    shade(least + share * (most - least))
                );
            }
            let below = last + 82.0;
            svg += &text(from - 8.0, below, NUMBER, "end", false, &short(least));
            svg += &text(
                from + length + 8.0,
                below,
                NUMBER,
                "start",
                false,
                &short(most),
            );
        }
        let described = match least <= most {
            true => format!("{}: {} to {}.", self.unit, short(least), short(most)),
            false => String::new(),
        };
        picture(last + BOTTOM, &self.title, &described, "", &svg)
    }
}

/// A number of about three digits, for a cell.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if size >= 99.95 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.01 => format!("{value:.2}"),
        _ => format!("{value:.0e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(values: &[Option<f64>]) -> HeatMap {
        HeatMap {
            title: "ranks <of> layers".into(),
            unit: "rank".into(),
            labels: ["step".into(), "layer".into()],
            columns: values.iter().map(|_| "10".to_string()).collect(),
            rows: vec![("0".into(), values.to_vec())],
        }
    }

    #[test]
    fn cells_have_their_number_as_text_and_as_a_title() {
        let svg = map(&[Some(12.345), None, Some(f64::NAN), Some(120.0)]).inline();
        assert!(svg.contains("ranks &lt;of&gt; layers"), "{svg}");
        assert!(
            svg.contains("<title>layer 0, step 10: rank 12.35</title>"),
            "{svg}"
        );
        assert!(
            svg.contains(">12.3</text>") && svg.contains(">120</text>"),
            "{svg}"
        );
        // Two cells: what has no number has none.
        assert_eq!(svg.matches("<g>").count(), 2);
        assert!(!svg.contains("NaN"));
        // The darkest one is the largest.
        assert_eq!(svg.matches("class=\"on\"").count(), 1);
    }

    #[test]
    fn an_empty_map_and_one_of_zeros_are_pictures() {
        for values in [vec![], vec![Some(0.0); 3], vec![None]] {
            let svg = map(&values).inline();
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
