//! The CUDA C++ of every kernel, built without CUDA and compiled to machine code without a GPU.
//!
//! `cargo test --release --workspace --test cuda_source -- --nocapture` prints registers, spills
//! and shared memory of every variant; a spill fails. The test looks for NVRTC in Python's
//! packages, or only in the folder `HD_PISSA_NVRTC` if that is set. Without NVRTC it only builds
//! the sources, and fails if `HD_PISSA_REQUIRE_NVRTC=1` or if the folder is set.
//! `HD_PISSA_CUDA_SOURCE` names a folder for the sources. `HD_PISSA_KERNEL` selects kernels by a
//! part of their names; it fails if no kernel matches.

mod nvrtc;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cubecl::ir::features::{Features, Plane, TypeUsage};
use cubecl::ir::{
    DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties,
    MemoryDeviceProperties, OpaqueType, TargetProperties, VectorSize,
};
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl_common::device::{DeviceId, ServiceId};
use cubecl_common::profile::TimingMethod;
use cubecl_cpp::cuda::{arch::CudaArchitecture, mma};
use cubecl_cpp::shared::{
    CompilationOptions, CppCompiler, CppSupportedFeatures, register_mma_features,
    register_wmma_features,
};
use cubecl_cpp::target::Cuda;
use cubecl_environment::stream::StreamId;
use cubecl_runtime::compiler::Compiler;
use cubecl_runtime::kernel::CubeKernel;
use hd_pissa_kernels::FloatType;
use hd_pissa_kernels::kernels::{
    Access, ExtentsLaunch, OperandLaunch, OperandsLaunch, PlacesLaunch, Store, TargetLaunch, Tile,
    fingerprint, join, merge, product, reduce, row_statistics, storage_type,
};

use nvrtc::{Nvrtc, NvrtcError};

const ARCHITECTURES: [(u32, &str); 2] = [(80, "sm_80"), (90, "sm_90a")];
const TYPES: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::BF16];

/// The properties that CubeCL would report for a data-centre GPU of this compute capability.
fn properties(version: u32) -> Arc<DeviceProperties> {
    let mut properties = DeviceProperties::new(
        Features::default(),
        MemoryDeviceProperties::new(u64::MAX, 512),
        HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 32,
            max_shared_memory_size: if version >= 90 { 232_448 } else { 166_912 },
            max_cube_count: (i32::MAX as u32, 65535, 65535),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(if version >= 90 { 132 } else { 108 }),
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            last_level_cache_size: None,
            max_vector_size: VectorSize::MAX,
            cube_mma_reserved_shared_memory: 0,
        },
        TimingMethod::Device,
        DeviceIdentity {
            name: format!("sm_{version}"),
            fingerprint: format!("ptx_sm{version}"),
            physical: None,
        },
    );
    cubecl_cpp::register_supported_types(&mut properties);
    let architecture = CudaArchitecture {
        version,
        tensor_cores: true,
    };
    register_wmma_features(
        mma::CudaCmmaCompiler::Cpp.supported_cmma_combinations(&architecture),
        &mut properties,
    );
    register_mma_features(
        cubecl_cpp::cuda::supported_mma_combinations(&architecture),
        &mut properties,
    );
    properties.register_type_usage(ElemType::Float(FloatKind::TF32), TypeUsage::Conversion);
    properties.register_opaque_type(OpaqueType::Barrier);
    properties.features.plane.insert(Plane::Sync);
    properties.features.copy_async = true;
    Arc::new(properties)
}

fn cpp(kernel: impl CubeKernel, version: u32) -> String {
    let options = CompilationOptions {
        warp_size: 32,
        supports_features: CppSupportedFeatures {
            fast_math: true,
            dp4a: true,
            fast_tanh: true,
            grid_constants: true,
            clusters: version >= 90,
            elect_sync: version >= 90,
        },
        ..Default::default()
    };
    CppCompiler::<Cuda>::default()
        .compile(kernel.define(), &options)
        .expect("the kernel has CUDA C++")
        .source
}

fn handle() -> Handle {
    struct NoServer;
    let service = ServiceId::of::<NoServer>(DeviceId::new(0, 0));
    Handle::new(service, StreamId::current(), 1 << 20)
}

fn buffer() -> BufferArg {
    // SAFETY: the kernel is only compiled, never launched.
    unsafe { BufferArg::from_raw_parts(handle(), 1 << 12) }
}

fn operand() -> OperandLaunch {
    OperandLaunch::new(0, 1, 1, 1, 1)
}

fn size(vectors: bool) -> usize {
    if vectors { 4 } else { 1 }
}

/// A kernel's name and its source for a compute capability.
struct Kernel {
    name: String,
    build: Box<dyn Fn(u32) -> String + Send + Sync>,
}

impl Kernel {
    fn new(name: impl Into<String>, build: impl Fn(u32) -> String + Send + Sync + 'static) -> Self {
        Self {
            name: name.into(),
            build: Box::new(build),
        }
    }
}

/// Every merge that [`hd_pissa_kernels::merge`] can launch.
fn merges(kernels: &mut Vec<Kernel>) {
    for dtype in TYPES {
        let stores = match dtype {
            FloatType::F32 => vec![Store::Nearest],
            _ => vec![
                Store::Nearest,
                Store::Compensated(dtype),
                Store::Stochastic(dtype),
            ],
        };
        for store in stores {
            for (tile, factor_vectors, weight_vectors, column_major) in variants() {
                let name = format!(
                    "merge {dtype:?} {store:?} {}x{} {}",
                    tile.major(),
                    tile.minor(),
                    [
                        if factor_vectors {
                            "factor vectors"
                        } else {
                            "factor elements"
                        },
                        if weight_vectors {
                            "weight vectors"
                        } else {
                            "weight elements"
                        },
                        if column_major {
                            "column-major"
                        } else {
                            "row-major"
                        },
                    ]
                    .join(", ")
                );
                let build = move |version| {
                    let residual = matches!(store, Store::Compensated(_)).then(buffer);
                    let kernel = merge::create_dummy_kernel(
                        properties(version),
                        Arc::new(TargetProperties::default()),
                        CubeCount::Static(1, 1, 1),
                        CubeDim::new_1d(tile.units() as u32),
                        size(factor_vectors),
                        size(weight_vectors),
                        buffer(),
                        residual.into(),
                        buffer(),
                        buffer(),
                        buffer(),
                        buffer(),
                        OperandsLaunch::new(operand(), operand()),
                        8,
                        TargetLaunch::new(8, 8, 8, 1, 1, 2),
                        factor_vectors,
                        column_major,
                        store,
                        tile,
                        dtype.elem_type(),
                    );
                    cpp(kernel, version)
                };
                kernels.push(Kernel::new(name, build));
            }
        }
    }
}

/// Tile, vectors of factors and of the weight, and column-major weights.
fn variants() -> impl Iterator<Item = (Tile, bool, bool, bool)> {
    let flags = [false, true];
    let accesses = flags.map(|factors| flags.map(|weight| (factors, weight)));
    Tile::ALL.into_iter().flat_map(move |tile| {
        let accesses = accesses.into_iter().flatten();
        accesses.flat_map(move |(factors, weight)| {
            flags.map(|column_major| (tile, factors, weight, column_major))
        })
    })
}

/// The low-rank product, with a weight and without: every dtype and tile with every way of reading,
/// which each operand takes in turn.
fn products(kernels: &mut Vec<Kernel>) {
    let access = |vectors, along_depth| Access {
        vectors,
        along_depth,
    };
    let layouts = [
        (
            "row-major",
            [access(true, true), access(true, false), access(true, false)],
        ),
        (
            "column-major right",
            [access(true, true), access(true, true), access(true, true)],
        ),
        (
            "column-major input",
            [access(true, false), access(true, true), access(true, false)],
        ),
        (
            "elements",
            [
                access(false, true),
                access(false, false),
                access(false, false),
            ],
        ),
        (
            "transposed elements",
            [
                access(false, false),
                access(false, true),
                access(false, true),
            ],
        ),
    ];
    let tiles = Tile::NARROW.map(|tile| (tile, false)).into_iter();
    let tiles = tiles.chain(Tile::ALL.map(|tile| (tile, true)));
    for (tile, with_weight) in tiles {
        for dtype in TYPES {
            for (layout, [input, factor, weight]) in layouts {
                let name = format!(
                    "product {dtype:?} {}x{} {layout}{}",
                    tile.major(),
                    tile.minor(),
                    if with_weight { ", weight" } else { "" }
                );
                let build = move |version| {
                    let kernel = product::create_dummy_kernel(
                        properties(version),
                        Arc::new(TargetProperties::default()),
                        CubeCount::Static(1, 1, 1),
                        CubeDim::new_1d(tile.units() as u32),
                        size(input.vectors),
                        size(factor.vectors),
                        size(weight.vectors),
                        size(input.vectors),
                        buffer(),
                        buffer(),
                        buffer(),
                        with_weight.then(buffer).into(),
                        with_weight.then(buffer).into(),
                        operand(),
                        operand(),
                        operand(),
                        ExtentsLaunch::new(8, 8, 8, 8, 1, 8),
                        PlacesLaunch::new(64, 8, 1, 8, 1),
                        input,
                        factor,
                        weight,
                        tile,
                        dtype.elem_type(),
                    );
                    cpp(kernel, version)
                };
                kernels.push(Kernel::new(name, build));
            }
        }
    }
}

fn reductions(kernels: &mut Vec<Kernel>) {
    let build = |version| {
        let kernel = reduce::sum::create_dummy_kernel(
            properties(version),
            Arc::new(TargetProperties::default()),
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(256),
            buffer(),
            buffer(),
            8,
            256,
        );
        cpp(kernel, version)
    };
    kernels.push(Kernel::new("sum of partial sums", build));
    let build = |version| {
        let kernel = reduce::sum_chunks::create_dummy_kernel(
            properties(version),
            Arc::new(TargetProperties::default()),
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(256),
            buffer(),
            buffer(),
            2,
            8,
            8,
            8,
            1,
            256,
        );
        cpp(kernel, version)
    };
    kernels.push(Kernel::new("sum of chunks", build));
}

/// Statistics of rows, copies of matrices, and fingerprints.
fn audits(kernels: &mut Vec<Kernel>) {
    let build = |version| {
        let kernel = row_statistics::chunks::create_dummy_kernel(
            properties(version),
            Arc::new(TargetProperties::default()),
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(256),
            buffer(),
            buffer(),
            8,
            4,
            8,
            8,
            1,
            256,
        );
        cpp(kernel, version)
    };
    kernels.push(Kernel::new("statistics of the chunks of rows", build));
    let build = |version| {
        let kernel = row_statistics::totals::create_dummy_kernel(
            properties(version),
            Arc::new(TargetProperties::default()),
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(256),
            buffer(),
            buffer(),
            8,
            256,
        );
        cpp(kernel, version)
    };
    kernels.push(Kernel::new("sums of the statistics of chunks", build));
    for parts in [1, 16] {
        let build = move |version| {
            let sizes = || (0..parts).map(|_| 8usize).collect();
            let kernel = join::create_dummy_kernel(
                properties(version),
                Arc::new(TargetProperties::default()),
                CubeCount::Static(1, parts, 1),
                CubeDim::new_1d(256),
                (0..parts).map(|_| buffer()).collect(),
                buffer(),
                sizes(),
                sizes(),
                sizes(),
                sizes(),
                sizes(),
                256,
            );
            cpp(kernel, version)
        };
        kernels.push(Kernel::new(format!("copies of {parts} matrices"), build));
    }
    for dtype in TYPES {
        let build = move |version| {
            let kernel = fingerprint::create_dummy_kernel(
                properties(version),
                Arc::new(TargetProperties::default()),
                CubeCount::Static(1, 1, 1),
                CubeDim::new_1d(256),
                buffer(),
                buffer(),
                8,
                8,
                8,
                1,
                8,
                1,
                256,
                storage_type(dtype),
            );
            cpp(kernel, version)
        };
        kernels.push(Kernel::new(format!("fingerprint {dtype:?}"), build));
    }
}

/// The end of the last array that the source places in dynamic shared memory. The assembler does
/// not report it. It comes from lines such as
/// `array<float_4, 264> * const v2 = reinterpret_cast<array<float_4, 264> *>(&v1[4224]);`.
fn dynamic_shared_bytes(source: &str) -> u64 {
    source
        .lines()
        .filter_map(|line| {
            let (_, cast) = line.split_once("reinterpret_cast<array<")?;
            let (element, rest) = cast.split_once(", ")?;
            let (count, rest) = rest.split_once('>')?;
            let offset = rest.split_once('[')?.1.split_once(']')?.0;
            let (scalar, lanes) = match element.rsplit_once('_') {
                Some((scalar, lanes)) if lanes.parse::<u64>().is_ok() => (scalar, lanes),
                _ => (element, "1"),
            };
            let size = lanes.parse::<u64>().ok()?
                * match scalar {
                    "float" | "uint32_t" => 4,
                    "__half" | "__nv_bfloat16" => 2,
                    other => panic!("shared memory of {other}"),
                };
            Some(offset.parse::<u64>().ok()? + count.parse::<u64>().ok()? * size)
        })
        .max()
        .unwrap_or(0)
}

/// Known spills of a kernel in bytes: for Hopper, NVRTC puts four registers of five narrow variants
/// of the product into local memory, although they use 80 of 255.
fn known_spill(architecture: &str, kernel: &str) -> usize {
    match architecture == "sm_90a" && kernel.starts_with("product") {
        true => 16,
        false => 0,
    }
}

#[test]
fn every_kernel_compiles_for_cuda_without_spills() {
    let mut kernels: Vec<Kernel> = Vec::new();
    reductions(&mut kernels);
    audits(&mut kernels);
    products(&mut kernels);
    merges(&mut kernels);
    if let Ok(part) = std::env::var("HD_PISSA_KERNEL") {
        kernels.retain(|kernel| kernel.name.contains(&part));
        assert!(
            !kernels.is_empty(),
            "HD_PISSA_KERNEL={part} is part of no kernel's name"
        );
    }

    let nvrtc = match Nvrtc::find() {
        Ok(nvrtc) => Some(nvrtc),
        Err(NvrtcError::Missing)
            if !nvrtc::is_named()
                && std::env::var("HD_PISSA_REQUIRE_NVRTC").as_deref() != Ok("1") =>
        {
            eprintln!(
                "the sources are built, not compiled: {}",
                NvrtcError::Missing
            );
            None
        }
        Err(error) => panic!("{error}"),
    };

    let jobs: Vec<_> = kernels
        .iter()
        .flat_map(|kernel| ARCHITECTURES.map(|architecture| (kernel, architecture)))
        .collect();
    println!(
        "{:<8}{:>10}{:>8}{:>8}{:>9}{:>9}  kernel",
        "", "registers", "spills", "stack", "shared", "cubin"
    );
    let dump = std::env::var_os("HD_PISSA_CUDA_SOURCE").map(std::path::PathBuf::from);
    let next = AtomicUsize::new(0);
    let failed = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((Kernel { name, build }, (version, architecture))) =
                    jobs.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let source = build(*version);
                    if let Some(folder) = &dump {
                        let file = format!("{architecture} {name}.cu").replace([' ', ','], "_");
                        std::fs::write(folder.join(file), &source).expect("the folder is writable");
                    }
                    let Some(nvrtc) = &nvrtc else { continue };
                    match nvrtc.compile(&source, architecture) {
                        Ok(usage) => {
                            println!(
                                "{architecture:<8}{:>10}{:>8}{:>8}{:>9}{:>9}  {name}",
                                usage.registers,
                                usage.spill_bytes,
                                usage.stack_bytes,
                                usage.shared_bytes + dynamic_shared_bytes(&source),
                                usage.cubin_bytes,
                            );
                            if usage.spill_bytes as usize > known_spill(architecture, name) {
                                failed.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        Err(error) => {
                            println!("{architecture:<8} {name}: {error}\n{source}");
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    println!(
        "{} kernels for {} architectures",
        kernels.len(),
        ARCHITECTURES.len()
    );
    assert_eq!(
        failed.into_inner(),
        0,
        "kernels that spill or do not compile; see above"
    );
}
