//! The findings, printed as they come, and the verdict.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::measure::panic_message;
use serde::Serialize;

use crate::case::Case;
use crate::comparison::{Compared, Difference};
use crate::environment::Environment;
use crate::speed::Speed;

/// The outcome of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Within,
    Beyond,
    /// A panic, as after a kernel that does not compile.
    Stopped,
    /// The device lacks a feature; this is not a failure.
    LeftOut,
}

/// One result of a case.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub case: Case,
    /// Name of the result in its case.
    pub what: String,
    pub outcome: Outcome,
    pub worst: Option<Difference>,
    /// The message of a panic, or the reason why the case was left out.
    pub message: Option<String>,
}

/// Changes a result before the comparison. Tests use it to damage a result.
pub type Spoil = Box<dyn Fn(&mut Compared)>;

/// All findings on one device.
#[derive(Serialize)]
pub struct Report {
    pub environment: Environment,
    pub rows: Vec<Row>,
    pub speeds: Vec<Speed>,
    #[serde(skip)]
    spoil: Option<Spoil>,
}

impl Report {
    /// Prints the environment. `spoil` is for tests.
    pub fn new(environment: Environment, spoil: Option<Spoil>) -> Self {
        println!("{environment}");
        Self {
            environment,
            rows: Vec::new(),
            speeds: Vec::new(),
            spoil,
        }
    }

    /// Compares the results of `work`. A panic in it counts as a result too.
    pub fn case(&mut self, case: Case, work: impl FnOnce() -> Vec<Compared>) {
        let compared = match catch_unwind(AssertUnwindSafe(work)) {
            Ok(compared) => compared,
            Err(panic) => {
                let message = panic_message(&*panic);
                return self.push(case, String::new(), Outcome::Stopped, None, Some(message));
            }
        };
        for mut compared in compared {
            if let Some(spoil) = &self.spoil {
                spoil(&mut compared);
            }
            let worst = compared.worst();
            let outcome = match worst.is_within() {
                true => Outcome::Within,
                false => Outcome::Beyond,
            };
            self.push(case.clone(), compared.what, outcome, Some(worst), None);
        }
    }

    pub fn left_out(&mut self, case: Case, reason: &str) {
        self.push(
            case,
            String::new(),
            Outcome::LeftOut,
            None,
            Some(reason.into()),
        );
    }

    pub fn speed(&mut self, speed: Speed) {
        println!("{speed}");
        self.speeds.push(speed);
    }

    fn push(
        &mut self,
        case: Case,
        what: String,
        outcome: Outcome,
        worst: Option<Difference>,
        message: Option<String>,
    ) {
        let row = Row {
            case,
            what,
            outcome,
            worst,
            message,
        };
        println!("{row}");
        self.rows.push(row);
    }

    pub fn count(&self, outcome: Outcome) -> usize {
        let rows = self.rows.iter();
        rows.filter(|row| row.outcome == outcome).count()
    }

    /// Whether something was compared, and everything is within its bound.
    pub fn passed(&self) -> bool {
        let [beyond, stopped] = [Outcome::Beyond, Outcome::Stopped].map(|o| self.count(o));
        beyond + stopped == 0 && self.count(Outcome::Within) > 0
    }

    /// One line.
    pub fn verdict(&self) -> String {
        let [within, beyond, stopped, left_out] = [
            Outcome::Within,
            Outcome::Beyond,
            Outcome::Stopped,
            Outcome::LeftOut,
        ]
        .map(|outcome| self.count(outcome));
        let verdict = if self.passed() { "PASSED" } else { "FAILED" };
        format!(
            "{verdict} on {}: {within} results within their bounds, {beyond} beyond, {stopped} cases \
             stopped, {left_out} left out",
            self.environment.hardware
        )
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Case {
            operation,
            dtype,
            sizes,
        } = &self.case;
        let outcome = match self.outcome {
            Outcome::Within => "ok",
            Outcome::Beyond => "WRONG",
            Outcome::Stopped => "STOPPED",
            Outcome::LeftOut => "left out",
        };
        write!(
            f,
            "{outcome:<9}{operation:<26}{dtype:<5}{sizes:<25}{:<22}",
            self.what
        )?;
        if let Some(worst) = &self.worst {
            write!(f, "{:9.2e} of {:.2e}", worst.difference, worst.bound)?;
            if self.outcome == Outcome::Beyond {
                let [row, column] = worst.place;
                write!(
                    f,
                    ": [{row}, {column}] is {:e}, not {:e}",
                    worst.found, worst.expected
                )?;
            }
        }
        match &self.message {
            Some(message) => write!(f, "{message}"),
            None => Ok(()),
        }
    }
}
