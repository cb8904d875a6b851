//! A Llama-family decoder, with every projection an [`HdPissaLinear`].
//!
//! Fields are named so that parameter paths are those of Hugging Face checkpoints.

use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Initializer, RmsNorm, RmsNormConfig};
use burn::tensor::module::linear;
use burn::tensor::{Device, Int, Tensor, TensorData};
use hd_pissa::{HdPissaLinear, HdPissaLinearConfig};

use crate::config::LlamaConfig;
use crate::ops::{Causal, attention_weights, rms_norm, rotate_heads, swiglu, target_loss};
use crate::rope::{Rotation, frequencies};

/// A decoder with its language-model head.
#[derive(Module, Debug)]
pub struct Llama {
    /// The decoder.
    pub model: Decoder,
    /// The head; `None` where it is the transposed embedding.
    pub lm_head: Option<HdPissaLinear>,
}

/// Embedding, layers and final norm.
#[derive(Module, Debug)]
pub struct Decoder {
    /// Token embedding, `[vocab_size, hidden_size]`.
    pub embed_tokens: Embedding,
    /// The layers in order.
    pub layers: Vec<Layer>,
    /// Norm before the head.
    pub norm: RmsNorm,
    #[module(skip)]
    frequencies: Vec<f64>,
    #[module(skip)]
    sliding_window: Option<usize>,
}

/// Attention and feed-forward, each behind a norm and added to the residual stream.
#[derive(Module, Debug)]
pub struct Layer {
    /// Norm before the attention.
    pub input_layernorm: RmsNorm,
    /// The attention.
    pub self_attn: Attention,
    /// Norm before the feed-forward part.
    pub post_attention_layernorm: RmsNorm,
    /// The feed-forward part.
    pub mlp: Mlp,
}

/// Grouped-query attention.
#[derive(Module, Debug)]
pub struct Attention {
    /// Queries, `[hidden, heads · head_dim]`.
    pub q_proj: HdPissaLinear,
    /// Keys, `[hidden, kv_heads · head_dim]`.
    pub k_proj: HdPissaLinear,
    /// Values, `[hidden, kv_heads · head_dim]`.
    pub v_proj: HdPissaLinear,
    /// Output, `[heads · head_dim, hidden]`.
    pub o_proj: HdPissaLinear,
    #[module(skip)]
    head_dim: usize,
}

/// SwiGLU.
#[derive(Module, Debug)]
pub struct Mlp {
    /// The gate, `[hidden, intermediate]`.
    pub gate_proj: HdPissaLinear,
    /// The gated values, `[hidden, intermediate]`.
    pub up_proj: HdPissaLinear,
    /// Back to the residual stream, `[intermediate, hidden]`.
    pub down_proj: HdPissaLinear,
}

/// Keys and values of the positions seen so far, per layer.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    layers: Vec<(Tensor<4>, Tensor<4>)>,
}

impl Cache {
    /// Number of positions held.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, |(keys, _)| keys.dims()[2])
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Llama {
    /// A model with random weights, drawn when first read: a pretrained one loads without drawing
    /// any.
    pub fn new(config: &LlamaConfig, device: &Device) -> Self {
        // The standard deviation that Llama's own training starts from.
        let initializer = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        let linear = |d_input, d_output, bias| {
            HdPissaLinearConfig::new(d_input, d_output)
                .with_bias(bias)
                .with_initializer(initializer.clone())
                .init(device)
        };
        let norm = || {
            RmsNormConfig::new(config.hidden_size)
                .with_epsilon(config.rms_norm_eps)
                .init(device)
        };
        let hidden = config.hidden_size;
        let queries = config.num_heads * config.head_dim;
        let keys = config.num_kv_heads * config.head_dim;
        let layer = |_| Layer {
            input_layernorm: norm(),
            self_attn: Attention {
                q_proj: linear(hidden, queries, config.qkv_bias),
                k_proj: linear(hidden, keys, config.qkv_bias),
                v_proj: linear(hidden, keys, config.qkv_bias),
                o_proj: linear(queries, hidden, config.o_bias),
                head_dim: config.head_dim,
            },
            post_attention_layernorm: norm(),
            mlp: Mlp {
                gate_proj: linear(hidden, config.intermediate_size, config.mlp_bias),
                up_proj: linear(hidden, config.intermediate_size, config.mlp_bias),
                down_proj: linear(config.intermediate_size, hidden, config.mlp_bias),
            },
        };
        Self {
            model: Decoder {
                embed_tokens: EmbeddingConfig::new(config.vocab_size, hidden)
                    .with_initializer(initializer.clone())
                    .init(device),
                layers: (0..config.num_layers).map(layer).collect(),
                norm: norm(),
                frequencies: frequencies(config),
                sliding_window: config.sliding_window,
            },
            lm_head: (!config.tied).then(|| linear(hidden, config.vocab_size, false)),
        }
    }

    /// Logits of every position: `[batch, positions]` to `[batch, positions, vocab_size]`.
    ///
    /// Right padding needs no mask: no real position attends to a later one.
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        self.logits(self.model.forward(tokens, None))
    }

    /// Logits after the last of `tokens`, `[batch, vocab_size]`; `tokens` follow those in `cache`
    /// and are added to it.
    pub fn next_logits(&self, tokens: Tensor<2, Int>, cache: &mut Cache) -> Tensor<2> {
        let hidden = self.model.forward(tokens, Some(cache));
        let last = hidden.dims()[1] - 1;
        self.logits(hidden.narrow(1, last, 1)).squeeze_dim(1)
    }

    /// Sum over `targets` of the negative log-likelihood, `[1]`.
    ///
    /// A target is a position of the flattened `tokens` and the token that follows there. The head
    /// is applied to those positions alone.
    pub fn target_loss(&self, tokens: Tensor<2, Int>, targets: &[(usize, u32)]) -> Tensor<1> {
        let device = tokens.device();
        let hidden = self.model.forward(tokens, None);
        let [batch, positions, width] = hidden.dims();
        let count = targets.len();
        let indices: Vec<i64> = targets.iter().map(|target| target.0 as i64).collect();
        let labels = targets.iter().map(|target| target.1).collect();
        let indices = Tensor::<1, Int>::from_data(TensorData::new(indices, [count]), &device);
        let hidden = hidden
            .reshape([batch * positions, width])
            .select(0, indices);
        target_loss(self.logits(hidden), labels)
    }

    fn logits<const D: usize>(&self, hidden: Tensor<D>) -> Tensor<D> {
        match &self.lm_head {
            Some(head) => head.forward(hidden),
            None => linear(
                hidden,
                self.model.embed_tokens.weight.val().transpose(),
                None,
            ),
        }
    }

    /// Every weight matrix with its path: the embedding, the projections and the head.
    pub fn matrices(&self) -> Vec<(String, &Param<Tensor<2>>)> {
        let mut matrices = vec![(
            "model.embed_tokens.weight".to_string(),
            &self.model.embed_tokens.weight,
        )];
        for (index, layer) in self.model.layers.iter().enumerate() {
            let (attention, mlp) = (&layer.self_attn, &layer.mlp);
            for (name, linear) in [
                ("self_attn.q_proj", &attention.q_proj),
                ("self_attn.k_proj", &attention.k_proj),
                ("self_attn.v_proj", &attention.v_proj),
                ("self_attn.o_proj", &attention.o_proj),
                ("mlp.gate_proj", &mlp.gate_proj),
                ("mlp.up_proj", &mlp.up_proj),
                ("mlp.down_proj", &mlp.down_proj),
            ] {
                matrices.push((
                    format!("model.layers.{index}.{name}.weight"),
                    &linear.weight,
                ));
            }
        }
        let head = self
            .lm_head
            .iter()
            .map(|head| ("lm_head.weight".to_string(), &head.weight));
        matrices.extend(head);
        matrices
    }

    /// The device of the parameters.
    pub fn device(&self) -> Device {
        Param::lazy_device(&self.model.embed_tokens.weight)
    }
}

impl Decoder {
    fn forward(&self, tokens: Tensor<2, Int>, mut cache: Option<&mut Cache>) -> Tensor<3> {
        let device = self.embed_tokens.weight.lazy_device();
        let positions = tokens.dims()[1];
        let start = cache.as_ref().map_or(0, |cache| cache.len());
        let rotation = Rotation::new(&self.frequencies, start, positions, &device);
        let causal = Causal {
            start,
            positions,
            window: self.sliding_window,
        };
        let mut x = self.embed_tokens.forward(tokens);
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&layer.input_layernorm, x.clone());
            let cache = cache.as_deref_mut().map(|cache| (cache, index));
            x = x + layer.self_attn.forward(normed, &rotation, causal, cache);
            let normed = rms_norm(&layer.post_attention_layernorm, x.clone());
            x = x + layer.mlp.forward(normed);
        }
        rms_norm(&self.norm, x)
    }
}

impl Attention {
    fn forward(
        &self,
        x: Tensor<3>,
        rotation: &Rotation,
        causal: Causal,
        cache: Option<(&mut Cache, usize)>,
    ) -> Tensor<3> {
        let [batch, positions, _] = x.dims();
        let queries = rotate_heads(self.q_proj.forward(x.clone()), rotation);
        let mut keys = rotate_heads(self.k_proj.forward(x.clone()), rotation);
        let values = self.v_proj.forward(x);
        let kv_heads = values.dims()[2] / self.head_dim;
        let values = values.reshape([batch, positions, kv_heads, self.head_dim]);
        let mut values = values.swap_dims(1, 2);
        if let Some((cache, layer)) = cache {
            match cache.layers.get_mut(layer) {
                Some((old_keys, old_values)) => {
                    keys = Tensor::cat(vec![old_keys.clone(), keys], 2);
                    values = Tensor::cat(vec![old_values.clone(), values], 2);
                    (*old_keys, *old_values) = (keys.clone(), values.clone());
                }
                None => cache.layers.push((keys.clone(), values.clone())),
            }
        }

        // The queries that share a key head stand below each other, so that no key is copied.
        let num_heads = queries.dims()[1];
        let group = num_heads / kv_heads;
        let queries = queries.reshape([batch, kv_heads, group * positions, self.head_dim]);
        let scores = queries.matmul(keys.transpose());
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let weights = attention_weights(scores, scale, causal);
        let mixed = weights
            .matmul(values)
            .reshape([batch, num_heads, positions, self.head_dim])
            .swap_dims(1, 2)
            .reshape([batch, positions, num_heads * self.head_dim]);
        self.o_proj.forward(mixed)
    }
}

impl Mlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.gate_proj.forward(x.clone());
        self.down_proj
            .forward(swiglu(gate, self.up_proj.forward(x)))
    }
}
