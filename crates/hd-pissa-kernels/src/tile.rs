//! The product of one tile in a cube: operands in stages of shared memory, sums in registers.

use cubecl::prelude::*;

use crate::grid::multiprocessors;

/// Four `f32`, the unit of shared memory and of the accumulators.
pub(crate) type Four = Vector<f32, Const<4>>;

/// How a cube computes one tile of the output.
///
/// Along the minor axis, neighbours of the output are adjacent in memory. Every unit owns
/// `major_vectors × minor_vectors` blocks of 4×4 elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Blocks of a unit along the major axis.
    pub major_vectors: usize,
    /// Blocks of a unit along the minor axis.
    pub minor_vectors: usize,
    /// Units along the major axis.
    pub major_units: usize,
    /// Units along the minor axis.
    pub minor_units: usize,
    /// Steps of the inner dimension per stage of shared memory, a multiple of 4.
    pub depth: usize,
}

impl Tile {
    /// 128×128 elements by 256 units: 16 flops per byte of shared memory read.
    pub const LARGE: Self = Self::new(2, 2, 16, 16);
    /// 64×64 elements by 64 units. With more units of fewer elements, the CUDA assembler would
    /// spill registers to fit more cubes on a multiprocessor.
    pub const MEDIUM: Self = Self::new(2, 2, 8, 8);
    /// 32×32 elements by 64 units.
    pub const SMALL: Self = Self::new(1, 1, 8, 8);
    /// Every tile, largest first.
    pub const ALL: [Self; 3] = [Self::LARGE, Self::MEDIUM, Self::SMALL];
    /// Tiles for outputs of few columns: 128×16, 128×32 and 128×64 elements. Their stages are twice
    /// as deep: a row of half-precision elements then fills whole sectors of 32 bytes.
    pub const NARROW: [Self; 3] = [
        Self::new(2, 1, 16, 4).with_depth(16),
        Self::new(2, 1, 16, 8).with_depth(16),
        Self::new(2, 2, 16, 8).with_depth(16),
    ];

    const fn with_depth(self, depth: usize) -> Self {
        Self { depth, ..self }
    }

    const fn new(
        major_vectors: usize,
        minor_vectors: usize,
        major_units: usize,
        minor_units: usize,
    ) -> Self {
        Self {
            major_vectors,
            minor_vectors,
            major_units,
            minor_units,
            depth: 8,
        }
    }

    /// Elements along the major axis.
    pub fn major(&self) -> usize {
        4 * self.major_vectors * self.major_units
    }

    /// Elements along the minor axis.
    pub fn minor(&self) -> usize {
        4 * self.minor_vectors * self.minor_units
    }

    /// Units of the cube.
    pub fn units(&self) -> usize {
        self.major_units * self.minor_units
    }

    /// Bytes of shared memory for `parts` pairs of operand stages and one sum over the units.
    pub(crate) fn shared_bytes(&self, parts: usize) -> usize {
        parts * self.depth * (row_vectors(self.major()) + row_vectors(self.minor())) * 16
            + self.units() * 4
    }

    /// The stage of an operand of `width` elements.
    pub(crate) fn stage(&self, width: usize) -> StageShape {
        StageShape {
            width,
            depth: self.depth,
            units: self.units(),
        }
    }

    /// The narrowest tile that holds `columns`, or the widest. All have at most 128 units and 13 KiB
    /// of shared memory, which every device has.
    pub(crate) fn choose_narrow(columns: usize) -> Self {
        let [narrow, middle, wide] = Self::NARROW;
        match columns {
            ..=16 => narrow,
            17..=32 => middle,
            _ => wide,
        }
    }

    /// The largest tile that the device can run and that still yields a tile for every
    /// multiprocessor; the smallest if none does.
    pub(crate) fn choose(client: &Client, major: usize, minor: usize, parts: usize) -> Self {
        let hardware = &client.properties().hardware;
        let wanted = multiprocessors(client);
        Self::ALL
            .into_iter()
            .find(|tile| {
                let cubes = major.div_ceil(tile.major()) * minor.div_ceil(tile.minor());
                cubes >= wanted
                    && tile.shared_bytes(parts) <= hardware.max_shared_memory_size
                    && tile.units() <= hardware.max_units_per_cube as usize
            })
            .unwrap_or(Self::SMALL)
    }
}

/// Vectors per depth step of a stage for a tile of `width` elements. It is one more than the
/// elements need. The units that fill one column of a stage then use different banks.
const fn row_vectors(width: usize) -> usize {
    width / 4 + 1
}

/// How an operand is read from global memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// Whether the buffer holds vectors of four, aligned with the operand's rows.
    pub vectors: bool,
    /// Whether neighbours in memory are neighbours along the inner dimension, not along the tile.
    pub along_depth: bool,
}

impl Access {
    /// Depth steps that a unit loads at once.
    fn rows(self) -> usize {
        if self.vectors && self.along_depth {
            4
        } else {
            1
        }
    }
}

/// The places of an operand's elements: with `q = shard · shard_depth + step`, element `(t, q)` is
/// number `offset + t · tile_stride + step · depth_stride + shard · shard_stride`.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Operand {
    /// Position of element `(0, 0)`.
    pub offset: usize,
    /// Distance along the tile.
    pub tile_stride: usize,
    /// Distance along the inner dimension, inside a shard.
    pub depth_stride: usize,
    /// Inner steps per shard.
    pub shard_depth: usize,
    /// Distance between shards.
    pub shard_stride: usize,
}

/// The part of an operand that a cube works on.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Window {
    /// First element along the tile.
    pub first: usize,
    /// Elements of the operand along the tile.
    pub extent: usize,
    /// First inner step.
    pub depth: usize,
    /// Inner steps of the operand.
    pub depth_extent: usize,
}

#[cube]
fn address(operand: &Operand, t: usize, q: usize) -> usize {
    let shard = q / operand.shard_depth;
    let step = q - shard * operand.shard_depth;
    operand.offset
        + t * operand.tile_stride
        + step * operand.depth_stride
        + shard * operand.shard_stride
}

/// Four elements along the tile, from `t`, for each of `access.rows()` inner steps from `q`; zero
/// outside of the operand.
#[cube]
fn load<F: Float, N: Size>(
    source: &[Vector<F, N>],
    operand: &Operand,
    window: &Window,
    t: usize,
    q: usize,
    #[comptime] access: Access,
) -> Array<Four> {
    let mut rows = Array::<Four>::new(comptime!(access.rows()));
    #[unroll]
    for row in 0..comptime!(access.rows()) {
        rows[row] = Four::new(0.0);
    }
    if q < window.depth_extent {
        if comptime!(!access.vectors) {
            let mut value = Four::new(0.0);
            let start = address(operand, t, q);
            #[unroll]
            for i in 0..4usize {
                if t + i < window.extent {
                    let element = source[start + i * operand.tile_stride];
                    value.insert(i, f32::cast_from(element.extract(0usize)));
                }
            }
            rows[0] = value;
        } else if comptime!(!access.along_depth) {
            if t < window.extent {
                rows[0] = Four::cast_from(source[address(operand, t, q) / 4]);
            }
        } else {
            let start = address(operand, t, q);
            #[unroll]
            for i in 0..4usize {
                if t + i < window.extent {
                    let line = Four::cast_from(source[(start + i * operand.tile_stride) / 4]);
                    #[unroll]
                    for row in 0..4usize {
                        let mut value = rows[row];
                        value.insert(i, line.extract(row));
                        rows[row] = value;
                    }
                }
            }
        }
    }
    rows
}

/// The number of the first vector (along the tile) and the first inner step of a unit's job.
#[cube]
fn job_place(
    job: usize,
    #[comptime] width: usize,
    #[comptime] steps: usize,
    #[comptime] access: Access,
) -> (usize, usize) {
    let vectors = comptime!(width / 4);
    // Neighbouring units read neighbouring memory.
    if comptime!(access.along_depth) {
        (job / steps, job % steps)
    } else {
        (job % vectors, job / vectors)
    }
}

/// The layout of a stage of shared memory, and the units that fill it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StageShape {
    /// Elements along the tile.
    pub width: usize,
    /// Inner steps.
    pub depth: usize,
    /// Units that fill it.
    pub units: usize,
}

impl StageShape {
    /// Vectors of the stage.
    pub fn vectors(self) -> usize {
        self.depth * row_vectors(self.width)
    }
}

/// Fills a stage with an operand, plus the values that the same units have put in the stage
/// `addend`.
#[cube]
pub(crate) fn fill<F: Float, N: Size>(
    source: &[Vector<F, N>],
    operand: &Operand,
    stage: &mut Shared<[Four]>,
    addend: ComptimeOption<Shared<[Four]>>,
    window: &Window,
    #[comptime] shape: StageShape,
    #[comptime] access: Access,
) {
    let rows = comptime!(access.rows());
    let steps = comptime!(shape.depth / rows);
    let jobs = comptime!(shape.width / 4 * steps);
    #[unroll]
    for pass in 0..comptime!(jobs.div_ceil(shape.units)) {
        let job = UNIT_POS as usize + pass * shape.units;
        if job < jobs {
            let (vector, step) = job_place(job, shape.width, steps, access);
            let q = step * rows;
            let loaded = load::<F, N>(
                source,
                operand,
                window,
                window.first + vector * 4,
                window.depth + q,
                access,
            );
            #[unroll]
            for row in 0..rows {
                let place = (q + row) * comptime!(row_vectors(shape.width)) + vector;
                let mut value = loaded[row];
                #[comptime]
                match &addend {
                    ComptimeOption::Some(addend) => {
                        value += addend[place];
                    }
                    ComptimeOption::None => {}
                }
                stage[place] = value;
            }
        }
    }
}

/// Zeroed accumulators: vector `(m · 4 + i) · minor_vectors + v` holds row `i` of block `(m, v)`.
#[cube]
pub(crate) fn accumulators(#[comptime] tile: Tile) -> Array<Four> {
    let count = comptime!(4 * tile.major_vectors * tile.minor_vectors);
    let mut sums = Array::<Four>::new(count);
    #[unroll]
    for i in 0..count {
        sums[i] = Four::new(0.0);
    }
    sums
}

/// Adds inner step `q` of a pair of stages to the accumulators.
#[cube]
pub(crate) fn accumulate(
    sums: &mut Array<Four>,
    major: &Shared<[Four]>,
    minor: &Shared<[Four]>,
    q: usize,
    #[comptime] tile: Tile,
) {
    let unit = UNIT_POS as usize;
    let (unit_major, unit_minor) = (unit / tile.minor_units, unit % tile.minor_units);
    let mut columns = Array::<Four>::new(tile.minor_vectors);
    #[unroll]
    for v in 0..tile.minor_vectors {
        columns[v] =
            minor[q * comptime!(row_vectors(tile.minor())) + unit_minor + v * tile.minor_units];
    }
    #[unroll]
    for m in 0..tile.major_vectors {
        let rows =
            major[q * comptime!(row_vectors(tile.major())) + unit_major + m * tile.major_units];
        #[unroll]
        for i in 0..4usize {
            let row = Four::new(rows.extract(i));
            #[unroll]
            for v in 0..tile.minor_vectors {
                let place = (m * 4 + i) * tile.minor_vectors + v;
                sums[place] = fma(row, columns[v], sums[place]);
            }
        }
    }
}

/// Adds a pair of stages to the accumulators once the cube has filled them, and waits until all
/// units have read them.
#[cube]
pub(crate) fn accumulate_stage(
    sums: &mut Array<Four>,
    major: &Shared<[Four]>,
    minor: &Shared<[Four]>,
    #[comptime] tile: Tile,
) {
    sync_cube();
    #[unroll]
    for q in 0..tile.depth {
        accumulate(sums, major, minor, q, tile);
    }
    sync_cube();
}
