//! What each diagram shows.

use crate::svg::{Anchor, SHARD, Svg};

/// The names of all diagrams and their texts.
pub fn all() -> [(&'static str, String); 6] {
    [
        ("windows", windows()),
        ("copies_and_windows", copies_and_windows()),
        ("step", step()),
        ("workers", workers()),
        ("out_of_reach", out_of_reach()),
        ("memory", memory()),
    ]
}

/// Singular values as bars, cut into windows of eight shards.
fn windows() -> String {
    let mut svg = Svg::new(
        330,
        "Singular values of a weight in falling order. Shard 0 holds the first r, shard 1 the next r, up to shard 7.",
    );
    svg.text(20.0, 28.0, Anchor::Start, "singular values of W");
    let (rank, base, step) = (4, 250.0, 8.6);
    let count = 50;
    for index in 0..count {
        let shard = index / rank;
        let value = 200.0 / (1.0 + index as f32 * 0.09);
        let (fill, opacity) = if shard < 8 {
            (SHARD[shard], 0.9)
        } else {
            ("currentColor", 0.12)
        };
        let x = 24.0 + index as f32 * step;
        svg.cell(x, base - value, step - 1.5, value, fill, opacity);
    }
    for shard in 0..8 {
        let x = 24.0 + (shard as f32 + 0.5) * rank as f32 * step;
        svg.text(x - 1.0, base + 24.0, Anchor::Middle, &shard.to_string());
    }
    svg.text(388.0, base + 24.0, Anchor::Middle, "untouched");
    svg.text(
        24.0,
        base + 56.0,
        Anchor::Start,
        "K = 8 shards, r = 4 components each",
    );
    svg.finish()
}

/// One adapter on eight devices, and eight windows on eight devices.
fn copies_and_windows() -> String {
    let mut svg = Svg::new(
        520,
        "LoRA: eight devices hold the same adapter, and the update has rank r. HD-PiSSA: each device holds another window, and the update has rank 2 K r.",
    );
    let grid = |svg: &mut Svg, top: f32, fill: &dyn Fn(usize) -> &'static str| {
        for device in 0..8 {
            let x = 24.0 + (device % 4) as f32 * 112.0;
            let y = top + (device / 4) as f32 * 74.0;
            svg.cell(x, y, 96.0, 58.0, "currentColor", 0.08);
            svg.cell(x + 8.0, y + 8.0, 12.0, 42.0, fill(device), 0.95);
            svg.cell(x + 26.0, y + 8.0, 62.0, 12.0, fill(device), 0.95);
            svg.text(x + 57.0, y + 46.0, Anchor::Middle, &format!("GPU {device}"));
        }
    };
    svg.heading(24.0, 28.0, Anchor::Start, "LoRA: one adapter, eight copies");
    grid(&mut svg, 44.0, &|_| SHARD[0]);
    svg.text(24.0, 218.0, Anchor::Start, "rank of the update: r (16)");
    svg.heading(24.0, 288.0, Anchor::Start, "HD-PiSSA: eight windows of W");
    grid(&mut svg, 304.0, &|device| SHARD[device]);
    svg.text(
        24.0,
        478.0,
        Anchor::Start,
        "rank of the update: 2 · 8 · r (256)",
    );
    svg.text(24.0, 506.0, Anchor::Start, "same trainable size per device");
    svg.finish()
}

/// One step of three shards, from data to the weight.
fn step() -> String {
    let mut svg = Svg::new(
        590,
        "One step: each shard turns its gradient into deltas of its factors; all deltas are gathered; every copy of W takes the same sum.",
    );
    let columns = [24.0, 176.0, 328.0];
    let labels = ["shard 0", "shard 1", "shard K−1"];
    for (column, label) in columns.iter().zip(labels) {
        svg.text(column + 64.0, 28.0, Anchor::Middle, label);
    }
    let rows = [
        (44.0, "its data"),
        (128.0, "gradient"),
        (212.0, "optimizer"),
        (296.0, "Δa, Δb"),
    ];
    for (shard, column) in columns.iter().enumerate() {
        let colour = SHARD[[0, 1, 7][shard]];
        for (index, (top, label)) in rows.iter().enumerate() {
            svg.cell(*column, *top, 128.0, 48.0, colour, 0.25);
            svg.text(column + 64.0, top + 31.0, Anchor::Middle, label);
            if index > 0 {
                svg.arrow((column + 64.0, top - 34.0), (column + 64.0, top - 3.0));
            }
        }
        svg.arrow((column + 64.0, 346.0), (column + 64.0, 381.0));
    }
    svg.cell(24.0, 384.0, 432.0, 48.0, "currentColor", 0.08);
    svg.text(
        240.0,
        415.0,
        Anchor::Middle,
        "gather the deltas of all shards",
    );
    svg.arrow((240.0, 434.0), (240.0, 465.0));
    svg.cell(24.0, 468.0, 432.0, 48.0, "currentColor", 0.08);
    svg.text(240.0, 499.0, Anchor::Middle, "W += Σ (a·Δb + Δa·b + Δa·Δb)");
    svg.text(
        240.0,
        548.0,
        Anchor::Middle,
        "The same sum on every device.",
    );
    svg.text(
        240.0,
        574.0,
        Anchor::Middle,
        "The factors stay where they were.",
    );
    svg.finish()
}

/// The same eight shards on one, two and eight workers.
fn workers() -> String {
    let mut svg = Svg::new(
        300,
        "Eight shards on one worker, on two workers, and on eight. The trained weights are the same.",
    );
    for (row, (count, label)) in [(1, "1 worker"), (2, "2 workers"), (8, "8 workers")]
        .into_iter()
        .enumerate()
    {
        let top = 20.0 + row as f32 * 84.0;
        svg.text(20.0, top + 36.0, Anchor::Start, label);
        let (left, width) = (128.0, 336.0 / count as f32);
        for worker in 0..count {
            svg.cell(
                left + worker as f32 * width,
                top,
                width - 4.0,
                58.0,
                "currentColor",
                0.08,
            );
        }
        for (shard, colour) in SHARD.into_iter().enumerate() {
            let x = left + shard as f32 * 42.0 + 4.0;
            svg.cell(x, top + 11.0, 30.0, 36.0, colour, 0.9);
        }
    }
    svg.text(
        240.0,
        288.0,
        Anchor::Middle,
        "The trained weights are the same.",
    );
    svg.finish()
}

/// The share of a change that a method cannot reach, against its trainable size.
fn out_of_reach() -> String {
    let mut svg = Svg::new(
        420,
        "The share of a full-rank change that is out of reach, against K r over the side of the weight: LoRA of rank r, LoRA of rank K r, HD-PiSSA.",
    );
    let at = |x: f32, y: f32| (60.0 + x * 390.0, 300.0 - y * 240.0);
    svg.text(20.0, 28.0, Anchor::Start, "share of a change out of reach");
    svg.line(at(0.0, 0.0), at(1.0, 0.0));
    svg.line(at(0.0, 0.0), at(0.0, 1.0));
    for (value, label) in [(0.0, "0"), (0.5, "0.5"), (1.0, "1")] {
        let (x, _) = at(value, 0.0);
        svg.text(x, 324.0, Anchor::Middle, label);
        let (_, y) = at(0.0, value);
        svg.text(52.0, y + 6.0, Anchor::End, label);
    }
    svg.text(
        255.0,
        350.0,
        Anchor::Middle,
        "K·r / side of the weight (K = 8)",
    );
    let draw = |svg: &mut Svg, colour: &str, dashes: &str, share: &dyn Fn(f32) -> f32| {
        let points: Vec<_> = (0..=60)
            .map(|index| index as f32 / 60.0)
            .map(|x| at(x, share(x)))
            .collect();
        svg.curve(&points, colour, 4.0, dashes);
    };
    draw(&mut svg, SHARD[5], "2 5", &|x| 1.0 - x / 8.0);
    draw(&mut svg, SHARD[1], "10 6", &|x| 1.0 - x);
    draw(&mut svg, SHARD[0], "", &|x| (1.0 - x) * (1.0 - x));
    let (x, y) = at(0.62, 1.0 - 0.62 / 8.0);
    svg.text(x, y - 10.0, Anchor::Middle, "LoRA, rank r");
    let (x, y) = at(0.5, 0.5);
    svg.text(x + 14.0, y - 8.0, Anchor::Start, "LoRA, rank K·r");
    let (x, y) = at(0.32, 0.46);
    svg.text(x - 16.0, y + 40.0, Anchor::End, "HD-PiSSA");
    svg.text(
        20.0,
        384.0,
        Anchor::Start,
        "For a change of full rank with equal singular",
    );
    svg.text(
        20.0,
        410.0,
        Anchor::Start,
        "values that ignores the directions of W.",
    );
    svg.finish()
}

/// Values of one shard's factors of rank 16, for the linear layers of a 7B Llama: 4 of 4096 x 4096 and 3 of
/// 4096 x 11008 in each of 32 blocks.
const VALUES_7B: f32 = 16.0 * 32.0 * (4.0 * 8192.0 + 3.0 * 15104.0);

/// Gigabytes on each of 8 devices for a 7B Llama at rank 16, without the weights and activations.
fn memory() -> String {
    let mut svg = Svg::new(
        560,
        "Memory of the adapters of a 7B Llama on each of 8 devices: LoRA of rank 16 takes 0.6 GB, HD-PiSSA as published 1.9, with shared gradients 4.2, LoRA of rank 128 5.1.",
    );
    svg.text(
        20.0,
        28.0,
        Anchor::Start,
        "GB on each of 8 devices, 7B Llama",
    );
    let one = VALUES_7B * 4.0 / 1e9;
    // Factors, frames of all shards, gradients, moments, in shards.
    let rows = [
        ("LoRA, rank 16", [1.0, 0.0, 1.0, 2.0]),
        ("HD-PiSSA, 8 × 16, per shard", [1.0, 8.0, 1.0, 2.0]),
        ("HD-PiSSA, 8 × 16, shared", [8.0, 8.0, 8.0, 2.0]),
        ("LoRA, rank 128", [8.0, 0.0, 8.0, 16.0]),
    ];
    let scale = 80.0;
    for (index, (name, parts)) in rows.into_iter().enumerate() {
        let y = 66.0 + index as f32 * 92.0;
        svg.text(20.0, y, Anchor::Start, name);
        let mut x = 20.0;
        for (part, colour) in parts.into_iter().zip(SHARD) {
            let width = part * one * scale;
            if width > 0.0 {
                svg.cell(x, y + 10.0, width, 36.0, colour, 0.9);
            }
            x += width;
        }
        let total: f32 = parts.into_iter().sum::<f32>() * one;
        // A long bar has its figure above its end.
        match x > 400.0 {
            true => svg.text(460.0, y, Anchor::End, &format!("{total:.1}")),
            false => svg.text(x + 8.0, y + 36.0, Anchor::Start, &format!("{total:.1}")),
        }
    }
    for (index, (name, colour)) in ["factors", "frames of all shards", "gradients", "moments"]
        .into_iter()
        .zip(SHARD)
        .enumerate()
    {
        let (x, y) = (
            20.0 + (index % 2) as f32 * 190.0,
            446.0 + (index / 2) as f32 * 44.0,
        );
        svg.cell(x, y, 24.0, 24.0, colour, 0.9);
        svg.text(x + 32.0, y + 20.0, Anchor::Start, name);
    }
    svg.finish()
}
