//! The operations under autodiff: each with its own backward pass.

use burn::backend::{Autodiff, Backend, tensor::FloatTensor};
use burn_autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use super::{Causal, LlamaOps};

/// Parent: the scores.
#[derive(Debug)]
struct AttentionWeights;

impl<B: LlamaOps> Backward<B, 1> for AttentionWeights {
    type State = (FloatTensor<B>, f64, Causal);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let (weights, scale, causal) = ops.state;
        if let [Some(scores)] = ops.parents {
            let gradient = B::llama_attention_weights_backward(weights, gradient, scale, causal);
            grads.register::<B>(scores.id, gradient);
        }
    }
}

/// Parents: gate and up.
#[derive(Debug)]
struct Swiglu;

impl<B: LlamaOps> Backward<B, 2> for Swiglu {
    type State = [FloatTensor<B>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let [gate, up] = ops.state;
        let (of_gate, of_up) = B::llama_swiglu_backward(gate, up, gradient);
        for (parent, gradient) in ops.parents.into_iter().zip([of_gate, of_up]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// Parents: `x` and `gamma`.
#[derive(Debug)]
struct RmsNorm;

impl<B: LlamaOps> Backward<B, 2> for RmsNorm {
    type State = ([FloatTensor<B>; 2], f64);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let ([x, gamma], epsilon) = ops.state;
        let (of_x, of_gamma) = B::llama_rms_norm_backward(x, gamma, gradient, epsilon);
        for (parent, gradient) in ops.parents.into_iter().zip([of_x, of_gamma]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// Parent: `x`. Cosines and sines are constants.
#[derive(Debug)]
struct RotateHeads;

impl<B: LlamaOps> Backward<B, 1> for RotateHeads {
    type State = [FloatTensor<B>; 2];

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let [cos, sin] = ops.state;
        if let [Some(x)] = ops.parents {
            let gradient = B::llama_rotate_heads_backward(gradient, cos, sin);
            grads.register::<B>(x.id, gradient);
        }
    }
}

/// Parent: the logits, whose gradient the forward pass has computed in their memory.
#[derive(Debug)]
struct TargetLoss;

impl<B: LlamaOps> Backward<B, 1> for TargetLoss {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        if let [Some(logits)] = ops.parents {
            let gradient = B::float_reshape(gradient, [1, 1].into());
            grads.register::<B>(logits.id, B::float_mul(ops.state, gradient));
        }
    }
}

impl<B: LlamaOps, C: CheckpointStrategy> LlamaOps for Autodiff<B, C> {
    fn llama_attention_weights(
        scores: FloatTensor<Self>,
        scale: f64,
        causal: Causal,
    ) -> FloatTensor<Self> {
        let prepared = AttentionWeights.prepare::<C>([scores.node()]);
        let weights = B::llama_attention_weights(scores.into_primitive(), scale, causal);
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((weights.clone(), scale, causal), weights),
            OpsKind::UnTracked(prep) => prep.finish(weights),
        }
    }

    fn llama_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let prepared = Swiglu.prepare::<C>([gate.node(), up.node()]);
        let [gate, up] = [gate, up].map(|x| x.into_primitive());
        let output = B::llama_swiglu(gate.clone(), up.clone());
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish([gate, up], output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn llama_rms_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let prepared = RmsNorm.prepare::<C>([x.node(), gamma.node()]);
        let [x, gamma] = [x, gamma].map(|x| x.into_primitive());
        let output = B::llama_rms_norm(x.clone(), gamma.clone(), epsilon);
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(([x, gamma], epsilon), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn llama_rotate_heads(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let prepared = RotateHeads.prepare::<C>([x.node()]);
        let [x, cos, sin] = [x, cos, sin].map(|x| x.into_primitive());
        let output = B::llama_rotate_heads(x, cos.clone(), sin.clone());
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish([cos, sin], output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn llama_target_loss(logits: FloatTensor<Self>, labels: Vec<u32>) -> FloatTensor<Self> {
        let prepared = TargetLoss.prepare::<C>([logits.node()]);
        let logits = logits.into_primitive();
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (loss, gradient) = B::llama_target_loss_with_gradient(logits, labels);
                prep.finish(gradient, loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::llama_target_loss(logits, labels)),
        }
    }

    // What backward passes call is called on the backend below.
    fn llama_attention_weights_backward(
        weights: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        scale: f64,
        causal: Causal,
    ) -> FloatTensor<Self> {
        let (weights, gradient) = (weights.into_primitive(), gradient.into_primitive());
        constant::<B, C>(B::llama_attention_weights_backward(
            weights, gradient, scale, causal,
        ))
    }

    fn llama_swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [gate, up, gradient] = [gate, up, gradient].map(|x| x.into_primitive());
        let (of_gate, of_up) = B::llama_swiglu_backward(gate, up, gradient);
        (constant::<B, C>(of_gate), constant::<B, C>(of_up))
    }

    fn llama_rms_norm_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [x, gamma, gradient] = [x, gamma, gradient].map(|x| x.into_primitive());
        let (of_x, of_gamma) = B::llama_rms_norm_backward(x, gamma, gradient, epsilon);
        (constant::<B, C>(of_x), constant::<B, C>(of_gamma))
    }

    fn llama_rotate_heads_backward(
        gradient: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [gradient, cos, sin] = [gradient, cos, sin].map(|x| x.into_primitive());
        constant::<B, C>(B::llama_rotate_heads_backward(gradient, cos, sin))
    }

    fn llama_target_loss_with_gradient(
        logits: FloatTensor<Self>,
        labels: Vec<u32>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (loss, gradient) = B::llama_target_loss_with_gradient(logits.into_primitive(), labels);
        (constant::<B, C>(loss), constant::<B, C>(gradient))
    }
}

fn constant<B: Backend, C: CheckpointStrategy>(x: FloatTensor<B>) -> FloatTensor<Autodiff<B, C>> {
    use burn::backend::AutodiffBackend;
    <Autodiff<B, C> as AutodiffBackend>::from_inner(x)
}
