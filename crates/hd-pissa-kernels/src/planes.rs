//! Products on a device's matrix units, with `f32` operands as sums of two `tf32`.

use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use crate::tile::{Four, StageShape, multiprocessors};

/// Units of a plane, and of the threads that share a fragment.
pub(crate) const PLANE: usize = 32;
/// Rows and columns of a fragment of the sums.
pub(crate) const FRAGMENT: usize = 16;
/// Inner steps of one instruction.
const STEP: usize = 8;
/// Vectors from one row to the next of a fragment in shared memory. One more than its elements
/// need, against bank conflicts.
pub(crate) const SCRATCH_PITCH: usize = FRAGMENT / 4 + 1;
/// Vectors of a fragment in shared memory.
pub(crate) const SCRATCH: usize = FRAGMENT * SCRATCH_PITCH;
/// Bytes that the address of a fragment's first element is a multiple of.
pub(crate) const ALIGNMENT: usize = 32;

/// How a cube of planes computes one tile of the output, every plane
/// `major_fragments × minor_fragments` fragments of 16×16 elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PlaneTile {
    /// Planes along the major axis.
    pub major_planes: usize,
    /// Planes along the minor axis.
    pub minor_planes: usize,
    /// Fragments of a plane along the major axis.
    pub major_fragments: usize,
    /// Fragments of a plane along the minor axis.
    pub minor_fragments: usize,
}

impl PlaneTile {
    /// 128×128 elements by 8 planes.
    pub const LARGE: Self = Self {
        major_planes: 2,
        minor_planes: 4,
        major_fragments: 4,
        minor_fragments: 2,
    };
    /// 64×64 elements by 4 planes.
    pub const SMALL: Self = Self {
        major_planes: 2,
        minor_planes: 2,
        major_fragments: 2,
        minor_fragments: 2,
    };
    /// Every tile, largest first.
    pub const ALL: [Self; 2] = [Self::LARGE, Self::SMALL];

    /// Elements along the major axis.
    pub fn major(&self) -> usize {
        FRAGMENT * self.major_fragments * self.major_planes
    }

    /// Elements along the minor axis.
    pub fn minor(&self) -> usize {
        FRAGMENT * self.minor_fragments * self.minor_planes
    }

    /// Planes of the cube.
    pub(crate) fn planes(&self) -> usize {
        self.major_planes * self.minor_planes
    }

    /// Units of the cube.
    pub fn units(&self) -> usize {
        PLANE * self.planes()
    }

    /// The stage of an operand of `width` elements.
    pub(crate) fn stage(&self, width: usize) -> StageShape {
        StageShape {
            width,
            // Two vectors more than the elements need: then the 8×4 elements that a plane reads at
            // once lie in 32 banks.
            pitch: width / 4 + 2,
            depth: STEP,
            units: self.units(),
            halves: true,
        }
    }

    fn shared_bytes(&self) -> usize {
        let stages = 2 * (self.stage(self.major()).vectors() + self.stage(self.minor()).vectors());
        16 * (stages + SCRATCH * self.planes()) + 4 * self.units()
    }

    /// The largest tile that the device can run and that still yields a tile for every
    /// multiprocessor, or else the smallest; `None` if the device lacks the instruction.
    pub(crate) fn choose(client: &Client, major: usize, minor: usize) -> Option<Self> {
        if !is_supported(client) {
            return None;
        }
        let hardware = &client.properties().hardware;
        let wanted = multiprocessors(client);
        let runs = |tile: &Self| {
            tile.shared_bytes() <= hardware.max_shared_memory_size
                && tile.units() <= hardware.max_units_per_cube as usize
        };
        let fills = |tile: &Self| {
            major.div_ceil(tile.major()) * minor.div_ceil(tile.minor()) >= wanted && runs(tile)
        };
        let chosen = Self::ALL.into_iter().find(fills);
        chosen.or(Some(Self::SMALL).filter(runs))
    }
}

/// Whether the device multiplies `tf32` fragments of 16×8 and 8×16 into `f32`, in planes of 32
/// units.
pub(crate) fn is_supported(client: &Client) -> bool {
    let tf32 = ElemType::Float(FloatKind::TF32);
    let hardware = &client.properties().hardware;
    [hardware.plane_size_min, hardware.plane_size_max] == [PLANE as u32; 2]
        && client.features().matmul.cmma.contains(&MmaConfig {
            a_type: tf32,
            b_type: tf32,
            cd_type: ElemType::Float(FloatKind::F32),
            m: FRAGMENT as u32,
            n: FRAGMENT as u32,
            k: STEP as u32,
        })
}

/// The nearest values with the 10 bits after the point that `tf32` keeps, ties away from zero.
#[cube]
pub(crate) fn nearest_tf32(value: Four) -> Four {
    let mut rounded = Four::new(0.0);
    #[unroll]
    for i in 0..4usize {
        let bits = u32::reinterpret(value.extract(i));
        rounded.insert(i, f32::reinterpret((bits + 0x1000u32) & 0xffff_e000u32));
    }
    rounded
}

/// The position of a unit's plane along the major and the minor axis of the cube.
#[cube]
pub(crate) fn plane_place(#[comptime] tile: PlaneTile) -> (usize, usize) {
    let plane = UNIT_POS as usize / PLANE;
    (plane / tile.minor_planes, plane % tile.minor_planes)
}

/// Zeroed sums: fragment `m · minor_fragments + n` holds block `(m, n)` of the plane.
#[cube]
pub(crate) fn sums(#[comptime] tile: PlaneTile) -> Sequence<Matrix<f32>> {
    let mut sums = Sequence::<Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(tile.major_fragments * tile.minor_fragments) {
        sums.push(Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            FRAGMENT,
            FRAGMENT,
            STEP,
            MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    sums
}

/// The fragment of a stage that starts at vector `start`.
#[cube]
fn fragment(
    stage: &Shared<[Four]>,
    start: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] shape: StageShape,
) -> Matrix<tf32> {
    let layout = comptime!(match ident {
        MatrixIdent::A => MatrixLayout::ColMajor,
        _ => MatrixLayout::RowMajor,
    });
    // SAFETY: loaded in the next line.
    let mut fragment =
        unsafe { Matrix::<tf32>::uninitialized(ident, FRAGMENT, FRAGMENT, STEP, layout) };
    let end = start + comptime!((STEP - 1) * shape.pitch + FRAGMENT / 4);
    cmma::load(
        &mut fragment,
        &stage[start..end],
        comptime!(4 * shape.pitch as u32),
    );
    fragment
}

/// Adds the product of a pair of stages to the sums, without the product of the second halves,
/// which is below the rounding of an `f32`.
#[cube]
pub(crate) fn multiply(
    sums: &Sequence<Matrix<f32>>,
    major: &Shared<[Four]>,
    minor: &Shared<[Four]>,
    #[comptime] tile: PlaneTile,
) {
    let (major_shape, minor_shape) =
        comptime!((tile.stage(tile.major()), tile.stage(tile.minor())));
    let (plane_major, plane_minor) = plane_place(tile);
    let first_major = plane_major * comptime!(tile.major_fragments * FRAGMENT / 4);
    let first_minor = plane_minor * comptime!(tile.minor_fragments * FRAGMENT / 4);
    let mut rows = Sequence::<Matrix<tf32>>::new();
    #[unroll]
    for m in 0..tile.major_fragments {
        let start = first_major + m * comptime!(FRAGMENT / 4);
        rows.push(fragment(major, start, MatrixIdent::A, major_shape));
        let start = start + comptime!(major_shape.part());
        rows.push(fragment(major, start, MatrixIdent::A, major_shape));
    }
    #[unroll]
    for n in 0..tile.minor_fragments {
        let start = first_minor + n * comptime!(FRAGMENT / 4);
        let high = fragment(minor, start, MatrixIdent::B, minor_shape);
        let start = start + comptime!(minor_shape.part());
        let low = fragment(minor, start, MatrixIdent::B, minor_shape);
        #[unroll]
        for m in 0..tile.major_fragments {
            let sum = &sums[m * tile.minor_fragments + n];
            cmma::execute(&rows[2 * m + 1], &high, sum, sum);
            cmma::execute(&rows[2 * m], &low, sum, sum);
            cmma::execute(&rows[2 * m], &high, sum, sum);
        }
    }
}

/// Puts a fragment of the sums into the plane's part of the scratch memory; the plane's units may
/// read it then.
#[cube]
pub(crate) fn spread(sum: &Matrix<f32>, scratch: &mut Shared<[Four]>) {
    let start = UNIT_POS as usize / PLANE * SCRATCH;
    let end = start + SCRATCH;
    // Nobody still reads the fragment before.
    sync_plane();
    cmma::store(
        &mut scratch[start..end],
        sum,
        comptime!(4 * SCRATCH_PITCH as u32),
        MatrixLayout::RowMajor,
    );
    sync_plane();
}
