//! The low-rank product through the pipelines of `cubek-matmul`.

use std::marker::PhantomData;

use cubecl::features::MmaConfig;
use cubecl::ir::{ElemType, VectorSize};
use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;
use cubecl::std::tensor::launch::ViewArg;
use cubecl::std::tensor::layout::VirtualLayoutLaunch;
use cubecl::std::tensor::{
    View, ViewExpand, ViewMut, ViewMutExpand, ViewOperations, ViewOperationsExpand,
    ViewOperationsMut, ViewOperationsMutExpand,
};
use cubek_matmul::definition::{
    MatmulElems, MatmulGlobalElems, MatmulProblem, MatmulSetupError, MatmulVectorSizes,
};
use cubek_matmul::multi_level::args::{BatchedCoords, MatmulArgs};
use cubek_matmul::multi_level::components::batch::{
    BatchMatmul, BatchMatmulFamily, PartitionedBatchMatmulFamily, RowMajorGlobalPartitionMatmul,
};
use cubek_matmul::multi_level::components::global::memory::{
    GlobalLayout, GlobalLayoutConfig, GlobalLayoutLaunch, NoopLayout, NoopLayoutLaunch,
};
use cubek_matmul::multi_level::components::global::read::sync_full_cyclic::SyncFullCyclicLoading;
use cubek_matmul::multi_level::components::global::single_stage::simple::SimpleMatmulFamily;
use cubek_matmul::multi_level::components::global::{
    GlobalConfig, GlobalMatmulFamily, PlaneWriterFamily, UnitWriterFamily,
};
use cubek_matmul::multi_level::components::stage::{PlanePartitioner, UnitPartitioner};
use cubek_matmul::multi_level::components::tile::TileMatmulKind;
use cubek_matmul::multi_level::definition::{
    BatchMatmulBlueprint, CubeMapping, cube_mapping_launch,
};
use cubek_matmul::multi_level::routines::batch::simple::{SimpleAlgorithm, SimpleArgs};
use cubek_matmul::multi_level::routines::batch::simple_unit::{
    SimpleUnitAlgorithm, SimpleUnitSelectionArgs,
};
use cubek_matmul::multi_level::tile::{ColMajorTilingOrder, RowMajorTilingOrder};
use cubek_matmul::multi_level::{BatchMatmulRoutine, LaunchInfo};
use cubek_matmul::routine::BlueprintStrategy;

use crate::product::{check, matrix_unit_type};
use crate::{FloatType, KernelError, LowRankProduct, Matrix, low_rank_product};

/// [`low_rank_product`] through the pipelines of `cubek-matmul`: on matrix units where the device
/// has them for the element type, on its ordinary units where not.
///
/// The pipeline multiplies `[weight | factor]`, a matrix that exists only as a way of reading, and
/// what it writes is split again. It sees one element type on the right, so the factor is rounded
/// to that of `weight`; matrix units take `f32` operands as `tf32`. Sums are `f32` in both.
///
/// # Errors
///
/// Those of [`low_rank_product`], and [`KernelError::Pipeline`] if the pipeline does not take the
/// product on this device. Then nothing runs.
pub fn low_rank_product_by_pipeline(
    client: &Client,
    product: LowRankProduct,
) -> Result<(), KernelError> {
    check(client, &product)?;
    let [tokens, d_input] = product.input.shape;
    let columns = product.weight.shape[1] + product.factor.shape[1];
    if tokens * columns == 0 {
        return Ok(());
    }
    if d_input == 0 {
        // A pipeline has at least one step.
        return low_rank_product(client, product);
    }
    let operand = matrix_unit_type(product.input.dtype);
    let matmul = &client.features().matmul;
    let has = |config: &MmaConfig| config.a_type == operand;
    let units = if matmul.cmma.iter().any(has) {
        Some(TileMatmulKind::Cmma)
    } else if matmul.mma.iter().any(has) {
        Some(TileMatmulKind::Mma)
    } else {
        None
    };
    match units {
        Some(tile_matmul) => {
            let strategy = SimpleArgs {
                tile_matmul,
                multi_rows: true,
            };
            launch::<SimpleAlgorithm, Planes>(client, product, strategy)
        }
        None => {
            let strategy = SimpleUnitSelectionArgs::default();
            launch::<SimpleUnitAlgorithm, Units>(client, product, strategy)
        }
    }
    .map_err(|error| KernelError::Pipeline(error.to_string().trim_end().into()))
}

type Left = SyncFullCyclicLoading<ColMajorTilingOrder>;
type Right = SyncFullCyclicLoading<RowMajorTilingOrder>;
type Simple<P, W> = SimpleMatmulFamily<P, (), Left, Right, Right, W>;

/// Tiles on matrix units.
pub type Planes = Simple<PlanePartitioner, PlaneWriterFamily>;

/// Tiles in the registers of single units.
pub type Units = Simple<UnitPartitioner, UnitWriterFamily>;

type Family<G> = PartitionedBatchMatmulFamily<(), G, RowMajorGlobalPartitionMatmul>;
type Batch<G, T> = <Family<G> as BatchMatmulFamily<()>>::Matmul<T>;

/// The product as the pipeline sees it: element types, one right operand, vectors of these sizes.
pub fn problem(product: &LowRankProduct, sizes: &MatmulVectorSizes) -> MatmulProblem {
    let [tokens, d_input] = product.input.shape;
    let columns = product.weight.shape[1] + product.factor.shape[1];
    // Whole vectors; behind the last column the operand reads as zero and nothing is written.
    let columns = columns.next_multiple_of(sizes.rhs.max(sizes.out));
    let strides = |matrix: &Matrix, [rows, columns]: [usize; 2]| match matrix.minor_axis() {
        0 => [1, rows],
        _ => [columns, 1],
    };
    let shapes = [[tokens, d_input], [d_input, columns], [tokens, columns]];
    let dtype = product.input.dtype.elem_type();
    MatmulProblem::from_shapes_and_strides(
        shapes[0].into(),
        shapes[1].into(),
        shapes[2].into(),
        strides(&product.input, shapes[0]).into(),
        strides(&product.weight, shapes[1]).into(),
        [columns, 1].into(),
        MatmulGlobalElems {
            lhs: dtype,
            rhs: dtype,
            out: FloatType::F32.elem_type(),
        },
        AddressType::U32,
        None,
        None,
    )
    .expect("strides of whole rows or columns")
}

fn launch<A, G>(
    client: &Client,
    product: LowRankProduct,
    strategy: A::Strategy,
) -> Result<(), MatmulSetupError>
where
    A: BatchMatmulRoutine<(), Blueprint = BatchMatmulBlueprint>,
    G: GlobalMatmulFamily<()>,
{
    let dtype = product.input.dtype;
    let vectors = |matrix: &Matrix, axis, size| {
        let sizes = client.io_optimized_vector_sizes(size);
        matrix.vector_size(axis, sizes)
    };
    let (input, weight, output) = (&product.input, &product.weight, &product.output);
    let sizes = MatmulVectorSizes {
        lhs: vectors(input, input.minor_axis(), dtype.size()),
        rhs: vectors(weight, weight.minor_axis(), dtype.size()),
        // The results are staged in `f32`, whatever they are stored in.
        out: vectors(output, 1, FloatType::F32.size()),
    };
    let problem = problem(&product, &sizes);
    let settings = A::device_settings(client, sizes);
    let strategy = BlueprintStrategy::Inferred(strategy);
    let blueprint = A::expand_blueprint(&problem, &settings, &strategy)?;
    let LaunchInfo {
        blueprint,
        dtypes,
        vector_sizes,
        cube_dim,
        cube_count_plan,
        ..
    } = A::prepare(&problem, &settings, blueprint)?;
    let arguments = arguments(product, &vector_sizes, &blueprint, |matrix, vector_size| {
        matrix.arg(client, vector_size)
    });
    // SAFETY: `check` has found the operands in their buffers. Reads and writes outside their
    // shapes are masked wherever the blueprint's tiles reach over them.
    unsafe {
        kernel::launch_unchecked::<G>(
            client,
            cube_count_plan.resolve(),
            cube_dim,
            vector_sizes.lhs,
            vector_sizes.rhs,
            vector_sizes.out,
            arguments,
            cube_mapping_launch(&cube_count_plan),
            vector_sizes,
            blueprint,
            dtypes,
            dtype.elem_type(),
        );
    }
    Ok(())
}

/// The arguments of the [`kernel`]; `buffer` gives a matrix as vectors of a size.
pub fn arguments<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive>(
    product: LowRankProduct,
    sizes: &MatmulVectorSizes,
    blueprint: &BatchMatmulBlueprint,
    buffer: impl Fn(Matrix, usize) -> BufferArg,
) -> OperandsLaunch<X, W, Y> {
    let (rows, depth) = (blueprint.check_m_bounds, blueprint.check_k_bounds);
    let view = |matrix: Matrix, vector_size: usize, check: [bool; 2]| {
        let [check_row_bounds, check_col_bounds] = check;
        let layout = GlobalLayoutLaunch::new(
            VirtualLayoutLaunch::new::<NoopLayout>(NoopLayoutLaunch::new()),
            matrix.shape[0] as u32,
            matrix.shape[1] as u32,
            matrix.strides[0],
            matrix.strides[1],
            vector_size,
            1,
            GlobalLayoutConfig {
                check_row_bounds,
                check_col_bounds,
                ..Default::default()
            },
        );
        ViewArg::new_array::<GlobalLayout>(buffer(matrix, vector_size), layout)
    };
    let [tokens, d_input] = product.input.shape;
    let (d_output, rank) = (product.weight.shape[1], product.factor.shape[1]);
    let bias = product.bias.map(|bias| {
        // The same row for every token.
        let row = Matrix {
            handle: bias.handle,
            shape: [tokens, d_output],
            strides: [0, 1],
            dtype: bias.dtype,
        };
        view(row, 1, [false, false])
    });
    // The columns of weight and factor, and those of the results, are told apart before the views
    // are asked; only those of the last vector of the factor can lie behind its end.
    OperandsLaunch::new(
        view(product.input, sizes.lhs, [rows, depth]),
        view(product.weight, sizes.rhs, [depth, false]),
        view(product.factor, 1, [depth, true]),
        bias.into(),
        view(product.output, sizes.out, [rows, false]),
        view(product.projection, 1, [rows, true]),
        d_input as u32,
        d_output as u32,
        rank as u32,
        tokens as u32,
    )
}

/// What the product reads and writes: vectors `X` of the input, `W` of the weight and `Y` of the
/// output; scalars elsewhere.
#[allow(dead_code, reason = "only the expanded kernel reads it")]
#[derive(CubeType, CubeLaunch, Clone)]
#[expand(derive(Clone))]
pub struct Operands<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive> {
    input: View<'static, X, BatchedCoords>,
    weight: View<'static, W, BatchedCoords>,
    factor: View<'static, f32, BatchedCoords>,
    bias: ComptimeOption<View<'static, X::Scalar, BatchedCoords>>,
    output: ViewMut<'static, Y, BatchedCoords>,
    projection: ViewMut<'static, f32, BatchedCoords>,
    d_input: u32,
    d_output: u32,
    rank: u32,
    tokens: u32,
}

/// `[weight | factor]` in vectors that lie along the columns or along the rows.
#[allow(dead_code, reason = "only the expanded kernel reads it")]
#[derive(CubeType)]
struct RightOperand<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive> {
    operands: Operands<X, W, Y>,
    #[cube(comptime)]
    along_depth: bool,
}

#[cube]
impl<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive> RightOperand<X, W, Y> {
    #[allow(unused, reason = "only the expanded kernel calls it")]
    fn get(&self, pos: BatchedCoords) -> W {
        let (batch, row, column) = pos;
        let d_output = self.operands.d_output;
        let mut value = W::cast_from(0.0f32);
        if column < d_output {
            value = self.operands.weight.read_checked((batch, row, column));
        } else {
            let first = column - d_output;
            let mut values = Vector::<f32, W::Size>::empty();
            #[unroll]
            for i in 0..W::Size::value().comptime() {
                let place = if self.along_depth.comptime() {
                    (batch, row + i as u32, first)
                } else {
                    (batch, row, first + i as u32)
                };
                values.insert(i, self.operands.factor.read_checked(place));
            }
            value = W::cast_from(values);
        }
        value
    }

    #[allow(unused, reason = "only the expanded kernel calls it")]
    fn extent(&self) -> BatchedCoords {
        let columns = self.operands.d_output + self.operands.rank;
        (1usize.runtime(), self.operands.d_input, columns)
    }
}

/// The methods of a view that no pipeline with a plain way of loading calls.
macro_rules! unused_reads {
    ($vector:ty, $value:ty) => {
        fn __expand_read_method(&self, _: &Scope, _: Place) -> $value {
            unreachable!("reads are checked")
        }

        fn __expand_read_unchecked_method(&self, _: &Scope, _: Place) -> $value {
            unreachable!("reads are checked")
        }

        fn __expand_read_masked_method(&self, _: &Scope, _: Place, _: $value) -> $value {
            unreachable!("reads are checked")
        }

        fn __expand_tensor_map_load_method(
            &self,
            _: &Scope,
            _: &NativeExpand<Barrier>,
            _: &mut SliceExpand<$vector>,
            _: Place,
        ) {
            unreachable!("the view is no tensor map")
        }

        fn __expand_as_linear_slice_method(
            &self,
            _: &Scope,
            _: Place,
            _: Place,
        ) -> &SliceExpand<$vector> {
            unreachable!("the view is not one piece of memory")
        }

        fn __expand_is_in_bounds_method(&self, _: &Scope, _: Place) -> NativeExpand<bool> {
            unreachable!("accesses are checked")
        }
    };
}

type Place = <BatchedCoords as CubeType>::ExpandType;

impl<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive> Vectorized for RightOperand<X, W, Y> {}
impl<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive> VectorizedExpand
    for RightOperandExpand<X, W, Y>
{
    fn __expand_vector_size_method(&self, scope: &Scope) -> VectorSize {
        W::__expand_vector_size(scope)
    }
}

impl<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive> ViewOperations<W, BatchedCoords>
    for RightOperand<X, W, Y>
{
}
impl<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive> ViewOperationsExpand<W, BatchedCoords>
    for RightOperandExpand<X, W, Y>
{
    unused_reads!(W, NativeExpand<W>);

    fn __expand_read_checked_method(&self, scope: &Scope, place: Place) -> NativeExpand<W> {
        self.__expand_get_method(scope, place)
    }

    fn __expand_shape_method(&self, scope: &Scope) -> Place {
        self.__expand_extent_method(scope)
    }
}

/// Where the pipeline writes `[output | projection]`.
#[allow(dead_code, reason = "only the expanded kernel reads it")]
#[derive(CubeType)]
struct SplitResult<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive> {
    operands: Operands<X, W, Y>,
}

#[cube]
impl<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive> SplitResult<X, W, Y> {
    /// `value` holds sums in `f32`, as many as a `Y` has elements.
    #[allow(unused, reason = "only the expanded kernel calls it")]
    fn put<T: CubePrimitive>(&self, pos: BatchedCoords, value: T) {
        let (batch, row, column) = pos;
        let d_output = self.operands.d_output;
        let mut sums = Vector::<f32, Y::Size>::cast_from(value);
        if column < d_output {
            #[comptime]
            match &self.operands.bias {
                ComptimeOption::Some(bias) =>
                {
                    #[unroll]
                    for i in 0..Y::Size::value().comptime() {
                        let place = (batch, row, column + i as u32);
                        let shift = f32::cast_from(bias.read_unchecked(place));
                        let shifted = sums.extract(i) + shift;
                        sums.insert(i, shifted);
                    }
                }
                ComptimeOption::None => {}
            }
            let mut output = self.operands.output;
            output.write_checked((batch, row, column), Y::cast_from(sums));
        } else {
            let first = column - d_output;
            let mut projection = self.operands.projection;
            #[unroll]
            for i in 0..Y::Size::value().comptime() {
                let place = (batch, row, first + i as u32);
                projection.write_checked(place, sums.extract(i));
            }
        }
    }

    #[allow(unused, reason = "only the expanded kernel calls it")]
    fn extent(&self) -> BatchedCoords {
        let columns = self.operands.d_output + self.operands.rank;
        (1usize.runtime(), self.operands.tokens, columns)
    }
}

impl<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive> Vectorized for SplitResult<X, W, Y> {}
impl<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive> VectorizedExpand
    for SplitResultExpand<X, W, Y>
{
    fn __expand_vector_size_method(&self, scope: &Scope) -> VectorSize {
        Y::__expand_vector_size(scope)
    }
}

impl<T, X, W, Y> ViewOperations<T, BatchedCoords> for SplitResult<X, W, Y>
where
    T: CubePrimitive,
    X: CubePrimitive,
    W: CubePrimitive,
    Y: CubePrimitive,
{
}
impl<T, X, W, Y> ViewOperationsExpand<T, BatchedCoords> for SplitResultExpand<X, W, Y>
where
    T: CubePrimitive,
    X: CubePrimitive,
    W: CubePrimitive,
    Y: CubePrimitive,
{
    unused_reads!(T, NativeExpand<T>);

    fn __expand_read_checked_method(&self, _: &Scope, _: Place) -> NativeExpand<T> {
        unreachable!("results are written")
    }

    fn __expand_shape_method(&self, scope: &Scope) -> Place {
        self.__expand_extent_method(scope)
    }
}

impl<T, X, W, Y> ViewOperationsMut<T, BatchedCoords> for SplitResult<X, W, Y>
where
    T: CubePrimitive,
    X: CubePrimitive,
    W: CubePrimitive,
    Y: CubePrimitive,
{
}
impl<T, X, W, Y> ViewOperationsMutExpand<T, BatchedCoords> for SplitResultExpand<X, W, Y>
where
    T: CubePrimitive,
    X: CubePrimitive,
    W: CubePrimitive,
    Y: CubePrimitive,
{
    fn __expand_write_method(&self, _: &Scope, _: Place, _: NativeExpand<T>) {
        unreachable!("writes are checked")
    }

    fn __expand_write_checked_method(&self, scope: &Scope, place: Place, value: NativeExpand<T>) {
        self.__expand_put_method::<T>(scope, place, value);
    }

    fn __expand_as_linear_slice_mut_method(
        &self,
        _: &Scope,
        _: Place,
        _: Place,
    ) -> &mut SliceExpand<T> {
        unreachable!("the view is not one piece of memory")
    }

    fn __expand_tensor_map_store_method(&self, _: &Scope, _: &SliceExpand<T>, _: Place) {
        unreachable!("the view is no tensor map")
    }
}

#[cube]
fn right_view<X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive>(
    right: RightOperand<X, W, Y>,
) -> View<'static, W, BatchedCoords> {
    intrinsic!(|scope| ViewExpand::new(scope, right))
}

#[cube]
#[allow(unused_variables)]
fn result_view<T: CubePrimitive, X: CubePrimitive, W: CubePrimitive, Y: CubePrimitive>(
    result: SplitResult<X, W, Y>,
) -> ViewMut<'static, T, BatchedCoords> {
    intrinsic!(|scope| ViewMutExpand::new(scope, result))
}

/// Arguments whose right operand and result are put together of two; the result is stored as `Y`.
#[derive(Clone)]
struct Joined<Y: CubePrimitive>(PhantomData<Y>);

#[cube]
impl<Y: CubePrimitive> MatmulArgs for Joined<Y> {
    type Input<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive> = Operands<L, R, Y>;
    type Output<T: CubePrimitive> = ();
    type Config = ();
    type State<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive> = State<L, R, Y>;

    fn init_state<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive>(
        input: &Self::Input<L, R, T>,
        _output: &mut Self::Output<T>,
        _config: (),
        #[comptime] _lhs: GlobalLayoutConfig,
        #[comptime] rhs: GlobalLayoutConfig,
        #[comptime] _out: GlobalLayoutConfig,
    ) -> Self::State<L, R, T> {
        let along_depth = comptime!(rhs.matrix_layout != Default::default());
        State::<L, R, Y>::new(input.clone(), along_depth)
    }

    fn view_lhs<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive>(
        state: &Self::State<L, R, T>,
    ) -> View<'_, L, BatchedCoords> {
        state.operands.input
    }

    fn batch_lhs<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive>(
        _state: &Self::State<L, R, T>,
        _batch: usize,
    ) -> usize {
        0usize.runtime()
    }

    fn view_rhs<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive>(
        state: &Self::State<L, R, T>,
    ) -> View<'_, R, BatchedCoords> {
        right_view::<L, R, Y>(RightOperand::<L, R, Y> {
            operands: state.operands.clone(),
            along_depth: state.along_depth,
        })
    }

    fn batch_rhs<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive>(
        _state: &Self::State<L, R, T>,
        _batch: usize,
    ) -> usize {
        0usize.runtime()
    }

    fn view_acc<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive>(
        _state: &Self::State<L, R, T>,
    ) -> ComptimeOption<View<'_, T, BatchedCoords>> {
        ComptimeOption::new_None()
    }

    fn batch_acc<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive>(
        _state: &Self::State<L, R, T>,
        _batch: usize,
    ) -> usize {
        0usize.runtime()
    }

    fn view_out<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive>(
        state: &Self::State<L, R, T>,
    ) -> ViewMut<'_, T, BatchedCoords> {
        result_view::<T, L, R, Y>(SplitResult::<L, R, Y> {
            operands: state.operands.clone(),
        })
    }

    fn batch_out<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive>(
        _state: &Self::State<L, R, T>,
        _batch: usize,
    ) -> usize {
        0usize.runtime()
    }

    fn runtime_config<L: CubePrimitive, R: CubePrimitive, T: CubePrimitive>(
        _state: &Self::State<L, R, T>,
    ) {
    }
}

#[allow(dead_code, reason = "only the expanded kernel reads it")]
#[derive(CubeType)]
pub struct State<L: CubePrimitive, R: CubePrimitive, Y: CubePrimitive> {
    operands: Operands<L, R, Y>,
    #[cube(comptime)]
    along_depth: bool,
}

#[cube]
impl<L: CubePrimitive, R: CubePrimitive, Y: CubePrimitive> State<L, R, Y> {
    fn new(operands: Operands<L, R, Y>, #[comptime] along_depth: bool) -> Self {
        State::<L, R, Y> {
            operands,
            along_depth,
        }
    }
}

/// The entry of the pipeline `G`: its types and sizes put in their places.
#[allow(clippy::type_complexity)]
#[cube(launch_unchecked, create_dummy_kernel)]
pub fn kernel<F: Float, NX: Size, NW: Size, NY: Size, G: GlobalMatmulFamily<()>>(
    operands: &Operands<Vector<F, NX>, Vector<F, NW>, Vector<F, NY>>,
    mapping: CubeMapping,
    #[comptime] sizes: MatmulVectorSizes,
    #[comptime] blueprint: BatchMatmulBlueprint,
    #[comptime] dtypes: MatmulElems,
    #[define(F)] _dtype: ElemType,
) {
    let properties = comptime::device_properties();
    let config = comptime!(Family::<G>::expand_config(
        &properties,
        &blueprint,
        &dtypes,
        &sizes
    ));
    if comptime!(config.is_err()) {
        push_validation_error(config.err().unwrap().to_string());
        comptime!(return);
    }
    let config = comptime!(config.unwrap());

    #[allow(clippy::collapsible_if)]
    if mapping.can_yield_extra_cubes {
        if CUBE_POS >= mapping.num_valid_cubes() {
            terminate!()
        }
    }

    let stage = comptime!(config.global_config.stage_config());
    let left = comptime!(stage.lhs_smem_config());
    let right = comptime!(stage.rhs_smem_config());
    let sums = comptime!(stage.acc_smem_config());
    let define!(LeftStage) = left.dtype;
    let size!(LeftSize) = comptime!(left.vector_size as usize);
    let define!(LeftRegister) = dtypes.lhs_register;
    let define!(RightStage) = right.dtype;
    let size!(RightSize) = comptime!(right.vector_size as usize);
    let define!(RightRegister) = dtypes.rhs_register;
    let define!(SumStage) = sums.dtype;
    let size!(SumSize) = comptime!(sums.vector_size as usize);
    let define!(SumRegister) = dtypes.acc_register;

    let along_depth = comptime!(blueprint.rhs_layout != Default::default());
    let state = State::new(operands.clone(), along_depth);
    Batch::<
        G,
        (
            (F, NX, LeftStage, LeftSize, LeftRegister, LeftSize),
            (F, NW, RightStage, RightSize, RightRegister, RightSize),
            (f32, NY, SumStage, SumSize, SumRegister, SumSize),
        ),
    >::execute::<Joined<Vector<F, NY>>>(&state, mapping, config);
}
