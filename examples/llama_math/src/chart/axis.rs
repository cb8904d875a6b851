//! An axis: values, their positions, and the marks at some of them.

use super::style::plain;

/// How values become positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// From the smallest value to the largest.
    Linear,
    /// The same, marked at whole numbers.
    Count,
    /// From 0 to the largest value.
    FromZero,
    /// By ratio; values that are not above 0 are left out.
    Logarithmic,
    /// The same, marked at powers of two.
    PowersOfTwo,
}

/// One axis: values and their positions.
pub(super) struct Axis {
    scale: Scale,
    /// Least and most, in the units of the scale.
    range: [f64; 2],
    places: [f64; 2],
}

impl Axis {
    pub(super) fn new(scale: Scale, values: impl Iterator<Item = f64>, places: [f64; 2]) -> Self {
        let scaled = values.map(|value| scaled(scale, value));
        let (mut low, mut high) = scaled
            .fold((f64::INFINITY, f64::NEG_INFINITY), |range, value| {
                (range.0.min(value), range.1.max(value))
            });
        if scale == Scale::FromZero {
            (low, high) = (0.0, high.max(0.0));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        let room = match scale {
            Scale::FromZero if high == 0.0 => [0.0, 1.0],
            Scale::FromZero => [0.0, 0.04 * high],
            _ if high == low => [0.5; 2],
            _ => [0.0; 2],
        };
        Self {
            scale,
            range: [low - room[0], high + room[1]],
            places,
        }
    }

    pub(super) fn place(&self, value: f64) -> f64 {
        let [low, high] = self.range;
        let [first, last] = self.places;
        first + (scaled(self.scale, value) - low) / (high - low) * (last - first)
    }

    /// Values to mark, and their texts.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let [low, high] = self.range;
        let margin = 1e-9 * (high - low);
        match self.scale {
            Scale::Logarithmic => {
                let decades = low.floor() as i32..=high.ceil() as i32;
                let of = |digits: &'static [f64]| {
                    let all = decades.clone().flat_map(move |decade| {
                        digits.iter().map(move |digit| digit * 10f64.powi(decade))
                    });
                    let inside = all.filter(|value: &f64| {
                        (low - margin..=high + margin).contains(&value.log10())
                    });
                    inside
                        .map(|value| (value, plain(value)))
                        .collect::<Vec<_>>()
                };
                let (few, some) = (of(&[1.0]), of(&[1.0, 2.0, 5.0]));
                match (few.len(), some.len()) {
                    (4.., _) => few,
                    (_, 2..) => some,
                    // A range without such numbers.
                    _ => {
                        let [low, high] = [low, high].map(|power| 10f64.powf(power));
                        even(low, high, 0.0)
                    }
                }
            }
            Scale::PowersOfTwo => {
                let [first, last] = [(low - margin).ceil() as i32, (high + margin).floor() as i32];
                let power = |exponent: i32| (2f64.powi(exponent), plain(2f64.powi(exponent)));
                (first..=last).map(power).collect()
            }
            Scale::Count => even(low, high, 1.0),
            Scale::Linear | Scale::FromZero => even(low, high, 0.0),
        }
    }
}

/// About five values at even distances of at least `least`, and their texts.
fn even(low: f64, high: f64, least: f64) -> Vec<(f64, String)> {
    let margin = 1e-9 * (high - low);
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
    let step = step.into_iter().find(|&step| step >= rough * 0.999);
    let step = step.unwrap_or(10.0 * power).max(least);
    let first = ((low - margin) / step).ceil() as i64;
    let last = ((high + margin) / step).floor() as i64;
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    let tick = |count: i64| {
        let value = count as f64 * step;
        let text = match decimals {
            ..=3 => format!("{value:.decimals$}"),
            _ if value == 0.0 => "0".into(),
            _ => plain(value),
        };
        (value, text)
    };
    (first..=last).map(tick).collect()
}

fn scaled(scale: Scale, value: f64) -> f64 {
    match scale {
        Scale::Logarithmic => value.log10(),
        Scale::PowersOfTwo => value.log2(),
        Scale::Linear | Scale::Count | Scale::FromZero => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_stand_where_their_values_say() {
        let axis = |scale, values: &[f64]| Axis::new(scale, values.iter().copied(), [0.0, 100.0]);
        assert_eq!(axis(Scale::Linear, &[2.0, 4.0]).place(2.5), 25.0);
        // 4 % of room above the largest.
        assert_eq!(axis(Scale::FromZero, &[2.0, 4.0]).place(2.08), 50.0);
        assert_eq!(axis(Scale::PowersOfTwo, &[1.0, 16.0]).place(2.0), 25.0);
        let logarithmic = axis(Scale::Logarithmic, &[0.01, 100.0]);
        assert!((logarithmic.place(0.1) - 25.0).abs() < 1e-9);
        let texts = |axis: &Axis| -> Vec<String> {
            axis.ticks().into_iter().map(|(_, text)| text).collect()
        };
        assert_eq!(texts(&logarithmic), ["0.01", "0.1", "1", "10", "100"]);
        assert_eq!(
            texts(&axis(Scale::PowersOfTwo, &[1.0, 8.0])),
            ["1", "2", "4", "8"]
        );
        let narrow = axis(Scale::Logarithmic, &[0.15, 6.0]);
        assert_eq!(texts(&narrow), ["0.2", "0.5", "1", "2", "5"]);
        assert_eq!(
            texts(&axis(Scale::FromZero, &[0.4])),
            ["0.0", "0.1", "0.2", "0.3", "0.4"]
        );
        assert_eq!(texts(&axis(Scale::Count, &[1.0, 2.0])), ["1", "2"]);
        // Neither a power of ten nor twice or five times one.
        assert_eq!(
            texts(&axis(Scale::Logarithmic, &[1.32, 1.41])),
            ["1.32", "1.34", "1.36", "1.38", "1.40"]
        );
        // Learning rates.
        assert_eq!(
            texts(&axis(Scale::FromZero, &[2e-5])),
            ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]
        );
    }
}
