//! The tiny model that is part of this example, and its prompt.

use crate::prompt::PromptTemplate;
use crate::{Error, Pretrained};

/// The model that `pretrain` made.
///
/// # Errors
///
/// None for the files as committed.
pub fn pretrained() -> Result<Pretrained, Error> {
    Pretrained::embedded(
        "<embedded tiny model>",
        include_bytes!("../assets/tiny/model.safetensors"),
        &[
            ("config.json", include_bytes!("../assets/tiny/config.json")),
            (
                "tokenizer.json",
                include_bytes!("../assets/tiny/tokenizer.json"),
            ),
            (
                "tokenizer_config.json",
                include_bytes!("../assets/tiny/tokenizer_config.json"),
            ),
        ],
    )
}

/// A short prompt for the generated problems.
pub fn template() -> PromptTemplate {
    PromptTemplate::new("Question:\n{instruction}\nAnswer:\n").expect("it has the place")
}
