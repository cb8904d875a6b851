//! By what the methods are compared on a task, in numbers and in words.

use super::statistics::Estimate;

/// Less than this share of right answers is a failure, and so is no more than the base has.
const LEARNED: f64 = 0.1;

/// What says how well a method does on a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judge {
    /// The share of right answers, or of a planted change that was learned: more is better.
    Share,
    /// The mean loss per target token: less is better.
    Loss,
}

impl Judge {
    /// How well a model with this share and this loss does, where more is better: the share, or the
    /// negative loss.
    pub fn gain(self, share: f64, loss: f64) -> f64 {
        match self {
            Self::Share => share,
            Self::Loss => -loss,
        }
    }

    /// Why the gains on a task say nothing about methods, if so: the base model knows the answers, or
    /// full fine-tuning learns nothing.
    pub fn why_unfit(self, base: Option<f64>, full: f64) -> Option<String> {
        let is_no_better = base.is_some_and(|base| full <= base);
        match (self, base) {
            (Self::Share, Some(base)) if base > 0.5 => Some(format!(
                "the base model already has {:.1} % of the answers",
                100.0 * base
            )),
            (Self::Share, _) if full < LEARNED || is_no_better => Some(format!(
                "full fine-tuning has no more than {:.1} % of the answers",
                100.0 * full
            )),
            (Self::Loss, Some(base)) if is_no_better => Some(format!(
                "full fine-tuning does not lower the loss of the untrained model: {:.3}, from {:.3}",
                -full, -base
            )),
            _ => None,
        }
    }

    /// A difference of gains, without its unit.
    pub fn number(self, difference: Estimate) -> String {
        let Estimate { mean, half_width } = difference;
        match self {
            Self::Share => format!("{:+.1} ± {:.1}", 100.0 * mean, 100.0 * half_width),
            Self::Loss => format!("{mean:+.3} ± {half_width:.3}"),
        }
    }

    /// A difference of gains in words.
    pub fn difference(self, difference: Estimate) -> String {
        let Estimate { mean, half_width } = difference;
        match self {
            Self::Share => format!("{} points", self.number(difference)),
            Self::Loss => {
                let direction = if mean < 0.0 { "higher" } else { "lower" };
                format!("loss {:.3} ± {half_width:.3} {direction}", mean.abs())
            }
        }
    }

    /// The heading of a table of differences from others.
    pub fn heading(self) -> &'static str {
        match self {
            Self::Share => "difference from others, in points",
            Self::Loss => "by how much its loss is lower than that of others",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_is_known_or_not_learned_tells_nothing() {
        let why_unfit = |base, full| Judge::Share.why_unfit(Some(base), full);
        assert!(why_unfit(0.6, 0.9).unwrap().contains("base model"));
        assert!(why_unfit(0.02, 0.05).unwrap().contains("full fine-tuning"));
        assert!(why_unfit(0.3, 0.3).unwrap().contains("full fine-tuning"));
        assert_eq!(why_unfit(0.02, 0.5), None);
        assert_eq!(Judge::Share.why_unfit(None, 0.5), None);
    }

    #[test]
    fn a_loss_that_full_fine_tuning_does_not_lower_tells_nothing() {
        let why_unfit = |base: f64, full: f64| {
            let gain = |loss| Judge::Loss.gain(0.0, loss);
            Judge::Loss.why_unfit(Some(gain(base)), gain(full))
        };
        let reason = why_unfit(1.25, 1.3).unwrap();
        assert!(reason.contains("1.300, from 1.250"), "{reason}");
        assert!(why_unfit(1.25, 1.25).is_some());
        assert!(why_unfit(1.25, f64::INFINITY).is_some());
        assert_eq!(why_unfit(1.25, 1.2), None);
    }

    #[test]
    fn differences_have_the_digits_and_the_unit_of_what_is_compared() {
        let difference = Estimate {
            mean: -0.0123,
            half_width: 0.004,
        };
        assert_eq!(Judge::Share.difference(difference), "-1.2 ± 0.4 points");
        assert_eq!(Judge::Loss.number(difference), "-0.012 ± 0.004");
        assert_eq!(
            Judge::Loss.difference(difference),
            "loss 0.012 ± 0.004 higher"
        );
    }
}
