//! The pre-training of the tiny model whose weights are part of this example.

use std::collections::BTreeSet;
use std::path::Path;

use burn::tensor::Device;
use hd_pissa::{FrameScale, GradientMode, Windows};
use rand::SeedableRng;
use rand::rngs::StdRng;
use regex::Regex;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::batch::{MicroBatch, Sequence};
use crate::export::write_weights;
use crate::method::{Adaptation, Method, SvdOption};
use crate::output::Staged;
use crate::problems::{LARGEST, pretraining_text, problems};
use crate::progress::Progress;
use crate::schedule::{Decay, Schedule};
use crate::tokenize::Tokens;
use crate::train::{OptimizerSettings, Trainer};
use crate::{Error, Llama, Pretrained, device};

const UNKNOWN: &str = "<unk>";
const END: &str = "<end>";
/// Words and numbers with the space before them, line breaks, punctuation.
const PIECES: &str = r" ?[A-Za-z]+| ?\d+|\n| ?[^\sA-Za-z\d]+";

/// Settings of the pre-training.
#[derive(Clone, Copy, Debug)]
pub struct Pretraining {
    /// Seed of weights and texts.
    pub seed: u64,
    /// Steps.
    pub steps: usize,
    /// Texts per step.
    pub batch_size: usize,
    /// Largest learning rate.
    pub lr: f64,
}

impl Pretraining {
    /// Trains the tiny model from random weights and writes it.
    ///
    /// # Errors
    ///
    /// Those of the output and of the training.
    pub fn run(&self, device: &Device, output: &Path, overwrite: bool) -> Result<(), Error> {
        let staged = Staged::new(output, overwrite)?;
        let folder = staged.path();
        let write = |name: &str, value: &Value| {
            let path = folder.join(name);
            std::fs::write(&path, format!("{value:#}\n")).map_err(Error::io(path))
        };
        let tokenizer = tokenizer(self.seed);
        let vocab_size = tokenizer["model"]["vocab"].as_object().map_or(0, Map::len);
        write("tokenizer.json", &tokenizer)?;
        write("tokenizer_config.json", &tokenizer_config())?;
        write("config.json", &config(vocab_size))?;

        device.seed(self.seed);
        let device = device::training(device);
        let files = ["config.json", "tokenizer.json", "tokenizer_config.json"];
        let contents: Vec<Vec<u8>> = files
            .iter()
            .map(|name| std::fs::read(folder.join(name)).map_err(Error::io(folder.join(name))))
            .collect::<Result<_, _>>()?;
        let config = crate::LlamaConfig::from_json(&contents[0], &folder.join(files[0]))?;
        let model = Llama::new(&config, &device);
        write_weights(&model, |_| Dtype::F32, &folder.join("model.safetensors"))?;
        let tokens = Tokens::of(&Pretrained::open(folder)?)?;

        let everything = Adaptation {
            method: Method::Full,
            rank: 1,
            shards: 1,
            windows: Windows::Leading,
            frame_scale: FrameScale::Balanced,
            alpha: None,
            targets: None,
            gradients: GradientMode::PerShard,
            svd: SvdOption::Exact,
            svd_cache: None,
        };
        let settings = OptimizerSettings {
            clip: Some(1.0),
            ..OptimizerSettings::default()
        };
        let mut trainer = Trainer::new(model, &everything, settings)?;
        let schedule = Schedule::new(self.lr, Decay::Cosine, 0.05, self.steps);
        let mut rng = StdRng::seed_from_u64(self.seed);
        let template = crate::tiny::template();
        let progress = Progress::new("pre-training", self.steps);
        for step in 0..self.steps {
            let sequences: Vec<Sequence> = (0..self.batch_size)
                .map(|_| {
                    let text = format!("{}\n{END}", pretraining_text(&template, &mut rng));
                    Ok(Sequence::new(tokens.encode(&text)?, 0))
                })
                .collect::<Result<_, Error>>()?;
            let batch = MicroBatch::new(&sequences.iter().collect::<Vec<_>>());
            let report = trainer.step(step + 1, schedule.at(step), vec![vec![batch]])?;
            progress.step(report.loss, report.tokens);
        }
        progress.finish();
        // Half precision, which halves the file; fine-tuning reads it into f32.
        write_weights(
            trainer.model(),
            |_| Dtype::F16,
            &folder.join("model.safetensors"),
        )?;
        staged.commit()
    }
}

/// A tokenizer with one token for each word and number that the generators write.
fn tokenizer(seed: u64) -> Value {
    let pieces = Regex::new(PIECES).expect("the pattern is valid");
    let mut rng = StdRng::seed_from_u64(seed);
    let template = crate::tiny::template();
    let mut texts: Vec<String> = (0..4000)
        .map(|_| pretraining_text(&template, &mut rng))
        .collect();
    let (records, _) = problems(seed, 4000, 0);
    texts.extend(
        records
            .into_iter()
            .map(|record| template.text(&record) + &record.answer),
    );
    let mut vocabulary: BTreeSet<String> =
        (0..=LARGEST).map(|number| format!(" {number}")).collect();
    for text in &texts {
        vocabulary.extend(
            pieces
                .find_iter(text)
                .map(|piece| piece.as_str().to_string()),
        );
    }
    let ordered = [UNKNOWN, END]
        .map(String::from)
        .into_iter()
        .chain(vocabulary);
    let vocabulary: Map<String, Value> = ordered
        .enumerate()
        .map(|(id, piece)| (piece, id.into()))
        .collect();
    let special = |id: usize, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        })
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0, UNKNOWN), special(1, END)],
        "normalizer": null,
        "pre_tokenizer": {
            "type": "Split", "pattern": { "Regex": PIECES }, "behavior": "Isolated",
            "invert": false,
        },
        "post_processor": null,
        "decoder": { "type": "Fuse" },
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN },
    })
}

fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": false,
    })
}

/// The smallest side of a projection is 64: sixteen times the rank of the comparison.
fn config(vocab_size: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "torch_dtype": "float16",
    })
}
