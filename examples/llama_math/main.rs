fn main() {
    let a: Vec<String> = std::env::args().collect();
    let p = llama_math::pretrain::Pretraining {
        seed: 1,
        steps: a[2].parse().unwrap(),
        batch_size: 32,
        lr: a[3].parse().unwrap(),
    };
    p.run(
        &burn::tensor::Device::flex(),
        std::path::Path::new(&a[1]),
        true,
    )
    .unwrap();
}
