//! Heat maps of the change of the weights: by layer and time, and by layer and projection at the end.

use crate::chart::HeatMap;
use crate::history::{Change, Measures, Record};

/// Most columns of a map over time.
const TIMES: usize = 10;

/// The changes at each time that they were measured.
fn changes(record: &Record) -> Vec<(usize, &[Change])> {
    let found = record.measurements.iter();
    let found = found.filter_map(|measurement| match &measurement.measures {
        Measures::Changes { weights, .. } => Some((measurement.step, &weights[..])),
        _ => None,
    });
    found.collect()
}

/// Mean effective rank of the change of each layer's weights over time, if it was measured more than once.
pub fn rank_map(record: &Record) -> Option<HeatMap> {
    let all = changes(record);
    if all.len() < 2 {
        return None;
    }
    // Evenly, the last one included.
    let count = all.len().min(TIMES);
    let shown: Vec<_> = (1..=count)
        .map(|i| all[i * all.len() / count - 1])
        .collect();
    let mut rows: Vec<(String, Vec<Option<f64>>)> = Vec::new();
    for layer in names(all[0].1, layer) {
        let mean = |(_, weights): &(usize, &[Change])| {
            let own = weights
                .iter()
                .filter(|change| self::layer(&change.path) == layer);
            let (count, sum) = own.fold((0, 0.0), |(count, sum), change| {
                (count + 1, sum + change.effective_rank)
            });
            (count > 0).then(|| sum / f64::from(count))
        };
        let values = shown.iter().map(mean).collect();
        rows.push((layer, values));
    }
    Some(HeatMap {
        title: "Effective rank by layer over time".into(),
        unit: "effective rank".into(),
        labels: ["step".into(), "layer".into()],
        columns: shown.iter().map(|(step, _)| step.to_string()).collect(),
        rows,
    })
}

/// Effective rank and size of the last measured changes, by layer and projection, and all of their numbers
/// as rows of a table.
pub fn last_changes(record: &Record) -> Option<([HeatMap; 2], &[Change])> {
    let (step, weights) = changes(record).pop()?;
    let kinds = names(weights, kind);
    let map = |title: String, unit: &str, of: fn(&Change) -> f64| HeatMap {
        title,
        unit: unit.into(),
        labels: ["projection".into(), "layer".into()],
        columns: kinds.clone(),
        rows: names(weights, layer)
            .into_iter()
            .map(|layer| {
                let value = |kind: &String| {
                    let is = |change: &&Change| {
                        self::layer(&change.path) == layer && self::kind(&change.path) == *kind
                    };
                    weights.iter().find(is).map(of)
                };
                let values = kinds.iter().map(value).collect();
                (layer, values)
            })
            .collect(),
    };
    let maps = [
        map(
            format!("Effective rank after step {step}"),
            "effective rank",
            |change| change.effective_rank,
        ),
        map(
            format!("Change after step {step}, % of the weight"),
            "% of the weight",
            |change| 100.0 * change.relative,
        ),
    ];
    Some((maps, weights))
}

/// The layer of a weight: its number, or the name of a weight outside of layers.
fn layer(path: &str) -> String {
    let after = path.split_once(".layers.").map(|(_, after)| after);
    let number = after.and_then(|after| after.split('.').next());
    number.map_or_else(|| kind(path), Into::into)
}

/// What a weight is: the part of its name before `weight`, without `_proj`.
fn kind(path: &str) -> String {
    let name = path.strip_suffix(".weight").unwrap_or(path);
    let name = name.rsplit('.').next().unwrap_or(name);
    name.trim_end_matches("_proj").into()
}

/// The different names, in the order of the weights.
fn names(weights: &[Change], of: fn(&str) -> String) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for change in weights {
        let name = of(&change.path);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Measurement;

    fn record(steps: usize) -> Record {
        let change = |layer: usize, name: &str, rank: usize| Change {
            path: format!("model.layers.{layer}.{name}_proj.weight"),
            relative: 0.01,
            rank,
            effective_rank: rank as f64,
            missed: 0.0,
        };
        let measurement = |step| Measurement {
            step,
            measures: Measures::Changes {
                weights: vec![
                    change(0, "self_attn.q", step),
                    change(0, "mlp.down", 3 * step),
                    change(1, "self_attn.q", 10 + step),
                ],
                spectrum: None,
            },
        };
        Record {
            metrics: Vec::new(),
            measurements: (1..=steps).map(measurement).collect(),
        }
    }

    #[test]
    fn layers_have_the_mean_of_their_weights_at_up_to_ten_times() {
        assert!(rank_map(&record(0)).is_none() && rank_map(&record(1)).is_none());
        let map = rank_map(&record(30)).unwrap();
        let columns: Vec<&str> = map.columns.iter().map(|name| &**name).collect();
        assert_eq!(columns.len(), TIMES);
        assert_eq!((columns[0], columns[9]), ("3", "30"));
        let expected = [("0".to_string(), Some(6.0)), ("1".to_string(), Some(13.0))];
        let first = map.rows.iter().map(|(name, row)| (name.clone(), row[0]));
        assert!(first.eq(expected));
        assert_eq!(rank_map(&record(3)).unwrap().columns, ["1", "2", "3"]);
    }

    #[test]
    fn the_last_changes_are_by_layer_and_projection() {
        let record = record(2);
        let ([ranks, sizes], weights) = last_changes(&record).unwrap();
        assert_eq!(weights.len(), 3);
        assert_eq!(ranks.columns, ["q", "down"]);
        let rows: Vec<_> = ranks.rows.iter().map(|(_, row)| row.clone()).collect();
        assert_eq!(rows, [[Some(2.0), Some(6.0)], [Some(12.0), None]]);
        assert_eq!(sizes.rows[0].1[0], Some(1.0));
    }

    #[test]
    fn weights_outside_of_layers_have_their_name() {
        assert_eq!(layer("model.layers.12.mlp.up_proj.weight"), "12");
        assert_eq!(kind("model.layers.12.mlp.up_proj.weight"), "up");
        assert_eq!(layer("lm_head.weight"), "lm_head");
    }
}
