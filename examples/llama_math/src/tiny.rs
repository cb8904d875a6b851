//! The tiny model that is part of this example, and its prompt.

use crate::tokenize::PromptTemplate;

/// A short prompt for the generated problems.
pub fn template() -> PromptTemplate {
    PromptTemplate::new("Question:\n{instruction}\nAnswer:\n").expect("it has the place")
}
