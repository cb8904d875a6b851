//! What a table shows, in words, whichever way its numbers fall. Losses come first.

use super::judge::Judge;
use super::row::Row;
use super::search::Finding;
use super::statistics::Estimate;

/// A method that another is compared with.
#[derive(Clone, Debug)]
pub struct Rival {
    /// Its name.
    pub name: String,
    /// How much better the other is than it.
    pub difference: Estimate,
}

/// Why the findings about one task say nothing about methods, if so, given the gain of the untrained
/// model.
pub fn unfit(findings: &[&Finding], base: Option<f64>) -> Option<String> {
    let is_full = |finding: &&&Finding| finding.entry.row == Row::Full && finding.is_complete();
    let full = findings.iter().find(is_full)?;
    let judge = full.entry.task.judge();
    judge.why_unfit(base, Estimate::of(&full.gains()).mean)
}

/// Every form of HD-PiSSA with those that it is compared with, paired by seed: all methods that are
/// not HD-PiSSA, and the published form. Findings without results are left out.
pub fn compared<'a>(findings: &[&'a Finding]) -> Vec<(&'a Finding, Vec<Rival>)> {
    let complete = findings.iter().filter(|finding| finding.is_complete());
    let complete: Vec<&Finding> = complete.copied().collect();
    let subjects = complete
        .iter()
        .filter(|subject| subject.entry.row.is_hd_pissa());
    let with_rivals = subjects.map(|&subject| {
        let is_rival = |other: &&&Finding| {
            let is_published = other.entry.row == Row::Published;
            !other.entry.row.is_hd_pissa() || (is_published && subject.entry.row != Row::Published)
        };
        let rivals = complete.iter().filter(is_rival).map(|other| Rival {
            name: other.entry.title(),
            difference: Estimate::of_differences(&subject.gains(), &other.gains()),
        });
        (subject, rivals.collect())
    });
    with_rivals.collect()
}

/// How a method stands against others. A difference counts if its 95 % interval leaves out zero.
pub fn against(judge: Judge, subject: &str, rivals: &[Rival]) -> String {
    let part = |words: &str, counts: fn(Estimate) -> bool| {
        let named: Vec<String> = rivals
            .iter()
            .filter(|rival| counts(rival.difference))
            .map(|rival| {
                let difference = judge.difference(rival.difference);
                format!("{} ({difference})", rival.name)
            })
            .collect();
        (!named.is_empty()).then(|| format!("{words} {}", named.join(", ")))
    };
    let parts = [
        part("behind", Estimate::is_negative),
        part("no difference shown from", |difference| {
            !difference.is_negative() && !difference.is_positive()
        }),
        part("ahead of", Estimate::is_positive),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    format!("{subject}: {}", parts.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rival(name: &str, mean: f64, half_width: f64) -> Rival {
        let name = name.into();
        let difference = Estimate { mean, half_width };
        Rival { name, difference }
    }

    #[test]
    fn losses_come_first_and_a_draw_is_called_one() {
        let rivals = [
            rival("A", 0.2, 0.1),
            rival("B", -0.3, 0.25),
            rival("C", 0.05, 0.06),
            rival("D", -0.02, 0.1),
            rival("E", -0.5, 0.1),
        ];
        assert_eq!(
            against(Judge::Share, "X", &rivals),
            "X: behind B (-30.0 ± 25.0 points), E (-50.0 ± 10.0 points); no difference shown from C \
             (+5.0 ± 6.0 points), D (-2.0 ± 10.0 points); ahead of A (+20.0 ± 10.0 points)"
        );
        assert_eq!(
            against(Judge::Share, "X", &rivals[..1]),
            "X: ahead of A (+20.0 ± 10.0 points)"
        );
        assert_eq!(
            against(Judge::Share, "X", &rivals[1..2]),
            "X: behind B (-30.0 ± 25.0 points)"
        );
    }
}
