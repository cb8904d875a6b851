//! What a report holds, and its HTML.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value};
use serde::Serialize;

use crate::chart::STYLE;
use crate::{Error, files};

/// Name of the file in an output.
pub const REPORT: &str = "report.html";

/// A page. All texts are shown as they are, whatever characters they hold.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The heading.
    pub title: String,
    /// A sentence below it.
    pub subtitle: String,
    /// What matters most.
    pub figures: Vec<Figure>,
    /// What may be wrong, a sentence each.
    pub warnings: Vec<String>,
    /// The parts.
    pub sections: Vec<Section>,
}

/// A number with its name.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What it is.
    pub name: String,
    /// The number.
    pub value: String,
    /// More about it; may be empty.
    pub note: String,
}

/// A part of a report.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Section {
    /// Name of the place in the page.
    pub id: String,
    /// The heading.
    pub heading: String,
    /// What is seen there.
    pub about: String,
    /// Pictures, as SVG of [`chart`](crate::chart).
    pub pictures: Vec<String>,
    /// Tables.
    pub tables: Vec<Table>,
    /// Questions with their answers.
    pub questions: Vec<Question>,
}

/// A table.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Table {
    /// What it shows, below it, or the name of a folded one; may be empty.
    pub caption: String,
    /// Names of the columns; where there are none, the first column names the rows.
    pub columns: Vec<String>,
    /// The rows.
    pub rows: Vec<Vec<String>>,
    /// Whether it is shown on request alone.
    pub is_folded: bool,
}

/// A question with answers.
#[derive(Clone, Debug, Serialize)]
pub struct Question {
    /// What was asked.
    pub prompt: String,
    /// The answer of the data; may be empty.
    pub reference: String,
    /// The answers.
    pub answers: Vec<Answered>,
}

/// An answer.
#[derive(Clone, Debug, Serialize)]
pub struct Answered {
    /// Who answered, or when.
    pub by: String,
    /// The text.
    pub text: String,
    /// Whether it is right, where that is known.
    pub correct: Option<bool>,
}

impl Report {
    /// The page as the text of an HTML file.
    pub fn html(&self) -> String {
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        let mut environment = Environment::new();
        environment.set_syntax(syntax.expect("only white space differs from the default"));
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        let template = environment.template_from_str(include_str!("page.jinja"));
        let context = minijinja::context! {
            report => Value::from(Serde(self)),
            css => Value::from_safe_string(include_str!("page.css").into()),
            chart_css => Value::from_safe_string(STYLE.into()),
            version => env!("CARGO_PKG_VERSION"),
        };
        let html = template.and_then(|template| template.render(context));
        html.expect("the template of the page is valid, and texts can be shown")
    }

    /// Writes the page into a folder. The file is complete or as it was before.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        files::replace(&folder.join(REPORT), self.html().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_from_outside_are_no_html() {
        const BAD: &str = "<script>alert(1)</script><img src=x onerror=\"f()\">&amp;'\"{{ 7 * 7 }}";
        let text = || BAD.to_string();
        let report = Report {
            title: text(),
            subtitle: text(),
            figures: vec![Figure {
                name: text(),
                value: text(),
                note: text(),
            }],
            warnings: vec![text()],
            sections: vec![Section {
                id: text(),
                heading: text(),
                about: text(),
                pictures: Vec::new(),
                tables: [true, false]
                    .map(|is_folded| Table {
                        caption: text(),
                        columns: vec![text()],
                        rows: vec![vec![text()]],
                        is_folded,
                    })
                    .into(),
                questions: vec![Question {
                    prompt: text(),
                    reference: text(),
                    answers: vec![Answered {
                        by: text(),
                        text: text(),
                        correct: Some(false),
                    }],
                }],
            }],
        };
        let html = report.html();
        assert!(
            !html.contains("<script") && !html.contains("<img"),
            "{html}"
        );
        assert!(!html.contains("49"), "{html}");
        // Every text is there, and the text of the title twice.
        let escaped = "&lt;script&gt;alert(1)";
        assert!(html.matches(escaped).count() >= 18, "{html}");
    }

    #[test]
    fn a_page_needs_nothing_else() {
        let html = Report::default().html();
        for part in [
            "http:", "https:", "src=", "@import", "url(", "<link", "<script",
        ] {
            assert!(!html.contains(part), "{part}");
        }
        assert!(html.contains("prefers-color-scheme: dark") && html.contains("@media print"));
    }
}
