//! Every supported family against the logits of transformers, on tiny random checkpoints.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use llama_math::export::ExportConfig;
use llama_math::{Cache, Pretrained};
use safetensors::SafeTensors;

use common::{floats, integers, largest, largest_difference, tokens};

const FAMILIES: [&str; 13] = [
    "llama2",
    "llama3",
    "llama3_older_keys",
    "llama_biases",
    "llama_dynamic",
    "llama_yarn",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_yarn",
    "smollm2",
    "smollm3",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

#[test]
fn logits_are_those_of_transformers() {
    let device = Device::flex();
    for name in FAMILIES {
        let folder = fixture(name);
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (expected, shape) = floats(&file, "logits");
        let ids = integers(&file, "input_ids");
        let model = Pretrained::open(&folder).unwrap().load(&device).unwrap();
        let logits = model.forward(tokens(&ids, [shape[0], shape[1]], &device));
        let logits: Vec<f32> = logits.into_data().iter().collect();
        let error = largest_difference(&logits, &expected) / largest(&expected);
        println!("{name}: largest error {error:.1e} of the largest logit");
        assert!(error <= 1e-4, "{name}: {error:e}");

        // Fed in parts through the cache, the last logits are the same; where the frequencies depend on
        // the length, keys in the cache keep the ones from before, in transformers too.
        if name == "llama_dynamic" {
            continue;
        }
        let mut cache = Cache::default();
        let mut last = Vec::new();
        for part in [&ids[..6], &ids[6..7], &ids[7..12], &ids[12..]] {
            last = model
                .next_logits(tokens(part, [1, part.len()], &device), &mut cache)
                .into_data()
                .iter::<f32>()
                .collect();
        }
        assert_eq!(cache.len(), ids.len());
        let whole = &expected[(shape[1] - 1) * shape[2]..];
        let error = largest_difference(&last, whole) / largest(&expected);
        assert!(error <= 1e-4, "{name} through the cache: {error:e}");
    }
}

/// Name, dtype, shape and bytes of every tensor of a checkpoint.
fn contents(folder: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let files = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let weights = files.filter(|path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("model") && name.ends_with(".safetensors")
    });
    weights
        .flat_map(|path| {
            let bytes = std::fs::read(path).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let tensor = |(name, view): (&str, safetensors::tensor::TensorView)| {
                let content = (
                    format!("{:?}", view.dtype()),
                    view.shape().into(),
                    view.data().into(),
                );
                (name.to_string(), content)
            };
            file.iter().map(tensor).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn an_untrained_export_is_the_checkpoint_bit_for_bit() {
    for name in FAMILIES {
        let folder = fixture(name);
        let pretrained = Pretrained::open(&folder).unwrap();
        let model = pretrained.load(&Device::flex()).unwrap();
        let output = tempfile::tempdir().unwrap();
        pretrained
            .export(&model, output.path(), &ExportConfig::default())
            .unwrap();
        assert_eq!(contents(output.path()), contents(&folder), "{name}");
        let config = |folder: &Path| std::fs::read(folder.join("config.json")).unwrap();
        assert_eq!(config(output.path()), config(&folder), "{name}");
    }
}
