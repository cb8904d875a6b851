//! `config.json` of a Hugging Face checkpoint.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::Error;

/// How the frequencies of rotary embeddings are changed for long contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies are divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Context length of the pre-training.
        original_context: f64,
    },
}

/// Shape of a Llama-family decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
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
    /// A position attends to this many positions at most, itself included.
    pub sliding_window: Option<usize>,
    /// Tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// The keys of `config.json` that matter, as they stand in the file.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    eos_token_id: Option<OneOrMany>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// Decoders this example knows. Llama covers SmolLM2.
#[derive(Clone, Copy, PartialEq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
}

impl LlamaConfig {
    /// Reads `config.json`; `path` is for messages.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for JSON that cannot be read, a missing key, an architecture or a setting
    /// that is not supported, and shapes that do not fit together.
    pub fn from_json(json: &[u8], path: &Path) -> Result<Self, Error> {
        let raw: Raw = serde_json::from_slice(json)
            .map_err(|error| Error::field(path, "content", error.to_string()))?;
        let fail = |field: &str, reason: String| Error::field(path, field, reason);
        let family = family(&raw).map_err(|found| {
            let known = "supported are llama (Llama 2 and 3, SmolLM2), mistral and qwen2";
            fail("model_type", format!("{found}; {known}"))
        })?;
        if raw.quantization_config.is_some() {
            let reason = "quantized checkpoints are not supported".into();
            return Err(fail("quantization_config", reason));
        }
        if let Some(act) = raw.hidden_act.as_deref().filter(|&act| act != "silu") {
            return Err(fail(
                "hidden_act",
                format!("`{act}` is not supported, only `silu`"),
            ));
        }
        let sliding_window = match family {
            Family::Mistral => raw.sliding_window,
            Family::Qwen2 if raw.use_sliding_window == Some(true) => {
                return Err(fail(
                    "use_sliding_window",
                    "is not supported for qwen2".into(),
                ));
            }
            _ => None,
        };
        let (rope_theta, rope_scaling) = rope(&raw).map_err(|(key, reason)| fail(key, reason))?;
        let attention_bias = raw.attention_bias.unwrap_or(false);
        let config = Self {
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_layers: raw.num_hidden_layers,
            num_heads: raw.num_attention_heads,
            num_kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim: match raw.head_dim {
                Some(dim) => dim,
                None => raw.hidden_size / raw.num_attention_heads.max(1),
            },
            max_positions: raw.max_position_embeddings.unwrap_or(2048),
            rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tied: raw.tie_word_embeddings.unwrap_or(false),
            qkv_bias: family == Family::Qwen2 || (family == Family::Llama && attention_bias),
            o_bias: family == Family::Llama && attention_bias,
            mlp_bias: family == Family::Llama && raw.mlp_bias.unwrap_or(false),
            sliding_window,
            eos_tokens: match raw.eos_token_id {
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
                None => Vec::new(),
            },
        };
        config.check().map_err(|(key, reason)| fail(key, reason))?;
        Ok(config)
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
            if value == 0 || value > 1 << 24 {
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

/// The family, or a description of what was found instead.
fn family(raw: &Raw) -> Result<Family, String> {
    let architecture = raw.architectures.as_ref().and_then(|list| list.first());
    let name = match (&raw.model_type, architecture) {
        (Some(name), _) | (None, Some(name)) => name,
        (None, None) => return Err("is missing, and so is architectures".into()),
    };
    match name.as_str() {
        "llama" | "LlamaForCausalLM" => Ok(Family::Llama),
        "mistral" | "MistralForCausalLM" => Ok(Family::Mistral),
        "qwen2" | "Qwen2ForCausalLM" => Ok(Family::Qwen2),
        other => Err(format!("unknown architecture `{other}`")),
    }
}

/// Older files hold `rope_theta` and `rope_scaling`, those of transformers 5 `rope_parameters`.
fn rope(raw: &Raw) -> Result<(f64, RopeScaling), (&'static str, String)> {
    let (key, rope) = match (&raw.rope_parameters, &raw.rope_scaling) {
        (Some(rope), _) => ("rope_parameters", Some(rope)),
        (None, Some(rope)) => ("rope_scaling", Some(rope)),
        (None, None) => ("rope_scaling", None),
    };
    let theta = rope
        .and_then(|rope| rope.rope_theta)
        .or(raw.rope_theta)
        .unwrap_or(10_000.0);
    if !(theta.is_finite() && theta > 0.0) {
        return Err(("rope_theta", format!("is {theta}; it must be above 0")));
    }
    let Some(rope) = rope else {
        return Ok((theta, RopeScaling::Default));
    };
    if let Some(part) = rope.partial_rotary_factor.filter(|&part| part != 1.0) {
        return Err((
            key,
            format!("partial_rotary_factor {part} is not supported"),
        ));
    }
    let need = |name: &str, value: Option<f64>| match value {
        Some(value) if value.is_finite() && value > 0.0 => Ok(value),
        Some(value) => Err((key, format!("{name} is {value}; it must be above 0"))),
        None => Err((key, format!("{name} is missing"))),
    };
    let scaling = match rope.rope_type.as_deref().unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: need("factor", rope.factor)?,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor", rope.factor)?,
            low_freq_factor: need("low_freq_factor", rope.low_freq_factor)?,
            high_freq_factor: need("high_freq_factor", rope.high_freq_factor)?,
            original_context: need(
                "original_max_position_embeddings",
                rope.original_max_position_embeddings,
            )?,
        },
        other => {
            let reason = format!("rope_type `{other}` is not supported");
            return Err((key, reason));
        }
    };
    Ok((theta, scaling))
}
