//! The final answer of a solution, in a form that compares.

use std::sync::LazyLock;

use regex::Regex;

/// The mark of the final answer in GSM8K.
const MARK: &str = "####";

/// A number, with commas between thousands or other parts, and an optional denominator.
static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = r"^(\d+(?:,\d+)*(?:\.\d+)?|\.\d+)(?:/(\d+(?:\.\d+)?))?";
    Regex::new(pattern).expect("the pattern is valid")
});

/// The characters of a part of a tuple: no words.
static PART: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = r"^(?:[\s\d.+*/^{}()$-]|\u{2212}|\\[A-Za-z]+|\b[A-Za-z]\b)*$";
    Regex::new(pattern).expect("the pattern is valid")
});

/// The answer after the first `####` with an answer on its line, else the last answer of the text.
/// Numbers compare by value; fractions, roots, powers and tuples by their parts.
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
        answers(line).into_iter().next()
    });
    marked.or_else(|| answers(text).pop())
}

/// Every answer of a text, in order.
fn answers(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(first) = text[at..].chars().next() {
        at += match answer_at(text, at) {
            Some((answers, length)) => {
                found.extend(answers);
                length
            }
            None => first.len_utf8(),
        };
    }
    found
}

/// The answer that begins at a position, and its length.
fn answer_at(text: &str, at: usize) -> Option<(Vec<String>, usize)> {
    let rest = &text[at..];
    if rest.starts_with(['(', '[']) {
        let (answer, length) = tuple(rest)?;
        return Some((vec![answer], length));
    }
    if is_exponent(&text[..at]) {
        // It belongs to the text before it, such as a unit.
        let length = NUMBER.find(rest).map(|found| found.len())?;
        return Some((Vec::new(), length));
    }
    let term = |(answer, length)| (vec![signed(&text[..at], answer)], length);
    if let Some(found) = command(rest) {
        return Some(term(found));
    }
    let found = NUMBER.captures(rest)?;
    let (whole, number) = (found.get(0)?.len(), &found[1]);
    let behind = &rest[whole..];
    if let Some(below) = found.get(2) {
        let answer = format!(
            "{}/{}",
            value(&number.replace(',', "")),
            value(below.as_str())
        );
        return Some(term((answer, whole)));
    }
    // A coefficient, a mixed number, a power, a time of day.
    if let Some((factor, length)) = command(behind) {
        let sign = if behind.starts_with("\\sqrt") {
            ""
        } else {
            "+"
        };
        let answer = format!("{}{sign}{factor}", value(&number.replace(',', "")));
        return Some(term((answer, whole + length)));
    }
    if let Some((exponent, length)) = behind.strip_prefix('^').and_then(argument) {
        let answer = format!(
            "{}^{}",
            value(&number.replace(',', "")),
            expression(exponent)
        );
        return Some(term((answer, whole + 1 + length)));
    }
    if let Some(found) = behind.strip_prefix(':').and_then(|rest| NUMBER.find(rest)) {
        let answer = format!("{number}:{}", found.as_str());
        return Some(term((answer, whole + 1 + found.len())));
    }
    let mut groups = number.split('.').next().unwrap_or_default().split(',');
    let first = groups.next().map_or(0, str::len);
    let is_one = !number.contains(',') || (first <= 3 && groups.all(|group| group.len() == 3));
    if is_one {
        return Some(term((value(&number.replace(',', "")), whole)));
    }
    // Several, which commas separate.
    let mut answers: Vec<String> = number.split(',').map(value).collect();
    answers[0] = signed(&text[..at], answers[0].clone());
    Some((answers, whole))
}

/// `\frac` or `\sqrt` with its arguments, as text, and its length.
fn command(text: &str) -> Option<(String, usize)> {
    let name = text.strip_prefix('\\')?;
    let fraction = ["frac", "dfrac", "tfrac", "cfrac"]
        .into_iter()
        .find(|&f| name.starts_with(f));
    if let Some(fraction) = fraction {
        let start = 1 + fraction.len();
        let (above, first) = argument(&text[start..])?;
        let (below, second) = argument(&text[start + first..])?;
        let (mut sign, mut above) = ("", expression(above));
        // One place for the sign.
        if let Some(rest) = above.strip_prefix('-') {
            (sign, above) = ("-", rest.to_string());
        }
        let answer = format!("{sign}{above}/{}", expression(below));
        return Some((answer, start + first + second));
    }
    let under = name.strip_prefix("sqrt")?;
    let (under, length) = argument(under)?;
    Some((format!("sqrt({})", expression(under)), 5 + length))
}

/// The argument of a command (the text in braces, or one character), and its length.
fn argument(text: &str) -> Option<(&str, usize)> {
    let start = text.len() - text.trim_start_matches(' ').len();
    let rest = &text[start..];
    if !rest.starts_with('{') {
        let first = rest.chars().next().filter(|c| c.is_alphanumeric())?;
        return Some((&rest[..first.len_utf8()], start + first.len_utf8()));
    }
    let mut depth = 0;
    for (index, character) in rest.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some((&rest[1..index], start + index + 1));
        }
    }
    None
}

/// An expression without spaces, its numbers by value.
fn expression(text: &str) -> String {
    let text: String = text
        .chars()
        .filter(|c| !c.is_whitespace() && *c != '$')
        .collect();
    let mut result = String::new();
    let mut at = 0;
    while let Some(first) = text[at..].chars().next() {
        let (part, length) = if let Some(found) = command(&text[at..]) {
            found
        } else if let Some(found) = NUMBER.find(&text[at..]) {
            (
                found
                    .as_str()
                    .split('/')
                    .map(value)
                    .collect::<Vec<_>>()
                    .join("/"),
                found.len(),
            )
        } else {
            let minus = if first == '\u{2212}' { '-' } else { first };
            (minus.to_string(), first.len_utf8())
        };
        result += &part;
        at += length;
    }
    result
}

/// A pair, a point or an interval, and its length.
fn tuple(text: &str) -> Option<(String, usize)> {
    let (mut depth, mut parts, mut start) = (0, Vec::new(), 1);
    for (index, character) in text.char_indices() {
        match character {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            '\n' => return None,
            _ => {}
        }
        let is_end = depth == 0;
        if is_end || (depth == 1 && character == ',') {
            parts.push(&text[start..index]);
            start = index + 1;
        }
        if !is_end {
            continue;
        }
        let is_part =
            |part: &&str| PART.is_match(part) && part.contains(|c: char| c.is_ascii_digit());
        // No coordinate begins like this, but thousands do.
        let is_group = |part: &&str| part.len() == 3 && part.starts_with('0');
        if parts.len() < 2 || !parts.iter().all(is_part) || parts[1..].iter().any(is_group) {
            return None;
        }
        let parts: Vec<String> = parts.into_iter().map(expression).collect();
        let answer = format!("{}{}{character}", &text[..1], parts.join(","));
        return Some((answer, index + 1));
    }
    None
}

/// Whether an exponent or an index follows.
fn is_exponent(before: &str) -> bool {
    before.trim_end_matches('{').ends_with(['^', '_'])
}

/// Includes a sign before it, also before or after a currency sign.
fn signed(before: &str, answer: String) -> String {
    const SIGNS: [char; 2] = ['-', '\u{2212}'];
    const CURRENCIES: [char; 4] = ['$', '\u{20ac}', '\u{a3}', '\u{a5}'];
    let without = |text: &str| match text.strip_suffix(CURRENCIES) {
        Some(rest) => rest.strip_suffix('\\').unwrap_or(rest).to_string(),
        None => text.to_string(),
    };
    let minus = |text: &str| {
        let rest = text.strip_suffix(SIGNS)?;
        // After a number or a bracket it is a subtraction, not a sign.
        let before = without(rest).chars().next_back();
        let is_sign = !before.is_some_and(|c| c.is_alphanumeric() || [')', ']', '}'].contains(&c));
        is_sign.then_some(())
    };
    let is_negative = minus(before).or_else(|| minus(&without(before))).is_some();
    match (is_negative, answer.strip_prefix('-')) {
        (false, _) => answer,
        _ if answer == "0" => answer,
        (true, Some(positive)) => positive.into(),
        (true, None) => format!("-{answer}"),
    }
}

/// The shortest text of a number: `5` for `5.00`.
fn value(text: &str) -> String {
    match text.parse::<f64>() {
        Ok(number) => number.to_string(),
        Err(_) => text.into(),
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
            ("$(3, \u{2212}4)$", Some("(3,-4)")),
            ("34 or (3,4)", Some("(3,4)")),
            ("items 3,4", Some("4")),
            ("1,2345", Some("2345")),
            ("#### none\n#### 5\nand 6", Some("5")),
            ("5 eggs\n####", Some("5")),
            ("#### 0 or -0", Some("0")),
            ("it costs -\\$5.50", Some("-5.5")),
            ("a loss of \u{2212}\u{20ac}1,200", Some("-1200")),
            ("10 - 4", Some("4")),
            ("\\frac12", Some("1/2")),
            ("\\frac{ 1 }{ 2 }", Some("1/2")),
            ("\\frac{-1}{2}", Some("-1/2")),
            ("-\\frac{-1}{2}", Some("1/2")),
            ("\\frac{\\sqrt{3}}{2}", Some("sqrt(3)/2")),
            ("\\frac{10.0}{\\frac{1}{2}}", Some("10/1/2")),
            ("1\\frac{1}{2}", Some("1+1/2")),
            ("3\\sqrt{2}", Some("3sqrt(2)")),
            ("2^{10}", Some("2^10")),
            ("25 m^2", Some("25")),
            ("x_1 = 7, said x_2", Some("7")),
            ("at 3:30", Some("3:30")),
            ("(3,4)", Some("(3,4)")),
            ("the point (\\frac{1}{2}, -3.0)", Some("(1/2,-3)")),
            ("the interval [0, 1)", Some("[0,1)")),
            ("in all (1,000)", Some("1000")),
            ("sold (3 apples, 4 pears)", Some("4")),
            ("(34)", Some("34")),
            ("half (or 1/2)", Some("1/2")),
            ("####", None),
            ("none", None),
        ] {
            assert_eq!(final_answer(text).as_deref(), expected, "{text}");
        }
    }
}
