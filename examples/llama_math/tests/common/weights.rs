//! Weights of checkpoints, and a copy of the tiny model in bf16.

use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// A copy of the tiny model whose weights are bf16.
pub fn bf16_model(folder: &Path) {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
    std::fs::create_dir(folder).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tiny.join(name), folder.join(name)).unwrap();
    }
    let tensors = values(&tiny);
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape, values)| {
            let bytes = values
                .iter()
                .flat_map(|&value| bf16::from_f32(value).to_le_bytes());
            (name, shape, bytes.collect())
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (
            name,
            TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap(),
        )
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// Name, shape and values of every tensor, by name.
pub fn values(folder: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file
        .iter()
        .map(|(name, view)| {
            let data = view.data();
            let values: Vec<f32> = match view.dtype() {
                Dtype::F32 => data
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&b| f32::from_le_bytes(b))
                    .collect(),
                Dtype::F16 => {
                    let values = data.as_chunks().0.iter();
                    values.map(|&b| f16::from_le_bytes(b).to_f32()).collect()
                }
                Dtype::BF16 => {
                    let values = data.as_chunks().0.iter();
                    values.map(|&b| bf16::from_le_bytes(b).to_f32()).collect()
                }
                other => panic!("{other:?}"),
            };
            (name.to_string(), view.shape().to_vec(), values)
        })
        .collect();
    tensors.sort_by(|x, y| x.0.cmp(&y.0));
    tensors
}
