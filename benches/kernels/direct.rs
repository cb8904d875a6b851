//! The kernels launched without Burn, on the same hardware.

use std::cell::Cell;

use cubecl::client::Client;
use cubecl::server::Handle;
use half::{bf16, f16};
use hd_pissa_bits::{Half, Rounding};
use hd_pissa_kernels::{
    DenseProduct, FloatType, LowRankProduct, Matrix, low_rank_product, residual_shape,
};

use crate::float::Float;
use crate::operands::{Factor, Merge, Merged, Product, Products, Variant};
use hd_pissa_check::measure::sample::Host;

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

fn words_of(client: &Client, handle: &Handle) -> Vec<u32> {
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
            let words = words_of(client, &matrix.handle).into_iter().take(len);
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

/// A word of zero.
fn word(client: &Client) -> Handle {
    client.create_from_slice(&0u32.to_ne_bytes())
}

/// Waits until the device has done everything queued so far, by reading one word of its memory.
fn sync(client: &Client, word: &Handle) {
    drop(client.read_one(word.clone()).expect("the device runs"));
}

/// The merge into an `f32` weight, and into halves that the device has, compensated.
pub fn merges<'a>(client: &'a Client, case: &Merge, error: f64) -> Vec<Variant<'a, Merged>> {
    let variants = [
        ("kernel", Float::F32),
        ("kernel, f16 compensated", Float::F16),
        ("kernel, bf16 compensated", Float::BF16),
    ];
    let supported = variants
        .into_iter()
        .filter(|(_, dtype)| dtype.kernel_type().is_supported(client));
    supported
        .map(|(name, dtype)| merge(client, case, name, dtype, error))
        .collect()
}

fn merge<'a>(
    client: &'a Client,
    case: &Merge,
    name: &'static str,
    dtype: Float,
    error: f64,
) -> Variant<'a, Merged> {
    let handle = upload(client, &case.weight.values, dtype);
    let weight = Matrix::row_major(handle, case.size, dtype.kernel_type());
    let words: usize = residual_shape(&weight).iter().product();
    let residual = (dtype != Float::F32).then(|| client.create_from_slice(&vec![0; 4 * words]));
    let gate = word(client);
    let arguments = hd_pissa_kernels::Merge {
        weight: weight.clone(),
        frames: upload(client, &case.frames.values, Float::F32),
        deltas: upload(client, &case.deltas.values, Float::F32),
        rank: case.rank,
        shards: case.shards,
        rounding: Rounding::Nearest,
        residual: residual.clone(),
        gate: gate.clone(),
    };
    let count = std::rc::Rc::new(Cell::new(0));
    let merged = count.clone();
    Variant {
        name,
        work: Box::new(move || {
            hd_pissa_kernels::merge(client, arguments.clone()).expect("the operands fit");
            sync(client, &gate);
            merged.set(merged.get() + 1);
        }),
        result: Box::new(move || {
            let mut values = download(client, &weight);
            if let Some(residual) = &residual {
                join(&mut values, &words_of(client, residual), dtype);
            }
            (values, count.get())
        }),
        error,
    }
}

/// Completes the high halves of a row-major weight.
fn join(values: &mut Host, residual: &[u32], dtype: Float) {
    let pitch = values.columns.div_ceil(2);
    for (place, value) in values.values.iter_mut().enumerate() {
        let (row, column) = (place / values.columns, place % values.columns);
        let low = (residual[row * pitch + column / 2] >> (16 * (column % 2))) as u16;
        *value = match dtype {
            Float::F32 => *value,
            Float::F16 => f16::from_f32(*value).join(low),
            Float::BF16 => bf16::from_f32(*value).join(low),
        };
    }
}

/// The product in one launch of the kernel.
pub fn product<'a>(client: &'a Client, case: &Product, input: Float) -> Variant<'a, Products> {
    let operand = |host: &Host, dtype: Float| matrix(client, host, dtype);
    let tokens = case.x.values.len() / case.x.columns;
    let poison = |columns: usize, dtype: Float| {
        let values = vec![f32::NAN; tokens * columns];
        operand(&Host { values, columns }, dtype)
    };
    let output = poison(case.w.columns, input);
    let projection = poison(case.a.columns, Float::F32);
    let product = LowRankProduct {
        input: operand(&case.x, input),
        factor: operand(&case.a, Float::F32),
        projection: projection.clone(),
        dense: Some(DenseProduct {
            weight: operand(&case.w, input),
            output: output.clone(),
        }),
    };
    let sums = case.x.columns as f64 * f64::from(f32::EPSILON);
    // Each step rounds a product and a sum; then the store rounds.
    let error = match input {
        Float::F32 => sums,
        Float::F16 => sums + 2f64.powi(-11),
        Float::BF16 => sums + 2f64.powi(-8),
    };
    let word = word(client);
    Variant {
        name: "kernel, fused",
        work: Box::new(move || {
            low_rank_product(client, product.clone()).expect("the operands fit");
            sync(client, &word);
        }),
        result: Box::new(move || [&output, &projection].map(|m| Some(download(client, m)))),
        error,
    }
}

/// The product with a factor, the input read in its own type.
pub fn factor_product<'a>(client: &'a Client, case: &Factor, input: Float) -> Variant<'a, Host> {
    let mut x = matrix(client, &case.x, input);
    if case.is_gradient {
        x = x.transposed();
    }
    let [rows, depth] = x.shape;
    let columns = case.f.columns;
    let values = vec![f32::NAN; rows * columns];
    let output = matrix(client, &Host { values, columns }, Float::F32);
    let product = LowRankProduct {
        input: x,
        factor: matrix(client, &case.f, Float::F32),
        projection: output.clone(),
        dense: None,
    };
    let word = word(client);
    Variant {
        name: "kernel",
        work: Box::new(move || {
            low_rank_product(client, product.clone()).expect("the operands fit");
            sync(client, &word);
        }),
        result: Box::new(move || download(client, &output)),
        error: depth as f64 * f64::from(f32::EPSILON),
    }
}

fn matrix(client: &Client, host: &Host, dtype: Float) -> Matrix {
    let handle = upload(client, &host.values, dtype);
    let shape = [host.values.len() / host.columns, host.columns];
    Matrix::row_major(handle, shape, dtype.kernel_type())
}
