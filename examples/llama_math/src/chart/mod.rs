//! Charts as SVG: panels below each other, curves with their names at their ends, and heat maps.
//!
//! Text stays readable on a narrow screen. Colours follow the reader's light or dark scheme. They
//! are those of Okabe and Ito, which people with a colour vision deficiency can distinguish.

mod axis;
mod heat;
mod panel;
mod style;

pub use axis::Scale;
pub use heat::HeatMap;
pub use panel::{Curve, Panel, Stroke};
pub use style::STYLE;

use panel::HEIGHT;
use style::{LEFT, TITLE, escaped, picture};

/// Height of the title above the panels.
const HEAD: f64 = 40.0;

/// The chart as the text of an SVG file.
pub fn svg(title: &str, panels: &[Panel]) -> String {
    let mut content = format!(
        "<text x=\"{LEFT}\" y=\"26\" font-size=\"{TITLE}\" font-weight=\"bold\">{}</text>\n",
        escaped(title)
    );
    for (index, panel) in panels.iter().enumerate() {
        panel.draw(HEAD + HEIGHT * index as f64, &mut content);
    }
    let height = HEAD + HEIGHT * panels.len() as f64;
    let style = format!("<style>\n{STYLE}</style>\n");
    picture(height, title, &style, &content)
}
