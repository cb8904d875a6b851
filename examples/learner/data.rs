//! Generated pictures of digits in the style of a pocket calculator, and a shifted version of the
//! task.

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::InMemDataset;
use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

pub const SIDE: usize = 16;
pub const CLASSES: usize = 10;

/// The orientation of a digit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Upright.
    Upright,
    /// On its side.
    Turned,
}

#[derive(Clone, Debug)]
pub struct Picture {
    /// `SIDE × SIDE` values, row by row, 0 for dark to 1 for bright, with noise.
    pixels: Vec<f32>,
    digit: usize,
}

/// `count` pictures; the same ones for the same seed.
pub fn pictures(count: usize, task: Task, seed: u64) -> InMemDataset<Picture> {
    let mut random = StdRng::seed_from_u64(seed);
    let pictures = (0..count).map(|index| picture(index % CLASSES, task, &mut random));
    InMemDataset::new(pictures.collect())
}

/// The seven segments of each digit: top, upper left and right, middle, lower left and right, bottom.
const SEGMENTS: [[u8; 7]; CLASSES] = [
    [1, 1, 1, 0, 1, 1, 1],
    [0, 0, 1, 0, 0, 1, 0],
    [1, 0, 1, 1, 1, 0, 1],
    [1, 0, 1, 1, 0, 1, 1],
    [0, 1, 1, 1, 0, 1, 0],
    [1, 1, 0, 1, 0, 1, 1],
    [1, 1, 0, 1, 1, 1, 1],
    [1, 0, 1, 0, 0, 1, 0],
    [1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 0, 1, 1],
];

fn picture(digit: usize, task: Task, random: &mut StdRng) -> Picture {
    let (top, left) = (random.random_range(1..4), random.random_range(2..6));
    let half = random.random_range(4..6);
    let width = random.random_range(5..8);
    let (middle, bottom, right) = (top + half, top + 2 * half, left + width);
    // Rows and columns from and to, both included.
    let lines = [
        [top, left, top, right],
        [top, left, middle, left],
        [top, right, middle, right],
        [middle, left, middle, right],
        [middle, left, bottom, left],
        [middle, right, bottom, right],
        [bottom, left, bottom, right],
    ];
    let mut pixels = vec![0.0f32; SIDE * SIDE];
    for (line, _) in lines.iter().zip(SEGMENTS[digit]).filter(|(_, on)| *on == 1) {
        let bright = random.random_range(0.6..1.0);
        for row in line[0]..=line[2] {
            for column in line[1]..=line[3] {
                pixels[row * SIDE + column] = bright;
            }
        }
    }
    if task == Task::Turned {
        let upright = pixels.clone();
        for row in 0..SIDE {
            for column in 0..SIDE {
                pixels[row * SIDE + column] = upright[(SIDE - 1 - column) * SIDE + row];
            }
        }
    }
    for pixel in &mut pixels {
        *pixel += random.random_range(-0.4..0.4);
    }
    Picture { pixels, digit }
}

#[derive(Clone, Debug)]
pub struct Batch {
    /// `[pictures, SIDE · SIDE]`
    pub pixels: Tensor<2>,
    /// `[pictures]`
    pub digits: Tensor<1, Int>,
}

pub struct Batches;

impl Batcher<Picture, Batch> for Batches {
    fn batch(&self, pictures: Vec<Picture>, device: &Device) -> Batch {
        let count = pictures.len();
        let digits = pictures.iter().map(|picture| picture.digit as i32);
        let digits = TensorData::new(digits.collect::<Vec<_>>(), [count]);
        let pixels = pictures.into_iter().flat_map(|picture| picture.pixels);
        let pixels = TensorData::new(pixels.collect::<Vec<_>>(), [count, SIDE * SIDE]);
        Batch {
            pixels: Tensor::from_data(pixels, device),
            digits: Tensor::from_data(digits, device),
        }
    }
}
