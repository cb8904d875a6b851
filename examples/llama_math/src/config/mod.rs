//! `config.json` of a pretrained model in the Hugging Face layout.

mod keys;
mod rope;

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, files};
use keys::{Fault, Keys};
pub use rope::RopeScaling;

/// Shape of a Llama-family decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// The family.
    pub family: Family,
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Number of query heads.
    pub num_heads: usize,
    /// Number of key and value heads.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Longest sequence the model was made for.
    pub max_positions: usize,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Whether q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection of the attention has a bias.
    pub o_bias: bool,
    /// Whether the feed-forward projections have a bias.
    pub mlp_bias: bool,
    /// Whether each head of queries and keys has a norm.
    pub qk_norm: bool,
    /// Whether q, k and v are one projection, and gate and up another.
    pub is_fused: bool,
    /// Whether heads are rotated, for each layer.
    pub rotary: Vec<bool>,
    /// A position attends to this many positions at most, itself included.
    pub sliding_window: Option<usize>,
    /// Tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// Larger sizes are mistakes.
const MOST: usize = 1 << 24;

/// Decoders this example knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen2.
    Qwen2,
    /// Qwen3.
    Qwen3,
    /// SmolLM3.
    SmolLm3,
    /// Phi-3.
    Phi3,
}

impl LlamaConfig {
    /// Reads `config.json`; `path` is for messages.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for JSON that cannot be read, a missing key, an architecture or a setting
    /// that is not supported, and shapes that do not fit together.
    pub fn from_json(json: &[u8], path: &Path) -> Result<Self, Error> {
        let text = files::as_text(json, path)?;
        let map: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| Error::field(path, "content", error.to_string()))?;
        let keys = Keys {
            map: &map,
            prefix: "",
        };
        Self::of(&keys).map_err(|(key, reason)| Error::field(path, key, reason))
    }

    fn of(keys: &Keys<'_>) -> Result<Self, Fault> {
        // First, so that nobody is told about the keys of a family that is not supported.
        let family = family(keys)?;
        let is_smollm3 = family == Family::SmolLm3;
        if keys
            .map
            .get("quantization_config")
            .is_some_and(|value| !value.is_null())
        {
            let reason = "quantized checkpoints are not supported";
            return Err(("quantization_config".into(), reason.into()));
        }
        let act: Option<String> = keys.get("hidden_act")?;
        if let Some(act) = act.filter(|act| act != "silu") {
            let reason = format!("`{act}` is not supported, only `silu`");
            return Err(("hidden_act".into(), reason));
        }
        let sliding_window = match family {
            Family::Mistral | Family::Phi3 => keys.get("sliding_window")?,
            Family::Qwen2 | Family::Qwen3 | Family::SmolLm3
                if keys.get("use_sliding_window")? == Some(true) =>
            {
                let reason = "is not supported for this architecture";
                return Err(("use_sliding_window".into(), reason.into()));
            }
            _ => None,
        };
        let max_positions = keys.get("max_position_embeddings")?.unwrap_or(2048);
        let default_theta = if is_smollm3 { 2_000_000.0 } else { 10_000.0 };
        let (rope_theta, rope_scaling) = rope::rope(keys, default_theta, max_positions)?;
        let has_o_bias = matches!(family, Family::Llama | Family::Qwen3 | Family::SmolLm3);
        let num_layers = keys.need("num_hidden_layers")?;
        let attention_bias = keys.get("attention_bias")?.unwrap_or(false);
        let hidden_size = keys.need("hidden_size")?;
        let num_heads: usize = keys.need("num_attention_heads")?;
        // Where a key is missing, what transformers takes for the family.
        let config = Self {
            family,
            vocab_size: keys.need("vocab_size")?,
            hidden_size,
            intermediate_size: keys.need("intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads: keys.get("num_key_value_heads")?.unwrap_or(match family {
                Family::SmolLm3 => 4,
                _ => num_heads,
            }),
            head_dim: match keys.get("head_dim")? {
                Some(dim) => dim,
                None if family == Family::Qwen3 => 128,
                None => hidden_size / num_heads.max(1),
            },
            max_positions,
            rms_norm_eps: keys.get("rms_norm_eps")?.unwrap_or(match family {
                Family::Phi3 => 1e-5,
                _ => 1e-6,
            }),
            rope_theta,
            rope_scaling,
            tied: keys.get("tie_word_embeddings")?.unwrap_or(is_smollm3),
            qkv_bias: family == Family::Qwen2 || (has_o_bias && attention_bias),
            o_bias: has_o_bias && attention_bias,
            mlp_bias: matches!(family, Family::Llama | Family::SmolLm3)
                && keys.get("mlp_bias")?.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            is_fused: family == Family::Phi3,
            rotary: rotary(keys, family, num_layers)?,
            sliding_window,
            eos_tokens: match keys.map.get("eos_token_id") {
                Some(Value::Array(_)) => keys.need("eos_token_id")?,
                _ => keys.get("eos_token_id")?.into_iter().collect(),
            },
        };
        let fault = |(key, reason): (&str, String)| (key.to_string(), reason);
        config.check().map_err(fault)?;
        Ok(config)
    }

    /// The longest sequence that the rotary embeddings are made for.
    pub fn longest(&self) -> usize {
        match self.rope_scaling {
            RopeScaling::Dynamic { factor } => (self.max_positions as f64 * factor) as usize,
            _ => self.max_positions,
        }
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        for (key, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_layers),
            ("num_attention_heads", self.num_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_positions),
        ] {
            if value == 0 || value > MOST {
                return Err((key, format!("is {value}; it must be from 1 to 2^24")));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let reason = format!(
                "is {}; it must divide num_attention_heads, {}",
                self.num_kv_heads, self.num_heads
            );
            return Err(("num_key_value_heads", reason));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(("head_dim", format!("is {}; it must be even", self.head_dim)));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            let reason = format!("is {}; it must be above 0", self.rms_norm_eps);
            return Err(("rms_norm_eps", reason));
        }
        if self.sliding_window == Some(0) {
            return Err(("sliding_window", "is 0; it must be at least 1".into()));
        }
        Ok(())
    }
}

fn family(keys: &Keys<'_>) -> Result<Family, Fault> {
    let architectures: Option<Vec<String>> = keys.get("architectures")?;
    let architecture = architectures.and_then(|list| list.into_iter().next());
    let found = match (keys.get("model_type")?, architecture) {
        (Some(name), _) | (None, Some(name)) => name,
        (None, None) => String::new(),
    };
    let found = match found.as_str() {
        "llama" | "LlamaForCausalLM" => return Ok(Family::Llama),
        "mistral" | "MistralForCausalLM" => return Ok(Family::Mistral),
        "qwen2" | "Qwen2ForCausalLM" => return Ok(Family::Qwen2),
        "qwen3" | "Qwen3ForCausalLM" => return Ok(Family::Qwen3),
        "smollm3" | "SmolLM3ForCausalLM" => return Ok(Family::SmolLm3),
        "phi3" | "Phi3ForCausalLM" => return Ok(Family::Phi3),
        "" => "is missing, and so is architectures".into(),
        other => format!("unsupported, unknown architecture `{other}`"),
    };
    let known =
        "supported are llama (Llama 2 and 3, SmolLM2), mistral, qwen2, qwen3, smollm3 and phi3";
    Err(("model_type".into(), format!("{found}; {known}")))
}

/// Which layers rotate heads: of SmolLM3 those that `no_rope_layers` marks with 1, else all but every
/// fourth, or as `no_rope_layer_interval` says.
fn rotary(keys: &Keys<'_>, family: Family, layers: usize) -> Result<Vec<bool>, Fault> {
    let layers = layers.min(MOST);
    if family != Family::SmolLm3 {
        return Ok(vec![true; layers]);
    }
    let key = "no_rope_layers";
    match keys.get::<Vec<u8>>(key)? {
        Some(marks) if marks.len() < layers => {
            let reason = format!("has {} entries for {layers} layers", marks.len());
            Err((key.into(), reason))
        }
        Some(marks) => Ok(marks[..layers].iter().map(|&mark| mark != 0).collect()),
        None => {
            let interval = keys
                .get("no_rope_layer_interval")?
                .unwrap_or(4_usize)
                .max(1);
            let layer = |index: usize| !(index + 1).is_multiple_of(interval);
            Ok((0..layers).map(layer).collect())
        }
    }
}
