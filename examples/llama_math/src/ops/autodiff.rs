//! The operations under autodiff: each with its own backward pass.

use burn::backend::{Autodiff, AutodiffBackend, Backend, tensor::FloatTensor};
use burn_autodiff::{
    NodeId,
    checkpoint::{
        base::Checkpointer, retro_forward::RetroForward, state::BackwardStates,
        strategy::CheckpointStrategy,
    },
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use super::{Causal, LlamaOps};

/// Parents: queries, keys and values.
#[derive(Debug)]
struct Attention;

impl<B: LlamaOps> Backward<B, 3> for Attention {
    type State = ([NodeId; 3], f64, Causal);

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let gradient = grads.consume::<B>(&ops.node);
        let (inputs, scale, causal) = ops.state;
        let [queries, keys, values] = inputs.map(|id| checkpointer.retrieve_node_output(id));
        let (of_queries, of_keys, of_values) =
            B::llama_attention_backward(queries, keys, values, gradient, scale, causal);
        let gradients = [of_queries, of_keys, of_values];
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// Parents: gate and up.
#[derive(Debug)]
struct Swiglu;

impl<B: LlamaOps> Backward<B, 2> for Swiglu {
    type State = [NodeId; 2];

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let gradient = grads.consume::<B>(&ops.node);
        let [gate, up] = ops.state.map(|id| checkpointer.retrieve_node_output(id));
        let (of_gate, of_up) = B::llama_swiglu_backward(gate, up, gradient);
        for (parent, gradient) in ops.parents.into_iter().zip([of_gate, of_up]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// The gated values once more, from gate and up.
#[derive(Debug)]
struct SwigluAgain<B> {
    inputs: [NodeId; 2],
    backend: std::marker::PhantomData<B>,
}

impl<B: LlamaOps> RetroForward for SwigluAgain<B> {
    fn forward(&self, states: &mut BackwardStates, node: NodeId) {
        let [gate, up] = self.inputs.map(|id| states.get_state(&id));
        states.save(node, B::llama_swiglu(gate, up));
    }
}

/// Parents: `x` and `gamma`.
#[derive(Debug)]
struct RmsNorm;

impl<B: LlamaOps> Backward<B, 2> for RmsNorm {
    type State = (NodeId, FloatTensor<B>, f64);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let gradient = grads.consume::<B>(&ops.node);
        let (x, gamma, epsilon) = ops.state;
        let x = checkpointer.retrieve_node_output(x);
        let (of_x, of_gamma) = B::llama_rms_norm_backward(x, gamma, gradient, epsilon);
        for (parent, gradient) in ops.parents.into_iter().zip([of_x, of_gamma]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// The norm once more, from `x` and a constant `gamma`.
#[derive(Debug)]
struct RmsNormAgain<B: Backend> {
    x: NodeId,
    gamma: FloatTensor<B>,
    epsilon: f64,
}

impl<B: LlamaOps> RetroForward for RmsNormAgain<B> {
    fn forward(&self, states: &mut BackwardStates, node: NodeId) {
        let x = states.get_state(&self.x);
        let output = B::llama_rms_norm(x, self.gamma.clone(), self.epsilon);
        states.save(node, output);
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

/// Parent: the input of a loss, whose gradient the forward pass has computed.
#[derive(Debug)]
struct Loss;

impl<B: LlamaOps> Backward<B, 1> for Loss {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        if let [Some(input)] = ops.parents {
            let gradient = B::float_reshape(gradient, [1, 1].into());
            grads.register::<B>(input.id, B::float_mul(ops.state, gradient));
        }
    }
}

impl<B: LlamaOps, C: CheckpointStrategy> LlamaOps for Autodiff<B, C> {
    fn llama_attention(
        queries: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        scale: f64,
        causal: Causal,
    ) -> FloatTensor<Self> {
        let inputs = [queries, keys, values];
        let prepared = Attention.prepare::<C>(inputs.each_ref().map(|x| x.node()));
        let output = |inputs: [FloatTensor<Self>; 3]| {
            let [queries, keys, values] = inputs.map(|x| x.into_primitive());
            B::llama_attention(queries, keys, values, scale, causal)
        };
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let saved = inputs.each_ref().map(|x| prep.checkpoint(x));
                prep.finish((saved, scale, causal), output(inputs))
            }
            OpsKind::UnTracked(prep) => prep.finish(output(inputs)),
        }
    }

    fn llama_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let inputs = [gate, up];
        let guards = inputs.each_ref().map(|x| x.node());
        let again = SwigluAgain::<B> {
            inputs: guards.each_ref().map(|guard| guard.id()),
            backend: std::marker::PhantomData,
        };
        let prepared = Swiglu.prepare::<C>(guards).memory_bound();
        let output = |inputs: [FloatTensor<Self>; 2]| {
            let [gate, up] = inputs.map(|x| x.into_primitive());
            B::llama_swiglu(gate, up)
        };
        match prepared.retro_forward(again).parents(&inputs).stateful() {
            OpsKind::Tracked(mut prep) => {
                let saved = inputs.each_ref().map(|x| prep.checkpoint(x));
                prep.finish(saved, output(inputs))
            }
            OpsKind::UnTracked(prep) => prep.finish(output(inputs)),
        }
    }

    fn llama_rms_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let guards = [x.node(), gamma.node()];
        let (x_id, has_constant_gamma) = (guards[0].id(), !gamma.is_tracked());
        let gamma = gamma.into_primitive();
        let prepared = RmsNorm.prepare::<C>(guards);
        // A recomputed node takes its inputs from its parents: `gamma` is one only if it is trained.
        let prepared = match has_constant_gamma {
            true => {
                let again = RmsNormAgain::<B> {
                    x: x_id,
                    gamma: gamma.clone(),
                    epsilon,
                };
                prepared.memory_bound().retro_forward(again).parents([&x])
            }
            false => prepared.compute_bound(),
        };
        match prepared.stateful() {
            OpsKind::Tracked(mut prep) => {
                let saved = prep.checkpoint(&x);
                let output = B::llama_rms_norm(x.into_primitive(), gamma.clone(), epsilon);
                prep.finish((saved, gamma, epsilon), output)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::llama_rms_norm(x.into_primitive(), gamma, epsilon))
            }
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

    fn llama_head_loss(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        labels: Vec<u32>,
    ) -> FloatTensor<Self> {
        let prepared = Loss.prepare::<C>([hidden.node()]);
        let [hidden, weight] = [hidden, weight].map(|x| x.into_primitive());
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (loss, gradient) = B::llama_head_loss_with_gradient(hidden, weight, labels);
                prep.finish(gradient, loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::llama_head_loss(hidden, weight, labels)),
        }
    }

    fn llama_target_loss(logits: FloatTensor<Self>, labels: Vec<u32>) -> FloatTensor<Self> {
        let prepared = Loss.prepare::<C>([logits.node()]);
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
    fn llama_attention_backward(
        queries: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        scale: f64,
        causal: Causal,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [queries, keys, values, gradient] =
            [queries, keys, values, gradient].map(|x| x.into_primitive());
        let (of_queries, of_keys, of_values) =
            B::llama_attention_backward(queries, keys, values, gradient, scale, causal);
        (
            Self::from_inner(of_queries),
            Self::from_inner(of_keys),
            Self::from_inner(of_values),
        )
    }

    fn llama_swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [gate, up, gradient] = [gate, up, gradient].map(|x| x.into_primitive());
        let (of_gate, of_up) = B::llama_swiglu_backward(gate, up, gradient);
        (Self::from_inner(of_gate), Self::from_inner(of_up))
    }

    fn llama_rms_norm_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [x, gamma, gradient] = [x, gamma, gradient].map(|x| x.into_primitive());
        let (of_x, of_gamma) = B::llama_rms_norm_backward(x, gamma, gradient, epsilon);
        (Self::from_inner(of_x), Self::from_inner(of_gamma))
    }

    fn llama_rotate_heads_backward(
        gradient: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [gradient, cos, sin] = [gradient, cos, sin].map(|x| x.into_primitive());
        Self::from_inner(B::llama_rotate_heads_backward(gradient, cos, sin))
    }

    fn llama_head_loss_with_gradient(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        labels: Vec<u32>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [hidden, weight] = [hidden, weight].map(|x| x.into_primitive());
        let (loss, gradient) = B::llama_head_loss_with_gradient(hidden, weight, labels);
        (Self::from_inner(loss), Self::from_inner(gradient))
    }

    fn llama_target_loss_with_gradient(
        logits: FloatTensor<Self>,
        labels: Vec<u32>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (loss, gradient) = B::llama_target_loss_with_gradient(logits.into_primitive(), labels);
        (Self::from_inner(loss), Self::from_inner(gradient))
    }
}
