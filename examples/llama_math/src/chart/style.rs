//! What pictures have in common: sizes, colours, and how they write text and numbers.

/// Width of a picture.
pub(super) const WIDTH: f64 = 520.0;
/// The room on the left for numbers and names.
pub(super) const LEFT: f64 = 58.0;
/// Heights of text.
pub(super) const TITLE: f64 = 19.0;
pub(super) const TEXT: f64 = 15.0;

/// The style of all pictures. A page that holds some has it once.
///
/// Colours of curves are `c0`, `c1`, ...; the fourth is darker on a light background, where yellow is hard
/// to see.
pub const STYLE: &str = "\
svg { --ground: #fff; --ink: #1b1b1b; --grid: #ddd; --reference: #c8c8c8; color-scheme: light dark }
.c0 { --c: #0072b2 } .c1 { --c: #d55e00 } .c2 { --c: #009e73 } .c3 { --c: #b08a00 }
.c4 { --c: #cc79a7 } .c5 { --c: #555 } .c6 { --c: #3a8fc4 }
@media (prefers-color-scheme: dark) {
svg { --ground: #16181c; --ink: #e8e8e8; --grid: #3a3d42; --reference: #5a5d63 }
.c0 { --c: #56b4e9 } .c1 { --c: #ff8a3d } .c2 { --c: #2bd6a4 } .c3 { --c: #f0e442 }
.c4 { --c: #e7a3c8 } .c5 { --c: #bbb } .c6 { --c: #9ad0f5 }
}
.ground { fill: var(--ground) }
text { fill: var(--ink); font-family: system-ui, sans-serif }
.grid { stroke: var(--grid); stroke-width: 1 }
.curve { fill: none; stroke: var(--c); stroke-width: 2.5; stroke-linejoin: round }
.dashed { stroke-dasharray: 7 4 }
.reference { fill: none; stroke: var(--reference); stroke-width: 10 }
.dot, .name, .cell { fill: var(--c) }
.band { fill: var(--c); opacity: 0.2 }
.leader { stroke: var(--c); stroke-width: 1; opacity: 0.6 }
.on { fill: var(--ground) }
";
/// Number of colours in [`STYLE`].
pub(super) const COLORS: usize = 7;

/// A picture of this height with `content`.
pub(super) fn picture(height: f64, title: &str, style: &str, content: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         role=\"img\">\n<title>{}</title>\n{style}\
         <rect class=\"ground\" width=\"{WIDTH}\" height=\"{height}\"/>\n{content}</svg>\n",
        escaped(title)
    )
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
