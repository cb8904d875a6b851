//! A pretrained model on data of the user's own.

mod finish;
mod held_out;
mod inputs;
mod options;
mod page;
mod report;
mod resume;
mod run;
mod settings;
mod template;
mod watch;

pub use options::{Change, FineTuning, Resume, SaveOptions, TemplateChoice, WatchOptions};
