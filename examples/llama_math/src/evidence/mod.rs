//! Methods compared at learning rates that were searched for.
//!
//! [`row`] and [`task`] say what is compared on what, a [`trial`] is one training, and [`children`]
//! run many of them side by side. A [`judge`] says by what methods are compared. A [`search`] finds the rates and repeats the best on fresh seeds. A
//! [`sweep`] is one over the methods of the run without arguments: [`results`] writes down what it
//! found, and [`learning_rates`] are what it left in the repository. To [`reproduce`] everything
//! that the book tells is a list of searches; [`report`] writes the chapter.

pub mod children;
pub mod forgetting;
pub mod judge;
pub mod learning_rates;
pub mod planted;
pub mod rates;
pub mod report;
pub mod reproduce;
pub mod results;
pub mod row;
pub mod search;
pub mod statistics;
pub mod sweep;
pub mod task;
pub mod trial;
pub mod verdict;
