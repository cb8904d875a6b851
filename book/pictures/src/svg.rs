//! An SVG that follows the reader's theme: text and lines take the colour of the page around them.

use std::fmt::Write;

/// Colours of eight shards, from the palette of Okabe and Ito, which colour-blind readers can tell
/// apart.
pub const SHARD: [&str; 8] = [
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#808080",
];

/// A picture under construction. Lengths are in units of a canvas that is 480 wide; a phone shows
/// about 0.75 pixels for each.
pub struct Svg {
    width: u32,
    height: u32,
    title: &'static str,
    body: String,
}

/// Where a text sits on its point.
#[derive(Clone, Copy)]
pub enum Anchor {
    /// The text starts at the point.
    Start,
    /// The point is the text's middle.
    Middle,
    /// The text ends at the point.
    End,
}

impl Svg {
    /// An empty picture. `title` is what a screen reader says.
    pub fn new(height: u32, title: &'static str) -> Self {
        Self {
            width: 480,
            height,
            title,
            body: String::new(),
        }
    }

    /// A filled rectangle with the outline of the page's text.
    pub fn cell(&mut self, x: f32, y: f32, width: f32, height: f32, fill: &str, opacity: f32) {
        writeln!(
            self.body,
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{fill}" fill-opacity="{opacity}" stroke="currentColor"/>"#
        )
        .expect("writing to a string succeeds");
    }

    /// A line of text, 20 units high.
    pub fn text(&mut self, x: f32, y: f32, anchor: Anchor, text: &str) {
        self.styled(x, y, anchor, "", text);
    }

    /// A line of bold text.
    pub fn heading(&mut self, x: f32, y: f32, anchor: Anchor, text: &str) {
        self.styled(x, y, anchor, r#" font-weight="bold""#, text);
    }

    fn styled(&mut self, x: f32, y: f32, anchor: Anchor, style: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}"{style}>{text}</text>"#
        )
        .expect("writing to a string succeeds");
    }

    /// A line in the colour of the text.
    pub fn line(&mut self, from: (f32, f32), to: (f32, f32)) {
        self.curve(&[from, to], "currentColor", 1.5, "");
    }

    /// A broken line of a colour and a width.
    pub fn curve(&mut self, points: &[(f32, f32)], colour: &str, width: f32, dashes: &str) {
        let points: Vec<String> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        writeln!(
            self.body,
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"/>"#,
            points.join(" ")
        )
        .expect("writing to a string succeeds");
    }

    /// A line with a head at its end.
    pub fn arrow(&mut self, from: (f32, f32), to: (f32, f32)) {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let length = dx.hypot(dy);
        let (ux, uy) = (dx / length * 9.0, dy / length * 9.0);
        self.line(from, to);
        writeln!(
            self.body,
            r#"<polygon points="{:.1},{:.1} {:.1},{:.1} {:.1},{:.1}" fill="currentColor"/>"#,
            to.0,
            to.1,
            to.0 - ux - uy * 0.5,
            to.1 - uy + ux * 0.5,
            to.0 - ux + uy * 0.5,
            to.1 - uy - ux * 0.5,
        )
        .expect("writing to a string succeeds");
    }

    /// The file's text. As an image the picture follows the reader's light or dark setting; inside
    /// a page it takes the page's text colour.
    pub fn finish(self) -> String {
        let Self {
            width,
            height,
            title,
            body,
        } = self;
        format!(
            concat!(
                r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" "#,
                r#"role="img" aria-label="{title}" font-family="system-ui, sans-serif" "#,
                r#"font-size="20" fill="currentColor" style="max-width:{wide}px;width:100%">"#,
                "\n<style>svg:root{{color:#1f2328}}",
                "@media(prefers-color-scheme:dark){{svg:root{{color:#e6edf3}}}}</style>\n",
                "{body}</svg>\n"
            ),
            width = width,
            height = height,
            wide = width * 3 / 2,
            title = title,
            body = body,
        )
    }
}
