//! The comparison's own promises about the embedded model.

use burn::module::Module;
use burn::tensor::Device;
use llama_math::compare::Comparison;
use llama_math::evidence::row::Row;
use llama_math::evidence::task::Task;
use llama_math::evidence::trial::{Measured, Outcome, Trial};
use llama_math::problems::problems;
use llama_math::tiny;
use llama_math::tokenize::Tokens;

#[test]
fn the_update_of_eight_shards_is_not_clipped() {
    let comparison = Comparison::new(1);
    let model = tiny::pretrained().unwrap().load(&Device::flex()).unwrap();
    let sides = model
        .matrices()
        .into_iter()
        .filter(|(path, _)| path.ends_with("_proj.weight"));
    let smallest = sides.flat_map(|(_, weight)| weight.dims()).min().unwrap();
    assert!(smallest >= 2 * comparison.shards * comparison.rank);
    assert_eq!(comparison.shards, 8);
}

#[test]
fn the_tokenizer_knows_every_problem() {
    let pretrained = tiny::pretrained().unwrap();
    let tokens = Tokens::of(&pretrained).unwrap();
    let (train, test) = problems(5, 3000, 300);
    for record in train.iter().chain(&test) {
        let text = tiny::template().text(record) + &record.answer;
        let ids = tokens.encode(&text).unwrap();
        // Token 0 stands for what is not in the vocabulary.
        assert!(!ids.contains(&0), "{text}");
        assert_eq!(tokens.decode(&ids).unwrap(), text);
        assert!(ids.len() < pretrained.config.max_positions / 2);
    }
}

const ROWS: [Row; 7] = [
    Row::Lora,
    Row::Pissa,
    Row::Published,
    Row::SharedRandom,
    Row::LoraWide,
    Row::PissaWide,
    Row::Full,
];

fn short_runs(task: Task) -> [Measured; 7] {
    ROWS.map(|row| {
        let (_, items) = task.length(true);
        let trial = Trial {
            task,
            row,
            lr: 1e-3,
            seed: 1,
            steps: 2,
            items,
            rank: 4,
            shards: 8,
            loss_only: false,
        };
        match trial.run(&Device::flex(), None).unwrap().outcome {
            Outcome::Trained(measured) => *measured,
            Outcome::Diverged(reason) => panic!("{reason}"),
        }
    })
}

#[test]
fn methods_train_different_numbers_of_parameters_and_report_them() {
    let results = short_runs(Task::Problems);
    let [lora, pissa, published, shared, lora_wide, pissa_wide, full] = &results;
    let parameters = tiny::pretrained()
        .unwrap()
        .load(&Device::flex())
        .unwrap()
        .num_params();
    assert_eq!(full.trainable, parameters);
    assert_eq!(pissa.trainable, lora.trainable);
    for equal in [published, shared, lora_wide, pissa_wide] {
        assert_eq!(equal.trainable, 8 * lora.trainable);
    }
    assert!(lora.numeric_rank <= 4.0);
    assert!(pissa.numeric_rank <= 8.0);
    assert!(published.numeric_rank > pissa.numeric_rank);
}

#[test]
fn every_method_starts_from_one_function_and_sees_the_same_sequences() {
    for task in Task::COMPARED {
        let results = short_runs(task);
        for (row, result) in ROWS.iter().zip(&results) {
            assert_eq!(result.losses.len(), 2);
            let (loss, first) = (result.losses[0], results[0].losses[0]);
            assert!(
                (loss - first).abs() < 1e-3 * first,
                "{task} {row}: {loss} for {first}"
            );
        }
    }
}

#[test]
fn the_default_run_compares_equal_parameters_at_recorded_rates() {
    let trials = Comparison::new(1).trials().unwrap();
    for task in Task::COMPARED {
        let of_task: Vec<&Trial> = trials.iter().filter(|trial| trial.task == task).collect();
        let rows: Vec<Row> = of_task.iter().map(|trial| trial.row).collect();
        assert!(
            rows.contains(&Row::LoraWide) && rows.contains(&Row::Full),
            "{task}"
        );
        assert!(of_task.iter().all(|trial| trial.lr > 0.0));
    }
    let mut other = Comparison::new(1);
    other.shards = 3;
    assert!(other.trials().unwrap_err().to_string().contains("--shards"));
}
