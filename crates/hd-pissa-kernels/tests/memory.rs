//! The kernels take no memory of the size of their large operand. The tests run one after the other
//! in their own process, because the report covers the whole process.

mod common;

use common::*;
use cubecl::MemoryScope;
use cubecl::client::Client;
use hd_pissa_bits::Rounding;
use hd_pissa_kernels::{FloatType, LowRankProduct, Merge, low_rank_product, merge};

#[test]
fn kernels_allocate_nothing_of_the_size_of_their_large_operand() {
    let Some(client) = client() else { return };
    a_merge_beside_the_weight(&client);
    a_product_beside_the_input(&client);
}

/// Bytes reserved beyond those in use before `launch`, which runs three times. Reserved memory
/// stays reserved until a clean-up, so the report holds the peak.
fn reserved(client: &Client, operand_bytes: u64, mut launch: impl FnMut()) -> u64 {
    let word = upload_words(client, &[0]);
    let wait = || drop(client.read_one(word.clone()).expect("the device runs"));
    wait();
    client.memory_cleanup().expect("nothing runs");
    let before = client.memory_report(MemoryScope::Device).usage();
    for _ in 0..3 {
        launch();
        wait();
    }
    let after = client.memory_report(MemoryScope::Device).usage();
    println!("before: {before:?}\nafter: {after:?}");
    assert!(before.bytes_in_use >= operand_bytes);
    after.bytes_reserved - before.bytes_in_use
}

fn a_merge_beside_the_weight(client: &Client) {
    let (size, rank, count) = (3000, 2, 2);
    let weight_bytes = (size * size * 4) as u64;
    let random = &mut Random(1);
    let shards = shards(random, count, [size, rank, size], 1e-3);
    let weight = matrix(
        client,
        &random.values(size * size, 1.0),
        [size, size],
        Layout::RowMajor,
        FloatType::F32,
    );
    let (frames, deltas) = (frames(client, &shards), deltas(client, &shards));
    let gate = upload_words(client, &[0]);
    let unused = reserved(client, weight_bytes, || {
        merge(
            client,
            Merge {
                weight: weight.clone(),
                frames: frames.clone(),
                deltas: deltas.clone(),
                rank,
                shards: count,
                rounding: Rounding::Nearest,
                residual: None,
                gate: gate.clone(),
            },
        )
        .unwrap();
    });
    assert!(
        unused < weight_bytes,
        "{unused} bytes beside the operands could hold a weight of {weight_bytes}"
    );
}

/// This also holds in half precision, where the products of the backend would need a copy in `f32`.
fn a_product_beside_the_input(client: &Client) {
    let [rows, depth, rank] = [8192, 4096, 8];
    let halves = [FloatType::F16, FloatType::BF16];
    let Some(dtype) = halves.into_iter().find(|dtype| dtype.is_supported(client)) else {
        eprintln!("skipped: the device has no half precision");
        return;
    };
    let input_bytes = (rows * depth * 2) as u64;
    let random = &mut Random(2);
    let mut operand = |shape: [usize; 2], dtype| {
        let values = random.values(shape[0] * shape[1], 1.0);
        matrix(client, &values, shape, Layout::RowMajor, dtype)
    };
    let product = LowRankProduct {
        input: operand([rows, depth], dtype),
        factor: operand([depth, rank], FloatType::F32),
        projection: operand([rows, rank], FloatType::F32),
        dense: None,
    };
    // Memory is reserved in pages that hold the largest operand. The sums of the chunks take a part
    // of a second page; the rest is too small for a copy of the input.
    let _half_a_page = client.empty(input_bytes as usize / 2);
    let unused = reserved(client, input_bytes, || {
        low_rank_product(client, product.clone()).unwrap();
    });
    assert!(
        unused < input_bytes,
        "{unused} bytes beside the operands could hold a copy of an input of {input_bytes}"
    );
}
