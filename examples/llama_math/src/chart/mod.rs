//! Charts as SVG: panels below each other, curves with their names at their ends, and heat maps.
//!
//! A page that includes a chart as SVG gives it its colour of text; a chart as a file follows the
//! reader's light or dark scheme. Colours of curves are those of Okabe and Ito, which people with a
//! colour vision deficiency can distinguish, and stand out on both. Text has 14 px on a phone of
//! 390 px. A description repeats in words what the chart shows.

mod axis;
mod heat;
mod panel;
mod style;

pub use axis::Scale;
pub use heat::HeatMap;
pub use panel::{Curve, Panel, Stroke};
pub use style::STYLE;

use std::fmt::Write;

use panel::HEIGHT;
use style::{TITLE, TITLE_LETTER, WIDTH, escaped, lines, picture};

/// The chart as the text of an SVG file.
pub fn svg(title: &str, panels: &[Panel]) -> String {
    let lines = lines(title, ((WIDTH - 8.0) / TITLE_LETTER) as usize);
    let head = 16.0 + 28.0 * lines.len() as f64;
    let mut content = String::new();
    for (index, line) in lines.iter().enumerate() {
        let _ = writeln!(
            content,
            "<text x=\"4\" y=\"{}\" font-size=\"{TITLE}\" font-weight=\"bold\">{}</text>",
            26.0 + 28.0 * index as f64,
            escaped(line)
        );
    }
    for (index, panel) in panels.iter().enumerate() {
        panel.draw(head + HEIGHT * index as f64, &mut content);
    }
    let height = head + HEIGHT * panels.len() as f64;
    let described: Vec<String> = panels.iter().map(Panel::described).collect();
    let style = format!("<style>\n{STYLE}</style>\n");
    picture(height, title, &described.join(" "), &style, &content)
}
