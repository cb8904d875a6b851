//! No input makes a reader of this example panic or allocate beyond the size of its files.
//!
//! `HD_PISSA_FUZZ_INPUTS` says how many inputs each target reads.

#[path = "../../../tests/fuzz/mod.rs"]
mod fuzz;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use llama_math::data::read_records;
use llama_math::export::write_weights;
use llama_math::prompt::PromptTemplate;
use llama_math::tokenize::Tokens;
use llama_math::{Llama, LlamaConfig, Pretrained};
use safetensors::Dtype;
use serde_json::json;

use fuzz::fuzz;

/// A checkpoint of a few hundred values with the tokenizer of the embedded model, in memory where
/// there is a file system for that.
struct Target {
    folder: tempfile::TempDir,
}

impl Target {
    fn new() -> Self {
        let folder = tempfile::tempdir_in("/dev/shm");
        let folder = folder.unwrap_or_else(|_| tempfile::tempdir().unwrap());
        let target = Self { folder };
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(tiny.join(name), target.path(name)).unwrap();
        }
        let theirs = std::fs::read(tiny.join("config.json")).unwrap();
        let theirs: serde_json::Value = serde_json::from_slice(&theirs).unwrap();
        let config = json!({
            "model_type": "llama",
            "vocab_size": theirs["vocab_size"],
            "hidden_size": 4,
            "intermediate_size": 6,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 2,
            "max_position_embeddings": 16,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
            "tie_word_embeddings": true,
            "hidden_act": "silu",
            "eos_token_id": [1, 2],
        });
        let config = config.to_string();
        let parsed = LlamaConfig::from_json(config.as_bytes(), Path::new("config.json")).unwrap();
        let model = Llama::new(&parsed, &Device::flex());
        std::fs::write(target.path("config.json"), config).unwrap();
        // Both dtypes, as the norms of some checkpoints are f32.
        let dtype = |name: &str| match name.contains("norm") {
            true => Dtype::F32,
            false => Dtype::BF16,
        };
        write_weights(&model, dtype, &target.path("model.safetensors")).unwrap();
        target
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn content(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    fn size(&self) -> usize {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        entries
            .map(|entry| entry.unwrap().metadata().unwrap().len() as usize)
            .sum()
    }

    /// Opens the checkpoint with another content of one file and does `then` with it.
    fn fuzz(&self, name: &str, then: impl Fn(&Pretrained) -> Result<(), llama_math::Error>) {
        fuzz(name, &[self.content(name)], self.size(), |input| {
            std::fs::write(self.path(name), input).unwrap();
            Pretrained::open(self.folder.path())
                .and_then(|pretrained| then(&pretrained))
                .map_err(|error| error.to_string())
        });
    }
}

fn load(pretrained: &Pretrained) -> Result<(), llama_math::Error> {
    pretrained.load(&Device::flex()).map(drop)
}

#[test]
fn configuration() {
    Target::new().fuzz("config.json", |pretrained| {
        load(pretrained)?;
        Tokens::of(pretrained).map(drop)
    });
}

#[test]
fn weights() {
    Target::new().fuzz("model.safetensors", load);
}

#[test]
fn index_of_weights() {
    let target = Target::new();
    let weights = target.content("model.safetensors");
    let weights = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let names = weights.names().into_iter();
    let map: serde_json::Map<String, serde_json::Value> = names
        .map(|name| (name.into(), "model.safetensors".into()))
        .collect();
    let index = json!({"metadata": {"total_size": 5}, "weight_map": map});
    let name = "model.safetensors.index.json";
    std::fs::write(target.path(name), index.to_string()).unwrap();
    target.fuzz(name, load);
}

#[test]
fn tokenizer() {
    Target::new().fuzz("tokenizer.json", |pretrained| {
        let tokens = Tokens::of(pretrained)?;
        let ids = tokens.encode("Ada has 3 + 4 = 7 eggs.")?;
        tokens.decode(&ids).map(drop)
    });
}

#[test]
fn configuration_of_the_tokenizer() {
    Target::new().fuzz("tokenizer_config.json", |pretrained| {
        Tokens::of(pretrained).map(drop)
    });
}

#[test]
fn data() {
    let target = Target::new();
    let path = target.path("data");
    let corpus = [
        "{\"question\": \"Ada has 3 eggs.\", \"answer\": \"so\\n#### 3\"}\n\n{\"question\": \"x\", \
         \"answer\": \"\\u00e4\"}\n",
        "[{\"instruction\": \"a\", \"input\": \"b\", \"output\": \"c\"}, {\"instruction\": \"d\", \
         \"output\": \"1,000.5\"}]",
        "{\"query\": \"q\", \"response\": \"The answer is: 2\", \"type\": [1, {\"x\": null}]}",
    ];
    let corpus = corpus.map(|text| text.as_bytes().to_vec());
    let pretrained = Pretrained::open(target.folder.path()).unwrap();
    let tokens = Tokens::of(&pretrained).unwrap();
    fuzz("data", &corpus, target.size(), |input| {
        std::fs::write(&path, input).unwrap();
        let records = read_records(&path, None).map_err(|error| error.to_string())?;
        let sequences = tokens.sequences(&records, &PromptTemplate::default(), 32);
        sequences.map(drop).map_err(|error| error.to_string())
    });
}
