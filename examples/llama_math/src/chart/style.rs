//! What pictures have in common: sizes, colours, and how they write text and numbers.

/// Width of a picture.
pub(super) const WIDTH: f64 = 480.0;
/// The room on the left for numbers and names.
pub(super) const LEFT: f64 = 64.0;
/// Heights of text, and about the widths of their letters.
pub(super) const TITLE: f64 = 22.0;
pub(super) const TITLE_LETTER: f64 = 12.5;
pub(super) const TEXT: f64 = 19.0;
pub(super) const LETTER: f64 = 11.0;

/// The style of all pictures. A page that holds some has it once. Colours of curves are `c0`, `c1`, ...
pub const STYLE: &str = "\
svg.chart:root { color: #1b1b1b; background: #fff }
@media (prefers-color-scheme: dark) { svg.chart:root { color: #e8e8e8; background: #16181c } }
.chart .c0 { color: #0072b2 } .chart .c1 { color: #d55e00 } .chart .c2 { color: #009e73 }
.chart .c3 { color: #b08a00 } .chart .c4 { color: #cc79a7 } .chart .c5 { color: #808080 }
.chart .c6 { color: #3a8fc4 }
.chart .grid { stroke: currentColor; stroke-width: 1; opacity: 0.2 }
.chart .curve { fill: none; stroke: currentColor; stroke-width: 2.5; stroke-linejoin: round }
.chart .dashed { stroke-dasharray: 7 4 }
.chart .reference { fill: none; stroke: currentColor; stroke-width: 10; opacity: 0.25 }
.chart .dot, .chart .name, .chart .band, .chart .cell { fill: currentColor }
.chart .band { opacity: 0.2 }
.chart .leader { stroke: currentColor; stroke-width: 1; opacity: 0.6 }
.chart .on { fill: #fff }
";
/// Number of colours in [`STYLE`].
pub(super) const COLORS: usize = 7;

/// A picture of this height with `content`, and a description of it in words.
pub(super) fn picture(
    height: f64,
    title: &str,
    description: &str,
    style: &str,
    content: &str,
) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" style=\"max-width:100%;height:auto\" role=\"img\" \
         font-family=\"system-ui, sans-serif\" font-size=\"{TEXT}\" fill=\"currentColor\">\n\
         <title>{}</title>\n<desc>{}</desc>\n{style}{content}</svg>\n",
        escaped(title),
        escaped(description)
    )
}

/// The text in lines of at most so many letters, unless a word has more.
pub(super) fn lines(text: &str, most: usize) -> Vec<String> {
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

pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// A number of few digits: `0.02`, `500`, `2e-5`.
pub(super) fn plain(value: f64) -> String {
    let rounded: f64 = format!("{value:.3e}").parse().unwrap_or(value);
    match rounded {
        _ if (1e-3..1e5).contains(&rounded) => format!("{rounded}"),
        _ => format!("{rounded:e}"),
    }
}
