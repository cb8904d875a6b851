//! A step: everything is prepared before the first weight changes.

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::Module;
use burn::tensor::Tensor;

use super::checks::{Checks, DenseCounts, Verdict};
use super::clip::clip;
use super::commit::Commit;
use super::dense::{DenseBefore, mean_gradients, non_finite_values};
use super::exchange::{Deltas, OwnDeltas, PendingDeltas};
use super::factors::Factors;
use super::fingerprint::Fingerprints;
use super::frames::Frames;
use super::gradients::{Resolved, StepGradients};
use super::inner::InnerOptimizer;
use super::layout::{RunSettings, ShardLayout};
use super::packed::pack_gradients;
use super::range::Ranges;
use super::reduce::reduce_shared;
use super::statistics::Statistics;
use super::{HdPissaOptimizer, OptimizerError, StepError};
use crate::ops::MergeInputs;
use crate::residuals::{Residuals, take_residuals};

impl HdPissaOptimizer {
    /// Takes one step. The call is Burn's, with the gradients of one micro-batch
    /// (`GradientsParams`), of several shards ([`ShardGradients`](crate::ShardGradients)), or of
    /// several micro-batches for all shards ([`SharedGradients`](crate::SharedGradients)).
    ///
    /// The gradients must cover every factor of every shard that this worker hosts, or of all
    /// shards if they share gradients. All workers step together. If nothing else holds a weight's
    /// tensor, it is updated in place. A clone of the model, a copy from `valid()` or a live graph
    /// keeps its values, and the step copies. The step reads back from the device once; with
    /// several workers, the exchange and the comparison of fingerprints add their own reads.
    ///
    /// You may pass another model, or the same one with other frames, from one step to the next:
    /// workers then agree again. Moments belong to parameters by their ids, and stay.
    ///
    /// # Errors
    ///
    /// A refused step returns the model. Weights, frames and moments are then unchanged on every
    /// worker; see [`OptimizerError`] for the causes.
    pub fn step<M: Module>(
        &mut self,
        lr: impl Into<ModuleLearningRate>,
        model: M,
        grads: impl Into<StepGradients>,
    ) -> Result<M, StepError<M>> {
        let prepared = match self.prepare(lr.into(), &model, grads.into()) {
            Ok(prepared) => prepared,
            Err(cause) => return Err(StepError { model, cause }),
        };
        // Drops the last handle to the old weights, so the merge can write in place.
        drop(model);
        self.commit(prepared)
    }

    /// Merges a prepared step if the checks allow it.
    fn commit<M: Module>(&mut self, prepared: Prepared<M>) -> Result<M, StepError<M>> {
        let Prepared {
            mut stepped,
            mut residuals,
            dense_before,
            inner,
            factors,
            mut deltas,
            dense_counts: [dense_gradients, dense_values],
            ranges,
            squared_gradients,
        } = prepared;
        let (layout, frames) = &mut **self.shared.as_mut().expect("agreed on before");
        let refuse = |stepped: M, cause| {
            let model = dense_before.restore(stepped);
            Err(StepError { model, cause })
        };
        loop {
            let checks = Checks::of(
                &factors,
                frames,
                &deltas,
                &dense_gradients,
                &dense_values,
                &ranges,
            );
            let gate = checks.gate();
            let (merged, squares) =
                Commit::apply(stepped, &factors, residuals, self.steps, |weight| {
                    MergeInputs {
                        frames: frames.of(weight, &factors),
                        deltas: deltas.packed[weight].clone(),
                        gate: gate.clone(),
                        rank: factors.weights[weight].rank(),
                        measure: self.config.measure_norms,
                    }
                });
            match checks.read(&factors, squares, squared_gradients.clone()) {
                Ok(Verdict::Merged {
                    squared_norm,
                    squared_gradients,
                }) => {
                    frames.adopt(&factors);
                    self.inner = inner;
                    self.steps += 1;
                    self.update_norm = self.config.measure_norms.then(|| squared_norm.sqrt());
                    self.gradient_norms = squared_gradients.into_iter().map(f64::sqrt).collect();
                    return Ok(merged);
                }
                // Every worker gets here, and the gate has kept the weights of all.
                Ok(Verdict::StaleFrames) => {
                    *frames = match Frames::gather(&factors, layout, &*self.communicator) {
                        Ok(frames) => frames,
                        Err(cause) => return refuse(merged, cause),
                    };
                    deltas.stale_is_settled();
                    (stepped, residuals) = take_residuals(merged);
                }
                // The gate has kept the weights.
                Err(cause) => return refuse(merged, cause),
            }
        }
    }

    /// Everything of a step up to the merge; changes neither the model nor the state of `self.inner`.
    fn prepare<M: Module>(
        &mut self,
        lr: ModuleLearningRate,
        model: &M,
        grads: StepGradients,
    ) -> Result<Prepared<M>, OptimizerError> {
        let factors = Factors::of(model, &*self.communicator)?;
        self.refuse_record_of_others(&factors)?;
        self.share(model, &factors)?;
        self.inner.arrange(&factors, &lr)?;
        let (layout, frames) = &**self.shared.as_ref().expect("just shared");
        let communicator = &*self.communicator;
        let workers = communicator.num_workers();

        let due = self
            .config
            .fingerprint_every
            .is_some_and(|every| self.steps > 0 && self.steps.is_multiple_of(every.get()));
        if due && workers > 1 {
            Fingerprints::of_step(model, &factors, &frames.all(&factors)).compare(communicator)?;
        }

        let (mut gradients, dense) = match grads.resolve(&factors)? {
            Resolved::PerShard(mut shards) => {
                let dense = mean_gradients(model, &mut shards, layout, communicator)?;
                (pack_gradients(&factors.weights, &mut shards), dense)
            }
            Resolved::Shared(sum, micro_batches) => {
                reduce_shared(model, sum, micro_batches, &factors, layout, communicator)?
            }
        };
        let statistics = Statistics::of(&gradients, &factors.weights);
        if let Some(max_norm) = self.config.max_grad_norm {
            let mode = factors.gradients;
            gradients = clip(gradients, &statistics, max_norm, mode, layout, communicator)?;
        }

        let mut inner = self.inner.clone();
        let (stepped, residuals) = take_residuals(model.clone());
        let stepped = inner.step_dense(lr.clone(), stepped, dense.gradients);
        let mut gathers = Vec::new();
        let groups = match workers {
            1 => 1,
            _ => self.config.buckets.get(),
        };
        let stale = frames.are_stale(&factors);
        let bad_gradients = statistics.non_finite();
        let device = factors.device();
        let mut gradients = gradients.into_iter();
        for group in factors.groups(groups) {
            let weights = &factors.weights[group.clone()];
            let gradients = gradients.by_ref().take(group.len()).collect();
            let deltas = inner.step(lr.clone(), group.start, weights, gradients, &device);
            let own = OwnDeltas {
                packed: deltas
                    .into_iter()
                    .map(|d| self.config.communication_dtype.round(d))
                    .collect(),
                bad_gradients: bad_gradients.clone().narrow(0, group.start, group.len()),
                stale: stale.clone(),
            };
            gathers.push(PendingDeltas::start(
                own,
                group,
                self.config.communication_dtype,
                communicator,
            )?);
        }
        // Wait for all before the first merge: a failed step then changes nothing.
        let deltas = Deltas::finish(gathers, &factors, layout, self.config.communication_dtype)?;

        Ok(Prepared {
            dense_counts: [dense.non_finite, non_finite_values(&stepped)],
            ranges: Ranges::of_weights(model, &factors),
            squared_gradients: self.config.measure_norms.then(|| statistics.squares()),
            stepped,
            residuals,
            dense_before: DenseBefore::of(model),
            inner,
            factors,
            deltas,
        })
    }

    /// Agrees with the other workers on the adapters and shares the frames, unless that is already
    /// done for these adapters.
    fn share<M: Module>(&mut self, model: &M, factors: &Factors) -> Result<(), OptimizerError> {
        let communicator = &*self.communicator;
        let layout = match self.shared.take() {
            Some(shared) if shared.0.fits(factors) => {
                // Several workers tell each other in the step if one of them has new frames.
                if communicator.num_workers() > 1 || shared.1.are_of(factors) {
                    self.shared = Some(shared);
                    return Ok(());
                }
                shared.0
            }
            _ => {
                let (shards, workers) = (factors.num_shards, communicator.num_workers());
                if factors.knows_all() && !shards.is_multiple_of(workers) {
                    return Err(OptimizerError::UnevenWorkers { shards, workers });
                }
                let settings = RunSettings {
                    communication_dtype: self.config.communication_dtype,
                    buckets: self.config.buckets.get(),
                };
                let model_hash = || Fingerprints::of_all(model).read_joined();
                ShardLayout::agree(factors, settings, communicator, model_hash)?
            }
        };
        let frames = Frames::gather(factors, &layout, communicator)?;
        self.shared = Some(Box::new((layout, frames)));
        Ok(())
    }
}

/// A step that is ready to be committed.
struct Prepared<M> {
    /// The model with dense parameters updated, and without residual bits.
    stepped: M,
    residuals: Residuals,
    dense_before: DenseBefore,
    inner: InnerOptimizer,
    /// The factors of the model before the step.
    factors: Factors,
    deltas: Deltas,
    /// Bad values in the gradients of dense parameters, and in the stepped parameters themselves.
    dense_counts: [DenseCounts; 2],
    ranges: Ranges,
    /// The squares of each hosted shard's gradients, `[hosted shards]`, if norms are measured.
    squared_gradients: Option<Tensor<1>>,
}
