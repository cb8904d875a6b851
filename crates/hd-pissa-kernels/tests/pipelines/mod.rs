//! The product through `cubek-matmul`, whose kernels are borrowed: they may spill.

use std::sync::Arc;

use cubecl::ir::{ElemType, FloatKind, TargetProperties};
use cubecl::prelude::*;
use cubek_matmul::definition::{MatmulElems, MatmulVectorSizes};
use cubek_matmul::multi_level::components::global::GlobalMatmulFamily;
use cubek_matmul::multi_level::components::tile::TileMatmulKind;
use cubek_matmul::multi_level::definition::{
    BatchMatmulBlueprint, TilingScheme, cube_mapping_launch,
};
use cubek_std::cube_count::{
    CubeCountPlan, CubeCountStrategy, GlobalOrder, HypercubeBlueprint, SmAllocation,
};
use hd_pissa_kernels::kernels::{
    Planes, pipeline, pipeline_arguments as arguments, pipeline_problem as problem,
};
use hd_pissa_kernels::{Buffer, FloatType, LowRankProduct, Matrix};

use super::{Kernel, TYPES, buffer, cpp, handle, properties};

/// The pipeline's product on matrix units: every dtype with row- and column-major weights, in
/// vectors and, for odd sizes, in elements; with bias.
pub fn all(kernels: &mut Vec<Kernel>) {
    for dtype in TYPES {
        for column_major in [false, true] {
            for (even, sizes) in [(true, [4096, 4096, 4096]), (false, [333, 555, 777])] {
                let name = format!(
                    "pipeline product {dtype:?} {} weight, {}",
                    if column_major {
                        "column-major"
                    } else {
                        "row-major"
                    },
                    if even { "vectors" } else { "elements" }
                );
                let build = move |version| {
                    let [input, output] = match even {
                        true => [16 / dtype.size(), 4],
                        false => [1, 1],
                    };
                    let sizes_of_vectors = MatmulVectorSizes {
                        lhs: input,
                        rhs: input,
                        out: output,
                    };
                    source(version, dtype, sizes, column_major, sizes_of_vectors)
                };
                kernels.push(Kernel {
                    name,
                    borrowed: true,
                    build: Box::new(build),
                });
            }
        }
    }
}

/// The tiles that the routine chooses on this device.
fn source(
    version: u32,
    dtype: FloatType,
    [tokens, d_input, d_output]: [usize; 3],
    column_major: bool,
    sizes: MatmulVectorSizes,
) -> String {
    let rank = 16;
    let matrix = |shape, dtype| Matrix::row_major(handle(), shape, dtype);
    let product = LowRankProduct {
        input: matrix([tokens, d_input], dtype),
        weight: match column_major {
            false => matrix([d_input, d_output], dtype),
            true => Matrix::column_major(handle(), [d_input, d_output], dtype),
        },
        factor: matrix([d_input, rank], FloatType::F32),
        bias: Some(Buffer {
            handle: handle(),
            len: d_output,
            dtype,
        }),
        output: matrix([tokens, d_output], dtype),
        projection: matrix([tokens, rank], FloatType::F32),
    };
    let problem = problem(&product, &sizes);
    let mut dtypes = MatmulElems::from_globals(&problem.global_dtypes);
    let [tile, partition]: [(u32, u32, u32); 2] = match dtype {
        FloatType::F32 => {
            let tf32 = ElemType::Float(FloatKind::TF32);
            dtypes.lhs_stage = tf32;
            dtypes.rhs_stage = tf32;
            dtypes.lhs_register = tf32;
            dtypes.rhs_register = tf32;
            [(16, 16, 8), (2, 8, 2)]
        }
        _ => [(8, 32, 16), (4, 4, 2)],
    };
    let properties = properties(version);
    let tiling = TilingScheme::builder()
        .with_tile_size(tile.into())
        .with_partition_size(partition.into())
        .with_stage_size((4, 1, 1).into())
        .build()
        .expect("a whole tiling scheme");
    let cubes = HypercubeBlueprint::builder()
        .global_order(GlobalOrder::SwizzleRow(4))
        .cube_count_strategy(CubeCountStrategy::Sm {
            num_sms: properties.hardware.num_streaming_multiprocessors.unwrap(),
            sm_usage: SmAllocation::Exact,
            cubes_first: true,
        })
        .build();
    let blueprint = BatchMatmulBlueprint::builder(TileMatmulKind::Cmma, tiling, 32, &problem)
        .hypercube_blueprint(cubes.clone())
        .build();
    let counts = (
        tokens.div_ceil(128) as u32,
        d_output.div_ceil(128) as u32,
        1,
    );
    let plan =
        CubeCountPlan::from_blueprint(&cubes, counts.into(), &properties.hardware.max_cube_count);
    let cube_dim = Planes::cubedim_resource(&blueprint, &dtypes, &sizes)
        .and_then(|resource| Ok(resource.to_cube_dim(32)?))
        .expect("the blueprint fits");
    let kernel = pipeline::create_dummy_kernel::<Planes>(
        properties,
        Arc::new(TargetProperties::default()),
        CubeCount::Static(1, 1, 1),
        cube_dim,
        sizes.lhs,
        sizes.rhs,
        sizes.out,
        arguments(product, &sizes, &blueprint, |_, _| buffer()),
        cube_mapping_launch(&plan),
        sizes,
        blueprint,
        dtypes,
        dtype.elem_type(),
    );
    cpp(kernel, version)
}
