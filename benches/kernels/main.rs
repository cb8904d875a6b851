//! The merge and the low-rank products in every form that the build has, against equivalents made
//! of Burn's products. A copy of the weight gives the bandwidth, and a large product the
//! arithmetic. Both give the least time that a job can take.
//!
//! `cargo bench --workspace --bench kernels` measures Flex. `--features wgpu` or `--features cuda`
//! measures a GPU, and also calls the kernels directly. With `autotune`, Burn's products are those
//! of a build with its default features. `-- --help` explains how to measure less. The rows go to
//! `benches/kernels.json`, where they replace those of the same device and case.
//!
//! Every case draws new inputs. Some elements of the results are compared with sums in `f64` before
//! and after the timing. This shows a launch that does nothing or writes to the wrong place.

mod device;
#[cfg(feature = "cubecl-kernels")]
mod direct;
#[cfg(feature = "cubecl-kernels")]
mod factors;
mod float;
mod merges;
mod operands;
mod products;
mod rows;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use device::Bench;
use float::Float;
use hd_pissa_check::measure::size;
use rows::{Roofline, Rows};

const SIZES: [[usize; 2]; 6] = [
    [576, 576],
    [576, 1536],
    [1024, 1024],
    [2048, 5632],
    [4096, 4096],
    [4096, 14336],
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Operation {
    Merge,
    Product,
    /// Only with a factor; on GPUs.
    Factor,
}

#[derive(Debug, Parser)]
struct Options {
    /// Measure only one operation.
    #[arg(long)]
    only: Option<Operation>,
    /// Sizes of weights, as in `576x1536,1024x1024`.
    #[arg(long, value_delimiter = ',', value_parser = size)]
    sizes: Vec<[usize; 2]>,
    /// Tokens of the input of a product.
    #[arg(long, value_delimiter = ',', default_values_t = [256, 2048, 8192])]
    tokens: Vec<usize>,
    /// Ranks of the factors.
    #[arg(long, value_delimiter = ',', default_values_t = [8, 16, 64])]
    ranks: Vec<usize>,
    /// Shards of a merge.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 8])]
    shards: Vec<usize>,
    /// Time for a case; there are 5 to 41 rounds.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Leave out a case if its arithmetic takes longer than this, in seconds.
    #[arg(long, default_value_t = 1.0)]
    limit: f64,
    /// The three smallest sizes, few tokens and little time, written to the target directory.
    #[arg(long)]
    quick: bool,
    /// The file to write, instead of `benches/kernels.json`.
    #[arg(long)]
    output: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let mut options = Options::parse();
    if options.sizes.is_empty() {
        options.sizes = SIZES.to_vec();
    }
    let mut output = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels.json");
    if options.quick {
        options
            .sizes
            .retain(|[rows, columns]| rows * columns <= 1 << 20);
        options.tokens.retain(|tokens| *tokens <= 256);
        options.seconds = options.seconds.min(0.2);
        output = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("../bench/kernels.json");
    }
    let output = options.output.clone().unwrap_or(output);

    let bench = Bench::new(options.seconds);
    let mut rows = Rows::new(bench.name.clone());
    for dtype in bench.dtypes() {
        let large = bench.large_product(dtype, options.quick);
        rows.push(large.row.clone());
        for &size in &options.sizes {
            let (copy, bytes_per_second) = bench.copy(size, dtype);
            rows.push(copy);
            let roofline = Roofline {
                bytes_per_second,
                flops_per_second: large.flops_per_second,
            };
            let fits = |flops: f64, case: &str| {
                let seconds = flops / roofline.flops_per_second;
                if seconds > options.limit {
                    println!("left out: {case} {size:?} would take {seconds:.1} s a round");
                }
                seconds <= options.limit
            };
            for &rank in &options.ranks {
                let is_wanted = |operation| options.only.is_none_or(|only| only == operation);
                if is_wanted(Operation::Merge) && dtype == Float::F32 {
                    for &shards in &options.shards {
                        if fits(merges::flops(size, rank, shards), "merge") {
                            merges::measure(&bench, size, rank, shards, &roofline, &mut rows);
                        }
                    }
                }
                #[cfg(feature = "cubecl-kernels")]
                if is_wanted(Operation::Factor) {
                    for &tokens in &options.tokens {
                        factors::measure(&bench, dtype, tokens, size, rank, &roofline, &mut rows);
                    }
                }
                if is_wanted(Operation::Product) {
                    for &tokens in &options.tokens {
                        if fits(products::flops(tokens, size, rank), "product") {
                            products::measure(
                                &bench, dtype, tokens, size, rank, &roofline, &mut rows,
                            );
                        }
                    }
                }
            }
        }
    }
    rows.write(&output);
}
