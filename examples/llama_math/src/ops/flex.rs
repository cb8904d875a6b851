//! The operations on Flex, Burn's CPU backend.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Flex, tensor::FloatTensor};
use burn::tensor::{Shape, Slice, TensorData};
use burn_flex::FlexTensor;

use super::rows::{each_row, exp, exponentials, largest, sum};
use super::{Causal, LlamaOps};

impl LlamaOps for Flex {
    fn llama_attention(
        queries: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        scale: f64,
        causal: Causal,
    ) -> FloatTensor<Self> {
        let scores = Self::float_matmul(queries, transposed(keys));
        Self::float_matmul(attention_weights(scores, scale, causal), values)
    }

    fn llama_attention_backward(
        queries: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        scale: f64,
        causal: Causal,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let scores = Self::float_matmul(queries.clone(), transposed(keys.clone()));
        let weights = attention_weights(scores, scale, causal);
        let of_values = Self::float_matmul(transposed(weights.clone()), gradient.clone());
        let of_weights = Self::float_matmul(gradient, transposed(values));
        let of_scores = attention_scores_gradient(weights, of_weights, scale, causal);
        let of_keys = Self::float_matmul(transposed(of_scores.clone()), queries);
        (Self::float_matmul(of_scores, keys), of_keys, of_values)
    }

    fn llama_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let (gate, up) = (whole(gate), whole(up));
        let [gates, ups] = [&gate, &up].map(|x| x.storage::<f32>());
        let len = last(&gate);
        let mut output = vec![0.0; gates.len()];
        each_row(
            &mut output,
            len,
            #[inline(always)]
            |index, row| {
                let [gates, ups] = [gates, ups].map(|x| &x[index * len..][..len]);
                for ((output, &gate), &up) in row.iter_mut().zip(gates).zip(ups) {
                    *output = gate * up / (1.0 + exp(-gate));
                }
            },
        );
        tensor(output, gate.layout().shape())
    }

    fn llama_swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (gate, up, mut gradient) = (whole(gate), whole(up), whole(gradient));
        let [gates, ups] = [&gate, &up].map(|x| x.storage::<f32>());
        let len = last(&gate);
        // First the gradient of `up`, then in place the gradient of `gate`.
        let mut of_up = vec![0.0; gates.len()];
        let gradients = gradient.storage::<f32>();
        each_row(
            &mut of_up,
            len,
            #[inline(always)]
            |index, row| {
                let [gates, gradients] = [gates, gradients].map(|x| &x[index * len..][..len]);
                for ((output, &gate), &gradient) in row.iter_mut().zip(gates).zip(gradients) {
                    *output = gradient * gate / (1.0 + exp(-gate));
                }
            },
        );
        each_row(
            gradient.storage_mut(),
            len,
            #[inline(always)]
            |index, row| {
                let [gates, ups] = [gates, ups].map(|x| &x[index * len..][..len]);
                for ((x, &gate), &up) in row.iter_mut().zip(gates).zip(ups) {
                    let sigmoid = 1.0 / (1.0 + exp(-gate));
                    *x *= up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
                }
            },
        );
        let of_up = tensor(of_up, gate.layout().shape());
        (gradient, of_up)
    }

    fn llama_rms_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let (x, gamma) = (whole(x), whole(gamma));
        let (inputs, gammas) = (x.storage::<f32>(), gamma.storage::<f32>());
        let len = gammas.len();
        let mut output = vec![0.0; inputs.len()];
        each_row(
            &mut output,
            len,
            #[inline(always)]
            |index, row| {
                let inputs = &inputs[index * len..][..len];
                let factor = inverse_rms(inputs, epsilon);
                for ((output, x), gamma) in row.iter_mut().zip(inputs).zip(gammas) {
                    *output = x * factor * gamma;
                }
            },
        );
        tensor(output, x.layout().shape())
    }

    fn llama_rms_norm_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (x, gamma, mut gradient) = (whole(x), whole(gamma), whole(gradient));
        let (inputs, gammas) = (x.storage::<f32>(), gamma.storage::<f32>());
        let len = gammas.len();
        let mut of_gamma = vec![0.0f32; len];
        let rows = inputs.chunks(len.max(1));
        for (inputs, gradients) in rows.zip(gradient.storage::<f32>().chunks(len.max(1))) {
            let factor = inverse_rms(inputs, epsilon);
            for ((sum, x), gradient) in of_gamma.iter_mut().zip(inputs).zip(gradients) {
                *sum += x * factor * gradient;
            }
        }
        each_row(
            gradient.storage_mut(),
            len,
            #[inline(always)]
            |index, row| {
                let inputs = &inputs[index * len..][..len];
                let factor = inverse_rms(inputs, epsilon);
                let product = sum(len, |i| inputs[i] * gammas[i] * row[i]);
                let along = product * factor * factor / len as f32;
                for ((gradient, x), gamma) in row.iter_mut().zip(inputs).zip(gammas) {
                    *gradient = factor * (gamma * *gradient - along * x);
                }
            },
        );
        let of_gamma = tensor(of_gamma, gamma.layout().shape());
        (gradient, of_gamma)
    }

    fn llama_rotate_heads(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (x, cos, sin) = (whole(x), whole(cos), whole(sin));
        let [batch, positions, width] = x.layout().shape().dims();
        let half = last(&cos);
        let heads = width / (2 * half);
        let [inputs, cos, sin] = [&x, &cos, &sin].map(|x| x.storage::<f32>());
        let mut output = vec![0.0; inputs.len()];
        each_row(
            &mut output,
            2 * half,
            #[inline(always)]
            |index, row| {
                let (position, rest) = (index % positions, index / positions);
                let (head, batch) = (rest % heads, rest / heads);
                let start = (batch * positions + position) * width + head * 2 * half;
                let angles = position * half..(position + 1) * half;
                rotate(
                    &inputs[start..][..2 * half],
                    row,
                    &cos[angles.clone()],
                    &sin[angles],
                    1.0,
                );
            },
        );
        tensor(output, &Shape::new([batch, heads, positions, 2 * half]))
    }

    fn llama_rotate_heads_backward(
        gradient: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (gradient, cos, sin) = (whole(gradient), whole(cos), whole(sin));
        let [batch, heads, positions, dim] = gradient.layout().shape().dims();
        let half = dim / 2;
        let [inputs, cos, sin] = [&gradient, &cos, &sin].map(|x| x.storage::<f32>());
        let mut output = vec![0.0; inputs.len()];
        each_row(
            &mut output,
            dim,
            #[inline(always)]
            |index, row| {
                let (head, rest) = (index % heads, index / heads);
                let (position, batch) = (rest % positions, rest / positions);
                let start = ((batch * heads + head) * positions + position) * dim;
                let angles = position * half..(position + 1) * half;
                rotate(
                    &inputs[start..][..dim],
                    row,
                    &cos[angles.clone()],
                    &sin[angles],
                    -1.0,
                );
            },
        );
        tensor(output, &Shape::new([batch, positions, heads * dim]))
    }

    fn llama_head_loss(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        labels: Vec<u32>,
    ) -> FloatTensor<Self> {
        head_loss(hidden, weight, labels, false).0
    }

    fn llama_head_loss_with_gradient(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        labels: Vec<u32>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (loss, gradients) = head_loss(hidden, weight, labels, true);
        (loss, Self::float_cat(gradients, 0))
    }

    fn llama_target_loss(logits: FloatTensor<Self>, labels: Vec<u32>) -> FloatTensor<Self> {
        Self::llama_target_loss_with_gradient(logits, labels).0
    }

    fn llama_target_loss_with_gradient(
        logits: FloatTensor<Self>,
        labels: Vec<u32>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (loss, gradient) = target_loss(logits, &labels);
        (tensor(vec![loss as f32], &Shape::new([1])), gradient)
    }
}

/// Softmax over the visible keys of `scale · scores: [batch, heads, rows, keys]`, with 0 for the others.
fn attention_weights(scores: FlexTensor, scale: f64, causal: Causal) -> FlexTensor {
    let mut weights = whole(scores);
    let keys = last(&weights);
    each_row(
        weights.storage_mut(),
        keys,
        #[inline(always)]
        |index, row| {
            let visible = causal.keys_of(index, keys);
            row[..visible.start].fill(0.0);
            row[visible.end..].fill(0.0);
            let row = &mut row[visible];
            let sum = exponentials(row, largest(row), scale as f32);
            let factor = 1.0 / sum;
            row.iter_mut().for_each(|x| *x *= factor);
        },
    );
    weights
}

/// The gradient of the scores, given the weights and their gradient.
fn attention_scores_gradient(
    weights: FlexTensor,
    gradient: FlexTensor,
    scale: f64,
    causal: Causal,
) -> FlexTensor {
    let weights = whole(weights);
    let mut gradient = whole(gradient);
    let keys = last(&weights);
    let all = weights.storage::<f32>();
    each_row(
        gradient.storage_mut(),
        keys,
        #[inline(always)]
        |index, row| {
            let visible = causal.keys_of(index, keys);
            row[..visible.start].fill(0.0);
            row[visible.end..].fill(0.0);
            let weights = &all[index * keys..][..keys][visible.clone()];
            let row = &mut row[visible];
            let mean = sum(row.len(), |i| weights[i] * row[i]);
            for (x, weight) in row.iter_mut().zip(weights) {
                *x = weight * (*x - mean) * scale as f32;
            }
        },
    );
    gradient
}

/// Rows whose logits exist at once, at most. Every part reads the whole head once more: with 58 rows in
/// a part, the products with a head of 576 × 49,152 took 1.4 times as long as with 172.
const ROWS_OF_LOGITS: usize = 192;

/// The loss of [`LlamaOps::llama_head_loss`], and, if they are asked for, the gradients of the rows of `hidden`,
/// in parts.
fn head_loss(
    hidden: FlexTensor,
    weight: FlexTensor,
    labels: Vec<u32>,
    with_gradients: bool,
) -> (FlexTensor, Vec<FlexTensor>) {
    // Parts of nearly equal size.
    let parts = labels.len().div_ceil(ROWS_OF_LOGITS).max(1);
    let rows = labels.len().div_ceil(parts).max(1);
    let mut losses = 0.0;
    let mut gradients = Vec::new();
    for (part, labels) in labels.chunks(rows).enumerate() {
        let start = part * rows;
        let slices = [Slice::from(start..start + labels.len())];
        let logits = Flex::float_matmul(Flex::float_slice(hidden.clone(), &slices), weight.clone());
        let (loss, gradient) = target_loss(logits, labels);
        losses += loss;
        if with_gradients {
            gradients.push(Flex::float_matmul(gradient, transposed(weight.clone())));
        }
    }
    (tensor(vec![losses as f32], &Shape::new([1])), gradients)
}

/// The loss of [`LlamaOps::llama_target_loss`] and the gradient of the logits, in their memory.
fn target_loss(logits: FlexTensor, labels: &[u32]) -> (f64, FlexTensor) {
    let mut gradient = whole(logits);
    let len = last(&gradient);
    let losses = each_row(
        gradient.storage_mut(),
        len,
        #[inline(always)]
        |index, row| {
            let label = labels[index] as usize;
            let (largest, wanted) = (largest(row), row[label]);
            let sum = exponentials(row, largest, 1.0);
            let factor = 1.0 / sum;
            row.iter_mut().for_each(|x| *x *= factor);
            row[label] -= 1.0;
            sum.ln() + (largest - wanted)
        },
    );
    (losses.into_iter().map(f64::from).sum(), gradient)
}

/// Last two dimensions exchanged, without a copy.
fn transposed(x: FlexTensor) -> FlexTensor {
    Flex::float_transpose(x)
}

/// `x` in its own order from the beginning of its memory to the end.
fn whole(x: FlexTensor) -> FlexTensor {
    let layout = x.layout();
    let len = layout.num_elements();
    match layout.is_contiguous() && layout.start_offset() == 0 && x.bytes().len() == 4 * len {
        true => x,
        false => x.to_contiguous(),
    }
}

fn last(x: &FlexTensor) -> usize {
    let shape = x.layout().shape();
    shape[shape.num_dims() - 1]
}

fn tensor(values: Vec<f32>, shape: &Shape) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.clone()))
}

#[inline(always)]
fn inverse_rms(x: &[f32], epsilon: f64) -> f32 {
    let mean = sum(x.len(), |i| x[i] * x[i]) / x.len() as f32;
    1.0 / (mean + epsilon as f32).sqrt()
}

/// Rotates the pairs of a head, forward or, with `sign` -1, back.
#[inline(always)]
fn rotate(input: &[f32], output: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    let (left, right) = input.split_at(half);
    let (to_left, to_right) = output.split_at_mut(half);
    for i in 0..half {
        to_left[i] = left[i] * cos[i] - right[i] * (sign * sin[i]);
        to_right[i] = right[i] * cos[i] + left[i] * (sign * sin[i]);
    }
}
