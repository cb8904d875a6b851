//! A device to test on, random data and conversions.

// Every test target compiles this module and uses its own part.
#![allow(dead_code)]

use std::sync::OnceLock;

use cubecl::client::Client;
use cubecl::server::Handle;
use half::f16;
use hd_pissa_bits::splitmix;
use hd_pissa_kernels::{FloatType, Matrix, reference::Shard};

/// The client of the most capable device of the build's runtimes. `None`, with a message, if there
/// is no device. A runtime that the environment requires must be the one found.
pub fn client() -> Option<Client> {
    static CLIENT: OnceLock<Option<Client>> = OnceLock::new();
    let client = CLIENT.get_or_init(find).clone();
    let name = client.as_ref().map_or("none", |client| client.name());
    for (variable, runtime) in [
        ("HD_PISSA_REQUIRE_WGPU", "wgpu"),
        ("HD_PISSA_REQUIRE_CUDA", "cuda"),
    ] {
        let is_required = std::env::var(variable).as_deref() == Ok("1");
        assert!(
            !is_required || name.starts_with(runtime),
            "{variable}=1, but the runtime of the device found is {name}"
        );
    }
    if client.is_none() {
        eprintln!("skipped: no device was found");
    }
    client
}

#[cfg(any(feature = "wgpu", feature = "cuda", feature = "rocm", feature = "cpu"))]
fn find() -> Option<Client> {
    // A runtime without a device panics.
    std::panic::catch_unwind(|| cubecl::Device::default().client()).ok()
}

/// A build without a runtime.
#[cfg(not(any(feature = "wgpu", feature = "cuda", feature = "rocm", feature = "cpu")))]
fn find() -> Option<Client> {
    None
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u64 {
        splitmix(&mut self.0)
    }

    /// Uniform in `[-scale, scale)`.
    pub fn values(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len)
            .map(|_| ((self.word() >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale)
            .collect()
    }
}

/// The bytes of values rounded to `dtype`.
pub fn bytes(values: &[f32], dtype: FloatType) -> Vec<u8> {
    match dtype {
        FloatType::F32 => values.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        FloatType::F16 => values
            .iter()
            .flat_map(|v| f16::from_f32(*v).to_ne_bytes())
            .collect(),
        FloatType::BF16 => values
            .iter()
            .flat_map(|v| half::bf16::from_f32(*v).to_ne_bytes())
            .collect(),
    }
}

/// A buffer of values rounded to `dtype`; never empty, as some devices have no empty buffers.
pub fn upload(client: &Client, values: &[f32], dtype: FloatType) -> Handle {
    let mut bytes = bytes(values, dtype);
    bytes.resize(bytes.len().max(4), 0);
    client.create_from_slice(&bytes)
}

pub fn upload_words(client: &Client, words: &[u32]) -> Handle {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    client.create_from_slice(&bytes)
}

/// The first `len` elements of a buffer, widened.
pub fn download(client: &Client, handle: &Handle, len: usize, dtype: FloatType) -> Vec<f32> {
    let bytes = client.read_one(handle.clone()).expect("the kernels ran");
    let halves = || {
        bytes
            .chunks_exact(2)
            .map(|b| u16::from_ne_bytes([b[0], b[1]]))
            .take(len)
    };
    match dtype {
        FloatType::F32 => bytes
            .chunks_exact(4)
            .map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
            .take(len)
            .collect(),
        FloatType::F16 => halves().map(|bits| f16::from_bits(bits).to_f32()).collect(),
        FloatType::BF16 => halves()
            .map(|bits| half::bf16::from_bits(bits).to_f32())
            .collect(),
    }
}

pub fn download_words(client: &Client, handle: &Handle) -> Vec<u32> {
    let bytes = client.read_one(handle.clone()).expect("the kernels ran");
    bytes
        .chunks_exact(4)
        .map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

/// Values after rounding to the device's type.
pub fn rounded(values: &[f32], dtype: FloatType) -> Vec<f32> {
    match dtype {
        FloatType::F32 => values.to_vec(),
        FloatType::F16 => values.iter().map(|v| f16::from_f32(*v).to_f32()).collect(),
        FloatType::BF16 => values
            .iter()
            .map(|v| half::bf16::from_f32(*v).to_f32())
            .collect(),
    }
}

/// The layout of a matrix in its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    RowMajor,
    ColumnMajor,
    /// Row-major with three unused elements behind each row.
    Padded,
    /// Every other element of a row-major buffer.
    Strided,
}

impl Layout {
    pub const ALL: [Self; 4] = [
        Self::RowMajor,
        Self::ColumnMajor,
        Self::Padded,
        Self::Strided,
    ];

    pub fn strides(self, [rows, columns]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::RowMajor => [columns, 1],
            Self::ColumnMajor => [1, rows],
            Self::Padded => [columns + 3, 1],
            Self::Strided => [2 * columns, 2],
        }
    }
}

fn span(shape: [usize; 2], strides: [usize; 2]) -> usize {
    if shape.contains(&0) {
        return 0;
    }
    (shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1] + 1
}

/// Puts a row-major matrix on the device. Unused elements are NaN, so a test notices if one is
/// read.
pub fn matrix(
    client: &Client,
    values: &[f32],
    shape: [usize; 2],
    layout: Layout,
    dtype: FloatType,
) -> Matrix {
    let strides = layout.strides(shape);
    let mut buffer = vec![f32::NAN; span(shape, strides)];
    for i in 0..shape[0] {
        for j in 0..shape[1] {
            buffer[i * strides[0] + j * strides[1]] = values[i * shape[1] + j];
        }
    }
    Matrix {
        handle: upload(client, &buffer, dtype),
        shape,
        strides,
        dtype,
    }
}

/// The row-major values of a matrix; elements between them must still be NaN.
pub fn read(client: &Client, matrix: &Matrix) -> Vec<f32> {
    let (shape, strides) = (matrix.shape, matrix.strides);
    let mut buffer = download(client, &matrix.handle, span(shape, strides), matrix.dtype);
    let mut values = Vec::with_capacity(shape[0] * shape[1]);
    for i in 0..shape[0] {
        for j in 0..shape[1] {
            let place = i * strides[0] + j * strides[1];
            values.push(std::mem::replace(&mut buffer[place], f32::NAN));
        }
    }
    assert!(
        buffer.iter().all(|value| value.is_nan()),
        "a gap of the matrix was written"
    );
    values
}

/// A row for each shard: its left and its right factor.
pub fn pack<'a>(client: &Client, factors: impl Iterator<Item = [&'a [f32]; 2]>) -> Handle {
    let values: Vec<f32> = factors.flat_map(|row| row.concat()).collect();
    upload(client, &values, FloatType::F32)
}

/// Random factors and deltas: factors of order one, deltas of order `delta`.
pub fn shards(
    random: &mut Random,
    count: usize,
    [d_input, rank, d_output]: [usize; 3],
    delta: f32,
) -> Vec<Shard> {
    (0..count)
        .map(|_| Shard {
            a: random.values(d_input * rank, 1.0),
            b: random.values(rank * d_output, 1.0),
            delta_a: random.values(d_input * rank, delta),
            delta_b: random.values(rank * d_output, delta),
        })
        .collect()
}

pub fn frames(client: &Client, shards: &[Shard]) -> Handle {
    pack(client, shards.iter().map(|shard| [&shard.a[..], &shard.b]))
}

pub fn deltas(client: &Client, shards: &[Shard]) -> Handle {
    let rows = shards.iter();
    pack(
        client,
        rows.map(|shard| [&shard.delta_a[..], &shard.delta_b]),
    )
}
