//! The operations under autodiff: the backward passes of the adapter, and steps outside the graph.

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, TensorMetadata,
    tensor::{Device, FloatTensor, IntTensor},
};
use burn::tensor::{DType, Slice};
use burn_autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use super::contract::{factor_product, flatten, products, readable, transposed_factor_product};
use super::{HdPissaOps, ProductKernels, Rounding};

/// Backward of [`HdPissaOps::hd_pissa_linear`], parents `x`, `a`, `b`.
#[derive(Debug)]
struct AdapterLinear;

/// The values that the backward pass keeps from the forward pass. Each field is present only if a
/// requested gradient needs it.
#[derive(Clone, Debug)]
struct LinearState<B: Backend> {
    /// The node of `x`, `[.., d_input]`, for the gradient of `a`.
    x: Option<NodeId>,
    /// `[d_input, d_output]`, the dtype of `x`, for the gradient of `x`.
    w: Option<FloatTensor<B>>,
    /// `[rank, d_output]`, `f32`, for the gradient of `a`.
    b: Option<FloatTensor<B>>,
    /// `x · a`, `[tokens, rank]`, `f32`, for the gradient of `b`.
    p: Option<FloatTensor<B>>,
    scale: f64,
}

impl<B: HdPissaOps> Backward<B, 3> for AdapterLinear {
    type State = LinearState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let [node_x, node_a, node_b] = ops.parents;
        let state = ops.state;
        let g = grads.consume::<B>(&ops.node);
        let x = state
            .x
            .map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));

        let (w, b) = (
            state.w.map(B::float_transpose),
            state.b.map(B::float_transpose),
        );
        let (dx, q) = products::<B>(g.clone(), w, b);
        if let (Some(node), Some(x), Some(q)) = (node_a, x, q) {
            let q = scaled::<B>(q, state.scale);
            let x = B::float_transpose(readable::<B>(flatten::<B>(x)));
            grads.register::<B>(node.id, factor_product::<B>(x, q));
        }
        if let (Some(node), Some(p)) = (node_b, state.p) {
            let p = scaled::<B>(p, state.scale);
            let g = readable::<B>(flatten::<B>(g));
            grads.register::<B>(node.id, transposed_factor_product::<B>(p, g));
        }
        if let (Some(node), Some(dx)) = (node_x, dx) {
            grads.register::<B>(node.id, dx);
        }
    }
}

/// Backward of [`HdPissaOps::hd_pissa_weight`], parents `a`, `b`.
#[derive(Debug)]
struct AdapterWeight;

#[derive(Clone, Debug)]
struct WeightState<B: Backend> {
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    scale: f64,
}

impl<B: HdPissaOps> Backward<B, 2> for AdapterWeight {
    type State = WeightState<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node_a, node_b] = ops.parents;
        let WeightState { a, b, scale } = ops.state;
        let g = readable::<B>(grads.consume::<B>(&ops.node));
        if let Some(node) = node_a {
            let grad = factor_product::<B>(g.clone(), B::float_transpose(b));
            grads.register::<B>(node.id, scaled::<B>(grad, scale));
        }
        if let Some(node) = node_b {
            let grad = transposed_factor_product::<B>(a, g);
            grads.register::<B>(node.id, scaled::<B>(grad, scale));
        }
    }
}

/// Backward of [`HdPissaOps::hd_pissa_part`], parents `whole`, `part`.
#[derive(Debug)]
struct Part;

impl<B: HdPissaOps> Backward<B, 2> for Part {
    /// Dimension, first index and number of indices.
    type State = [usize; 3];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let g = grads.consume::<B>(&ops.node);
        let [node_whole, node_part] = ops.parents;
        if let Some(node) = node_part {
            let [dim, start, len] = ops.state;
            let mut slices: Vec<Slice> = g.shape().iter().map(|&n| Slice::from(0..n)).collect();
            slices[dim] = Slice::from(start..start + len);
            grads.register::<B>(node.id, B::float_slice(g.clone(), &slices));
        }
        if let Some(node) = node_whole {
            grads.register::<B>(node.id, g);
        }
    }
}

fn scaled<B: Backend>(x: FloatTensor<B>, scale: f64) -> FloatTensor<B> {
    if scale == 1.0 {
        x
    } else {
        B::float_mul_scalar(x, scale.into())
    }
}

impl<B: ProductKernels, C: CheckpointStrategy> ProductKernels for Autodiff<B, C> {
    fn has_factor_product(device: &Device<Self>, dtype: DType) -> bool {
        B::has_factor_product(device, dtype)
    }

    fn has_low_rank_product(device: &Device<Self>, dtype: DType) -> bool {
        B::has_low_rank_product(device, dtype)
    }
}

impl<B: HdPissaOps, C: CheckpointStrategy> HdPissaOps for Autodiff<B, C> {
    fn hd_pissa_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        let (x_tracked, a_tracked, b_tracked) = (x.is_tracked(), a.is_tracked(), b.is_tracked());
        match AdapterLinear
            .prepare::<C>([x.node(), a.node(), b.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let saved_x = a_tracked.then(|| prep.checkpoint(&x));
                let (x, w) = (x.into_primitive(), w.into_primitive());
                let (a, b) = (a.into_primitive(), b.into_primitive());
                let saved_w = x_tracked.then(|| w.clone());
                let (y, p) = products::<B>(x, Some(w), b_tracked.then_some(a));
                let state = LinearState {
                    x: saved_x,
                    w: saved_w,
                    b: a_tracked.then_some(b),
                    p,
                    scale,
                };
                prep.finish(state, y.expect("asked for"))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::hd_pissa_linear(
                x.into_primitive(),
                w.into_primitive(),
                a.into_primitive(),
                b.into_primitive(),
                scale,
            )),
        }
    }

    fn hd_pissa_weight(
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        match AdapterWeight
            .prepare::<C>([a.node(), b.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let state = WeightState {
                    a: a.into_primitive(),
                    b: b.into_primitive(),
                    scale,
                };
                prep.finish(state, w.into_primitive())
            }
            OpsKind::UnTracked(prep) => prep.finish(w.into_primitive()),
        }
    }

    fn hd_pissa_part(
        whole: FloatTensor<Self>,
        part: FloatTensor<Self>,
        dim: usize,
        start: usize,
    ) -> FloatTensor<Self> {
        let prepared = Part.prepare::<C>([whole.node(), part.node()]);
        let len = part.shape()[dim];
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish([dim, start, len], whole.into_primitive()),
            OpsKind::UnTracked(prep) => prep.finish(whole.into_primitive()),
        }
    }

    // The operations above call these on the backend below, inside their own forward and backward.
    fn hd_pissa_factor_product(x: FloatTensor<Self>, f: FloatTensor<Self>) -> FloatTensor<Self> {
        let (x, f) = (x.into_primitive(), f.into_primitive());
        Self::from_inner(B::hd_pissa_factor_product(x, f))
    }

    fn hd_pissa_low_rank_product(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        f: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (x, w, f) = (x.into_primitive(), w.into_primitive(), f.into_primitive());
        let (y, p) = B::hd_pissa_low_rank_product(x, w, f);
        (Self::from_inner(y), Self::from_inner(p))
    }

    // A step happens outside the graph, on tensors without autodiff. A tensor with autodiff counts
    // as a constant here.
    fn hd_pissa_merge(
        w: FloatTensor<Self>,
        frames: FloatTensor<Self>,
        deltas: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        rank: usize,
        rounding: Rounding,
        measure: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (w, squares) = B::hd_pissa_merge(
            w.into_primitive(),
            frames.into_primitive(),
            deltas.into_primitive(),
            gate.into_primitive(),
            rank,
            rounding,
            measure,
        );
        (Self::from_inner(w), Self::from_inner(squares))
    }

    fn hd_pissa_merge_compensated(
        w: FloatTensor<Self>,
        residual: IntTensor<Self>,
        frames: FloatTensor<Self>,
        deltas: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        rank: usize,
        measure: bool,
    ) -> (FloatTensor<Self>, IntTensor<Self>, FloatTensor<Self>) {
        let (w, residual, squares) = B::hd_pissa_merge_compensated(
            w.into_primitive(),
            residual,
            frames.into_primitive(),
            deltas.into_primitive(),
            gate.into_primitive(),
            rank,
            measure,
        );
        (Self::from_inner(w), residual, Self::from_inner(squares))
    }

    fn hd_pissa_row_statistics(x: FloatTensor<Self>, split: usize) -> FloatTensor<Self> {
        Self::from_inner(B::hd_pissa_row_statistics(x.into_primitive(), split))
    }

    fn hd_pissa_max_abs(w: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::hd_pissa_max_abs(w.into_primitive()))
    }

    fn hd_pissa_fingerprint(x: FloatTensor<Self>) -> IntTensor<Self> {
        B::hd_pissa_fingerprint(x.into_primitive())
    }

    fn hd_pissa_fingerprint_int(x: IntTensor<Self>) -> IntTensor<Self> {
        B::hd_pissa_fingerprint_int(x)
    }
}
