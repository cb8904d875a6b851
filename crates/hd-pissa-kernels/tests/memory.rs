//! The merge takes no memory of the weight's size. Alone in its process: the report covers it all.

mod common;

use common::*;
use cubecl::MemoryScope;
use hd_pissa_kernels::{FloatType, Merge, MergePrecision, merge, new_counter};

#[test]
fn merge_allocates_nothing_of_the_weights_size() {
    let Some(client) = client() else { return };
    let (size, rank, count) = (3000, 2, 2);
    let weight_bytes = (size * size * 4) as u64;
    let random = &mut Random(1);
    let shards = shards(random, count, [size, rank, size], 1e-3);
    let packing = Packing {
        before: 0,
        between: 0,
        after: 0,
    };
    let weight = matrix(
        &client,
        &random.values(size * size, 1.0),
        [size, size],
        Layout::RowMajor,
        FloatType::F32,
    );
    let frames = pack(&client, &frames(&shards), packing);
    let deltas = pack(&client, &deltas(&shards), packing);
    let (counter, squares) = (new_counter(&client), new_counter(&client));
    let wait = || drop(client.read_one(counter.clone()).expect("the device runs"));
    wait();
    client.memory_cleanup().expect("nothing runs");
    let before = client.memory_report(MemoryScope::Device).usage();
    for _ in 0..3 {
        merge(
            &client,
            Merge {
                weight: weight.clone(),
                frames: frames.clone(),
                deltas: deltas.clone(),
                rank,
                shards: count,
                precision: MergePrecision::Split,
                companion: None,
                non_finite: counter.clone(),
                squares: squares.clone(),
                square_slot: 0,
            },
        )
        .unwrap();
        wait();
    }
    // Memory once reserved stays so until a clean-up: the report holds the peak.
    let after = client.memory_report(MemoryScope::Device).usage();
    println!("before: {before:?}\nafter: {after:?}");
    let unused = after.bytes_reserved - before.bytes_in_use;
    assert!(before.bytes_in_use >= weight_bytes);
    assert!(
        unused < weight_bytes,
        "{unused} bytes beside the operands could hold a weight of {weight_bytes}"
    );
}
