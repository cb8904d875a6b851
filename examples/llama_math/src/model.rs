//! A decoder of the Llama family or of one like it, with every projection an [`HdPissaLinear`].
//!
//! Fields are named so that parameter paths are those of Hugging Face checkpoints.

use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Initializer, RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use hd_pissa::{HdPissaAdapter, HdPissaLinear, HdPissaLinearConfig};

use crate::config::LlamaConfig;
use crate::ops::{Causal, attention, head_loss, rms_norm, rotate_heads, swiglu, target_loss};
use crate::rope::{Rope, Rotation};

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
    rope: Rope,
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
    /// Queries, `[hidden, heads · head_dim]`; `None` where they are fused.
    pub q_proj: Option<HdPissaLinear>,
    /// Keys, `[hidden, kv_heads · head_dim]`; `None` where they are fused.
    pub k_proj: Option<HdPissaLinear>,
    /// Values, `[hidden, kv_heads · head_dim]`; `None` where they are fused.
    pub v_proj: Option<HdPissaLinear>,
    /// Queries, keys and values beside each other, where they are fused.
    pub qkv_proj: Option<HdPissaLinear>,
    /// Output, `[heads · head_dim, hidden]`.
    pub o_proj: HdPissaLinear,
    /// Norm of each head of the queries, `[head_dim]`.
    pub q_norm: Option<RmsNorm>,
    /// Norm of each head of the keys, `[head_dim]`.
    pub k_norm: Option<RmsNorm>,
    #[module(skip)]
    shape: Heads,
}

/// Number and width of heads.
#[derive(Clone, Copy, Debug)]
struct Heads {
    queries: usize,
    keys: usize,
    dim: usize,
    /// Whether positions rotate queries and keys.
    is_rotary: bool,
}

/// SwiGLU.
#[derive(Module, Debug)]
pub struct Mlp {
    /// The gate, `[hidden, intermediate]`; `None` where it is fused.
    pub gate_proj: Option<HdPissaLinear>,
    /// The gated values, `[hidden, intermediate]`; `None` where they are fused.
    pub up_proj: Option<HdPissaLinear>,
    /// Gate and gated values beside each other, where they are fused.
    pub gate_up_proj: Option<HdPissaLinear>,
    /// Back to the residual stream, `[intermediate, hidden]`.
    pub down_proj: HdPissaLinear,
}

/// A sequence that is continued: the tokens that follow, and keys and values of those seen so far, per layer.
#[derive(Clone, Debug, Default)]
pub struct Continued {
    /// The tokens that the next pass takes.
    pub tokens: Vec<u32>,
    layers: Vec<(Tensor<4>, Tensor<4>)>,
}

impl Continued {
    /// A sequence that no pass has taken yet, with all of its tokens.
    pub fn new(tokens: Vec<u32>) -> Self {
        Self {
            tokens,
            layers: Vec::new(),
        }
    }

    /// Number of positions seen.
    fn len(&self) -> usize {
        self.layers.first().map_or(0, |(keys, _)| keys.dims()[2])
    }

    /// Keys and values of a layer with those that were there before, and keeps them.
    fn extended(&mut self, layer: usize, keys: Tensor<4>, values: Tensor<4>) -> [Tensor<4>; 2] {
        let [keys, values] = match self.layers.get(layer).cloned() {
            Some((old_keys, old_values)) => [
                Tensor::cat(vec![old_keys, keys], 2),
                Tensor::cat(vec![old_values, values], 2),
            ],
            None => [keys, values],
        };
        let held = (keys.clone(), values.clone());
        match self.layers.get_mut(layer) {
            Some(entry) => *entry = held,
            None => self.layers.push(held),
        }
        [keys, values]
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
        let norm_of = |width| {
            RmsNormConfig::new(width)
                .with_epsilon(config.rms_norm_eps)
                .init(device)
        };
        let norm = || norm_of(config.hidden_size);
        let head_norm = || config.qk_norm.then(|| norm_of(config.head_dim));
        let apart =
            |d_input, d_output, bias| (!config.is_fused).then(|| linear(d_input, d_output, bias));
        let fused = |d_input, d_output| config.is_fused.then(|| linear(d_input, d_output, false));
        let hidden = config.hidden_size;
        let queries = config.num_heads * config.head_dim;
        let keys = config.num_kv_heads * config.head_dim;
        let width = config.intermediate_size;
        let layer = |&is_rotary: &bool| Layer {
            input_layernorm: norm(),
            self_attn: Attention {
                q_proj: apart(hidden, queries, config.qkv_bias),
                k_proj: apart(hidden, keys, config.qkv_bias),
                v_proj: apart(hidden, keys, config.qkv_bias),
                qkv_proj: fused(hidden, queries + 2 * keys),
                o_proj: linear(queries, hidden, config.o_bias),
                q_norm: head_norm(),
                k_norm: head_norm(),
                shape: Heads {
                    queries: config.num_heads,
                    keys: config.num_kv_heads,
                    dim: config.head_dim,
                    is_rotary,
                },
            },
            post_attention_layernorm: norm(),
            mlp: Mlp {
                gate_proj: apart(hidden, width, config.mlp_bias),
                up_proj: apart(hidden, width, config.mlp_bias),
                gate_up_proj: fused(hidden, 2 * width),
                down_proj: linear(width, hidden, config.mlp_bias),
            },
        };
        Self {
            model: Decoder {
                embed_tokens: EmbeddingConfig::new(config.vocab_size, hidden)
                    .with_initializer(initializer.clone())
                    .init(device),
                layers: config.rotary.iter().map(layer).collect(),
                norm: norm(),
                rope: Rope::new(config),
                sliding_window: config.sliding_window,
            },
            lm_head: (!config.tied).then(|| linear(hidden, config.vocab_size, false)),
        }
    }

    /// Logits of every position: `[batch, positions]` to `[batch, positions, vocab_size]`.
    ///
    /// Right padding needs no mask: no real position attends to a later one.
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        self.logits(self.model.forward(tokens))
    }

    /// Logits after the last token of each sequence, `[sequences, vocab_size]`. The tokens of all sequences
    /// pass through the layers together, and are then part of what the sequences have seen.
    ///
    /// # Panics
    ///
    /// If there is no sequence, or one without a token.
    pub fn next_logits(&self, sequences: &mut [Continued]) -> Tensor<2> {
        let lengths: Vec<usize> = sequences.iter().map(|one| one.tokens.len()).collect();
        assert!(
            !lengths.is_empty() && !lengths.contains(&0),
            "each sequence has a token"
        );
        let device = self.device();
        let indices = |indices: Vec<i64>| {
            let count = indices.len();
            Tensor::<1, Int>::from_data(TensorData::new(indices, [count]), &device)
        };
        let tokens = sequences.iter_mut().flat_map(|one| one.tokens.drain(..));
        let tokens = indices(tokens.map(i64::from).collect()).unsqueeze();
        let hidden = self.model.forward_packed(tokens, &lengths, sequences);
        let ends = lengths.iter().scan(-1, |end, &length| {
            *end += length as i64;
            Some(*end)
        });
        self.logits(
            hidden
                .squeeze_dim::<2>(0)
                .select(0, indices(ends.collect())),
        )
    }

    /// Sum over `targets` of the negative log-likelihood, `[1]`.
    ///
    /// A target is a position of the flattened `tokens` and the token that follows there. The head
    /// is applied to those positions alone.
    pub fn target_loss(&self, tokens: Tensor<2, Int>, targets: &[(usize, u32)]) -> Tensor<1> {
        self.loss_after(self.model.forward(tokens), targets)
    }

    /// As [`target_loss`](Self::target_loss), of sequences of these lengths one after the other in
    /// `tokens: [1, positions]`. None attends to another, and each has positions from 0 on.
    pub fn packed_target_loss(
        &self,
        tokens: Tensor<2, Int>,
        lengths: &[usize],
        targets: &[(usize, u32)],
    ) -> Tensor<1> {
        self.loss_after(self.model.forward_packed(tokens, lengths, &mut []), targets)
    }

    fn loss_after(&self, hidden: Tensor<3>, targets: &[(usize, u32)]) -> Tensor<1> {
        let device = hidden.device();
        let [batch, positions, width] = hidden.dims();
        let count = targets.len();
        let indices: Vec<i64> = targets.iter().map(|target| target.0 as i64).collect();
        let labels = targets.iter().map(|target| target.1).collect();
        let indices = Tensor::<1, Int>::from_data(TensorData::new(indices, [count]), &device);
        let hidden = hidden
            .reshape([batch * positions, width])
            .select(0, indices);
        match self.plain_head() {
            Some(weight) => head_loss(hidden, weight, labels),
            None => target_loss(self.logits(hidden), labels),
        }
    }

    /// The weight of the head, `[hidden, vocabulary]`, if the head is nothing but its product.
    fn plain_head(&self) -> Option<Tensor<2>> {
        match &self.lm_head {
            None => Some(self.model.embed_tokens.weight.val().transpose()),
            Some(head) => {
                let adapter = head.weight.reparameterization::<HdPissaAdapter>();
                let is_plain = adapter.is_none() && head.bias.is_none();
                is_plain.then(|| head.weight.val())
            }
        }
    }

    fn logits<const D: usize>(&self, hidden: Tensor<D>) -> Tensor<D> {
        match &self.lm_head {
            Some(head) => head.forward(hidden),
            None => {
                // Of two dimensions: with more, Burn copies the transposed weight first.
                let mut dims = hidden.dims();
                let [vocabulary, width] = self.model.embed_tokens.weight.lazy_shape().dims();
                let rows = dims[..D - 1].iter().product();
                let weight = self.model.embed_tokens.weight.val().transpose();
                let logits = hidden.reshape([rows, width]).matmul(weight);
                dims[D - 1] = vocabulary;
                logits.reshape(dims)
            }
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
                ("self_attn.q_proj", attention.q_proj.as_ref()),
                ("self_attn.k_proj", attention.k_proj.as_ref()),
                ("self_attn.v_proj", attention.v_proj.as_ref()),
                ("self_attn.qkv_proj", attention.qkv_proj.as_ref()),
                ("self_attn.o_proj", Some(&attention.o_proj)),
                ("mlp.gate_proj", mlp.gate_proj.as_ref()),
                ("mlp.up_proj", mlp.up_proj.as_ref()),
                ("mlp.gate_up_proj", mlp.gate_up_proj.as_ref()),
                ("mlp.down_proj", Some(&mlp.down_proj)),
            ] {
                let path = format!("model.layers.{index}.{name}.weight");
                matrices.extend(linear.map(|linear| (path, &linear.weight)));
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
    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let device = self.embed_tokens.weight.lazy_device();
        let positions = tokens.dims()[1];
        let rotation = Rotation::new(&self.rope, std::iter::once(0..positions), &device);
        let causal = Causal {
            start: 0,
            positions,
            window: self.sliding_window,
        };
        self.through_layers(tokens, |_, attention, x| {
            let [queries, keys, values] = attention.heads(x, &rotation);
            attention.attend(queries, keys, values, causal)
        })
    }

    /// Of sequences of these lengths one after the other in one row. `continued` is empty, or has for each what
    /// comes before, and then also what this pass adds.
    fn forward_packed(
        &self,
        tokens: Tensor<2, Int>,
        lengths: &[usize],
        continued: &mut [Continued],
    ) -> Tensor<3> {
        let device = self.embed_tokens.weight.lazy_device();
        let seen: Vec<usize> = match continued {
            [] => vec![0; lengths.len()],
            _ => continued.iter().map(Continued::len).collect(),
        };
        let positions = seen.iter().zip(lengths);
        let positions = positions.map(|(&seen, &length)| seen..seen + length);
        let rotation = Rotation::new(&self.rope, positions, &device);
        self.through_layers(tokens, |layer, attention, x| {
            let [queries, keys, values] = attention.heads(x, &rotation);
            let mut start = 0;
            // One block of the diagonal after the other: nothing between sequences is computed.
            let of_sequence = |(index, &length): (usize, &usize)| {
                let part = |x: &Tensor<4>| x.clone().narrow(2, start, length);
                let (queries, mut keys, mut values) = (part(&queries), part(&keys), part(&values));
                start += length;
                if let Some(continued) = continued.get_mut(index) {
                    [keys, values] = continued.extended(layer, keys, values);
                }
                let causal = Causal {
                    start: seen[index],
                    positions: length,
                    window: self.sliding_window,
                };
                attention.attend(queries, keys, values, causal)
            };
            Tensor::cat(lengths.iter().enumerate().map(of_sequence).collect(), 1)
        })
    }

    /// `attend` mixes the positions of a layer: `[batch, positions, hidden]` to
    /// `[batch, positions, heads · head_dim]`.
    fn through_layers(
        &self,
        tokens: Tensor<2, Int>,
        mut attend: impl FnMut(usize, &Attention, Tensor<3>) -> Tensor<3>,
    ) -> Tensor<3> {
        let mut x = self.embed_tokens.forward(tokens);
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&layer.input_layernorm, x.clone());
            let mixed = attend(index, &layer.self_attn, normed);
            x = x + layer.self_attn.o_proj.forward(mixed);
            let normed = rms_norm(&layer.post_attention_layernorm, x.clone());
            x = x + layer.mlp.forward(normed);
        }
        rms_norm(&self.norm, x)
    }
}

impl Attention {
    /// Queries, keys and values in their places, `[batch, heads, positions, head_dim]`.
    fn heads(&self, x: Tensor<3>, rotation: &Rotation) -> [Tensor<4>; 3] {
        let [batch, positions, _] = x.dims();
        let Heads { dim, is_rotary, .. } = self.shape;
        let [queries, keys, values] = self.project(x);
        let heads = |x: Tensor<3>| {
            let count = x.dims()[2] / dim;
            x.reshape([batch, positions, count, dim]).swap_dims(1, 2)
        };
        let placed = |x: Tensor<3>| match is_rotary {
            true => rotate_heads(x, rotation),
            false => heads(x),
        };
        [
            placed(norm_heads(self.q_norm.as_ref(), queries, dim)),
            placed(norm_heads(self.k_norm.as_ref(), keys, dim)),
            heads(values),
        ]
    }

    /// The values that the queries look at, `[batch, positions, heads · head_dim]`.
    fn attend(
        &self,
        queries: Tensor<4>,
        keys: Tensor<4>,
        values: Tensor<4>,
        causal: Causal,
    ) -> Tensor<3> {
        let [batch, num_heads, positions, dim] = queries.dims();
        let kv_heads = self.shape.keys;
        // The queries that share a key head stand below each other, so that no key is copied.
        let group = num_heads / kv_heads;
        let queries = queries.reshape([batch, kv_heads, group * positions, dim]);
        let scale = 1.0 / (dim as f64).sqrt();
        attention(queries, keys, values, scale, causal)
            .reshape([batch, num_heads, positions, dim])
            .swap_dims(1, 2)
            .reshape([batch, positions, num_heads * dim])
    }

    /// Queries, keys and values, `[batch, positions, heads · head_dim]`.
    fn project(&self, x: Tensor<3>) -> [Tensor<3>; 3] {
        let Heads {
            queries, keys, dim, ..
        } = self.shape;
        match (&self.q_proj, &self.k_proj, &self.v_proj, &self.qkv_proj) {
            (Some(q), Some(k), Some(v), _) => {
                [q.forward(x.clone()), k.forward(x.clone()), v.forward(x)]
            }
            (.., Some(fused)) => parts(fused.forward(x), [queries * dim, keys * dim, keys * dim]),
            _ => unreachable!("projections are fused or apart"),
        }
    }
}

impl Mlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [gate, up] = match (&self.gate_proj, &self.up_proj, &self.gate_up_proj) {
            (Some(gate), Some(up), _) => [gate.forward(x.clone()), up.forward(x)],
            (.., Some(fused)) => {
                let both = fused.forward(x);
                let width = both.dims()[2] / 2;
                parts(both, [width, width])
            }
            _ => unreachable!("projections are fused or apart"),
        };
        self.down_proj.forward(swiglu(gate, up))
    }
}

/// What stands beside each other in the last dimension, of these widths.
fn parts<const N: usize>(x: Tensor<3>, widths: [usize; N]) -> [Tensor<3>; N] {
    let mut start = 0;
    widths.map(|width| {
        start += width;
        x.clone().narrow(2, start - width, width)
    })
}

/// Each head of `x: [batch, positions, heads · dim]` after its norm, if it has one.
fn norm_heads(norm: Option<&RmsNorm>, x: Tensor<3>, dim: usize) -> Tensor<3> {
    let Some(norm) = norm else {
        return x;
    };
    let [batch, positions, width] = x.dims();
    let heads = x.reshape([batch, positions * (width / dim), dim]);
    rms_norm(norm, heads).reshape([batch, positions, width])
}
