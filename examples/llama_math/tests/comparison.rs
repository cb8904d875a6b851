//! The comparison's own promises about the embedded model.

use burn::module::Module;
use burn::tensor::Device;
use llama_math::compare::Comparison;
use llama_math::method::Method;
use llama_math::problems::problems;
use llama_math::tiny;
use llama_math::tokenize::Tokens;

#[test]
fn the_update_of_eight_shards_is_not_clipped() {
    let comparison = Comparison::new(false);
    let model = tiny::checkpoint().unwrap().load(&Device::flex()).unwrap();
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
    let checkpoint = tiny::checkpoint().unwrap();
    let tokens = Tokens::of(&checkpoint).unwrap();
    let (train, test) = problems(5, 3000, 300);
    for record in train.iter().chain(&test) {
        let text = tiny::template().prompt(record) + &record.answer;
        let ids = tokens.encode(&text).unwrap();
        // Token 0 stands for what is not in the vocabulary.
        assert!(!ids.contains(&0), "{text}");
        assert_eq!(tokens.decode(&ids).unwrap(), text);
        assert!(ids.len() < checkpoint.config.max_positions / 2);
    }
}

#[test]
fn methods_train_different_numbers_of_parameters_and_report_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut comparison = Comparison::new(true);
    (comparison.steps, comparison.test_problems) = (2, 3);
    let results = Method::ALL.map(|method| {
        let path = folder.path().join("result.json");
        comparison
            .run_method(method, &Device::flex(), &path)
            .unwrap();
        let result: llama_math::compare::MethodResult =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(result.method, method);
        assert_eq!(result.losses.len(), 2);
        result
    });
    let [lora, pissa, hd_pissa, full] = results;
    // Every method starts from the same function and sees the same micro-batches.
    for result in [&pissa, &hd_pissa, &full] {
        assert!((result.losses[0] - lora.losses[0]).abs() < 1e-3 * lora.losses[0]);
    }
    let parameters = tiny::checkpoint()
        .unwrap()
        .load(&Device::flex())
        .unwrap()
        .num_params();
    assert_eq!(full.trainable, parameters);
    assert_eq!(pissa.trainable, lora.trainable);
    assert_eq!(hd_pissa.trainable, comparison.shards * lora.trainable);
    assert!(lora.numeric_rank <= comparison.rank as f64);
    assert!(pissa.numeric_rank <= 2.0 * comparison.rank as f64);
    assert!(hd_pissa.numeric_rank > pissa.numeric_rank);
}
