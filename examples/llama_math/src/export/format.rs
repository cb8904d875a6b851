//! The forms of a trained model in files.

use std::fmt::{self, Display, Formatter};

use clap::ValueEnum;

/// The form of a trained model in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A model like the pretrained one, in any dtype, in several files if it is large
    Merged,
    /// A LoRA adapter for Python's PEFT, to be loaded on the pretrained model
    Lora,
    /// One small file from which --format merged rebuilds the model, given the pretrained one
    Delta,
}

impl Format {
    const ALL: [Self; 3] = [Self::Merged, Self::Lora, Self::Delta];

    pub(super) fn parse(name: &str) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|format| format.to_string() == name)
    }
}

impl Display for Format {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Merged => "merged",
            Self::Lora => "lora",
            Self::Delta => "delta",
        })
    }
}
