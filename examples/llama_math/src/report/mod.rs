//! A report of a run: one HTML file that needs nothing else, with pictures, tables and answers.

mod curves;
mod maps;
mod page;
mod sections;
mod warnings;

pub use curves::{Line, curves, ranks};
pub use maps::last_changes;
pub use page::{Answered, Figure, Question, REPORT, Report, Section, Table};
pub use sections::{change, configuration, machine};
pub use warnings::warnings;
