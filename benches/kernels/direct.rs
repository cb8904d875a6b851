//! The kernels launched without Burn, on the same hardware.

use std::cell::Cell;

use cubecl::client::Client;
use cubecl::server::Handle;
use half::{bf16, f16};
use hd_pissa_kernels::{
    Arithmetic, Buffer, FactorProduct, FloatType, KernelError, LowRankProduct, Matrix, Merge,
    MergePrecision, ShardedFactors, companion_len, low_rank_product, merge_with, new_counter,
    reference,
};

use crate::device::Float;
use crate::{factors, merges, products};
use hd_pissa_benches::sample::Host;

pub fn float(dtype: Float) -> FloatType {
    match dtype {
        Float::F32 => FloatType::F32,
        Float::F16 => FloatType::F16,
        Float::BF16 => FloatType::BF16,
    }
}

fn upload(client: &Client, values: &[f32], dtype: Float) -> Handle {
    let bytes: Vec<u8> = match dtype {
        Float::F32 => values.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        Float::F16 => {
            let halves = values.iter().map(|v| f16::from_f32(*v));
            halves.flat_map(|v| v.to_ne_bytes()).collect()
        }
        Float::BF16 => {
            let halves = values.iter().map(|v| bf16::from_f32(*v));
            halves.flat_map(|v| v.to_ne_bytes()).collect()
        }
    };
    client.create_from_slice(&bytes)
}

fn words(client: &Client, handle: &Handle) -> Vec<u32> {
    let bytes = client.read_one(handle.clone()).expect("the kernels ran");
    let words = bytes.chunks_exact(4);
    words
        .map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

/// The bits of `len` halves.
fn halves(client: &Client, handle: &Handle, len: usize) -> Vec<u16> {
    let bytes = client.read_one(handle.clone()).expect("the kernels ran");
    let halves = bytes.chunks_exact(2).take(len);
    halves.map(|b| u16::from_ne_bytes([b[0], b[1]])).collect()
}

fn download(client: &Client, matrix: &Matrix) -> Host {
    let [rows, columns] = matrix.shape;
    let len = rows * columns;
    let values = match matrix.dtype {
        FloatType::F32 => {
            let words = words(client, &matrix.handle).into_iter().take(len);
            words.map(f32::from_bits).collect()
        }
        FloatType::F16 => {
            let halves = halves(client, &matrix.handle, len).into_iter();
            halves.map(|bits| f16::from_bits(bits).to_f32()).collect()
        }
        FloatType::BF16 => {
            let halves = halves(client, &matrix.handle, len).into_iter();
            halves.map(|bits| bf16::from_bits(bits).to_f32()).collect()
        }
    };
    Host { values, columns }
}

/// Waits until the device has done everything queued so far: by reading one word of its memory.
fn sync(client: &Client, word: &Handle) {
    drop(client.read_one(word.clone()).expect("the device runs"));
}

/// Every kernel that the device has for a merge.
pub fn merges<'a>(client: &'a Client, case: &merges::Case, sums: f64) -> Vec<merges::Way<'a>> {
    let tf32 = Arithmetic::SplitTf32;
    // The sums on matrix units round toward zero, by at most twice as much.
    let tf32_error = 2.0 * sums + 2f64.powi(-22);
    let mut ways = vec![merge_way(
        client,
        case,
        "kernel",
        Float::F32,
        Arithmetic::Exact,
        sums,
    )];
    for (name, dtype) in [
        ("kernel, f16 split", Float::F16),
        ("kernel, bf16 split", Float::BF16),
    ] {
        if float(dtype).is_supported(client) {
            ways.push(merge_way(
                client,
                case,
                name,
                dtype,
                Arithmetic::Exact,
                sums,
            ));
        }
    }
    if tf32.is_supported(client) {
        ways.push(merge_way(
            client,
            case,
            "kernel, tf32 halves",
            Float::F32,
            tf32,
            tf32_error,
        ));
    }
    ways
}

fn merge_way<'a>(
    client: &'a Client,
    case: &merges::Case,
    name: &'static str,
    dtype: Float,
    arithmetic: Arithmetic,
    error: f64,
) -> merges::Way<'a> {
    let [d_input, _] = case.size;
    let factors = |host: &Host| ShardedFactors {
        buffer: Buffer {
            handle: upload(client, &host.values, Float::F32),
            len: host.values.len(),
            dtype: FloatType::F32,
        },
        left: 0,
        right: case.rank * d_input,
        shard_stride: host.columns,
    };
    let handle = upload(client, &case.weight.values, dtype);
    let weight = Matrix::row_major(handle, case.size, float(dtype));
    let companion = vec![0; 4 * companion_len(&weight)];
    let companion = (dtype != Float::F32).then(|| client.create_from_slice(&companion));
    let counter = new_counter(client);
    let arguments = Merge {
        weight: weight.clone(),
        frames: factors(&case.frames),
        deltas: factors(&case.deltas),
        rank: case.rank,
        shards: case.shards,
        precision: MergePrecision::Split,
        companion: companion.clone(),
        non_finite: counter.clone(),
        squares: new_counter(client),
        square_slot: 0,
    };
    let count = std::rc::Rc::new(Cell::new(0));
    let merged = count.clone();
    merges::Way {
        name,
        work: Box::new(move || {
            merge_with(client, arguments.clone(), arithmetic).expect("the operands fit");
            sync(client, &counter);
            merged.set(merged.get() + 1);
        }),
        weight: Box::new(move || {
            let mut values = download(client, &weight);
            if let Some(companion) = &companion {
                join(&mut values, &words(client, companion), dtype);
            }
            (values, count.get())
        }),
        error,
    }
}

/// Completes the high halves of a row-major weight.
fn join(values: &mut Host, companion: &[u32], dtype: Float) {
    let pitch = values.columns.div_ceil(2);
    for (place, value) in values.values.iter_mut().enumerate() {
        let (row, column) = (place / values.columns, place % values.columns);
        let low = (companion[row * pitch + column / 2] >> (16 * (column % 2))) as u16;
        *value = match dtype {
            Float::F32 => *value,
            Float::F16 => reference::join_f16(f16::from_f32(*value), low),
            Float::BF16 => reference::join_bf16(bf16::from_f32(*value), low),
        };
    }
}

/// A launch function.
type Launch = fn(&Client, LowRankProduct) -> Result<(), KernelError>;

/// The product in one launch of the kernel or of the pipeline, and in two of the kernel.
pub fn products<'a>(
    client: &'a Client,
    case: &products::Case,
    input: Float,
) -> Vec<products::Way<'a>> {
    let dtype = float(input);
    let (tokens, d_input) = (case.x.values.len() / case.x.columns, case.x.columns);
    let (d_output, rank) = (case.w.columns, case.a.columns);
    let operand = |host: &Host, dtype: Float, rows: usize| {
        let handle = upload(client, &host.values, dtype);
        Matrix::row_major(handle, [rows, host.columns], float(dtype))
    };
    let poison = |columns: usize, dtype: Float| {
        let values = vec![f32::NAN; tokens * columns];
        operand(&Host { values, columns }, dtype, tokens)
    };
    let both = || LowRankProduct {
        input: operand(&case.x, input, tokens),
        weight: operand(&case.w, input, d_input),
        factor: operand(&case.a, Float::F32, d_input),
        bias: None,
        output: poison(d_output, input),
        projection: poison(rank, Float::F32),
    };
    let empty = |rows: usize, dtype| Matrix::row_major(client.empty(4), [rows, 0], dtype);
    let (fused, pair) = (both(), both());
    let only_y = LowRankProduct {
        factor: empty(d_input, FloatType::F32),
        projection: empty(tokens, FloatType::F32),
        ..pair.clone()
    };
    let only_p = LowRankProduct {
        weight: empty(d_input, dtype),
        output: empty(tokens, dtype),
        ..pair.clone()
    };
    let sums = d_input as f64 * f64::from(f32::EPSILON);
    // A product and a sum per step, each rounded; then the store.
    let error = match input {
        Float::F32 => sums,
        Float::F16 => sums + 2f64.powi(-11),
        Float::BF16 => sums + 2f64.powi(-8),
    };
    let kernel: Launch = low_rank_product;
    #[allow(unused_mut, reason = "extended in a build with pipelines")]
    let mut ways: Vec<Plan> = vec![
        ("kernel, fused", kernel, fused.clone(), vec![fused], error),
        (
            "kernel, y, then p",
            kernel,
            pair,
            vec![only_y, only_p],
            error,
        ),
    ];
    #[cfg(feature = "pipeline")]
    ways.extend(pipeline(client, both(), error));
    let ways = ways.into_iter();
    ways.map(|(name, run, product, launches, error)| {
        let word = new_counter(client);
        products::Way {
            name,
            work: Box::new(move || {
                for launch in &launches {
                    run(client, launch.clone()).expect("the operands fit");
                }
                sync(client, &word);
            }),
            result: Box::new(move || {
                [&product.output, &product.projection].map(|matrix| Some(download(client, matrix)))
            }),
            has_projection: true,
            error,
        }
    })
    .collect()
}

/// The product with a factor, the input read in its own type.
pub fn factor_product<'a>(
    client: &'a Client,
    case: &factors::Case,
    input: Float,
) -> factors::Way<'a> {
    let operand = |host: &Host, dtype: Float| {
        let handle = upload(client, &host.values, dtype);
        let shape = [host.values.len() / host.columns, host.columns];
        Matrix::row_major(handle, shape, float(dtype))
    };
    let mut x = operand(&case.x, input);
    if case.is_gradient {
        x = x.transposed();
    }
    let [rows, depth] = x.shape;
    let columns = case.f.columns;
    let values = vec![f32::NAN; rows * columns];
    let output = operand(&Host { values, columns }, Float::F32);
    let product = FactorProduct {
        input: x,
        factor: operand(&case.f, Float::F32),
        output: output.clone(),
    };
    let word = new_counter(client);
    factors::Way {
        name: "kernel",
        work: Box::new(move || {
            hd_pissa_kernels::factor_product(client, product.clone()).expect("the operands fit");
            sync(client, &word);
        }),
        result: Box::new(move || download(client, &output)),
        error: depth as f64 * f64::from(f32::EPSILON),
    }
}

/// A name, a launch function, the product whose results count, all launches, and a bound on the error.
type Plan = (
    &'static str,
    Launch,
    LowRankProduct,
    Vec<LowRankProduct>,
    f64,
);

/// The product through the pipeline, unless the device cannot run it.
#[cfg(feature = "pipeline")]
fn pipeline(client: &Client, product: LowRankProduct, error: f64) -> Option<Plan> {
    let run: Launch = hd_pissa_kernels::low_rank_product_by_pipeline;
    if let Err(error) = run(client, product.clone()) {
        println!("left out: {error}");
        return None;
    }
    // It rounds what it reads: to `tf32` on matrix units, the factor to the input's type.
    let dtype = product.input.dtype;
    let read = match dtype {
        FloatType::F32 if !hd_pissa_kernels::has_matrix_units(client, dtype) => 0.0,
        FloatType::F32 => 2f64.powi(-9),
        FloatType::F16 => 2f64.powi(-11),
        FloatType::BF16 => 2f64.powi(-8),
    };
    let launches = vec![product.clone()];
    Some(("pipeline, fused", run, product, launches, error + read))
}
