//! The loop itself, with the order of events of Burn's own strategies.

use std::any::Any;
use std::ops::RangeInclusive;
use std::sync::Arc;

use burn::data::dataloader::DataLoader;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::optim::ModuleOptimizer;
use burn::train::metric::store::EventStoreClient;
use burn::train::{
    CloneEarlyStoppingStrategy, EventProcessorTraining, InferenceStep, Interrupter, Learner,
    LearnerEvent, LearnerModel, LearningCheckpointer, SupervisedTrainingEventProcessor, TrainStep,
    TrainingItem,
};

use super::crew::{Crew, Worker};
use super::error::{FirstError, LearnerError};
use super::layout::Layout;
use super::parts::Parts;
use super::state;

type TrainInput<M> = <M as TrainStep>::Input;
type ValidInput<M> = <M as InferenceStep>::Input;

/// A running training.
pub(super) struct Run<'a, M: LearnerModel> {
    /// Without state, for checkpoints.
    pub(super) optimizer: ModuleOptimizer,
    pub(super) error: &'a FirstError,
    pub(super) crew: Crew<'a, M>,
    pub(super) layout: Layout,
    pub(super) scheduler: ModuleLrScheduler,
    pub(super) events: SupervisedTrainingEventProcessor<M>,
    pub(super) interrupter: Interrupter,
    pub(super) checkpointer: Option<LearningCheckpointer<M>>,
    pub(super) early_stopping: Option<Box<dyn CloneEarlyStoppingStrategy>>,
    pub(super) store: Arc<EventStoreClient>,
}

type TrainEvent<M> = LearnerEvent<<M as TrainStep>::Output>;
type ValidEvent<M> = LearnerEvent<<M as InferenceStep>::Output>;
/// The trained model, or the panic of all workers.
type Trained<M> = Result<M, Box<dyn Any + Send>>;

impl<M: LearnerModel> Run<'_, M> {
    /// Trains until the last epoch, an early stop, an interruption or an error.
    pub(super) fn epochs(
        mut self,
        epochs: RangeInclusive<usize>,
        train: &Parts<TrainInput<M>>,
        train_items: usize,
        valid: &dyn DataLoader<ValidInput<M>>,
    ) -> (Trained<M>, SupervisedTrainingEventProcessor<M>) {
        for epoch in epochs {
            self.train_event(LearnerEvent::StartSplit {
                epoch_number: epoch,
                total_items: train_items,
            });
            let trained = self.train(train, train_items);
            self.end_on(trained);
            self.train_event(LearnerEvent::EndSplit(epoch));
            if self.interrupter.should_stop() {
                break;
            }

            self.valid_event(LearnerEvent::StartSplit {
                epoch_number: epoch,
                total_items: valid.num_items(),
            });
            let validated = self.validate(valid);
            self.end_on(validated);
            self.valid_event(LearnerEvent::EndSplit(epoch));
            self.train_event(LearnerEvent::EndEpoch(epoch));
            if self.checkpointer.is_some() || self.early_stopping.is_some() {
                let flushed = self.events.flush();
                self.interrupter.fail_on_error(flushed);
            }
            if self.interrupter.should_stop() {
                break;
            }

            let saved = self.save(epoch);
            self.end_on(saved);
            if self.stops_early(epoch) {
                break;
            }
        }
        if let Some(interruption) = self.interrupter.interruption() {
            let reason = interruption.reason.as_deref().unwrap_or("reason unknown");
            log::info!("training interrupted: {reason}");
        }
        (self.crew.dismiss(), self.events)
    }

    /// One epoch of steps.
    fn train(&mut self, parts: &Parts<TrainInput<M>>, items: usize) -> Result<(), LearnerError> {
        let mut pass = parts.pass();
        let mut iteration = 0;
        while let Some(batches) = pass.next_step() {
            let batches = match batches {
                Ok(batches) => batches,
                Err(error) => {
                    self.interrupter.fail(error);
                    return Ok(());
                }
            };
            let batches = self.layout.deal(batches);
            let outputs = self.crew.each(batches, Worker::train)?;
            let lr = self.scheduler.step();
            let stepped = self
                .crew
                .each(vec![lr.clone(); self.crew.len()], Worker::step);
            // Includes the micro-batches of a refused step: they may show the reason.
            for output in outputs.into_iter().flatten() {
                iteration += 1;
                let progress = pass.progress();
                let item = TrainingItem::new(output, progress, Some(iteration), Some(lr.clone()));
                self.train_event(LearnerEvent::ProcessedItem(item));
            }
            stepped?;
            if self.interrupter.should_stop() {
                return Ok(());
            }
        }
        match iteration {
            0 => Err(LearnerError::TooFewItems {
                items,
                parts: self.layout.parts,
            }),
            _ => Ok(()),
        }
    }

    /// One pass over the validation data.
    fn validate(&mut self, loader: &dyn DataLoader<ValidInput<M>>) -> Result<(), LearnerError> {
        let start = |worker: &mut Worker<M>, ()| {
            worker.start_validation();
            Ok(())
        };
        self.crew.first((), start)?;
        let validated = self.validate_items(loader);
        let end = |worker: &mut Worker<M>, ()| {
            worker.end_validation();
            Ok(())
        };
        self.crew.first((), end)?;
        validated
    }

    fn validate_items(
        &mut self,
        loader: &dyn DataLoader<ValidInput<M>>,
    ) -> Result<(), LearnerError> {
        let mut iterator = loader.iter();
        let mut iteration = 0;
        while let Some(item) = iterator.next() {
            let item = match item {
                Ok(item) => item,
                Err(error) => {
                    self.interrupter.fail(error);
                    return Ok(());
                }
            };
            iteration += 1;
            let output = self.crew.first(item, Worker::validate)?;
            let item = TrainingItem::new(output, iterator.progress(), Some(iteration), None);
            self.valid_event(LearnerEvent::ProcessedItem(item));
            if self.interrupter.should_stop() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Hands the state of all workers to Burn's checkpointer, if there is one.
    fn save(&mut self, epoch: usize) -> Result<(), LearnerError> {
        let Some(checkpointer) = &mut self.checkpointer else {
            return Ok(());
        };
        let states = self
            .crew
            .each(vec![(); self.crew.len()], |worker, ()| worker.state())?;
        let refused = |cause| LearnerError::Optimizer { worker: 0, cause };
        let record = state::join(states).map_err(refused)?;
        // Lives only during the call, because steps write the weights in place.
        let model = self
            .crew
            .first((), |worker, ()| Ok(worker.model().clone()))?;
        let optimizer = self.optimizer.clone().load_record(record);
        let learner = Learner::new(model, optimizer, self.scheduler.clone());
        checkpointer.checkpoint(&learner, epoch, &self.store);
        Ok(())
    }

    fn stops_early(&mut self, epoch: usize) -> bool {
        match &mut self.early_stopping {
            Some(strategy) => strategy.should_stop(epoch, &self.store),
            None => false,
        }
    }

    fn end_on(&self, result: Result<(), LearnerError>) {
        self.error.end_on(result, &self.interrupter);
    }

    fn train_event(&mut self, event: TrainEvent<M>) {
        let result = self.events.process_train(event);
        self.interrupter.fail_on_error(result);
    }

    fn valid_event(&mut self, event: ValidEvent<M>) {
        let result = self.events.process_valid(event);
        self.interrupter.fail_on_error(result);
    }
}
