//! Parts that reports have in common.

use burn::tensor::Device;

use super::curves::spectra;
use super::maps::{last_changes, rank_map};
use super::page::{Section, Table};
use crate::history::Record;
use crate::machine::facts;

/// The change of the weights, if it was measured.
pub fn change(record: &Record) -> Option<Section> {
    let (maps, weights) = last_changes(record)?;
    let mut pictures: Vec<String> = rank_map(record).iter().map(|map| map.inline()).collect();
    pictures.extend(spectra(record).iter().map(|panel| panel.inline()));
    pictures.extend(maps.iter().map(|map| map.inline()));
    let rows = weights.iter().map(|change| {
        vec![
            change.path.clone(),
            change.rank.to_string(),
            format!("{:.1}", change.effective_rank),
            format!("{:.3}", 100.0 * change.relative),
            format!("{:.3}", 100.0 * change.missed),
        ]
    });
    Some(Section {
        id: "change".into(),
        heading: "Change of the weights".into(),
        about: "The difference between each adapted weight and the pretrained one. The rank counts its \
                directions; the effective rank weighs them, and is large if many directions matter."
            .into(),
        pictures,
        tables: vec![Table {
            caption: format!("All {} weights", weights.len()),
            columns: [
                "weight",
                "rank",
                "effective rank",
                "change, % of the weight",
                "missed by the sketch, % of the squared norm",
            ]
            .map(String::from)
            .into(),
            rows: rows.collect(),
            is_folded: true,
        }],
        ..Section::default()
    })
}

/// The settings, by name, and the command.
pub fn configuration(mut settings: Vec<(String, String)>, command: String) -> Section {
    settings.push(("command".into(), command));
    Section {
        id: "configuration".into(),
        heading: "Configuration".into(),
        tables: vec![pairs(settings)],
        ..Section::default()
    }
}

/// What a result depends on besides its settings.
pub fn machine(device: &Device) -> Section {
    Section {
        id: "machine".into(),
        heading: "Machine".into(),
        tables: vec![pairs(facts(device))],
        ..Section::default()
    }
}

fn pairs(pairs: Vec<(String, String)>) -> Table {
    Table {
        rows: pairs
            .into_iter()
            .map(|(name, value)| vec![name, value])
            .collect(),
        ..Table::default()
    }
}
