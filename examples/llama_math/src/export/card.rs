//! The page of an output, README.md: what it is, what loads it, and how it was made.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};

use hd_pissa::export::WeightChange;

use super::merged::{BASE_README, README, RUN_README};
use super::sums::SUMS;
use crate::Error;
use crate::machine::BURN;

/// What the page of an output says.
#[derive(Clone, Debug)]
pub struct Card {
    /// The folder of the output.
    pub(crate) folder: PathBuf,
    /// The folder of the pretrained model.
    pub(crate) base: PathBuf,
    /// Name of the training data, where it is known.
    pub(crate) data: Option<String>,
    /// What loads it.
    pub(crate) form: Form,
    /// Settings of the training, by option.
    pub(crate) settings: BTreeMap<String, String>,
    /// What was measured, a line for each.
    pub(crate) figures: Vec<String>,
    /// The changes of weights, where those are the output.
    pub(crate) layers: Vec<Layer>,
}

/// A weight's change in a LoRA adapter or a delta. Prints as a line.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    path: String,
    rank: usize,
    /// Relative to the change.
    pub(super) error: f64,
}

impl Layer {
    pub(super) fn of(change: &WeightChange) -> Self {
        Self {
            path: change.path().into(),
            rank: change.rank(),
            error: change.relative_error(),
        }
    }
}

impl Display for Layer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { path, rank, error } = self;
        write!(f, "{path}: rank {rank}, relative error {error:.2e}")
    }
}

/// The errors of all layers, as a line.
pub(super) fn errors(layers: &[Layer]) -> String {
    let smallest = layers.iter().map(|layer| layer.error);
    let smallest = smallest.fold(f64::INFINITY, f64::min);
    format!(
        "{} weights: relative error {smallest:.2e} to {:.2e}",
        layers.len(),
        worst(layers)
    )
}

/// The largest error.
pub(super) fn worst(layers: &[Layer]) -> f64 {
    layers.iter().map(|layer| layer.error).fold(0.0, f64::max)
}

/// What loads an output.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Form {
    /// A model.
    Merged,
    /// An adapter.
    Lora {
        /// The largest rank.
        rank: usize,
        /// Whether all layers have it.
        is_uniform: bool,
    },
    /// A delta.
    Delta,
}

impl Form {
    pub(super) fn lora(layers: &[Layer]) -> Self {
        let rank = layers.iter().map(|layer| layer.rank).max().unwrap_or(0);
        let is_uniform = layers.iter().all(|layer| layer.rank == rank);
        Self::Lora { rank, is_uniform }
    }

    /// What loads an output in `folder`, a line for each program.
    pub(super) fn usage(self, folder: &Path, base: &Path) -> Vec<String> {
        /// Ranks that vLLM takes.
        const RANKS: [usize; 8] = [8, 16, 32, 64, 128, 256, 320, 512];
        let (folder, name) = (quoted(&folder.display().to_string()), name_of(base));
        match self {
            Self::Merged => vec![
                format!("transformers: AutoModelForCausalLM.from_pretrained({folder})"),
                format!("vLLM: vllm serve {folder}"),
                format!("llama.cpp: python convert_hf_to_gguf.py {folder}"),
            ],
            Self::Lora { rank, is_uniform } => {
                let most = RANKS.into_iter().find(|&most| rank <= most);
                let name = quoted(&name);
                vec![
                    format!(
                        "transformers with PEFT: \
                         PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({name}), {folder})"
                    ),
                    match most {
                        Some(most) => format!(
                            "vLLM: vllm serve {name} --enable-lora --max-lora-rank {most} \
                             --lora-modules tuned={folder}"
                        ),
                        None => "vLLM: takes no rank above 512; export with --max-rank 256, or as merged".to_string(),
                    },
                    match is_uniform {
                        true => format!(
                            "llama.cpp: python convert_lora_to_gguf.py --base {} {folder}",
                            quoted(&base.display().to_string())
                        ),
                        false => {
                            "llama.cpp: not this one, because it takes one rank for all layers; \
                                  export with --rank"
                                .into()
                        }
                    },
                ]
            }
            Self::Delta => vec![format!(
                "no other program loads a delta; llama_math export {folder} --format merged --model {} \
                 --output MERGED makes a model of it",
                quoted(&base.display().to_string())
            )],
        }
    }
}

impl Card {
    /// Writes the page into a folder.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(README);
        std::fs::write(&path, self.text(folder)).map_err(Error::io(&path))
    }

    fn text(&self, folder: &Path) -> String {
        let name = self.folder.file_name().unwrap_or_default();
        let base = name_of(&self.base);
        let method = self.settings.get("--method").map_or("", String::as_str);
        let (what, library) = match self.form {
            Form::Merged => ("", "transformers"),
            Form::Lora { .. } => (" This is the change alone, as a LoRA adapter.", "peft"),
            Form::Delta => (" This is the change alone.", "llama_math"),
        };
        let method_link = match method {
            "hd-pissa" => "[HD-PiSSA](https://arxiv.org/abs/2505.18777)",
            other => other,
        };
        let data = self.data.as_ref();
        let on = data.map_or_else(String::new, |data| format!(" on `{data}`"));
        let mut text = format!(
            "---\nbase_model: {base}\nlibrary_name: {library}\ntags:\n- {method}\n---\n\n# {}\n\n`{base}`, \
             fine-tuned{on} with {method_link}.{what}\n\n## Use\n\n",
            name.to_string_lossy()
        );
        for line in self.form.usage(&self.folder, &self.base) {
            let (program, how) = line.split_once(": ").unwrap_or(("", &line));
            text += &match program {
                "" => format!("- {how}\n"),
                program => format!("- {program}: `{how}`\n"),
            };
        }
        text += "\n## Figures\n\n";
        for figure in &self.figures {
            text += &format!("- {figure}\n");
        }
        if !self.layers.is_empty() {
            text += "\n| weight | rank | relative error |\n|---|---|---|\n";
            for Layer { path, rank, error } in &self.layers {
                text += &format!("| `{path}` | {rank} | {error:.2e} |\n");
            }
            text += "\nThe relative error is `‖D − L·R‖ / ‖D‖` in the Frobenius norm, with the change `D` of \
                     the weight and the factors `L·R` that are written.\n";
        }
        text += "\n## Training\n\n| setting | value |\n|---|---|\n";
        for (setting, value) in &self.settings {
            text += &format!("| {setting} | {} |\n", value.replace('|', "\\|"));
        }
        text += &format!(
            "\nThe command that wrote this folder:\n\n```sh\n{}\n```\n\nVersions: llama_math {}, Burn \
             {BURN}.\n\n`sha256sum -c {SUMS}` compares the files with what was written; `llama_math \
             verify` does so too, and compares logits.\n",
            command(std::env::args()),
            env!("CARGO_PKG_VERSION"),
        );
        for (page, of_what) in [
            (RUN_README, "the run that trained it"),
            (BASE_README, "the pretrained model"),
        ] {
            if folder.join(page).exists() {
                text += &format!("\nThe page of {of_what} is [{page}]({page}).\n");
            }
        }
        text
    }
}

/// The name of a model on the Hub, if the folder is one of the Hub's cache; else the folder.
pub(crate) fn name_of(folder: &Path) -> String {
    let parts = folder.iter().map(|part| part.to_string_lossy());
    let cached = parts.filter_map(|part| Some(part.strip_prefix("models--")?.replace("--", "/")));
    let mut cached = cached.collect::<Vec<_>>();
    cached.pop().unwrap_or_else(|| folder.display().to_string())
}

/// A command line as a shell reads it.
pub(crate) fn command(arguments: impl Iterator<Item = String>) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./,=:+@%".contains(c);
    let word = |argument: String| match !argument.is_empty() && argument.chars().all(is_plain) {
        true => argument,
        false => format!("'{}'", argument.replace('\'', r"'\''")),
    };
    arguments.map(word).collect::<Vec<_>>().join(" ")
}

/// Text in double quotes, which shells and Python read alike.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        if matches!(c, '"' | '\\' | '$' | '`') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_can_be_pasted() {
        let words = [
            "llama_math",
            "--targets",
            "(q|k)_proj",
            "--fields",
            "it's",
            "",
        ];
        assert_eq!(
            command(words.map(String::from).into_iter()),
            r"llama_math --targets '(q|k)_proj' --fields 'it'\''s' ''"
        );
        assert_eq!(quoted(r#"a "b" $c"#), r#""a \"b\" \$c""#);
    }

    #[test]
    fn models_of_the_hub_have_their_name() {
        let cached = "/cache/hub/models--org--some-model/snapshots/0123";
        assert_eq!(name_of(Path::new(cached)), "org/some-model");
        assert_eq!(name_of(Path::new("models/mine")), "models/mine");
    }

    #[test]
    fn adapters_of_several_ranks_are_not_for_every_program() {
        let layer = |rank| Layer {
            path: "w".into(),
            rank,
            error: 0.0,
        };
        let usage = |ranks: &[usize]| {
            let layers: Vec<Layer> = ranks.iter().map(|&rank| layer(rank)).collect();
            Form::lora(&layers).usage(Path::new("out"), Path::new("base"))
        };
        let same = usage(&[24, 24]);
        assert!(same[1].contains("--max-lora-rank 32"), "{}", same[1]);
        assert!(same[2].contains(r#"--base "base" "out""#), "{}", same[2]);
        let several = usage(&[24, 600]);
        assert!(several[1].contains("no rank above 512"), "{}", several[1]);
        assert!(several[2].contains("not this one"), "{}", several[2]);
    }
}
