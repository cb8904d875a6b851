//! The operations that the model needs from a backend beyond Burn's own.

use burn::backend::{Backend, backend_extension, tensor::FloatTensor};

/// The keys that a query may see: those up to its own position, at most `window` of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Causal {
    /// Number of keys before the first query.
    pub start: usize,
    /// Number of consecutive queries; their rows repeat for every head.
    pub positions: usize,
    /// Largest number of keys, the query's own position included.
    pub window: Option<usize>,
}

impl Causal {
    /// The keys of a row of scores, of `keys` in all.
    pub fn keys_of(&self, row: usize, keys: usize) -> std::ops::Range<usize> {
        let end = (self.start + row % self.positions + 1).min(keys);
        let first = self.window.map_or(0, |window| end.saturating_sub(window));
        first..end
    }
}

/// Fused forms of several of Burn's operations, and their gradients. All tensors are `f32`.
///
/// Only backends that gain from them implement them; on others, the functions on tensors use Burn's
/// operations.
///
/// Backward passes keep inputs only, and compute the rest again. With Burn's gradient checkpointing, the results
/// of the norm and of the gate are computed again too, so that the projections that follow keep none of them.
#[backend_extension(Autodiff, Flex: cfg(feature = "flex"))]
pub trait LlamaOps: Backend {
    /// `softmax(scale · queries · keysᵀ) · values`, over the keys that a query may see.
    ///
    /// `queries: [batch, heads, rows, head_dim]`, `keys` and `values: [batch, heads, keys, head_dim]`; the
    /// result has the shape of the queries. Row `i` is the query at position `i % causal.positions`.
    fn llama_attention(
        queries: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        scale: f64,
        causal: Causal,
    ) -> FloatTensor<Self>;

    /// The gradients of queries, keys and values. Computes the weights of the forward pass again.
    fn llama_attention_backward(
        queries: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        scale: f64,
        causal: Causal,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// `gate · sigmoid(gate) · up`, all of one shape.
    fn llama_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;

    /// The gradients of `gate` and `up`.
    fn llama_swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `x / √(mean(x²) + epsilon) · gamma` for `x: [.., d]` and `gamma: [d]`.
    fn llama_rms_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;

    /// The gradients of `x` and `gamma`.
    fn llama_rms_norm_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// From `x: [batch, positions, heads · head_dim]` to `[batch, heads, positions, head_dim]`, each
    /// dimension `i` rotated with `i + head_dim / 2`, by the angles of its position:
    /// `cos, sin: [positions, head_dim / 2]`.
    fn llama_rotate_heads(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// The gradient of `x`: back to its shape, rotated the other way.
    fn llama_rotate_heads_backward(
        gradient: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// With `logits = hidden · weight`, `Σ_i log Σ_j exp(logits_ij) − logits_i,labels_i`, `[1]`, for
    /// `hidden: [rows, d]` and `weight: [d, vocabulary]`, a constant. The logits of all rows never exist at once.
    fn llama_head_loss(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        labels: Vec<u32>,
    ) -> FloatTensor<Self>;

    /// The same, and the gradient of `hidden`.
    fn llama_head_loss_with_gradient(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        labels: Vec<u32>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The first function for given logits, `[rows, vocabulary]`.
    fn llama_target_loss(logits: FloatTensor<Self>, labels: Vec<u32>) -> FloatTensor<Self>;

    /// The same, and the gradient of the logits: `softmax(logits) − one_hot(labels)`.
    fn llama_target_loss_with_gradient(
        logits: FloatTensor<Self>,
        labels: Vec<u32>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}
