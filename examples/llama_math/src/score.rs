//! The final answer of a solution, as text that compares.

use std::sync::LazyLock;

use regex::{Captures, Regex};

/// A fraction of LaTeX, a tuple, or a number with an optional denominator. Commas separate thousands
/// only; a sign may stand before or behind a currency sign.
static ANSWER: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = r"(?x)
        (?P<outer> [-\u{2212}]? ) \\ [dt]? frac
            \{ \s* (?P<above> [-\u{2212}]? \d+ ) \s* \} \s* \{ \s* (?P<below> \d+ ) \s* \}
        | (?P<tuple> \( \s* [-\u{2212}]? \d+ (?: \.\d+ )?
            (?: \s* , \s* [-\u{2212}]? \d+ (?: \.\d+ )? )+ \s* \) )
        | (?P<first> [-\u{2212}]? ) \$? (?P<second> [-\u{2212}]? )
            (?P<number> \d+ (?: ,\d+ )* (?: \.\d+ )? | \.\d+ )
            (?: / (?P<denominator> \d+ ) )?";
    Regex::new(pattern).expect("the pattern is valid")
});

/// What marks the final answer in GSM8K.
const MARK: &str = "####";

/// The answer after the first `####` that has one behind it on its line, else the last answer of the
/// text. Numbers compare by value, fractions and tuples by their parts.
///
/// ```
/// use llama_math::score::final_answer;
///
/// assert_eq!(final_answer("3 + 4 = 7\n#### 1,007.0 eggs"), Some("1007".into()));
/// assert_ne!(final_answer(r"\frac{1}{2}"), final_answer(r"\frac{3}{2}"));
/// ```
pub fn final_answer(text: &str) -> Option<String> {
    let marked = text.split(MARK).skip(1).find_map(|behind| {
        let line = behind.lines().next().unwrap_or_default();
        answers(line).next()
    });
    marked.or_else(|| answers(text).last())
}

fn answers(text: &str) -> impl Iterator<Item = String> {
    ANSWER.captures_iter(text).flat_map(move |found| {
        let start = found.get(0).expect("the whole match").start();
        normalized(&found, text[..start].chars().next_back())
    })
}

/// One answer, or each part of what commas separate without making thousands.
fn normalized(found: &Captures<'_>, before: Option<char>) -> Vec<String> {
    let part = |name: &str| found.name(name).map_or("", |part| part.as_str());
    // After a number or a bracket it is a difference and no sign.
    let is_sign = !before.is_some_and(|c| c.is_alphanumeric() || c == ')');
    let is_minus = |text: &str| text.starts_with(['-', '\u{2212}']);
    if let Some(tuple) = found.name("tuple") {
        let parts = tuple.as_str().trim_matches(['(', ')']).split(',');
        let parts: Vec<String> = parts.map(|part| value(part.trim())).collect();
        return vec![format!("({})", parts.join(","))];
    }
    if found.name("above").is_some() {
        let above = part("above");
        let negative = (is_minus(part("outer")) && is_sign) != is_minus(above);
        let above = value(above.trim_start_matches(['-', '\u{2212}']));
        let sign = if negative { "-" } else { "" };
        return vec![format!("{sign}{above}/{}", value(part("below")))];
    }
    let negative = (is_minus(part("first")) && is_sign) || is_minus(part("second"));
    let sign = if negative { "-" } else { "" };
    let signed = |number: &str| match value(number) {
        zero if zero == "0" => zero,
        number => format!("{sign}{number}"),
    };
    let number = part("number");
    let whole = number.split('.').next().unwrap_or_default();
    let mut groups = whole.split(',');
    let first = groups.next().map_or(0, str::len);
    if whole.contains(',') && !(first <= 3 && groups.all(|group| group.len() == 3)) {
        let mut parts: Vec<String> = number.split(',').map(value).collect();
        parts[0] = signed(number.split(',').next().unwrap_or_default());
        return parts;
    }
    let number = signed(&number.replace(',', ""));
    vec![match found.name("denominator") {
        Some(below) => format!("{number}/{}", value(below.as_str())),
        None => number,
    }]
}

/// The shortest text of a number: `5` for `5.00`.
fn value(text: &str) -> String {
    let text = text.replace('\u{2212}', "-");
    match text.parse::<f64>() {
        Ok(number) => number.to_string(),
        Err(_) => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_found() {
        for (text, expected) in [
            ("so 3 + 4 = 7\n#### 7", Some("7")),
            ("#### 1,234,567 eggs of 12", Some("1234567")),
            ("She has 4 left, and 5.50 dollars.", Some("5.5")),
            ("It is 20.", Some("20")),
            ("#### -3", Some("-3")),
            ("10-4 = 6", Some("6")),
            ("from 10-4", Some("4")),
            ("(2)-4", Some("4")),
            ("#### $1,000.00", Some("1000")),
            ("#### -$5", Some("-5")),
            ("#### $-5", Some("-5")),
            ("#### \u{2212}5", Some("-5")),
            ("The answer is \\frac{1}{2}", Some("1/2")),
            ("The answer is $-\\dfrac{3}{2}$", Some("-3/2")),
            ("a share of 3/4", Some("3/4")),
            ("at (3, -4)", Some("(3,-4)")),
            ("34 or (3,4)", Some("(3,4)")),
            ("items 3,4", Some("4")),
            ("1,2345", Some("2345")),
            ("#### none\n#### 5\nand 6", Some("5")),
            ("5 eggs\n####", Some("5")),
            ("#### 0 or -0", Some("0")),
            ("####", None),
            ("none", None),
        ] {
            assert_eq!(final_answer(text).as_deref(), expected, "{text}");
        }
    }
}
