//! The record of a run: what each step did, and what was measured between steps.

mod lines;
mod measurement;
mod step;

pub(crate) use lines::Elapsed;
pub use lines::{History, MEASUREMENTS, METRICS, Record};
pub use measurement::{Change, LoggedAnswer, Measurement, Measures, Spectrum};
pub use step::StepMetrics;
