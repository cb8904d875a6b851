//! The files of a sweep: its tables for the book, the rates it chose, and a picture.

use std::fmt::Write;
use std::path::Path;

use super::learning_rates::{Best, LearningRates};
use super::rates;
use super::row::Row;
use super::search::Finding;
use super::statistics::{Estimate, percent};
use super::sweep::Sweep;
use super::task::{SEQUENCES_PER_STEP, Task};
use super::trial::{Outcome, TrialResult};
use super::verdict::{against, compared, unfit};
use crate::Error;
use crate::chart::{self, Curve, Panel, Scale, Stroke};
use crate::machine::machine;

/// The tables, for the book.
pub const TABLE: &str = "sweep.md";
/// The best rates, which the run without arguments reads.
pub const RATES: &str = "learning_rates.json";
/// Right answers by learning rate.
pub const PICTURE: &str = "sweep.svg";

/// Writes them.
///
/// # Errors
///
/// [`Error::Io`].
pub fn write(
    folder: &Path,
    sweep: &Sweep,
    findings: &[Finding],
    base: &[(Task, f64)],
) -> Result<(), Error> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let write = |name: &str, content: &str| {
        let path = folder.join(name);
        std::fs::write(&path, content).map_err(Error::io(path))
    };
    write(TABLE, &table(sweep, findings, base))?;
    write(PICTURE, &picture(sweep, findings))?;
    let rates = serde_json::to_string_pretty(&learning_rates(sweep, findings));
    write(RATES, &(rates.expect("numbers have a JSON form") + "\n"))
}

fn learning_rates(sweep: &Sweep, findings: &[Finding]) -> LearningRates {
    let best = findings.iter().map(|finding| Best {
        task: finding.entry.task,
        row: finding.entry.row,
        lr: finding.lr(),
    });
    LearningRates {
        tuning_seeds: sweep.tuning_seeds.clone(),
        rank: sweep.rank,
        shards: sweep.shards,
        best: best.collect(),
    }
}

/// How HD-PiSSA's rows stand against the others, a sentence each.
fn verdicts(task: Task, findings: &[Finding], base: f64) -> Vec<String> {
    let of_task = findings.iter().filter(|finding| finding.entry.task == task);
    let of_task: Vec<&Finding> = of_task.collect();
    if let Some(reason) = unfit(&of_task, Some(base)) {
        return vec![format!("Nothing can be said: {reason}.")];
    }
    let sentences = compared(&of_task).into_iter();
    sentences
        .map(|(subject, rivals)| against(task.judge(), &subject.entry.title(), &rivals) + ".")
        .collect()
}

fn table(sweep: &Sweep, findings: &[Finding], base: &[(Task, f64)]) -> String {
    let listed = |seeds: &[u64]| {
        let all: Vec<String> = seeds.iter().map(u64::to_string).collect();
        all.join(", ")
    };
    let tuning = listed(&sweep.tuning_seeds);
    let mut text = format!(
        "<!-- Written by `llama_math sweep`. -->\n\nHD-PiSSA has {} shards of rank {}; \
         every method sees the same {SEQUENCES_PER_STEP} sequences in each step. Learning rates were \
         chosen by the tuning seeds {}, results are of the seeds {}. Intervals are 95 % ones of the mean over seeds \
         (Student's t); differences are paired by seed. {}\n",
        sweep.shards,
        sweep.rank,
        tuning,
        listed(&sweep.seeds),
        machine()
    );
    for &task in &sweep.tasks {
        let of_task = findings.iter().filter(|finding| finding.entry.task == task);
        let of_task: Vec<&Finding> = of_task.collect();
        let base = base.iter().find(|(of, _)| *of == task);
        let base = base.map_or(0.0, |(_, share)| *share);
        let (steps, items) = task.length(sweep.quick);
        let what = task.heading(items);
        let _ = writeln!(text, "\n### {what}: {steps} steps\n");
        for sentence in verdicts(task, findings, base) {
            let _ = writeln!(text, "- {sentence}");
        }
        let _ = writeln!(
            text,
            "\n| method | learning rate | of ({} of tuning) | {} of each seed | mean | loss | \
             trainable | effective rank |\n|---|---|---|---|---|---|---|---|",
            task.measure(),
            task.measure()
        );
        let _ = writeln!(text, "| base | | | | {} | | | |", percent(base));
        for finding in of_task {
            let _ = writeln!(text, "{}", line(sweep, finding));
        }
    }
    text
}

fn line(sweep: &Sweep, finding: &Finding) -> String {
    let tried = rates::tried(&finding.tried).into_iter().map(|tried| {
        let rate = tried.rate.value();
        match tried.loss.is_finite() {
            true => format!("{rate:e}: {}", percent(tried.score)),
            false => format!("{rate:e}: diverged"),
        }
    });
    let tried = tried.collect::<Vec<_>>().join(", ");
    let each: Vec<String> = finding.scores().into_iter().map(percent).collect();
    let share = Estimate::of(&finding.scores());
    let losses: Vec<f64> = finding.fresh.iter().map(TrialResult::loss).collect();
    let loss = Estimate::of(&losses);
    let measured = finding
        .fresh
        .iter()
        .filter_map(|result| match &result.outcome {
            Outcome::Trained(measured) => Some(measured),
            Outcome::Diverged(_) => None,
        });
    let measured: Vec<_> = measured.collect();
    let trainable = measured.first().map_or(0, |measured| measured.trainable);
    let ranks = measured.iter().map(|measured| measured.effective_rank);
    let rank = ranks.sum::<f64>() / measured.len().max(1) as f64;
    format!(
        "| {} | {:e} | {tried} | {} | {} ± {:.1} | {:.3} ± {:.3} | {trainable} | {rank:.1} |",
        finding.entry.row.title(sweep.rank, sweep.shards),
        finding.lr(),
        each.join(", "),
        percent(share.mean),
        100.0 * share.half_width,
        loss.mean,
        loss.half_width
    )
}

fn picture(sweep: &Sweep, findings: &[Finding]) -> String {
    let panel = |&task: &Task| {
        let of_task = findings.iter().filter(|finding| finding.entry.task == task);
        let curves = of_task.map(|finding| {
            let tried = rates::tried(&finding.tried).into_iter();
            let points = tried.map(|tried| (tried.rate.value(), 100.0 * tried.score));
            Curve {
                name: finding.entry.row.short(sweep.rank, sweep.shards),
                color: finding.entry.row.color(),
                stroke: match finding.entry.row {
                    Row::LoraWide | Row::PissaWide | Row::SharedLeading => Stroke::Dashed,
                    _ => Stroke::Dotted,
                },
                points: points.collect(),
                band: Vec::new(),
            }
        });
        Panel {
            title: task.to_string(),
            labels: ["learning rate".into(), format!("{}, %", task.measure())],
            scales: [Scale::Logarithmic, Scale::FromZero],
            curves: curves.collect(),
        }
    };
    let panels: Vec<Panel> = sweep.tasks.iter().map(panel).collect();
    chart::svg("Every method by learning rate", &panels)
}
