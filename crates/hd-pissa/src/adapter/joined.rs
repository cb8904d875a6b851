//! The frames of several shards side by side. They are joined once and kept.

use std::fmt::{self, Debug, Formatter};
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::ops::{Origin, part_of};

/// The joined frames of an adapter and of its copies, which share them.
#[derive(Clone, Default)]
pub(crate) struct JoinedFrames(Arc<Mutex<Option<Joined>>>);

struct Joined {
    /// The parts that were joined.
    parts: Vec<[Origin; 2]>,
    /// `[d_input, n · rank]` and `[n · rank, d_output]`, without autodiff.
    whole: [Tensor<2>; 2],
}

impl JoinedFrames {
    /// The pairs `a: [d_input, rank]`, `b: [rank, d_output]` side by side: `[d_input, n · rank]`
    /// and `[n · rank, d_output]`, whose gradients go to the pairs. Copies only values that differ
    /// from the last time.
    pub(super) fn of(&self, pairs: Vec<[Tensor<2>; 2]>) -> [Tensor<2>; 2] {
        let whole = self.values(&pairs);
        let (a, b): (Vec<_>, Vec<_>) = pairs.into_iter().map(|[a, b]| (a, b)).unzip();
        let [whole_a, whole_b] = whole;
        [tracked(whole_a, a, 1), tracked(whole_b, b, 0)]
    }

    fn values(&self, pairs: &[[Tensor<2>; 2]]) -> [Tensor<2>; 2] {
        let parts: Vec<[Origin; 2]> = pairs
            .iter()
            .map(|pair| pair.each_ref().map(Origin::of))
            .collect();
        let is_of = |joined: &&Joined| {
            let same = |(x, y): (&[Origin; 2], &[Origin; 2])| x[0].is(&y[0]) && x[1].is(&y[1]);
            joined.parts.len() == parts.len() && joined.parts.iter().zip(&parts).all(same)
        };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(joined) = kept.as_ref().filter(is_of) {
            return joined.whole.clone();
        }
        let side = |side: usize| {
            let parts = pairs.iter().map(|pair| without_autodiff(&pair[side]));
            Tensor::cat(parts.collect(), 1 - side)
        };
        let whole = [side(0), side(1)];
        *kept = Some(Joined {
            parts,
            whole: whole.clone(),
        });
        whole
    }
}

/// Without values: they are those of the shards.
impl Debug for JoinedFrames {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("JoinedFrames")
    }
}

fn without_autodiff(tensor: &Tensor<2>) -> Tensor<2> {
    match tensor.is_autodiff() {
        true => tensor.clone().inner(),
        false => tensor.clone(),
    }
}

/// `whole`, whose slices along `dim` send their gradients to `parts`.
fn tracked(whole: Tensor<2>, parts: Vec<Tensor<2>>, dim: usize) -> Tensor<2> {
    let Some(strategy) = parts[0].gradient_checkpointing_strategy() else {
        return whole;
    };
    let whole = Tensor::from_inner(whole).with_gradient_checkpointing_strategy(strategy);
    let mut start = 0;
    parts.into_iter().fold(whole, |whole, part| {
        let len = part.dims()[dim];
        let whole = part_of(whole, part, dim, start);
        start += len;
        whole
    })
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution};

    #[test]
    fn frames_are_joined_again_only_if_they_are_others() {
        let device = Device::flex().autodiff();
        let random = |shape| Tensor::<2>::random(shape, Distribution::Default, &device);
        let draw = || -> Vec<[Tensor<2>; 2]> {
            let pair = |_| [random([5, 2]).require_grad(), random([2, 7]).require_grad()];
            (0..3).map(pair).collect()
        };
        let joined = JoinedFrames::default();
        let check = |pairs: &[[Tensor<2>; 2]]| {
            let whole = joined.of(pairs.to_vec());
            for side in 0..2 {
                let parts = pairs.iter().map(|pair| pair[side].clone()).collect();
                let expected = Tensor::cat(parts, 1 - side);
                assert_eq!(whole[side].to_data(), expected.to_data());
            }
            Origin::of(&whole[0])
        };
        let pairs = draw();
        let first = check(&pairs);
        assert!(check(&pairs).is(&first));
        // The same memory with its own nodes, as in the copy of another thread.
        let copies = pairs.iter().map(|pair| {
            let copy = |tensor: &Tensor<2>| Tensor::from_inner(tensor.clone().inner());
            pair.each_ref().map(copy)
        });
        assert!(check(&copies.collect::<Vec<_>>()).is(&first));
        // Equal values in other memory, in another order, fewer, and different values.
        let mut others = pairs.clone();
        others[1][0] = others[1][0].clone() * 1.0;
        assert!(!check(&others).is(&first));
        others.swap(0, 2);
        check(&others);
        check(&others[..2]);
        check(&draw());
    }

    #[test]
    fn gradients_go_to_the_parts() {
        let device = Device::flex().autodiff();
        let random = |shape| Tensor::<2>::random(shape, Distribution::Default, &device);
        let pair = |_| [random([5, 2]).require_grad(), random([2, 7]).require_grad()];
        let pairs: Vec<[Tensor<2>; 2]> = (0..3).map(pair).collect();
        let [left, right] = [random([4, 5]), random([7, 4])];
        let gradients = |[a, b]: [Tensor<2>; 2]| {
            let loss = (left.clone().matmul(a) * b.matmul(right.clone()).transpose()).sum();
            let gradients = loss.backward();
            let of = |tensor: &Tensor<2>| tensor.grad(&gradients).unwrap().into_data();
            let all = pairs.iter().flatten().map(of);
            all.collect::<Vec<_>>()
        };
        let plain = [0, 1].map(|side| {
            let parts = pairs.iter().map(|pair| pair[side].clone()).collect();
            Tensor::cat(parts, 1 - side)
        });
        let joined = JoinedFrames::default();
        let expected = gradients(plain);
        for _ in 0..2 {
            assert_eq!(gradients(joined.of(pairs.clone())), expected);
        }
    }
}
