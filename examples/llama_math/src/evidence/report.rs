//! The files of a reproduction: a chapter of the book with its tables and pictures, and all numbers
//! as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use super::judge::Judge;
use super::rates;
use super::reproduce::{Answered, Experiment, Measure, Settings};
use super::row::Row;
use super::search::{Entry, Finding};
use super::statistics::{Estimate, percent};
use super::task::{Kind, MAX_LENGTH_OF_RECORDS, Task};
use super::trial::{Measured, Outcome, TrialResult};
use super::verdict::{Rival, compared, unfit};
use crate::Error;
use crate::chart::{self, Curve, Panel, Scale, Stroke};
use crate::machine::machine;

/// The chapter.
pub const CHAPTER: &str = "reproduce.md";
/// The numbers.
pub const NUMBERS: &str = "reproduce.json";

/// Stands where a training has not been run.
const MISSING: &str = "not run";

/// Differences below this one are none: they show as 0.0 points, or a loss of 0.000.
const NOTHING: f64 = 5e-4;

/// A rate whose share of right answers falls below this part of what it was with the tuning seeds has
/// not carried over to other seeds.
const CARRIED_OVER: f64 = 0.5;

/// What the paper says of itself. Its figures are not ours to compute.
const PAPER: &str = "\
## The paper's own figures

HD-PiSSA's paper (arXiv 2505.18777) reports for several tasks trained at once, on the mean of 12 benchmarks, 10.0 \
points more than LoRA and 4.98 points more than PiSSA. Its setting differs from this one in almost everything:

| setting | the paper | here |
|---|---|---|
| models | Llama-2-7B, Llama-3-8B, Mistral-7B | a Llama of 0.8 million values, SmolLM2-135M on GSM8K, and single layers |
| shards | 8 GPUs, rank 16 each | virtual shards on a CPU, rank as above |
| learning rate | 2e-5 for all methods; its LoRA was not tuned | searched for every method and task |
| batch | 128 sequences per step, one epoch | 32 sequences per step, 8 on GSM8K |
| baselines | LoRA and PiSSA of the rank of one shard | these, and LoRA and PiSSA of as many trainable values |

“16 times the effective rank” compares K = 8 shards, whose update has rank up to 2·K·r = 16·r, with a LoRA of rank r. \
PiSSA's own change has rank up to 2·r: there the bound is 8 times.
";

/// Writes them.
///
/// # Errors
///
/// [`Error::Io`].
pub fn write(folder: &Path, settings: &Settings, answers: &[Vec<Answered>]) -> Result<(), Error> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let write = |name: &str, content: &str| {
        let path = folder.join(name);
        std::fs::write(&path, content).map_err(Error::io(path))
    };
    write(CHAPTER, &chapter(settings, answers))?;
    let numbers = serde_json::to_string(&numbers(settings, answers));
    write(
        NUMBERS,
        &(numbers.expect("numbers have a JSON form") + "\n"),
    )?;
    for (experiment, parts) in settings.experiments.iter().zip(answers) {
        if let Some(text) = picture(experiment, parts) {
            write(&picture_name(experiment), &text)?;
        }
    }
    Ok(())
}

fn picture_name(experiment: &Experiment) -> String {
    format!("reproduce_{}.svg", experiment.name)
}

fn measured(result: &TrialResult) -> Option<&Measured> {
    match &result.outcome {
        Outcome::Trained(measured) => Some(measured),
        Outcome::Diverged(_) => None,
    }
}

/// Every result there is, each training once.
fn results(answers: &[Vec<Answered>]) -> BTreeMap<String, &TrialResult> {
    let parts = answers.iter().flatten();
    let all = parts.flat_map(|answered| {
        let findings = answered.findings.iter();
        let of_findings = findings.flat_map(|finding| finding.tried.iter().chain(&finding.fresh));
        of_findings.chain(&answered.base)
    });
    all.map(|result| (result.trial.name(), result)).collect()
}

fn listed<T: ToString>(values: &[T]) -> String {
    let all: Vec<String> = values.iter().map(T::to_string).collect();
    all.join(", ")
}

fn chapter(settings: &Settings, answers: &[Vec<Answered>]) -> String {
    let results = results(answers);
    let minutes = results.values().filter_map(|result| measured(result));
    let minutes = minutes.map(|measured| measured.seconds).sum::<f64>() / 60.0;
    let mut text = format!(
        "<!-- Written by `llama_math reproduce`. -->\n\n# What the command `reproduce` found\n\n\
         Written by one command, from the settings in `examples/llama_math/reproduce.json`:\n\n\
         ```sh\ncargo run --example llama_math -- reproduce --output target/reproduce \\\n    \
         --results book/src/results\n```\n\n\
         A shard has rank {}. Learning rates are the best of a series on the tuning seeds {}; results \
         are of the seeds {} unless a section says otherwise. Every method sees the same data in \
         each step. Intervals are 95 % ones of the mean over seeds (Student's t), differences are \
         paired by seed, and a difference counts if its interval leaves out zero. All numbers are in \
         [{NUMBERS}]({NUMBERS}). The times of the {} trainings, one compute thread each, add up to \
         {minutes:.0} minutes; whatever else the machine did is in them. {}\n",
        settings.rank,
        listed(&settings.tuning_seeds),
        listed(&settings.seeds),
        results.len(),
        machine()
    );
    let mut parts = settings
        .experiments
        .iter()
        .flat_map(|experiment| &experiment.parts);
    if parts.any(|part| part.task.takes_files()) {
        text += "\nOn records of files, such as GSM8K, methods are compared by the loss on held-out records, \
                 elsewhere by the share of right answers or of what was to be learned. To run that part, add \
                 `--model DIR --data train.jsonl --test test.jsonl`.\n";
    }
    missing(settings, answers, &mut text);
    losses(settings, answers, &mut text);
    for (experiment, parts) in settings.experiments.iter().zip(answers) {
        section(settings, experiment, parts, &mut text);
    }
    text + "\n" + PAPER
}

/// What has not been run.
fn missing(settings: &Settings, answers: &[Vec<Answered>], text: &mut String) {
    let mut lines = Vec::new();
    for (experiment, parts) in settings.experiments.iter().zip(answers) {
        for answered in parts {
            let lacking = answered
                .findings
                .iter()
                .filter(|found| !found.is_complete());
            let lacking: Vec<String> = lacking.map(|found| found.entry.title()).collect();
            let what = match lacking.len() {
                0 => continue,
                all if all == answered.findings.len() => "all methods".into(),
                _ => lacking.join("; "),
            };
            lines.push(format!(
                "- {}, {}: {what}",
                experiment.title, answered.part.label
            ));
        }
    }
    if !lines.is_empty() {
        let _ = writeln!(
            text,
            "\n**This record is not complete.** The command was stopped before these were run; it goes \
             on where it stopped.\n\n<details><summary>What is missing: {} columns of tables</summary>\n\n{}\n\n</details>",
            lines.len(),
            lines.join("\n")
        );
    }
}

fn base_gain(answered: &Answered) -> Option<f64> {
    answered.base.as_ref().map(TrialResult::gain)
}

fn complete(answered: &Answered) -> Vec<&Finding> {
    let findings = answered.findings.iter();
    findings.filter(|finding| finding.is_complete()).collect()
}

/// By row of HD-PiSSA and name of its rival: labels of parts with the differences there.
type Differences<'a> = BTreeMap<Row, BTreeMap<String, Vec<(&'a str, Estimate)>>>;

fn differences(parts: &[Answered]) -> Differences<'_> {
    let mut all = Differences::new();
    for answered in parts {
        let findings = complete(answered);
        if unfit(&findings, base_gain(answered)).is_some() {
            continue;
        }
        for (subject, rivals) in compared(&findings) {
            let of_row = all.entry(subject.entry.row).or_default();
            for Rival {
                name,
                mut difference,
            } in rivals
            {
                if difference.mean.abs() < NOTHING {
                    difference.mean = 0.0;
                }
                let label = answered.part.label.as_str();
                of_row.entry(name).or_default().push((label, difference));
            }
        }
    }
    all
}

/// Where HD-PiSSA is behind, and how often it is not.
fn losses(settings: &Settings, answers: &[Vec<Answered>], text: &mut String) {
    let _ = writeln!(text, "\n## Losses first\n");
    for (experiment, parts) in settings.experiments.iter().zip(answers) {
        for (row, rivals) in differences(parts) {
            let title = row.title(settings.rank, 1);
            if rivals.is_empty() {
                continue;
            }
            let all = || rivals.values().flatten().map(|(_, difference)| difference);
            let behind = rivals.iter().filter_map(|(name, differences)| {
                let labels = differences
                    .iter()
                    .filter(|(_, difference)| difference.is_negative());
                let labels: Vec<&str> = labels.map(|(label, _)| *label).collect();
                (!labels.is_empty()).then(|| format!("{name} ({})", labels.join("; ")))
            });
            let behind: Vec<String> = behind.collect();
            let ahead = all().filter(|difference| difference.is_positive()).count();
            let lost = all().filter(|difference| difference.is_negative()).count();
            let drawn = all().count() - ahead - lost;
            let behind = match behind.is_empty() {
                true => "behind nobody".into(),
                false => format!("behind {}", behind.join(", ")),
            };
            let _ = writeln!(
                text,
                "- {}, {title}: {behind}. Of {} comparisons: {lost} behind, {drawn} without a difference \
                 shown, {ahead} ahead.",
                experiment.title,
                all().count()
            );
        }
    }
}

fn section(settings: &Settings, experiment: &Experiment, parts: &[Answered], text: &mut String) {
    let _ = writeln!(text, "\n## {}\n", experiment.title);
    if parts.iter().all(|answered| complete(answered).is_empty()) {
        let _ = writeln!(text, "Not run.");
        return;
    }
    let mut headings: Vec<String> = Vec::new();
    for answered in parts {
        let part = &answered.part;
        headings.push(format!(
            "{}: {}, {} steps, K = {}",
            part.label,
            part.task.heading(part.items),
            part.steps,
            part.shards
        ));
    }
    let _ = writeln!(
        text,
        "Seeds {}. The columns:\n",
        listed(settings.seeds_of(experiment))
    );
    for heading in headings {
        let _ = writeln!(text, "- {heading}");
    }
    for answered in parts {
        let base = answered.base.as_ref().and_then(measured);
        if let Some((used, all)) = base.and_then(|base| base.used) {
            let _ = writeln!(
                text,
                "\nOnly records of at most {MAX_LENGTH_OF_RECORDS} tokens are used, prompt and answer together, none of \
                 them cut: {used} of {all} to train on, and the first such to test on. Learning rates are chosen by the \
                 loss on other records than the test problems."
            );
        }
        if let Some(reason) = unfit(&complete(answered), base_gain(answered)) {
            let label = &answered.part.label;
            let _ = writeln!(text, "\nThrown out: {label}, because {reason}.");
        }
    }
    for line in parts.iter().flat_map(unsteady) {
        let _ = writeln!(text, "\n{line}");
    }
    if picture(experiment, parts).is_some() {
        let name = picture_name(experiment);
        let _ = writeln!(text, "\n![{}]({name})", experiment.title);
    }
    for &measure in &experiment.tables {
        let _ = writeln!(
            text,
            "\n### {}\n\n{}",
            heading(measure),
            table(experiment, measure, parts)
        );
    }
    for (row, rivals) in differences(parts) {
        if rivals.is_empty() {
            continue;
        }
        let _ = writeln!(
            text,
            "\n### {}: {}\n",
            row.title(settings.rank, 1),
            experiment.judge().heading()
        );
        let labels: Vec<&str> = parts
            .iter()
            .map(|answered| answered.part.label.as_str())
            .collect();
        let mut lines: Vec<(f64, String)> = Vec::new();
        for (name, differences) in &rivals {
            let cell = |label: &&str| {
                let found = differences.iter().find(|(of, _)| of == label);
                found.map_or(String::new(), |&(_, difference)| {
                    let number = experiment.judge().number(difference);
                    match difference.is_positive() || difference.is_negative() {
                        true => format!("**{number}**"),
                        false => number,
                    }
                })
            };
            let cells: Vec<String> = labels.iter().map(cell).collect();
            let mean = differences.iter().map(|(_, d)| d.mean).sum::<f64>();
            let line = format!("| {name} | {} |", cells.join(" | "));
            lines.push((mean / differences.len() as f64, line));
        }
        lines.sort_by(|a, b| a.0.total_cmp(&b.0));
        let lines: Vec<String> = lines.into_iter().map(|(_, line)| line).collect();
        let _ = writeln!(text, "{}{}", head("from", &labels), lines.join("\n"));
    }
}

/// Methods whose rate was good with the tuning seeds alone, a sentence each.
fn unsteady(answered: &Answered) -> Vec<String> {
    let of_finding = |finding: &&Finding| {
        let tried = rates::tried(&finding.tried).into_iter();
        let tuned = tried.filter(|tried| tried.rate.value() == finding.lr());
        let tuned = tuned.map(|tried| tried.score).next()?;
        let fresh = Estimate::of(&finding.scores()).mean;
        (answered.part.task.judge() == Judge::Share && fresh < CARRIED_OVER * tuned).then(|| {
            format!(
                "The rate of {} did not carry over, {}: {} with the tuning seeds, {} with the others. A \
                 difference from it says little.",
                finding.entry.title(),
                answered.part.label,
                percent(tuned),
                percent(fresh)
            )
        })
    };
    complete(answered).iter().filter_map(of_finding).collect()
}

fn head(first: &str, labels: &[&str]) -> String {
    let rule = "---|".repeat(labels.len() + 1);
    format!("| {first} | {} |\n|{rule}\n", labels.join(" | "))
}

fn heading(measure: Measure) -> &'static str {
    match measure {
        Measure::Score => "Right answers, or what was learned of a change",
        Measure::Loss => "Loss per token on the test problems",
        Measure::Missed => "Missed share of the change, and the closed form where there is one",
        Measure::PerParameter => "Right answers for each thousand trainable values",
        Measure::Rate => "Learning rates that were best",
        Measure::TextLoss => "Loss on texts of the pre-training",
        Measure::EffectiveRank => "Effective rank of the update",
        Measure::RankBySteps => "Effective rank of the update, by steps",
    }
}

fn table(experiment: &Experiment, measure: Measure, parts: &[Answered]) -> String {
    if measure == Measure::RankBySteps {
        return parts.iter().map(ranks_by_steps).collect();
    }
    let labels: Vec<&str> = parts
        .iter()
        .map(|answered| answered.part.label.as_str())
        .collect();
    let mut text = head("method", &labels);
    if matches!(measure, Measure::Score | Measure::Loss | Measure::TextLoss) {
        let cells = parts
            .iter()
            .map(|answered| match (measure, &answered.base) {
                (_, None) => String::new(),
                (Measure::Score, Some(base)) => percent(base.score()),
                (Measure::Loss, Some(base)) => format!("{:.3}", base.loss()),
                (_, Some(base)) => {
                    let loss = measured(base).and_then(|measured| measured.text_loss);
                    loss.map_or(String::new(), |loss| format!("{loss:.3}"))
                }
            });
        let cells: Vec<String> = cells.collect();
        if cells.iter().any(|cell| !cell.is_empty()) {
            let _ = writeln!(text, "| untrained | {} |", cells.join(" | "));
        }
    }
    for (place, &row) in experiment.rows.iter().enumerate() {
        let cells = parts.iter().map(|answered| {
            let finding = &answered.findings[place];
            match finding.is_complete() {
                true => cell(measure, finding),
                false => MISSING.into(),
            }
        });
        let cells: Vec<String> = cells.collect();
        // Its rank and with it its name depends on the number of shards.
        let mut titles: Vec<String> = parts
            .iter()
            .map(|answered| answered.findings[place].entry.title())
            .collect();
        titles.dedup();
        let title = match titles.len() {
            1 => titles.remove(0),
            _ => format!("{}, r by K", row.title(0, 0).replace(" r 0", "")),
        };
        let _ = writeln!(text, "| {title} | {} |", cells.join(" | "));
    }
    text
}

fn estimate(finding: &Finding, of: impl Fn(&TrialResult) -> f64) -> Estimate {
    let values: Vec<f64> = finding.fresh.iter().map(of).collect();
    Estimate::of(&values)
}

/// The closed form of a finding about a layer, where there is one.
fn closed_form(entry: &Entry) -> Option<f64> {
    let Kind::Layer(planted) = entry.task.kind() else {
        return None;
    };
    let adaptation = entry.row.adaptation(entry.rank, entry.shards, 0);
    planted.missed(&adaptation, entry.items)
}

fn cell(measure: Measure, finding: &Finding) -> String {
    let shown = |estimate: Estimate, factor: f64, digits: usize| {
        let Estimate { mean, half_width } = estimate;
        format!(
            "{:.digits$} ± {:.digits$}",
            factor * mean,
            factor * half_width
        )
    };
    let of_measured = |of: &dyn Fn(&Measured) -> f64| {
        estimate(finding, |result| measured(result).map_or(f64::NAN, of))
    };
    match measure {
        Measure::Score => shown(estimate(finding, TrialResult::score), 100.0, 1) + " %",
        Measure::Loss => shown(estimate(finding, TrialResult::loss), 1.0, 3),
        Measure::Missed => {
            let missed = shown(estimate(finding, TrialResult::loss), 100.0, 1);
            match closed_form(&finding.entry) {
                Some(form) => format!("{missed} % ({:.1})", 100.0 * form),
                None => format!("{missed} %"),
            }
        }
        Measure::PerParameter => {
            let each =
                |measured: &Measured| 1e3 * measured.correct as f64 / measured.trainable as f64;
            shown(of_measured(&each), 1.0, 2)
        }
        Measure::Rate => format!("{:e}", finding.lr()),
        Measure::TextLoss => {
            let each = |measured: &Measured| measured.text_loss.unwrap_or(f64::NAN);
            shown(of_measured(&each), 1.0, 3)
        }
        Measure::EffectiveRank => shown(of_measured(&|measured| measured.effective_rank), 1.0, 1),
        Measure::RankBySteps => String::new(),
    }
}

/// Mean effective rank by step; none of a finding without results.
fn ranks(finding: &Finding) -> Vec<(usize, f64)> {
    let each: Vec<&Measured> = finding.fresh.iter().filter_map(measured).collect();
    let Some(first) = each.first() else {
        return Vec::new();
    };
    let mean = |(place, &(step, _)): (usize, &(usize, f64))| {
        let sum = each
            .iter()
            .map(|measured| measured.ranks[place].1)
            .sum::<f64>();
        (step, sum / each.len() as f64)
    };
    first.ranks.iter().enumerate().map(mean).collect()
}

/// The effective ranks by step, and how many times those of LoRA, PiSSA and LoRA with as many values
/// those of HD-PiSSA are.
fn ranks_by_steps(answered: &Answered) -> String {
    let rows: Vec<(&Finding, Vec<(usize, f64)>)> = complete(answered)
        .into_iter()
        .map(|finding| (finding, ranks(finding)))
        .filter(|(_, ranks)| !ranks.is_empty())
        .collect();
    let Some((_, first)) = rows.first() else {
        return format!("{MISSING}\n");
    };
    let steps: Vec<String> = first.iter().map(|(step, _)| step.to_string()).collect();
    let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
    let mut text = head("after step", &steps);
    let mut line = |name: String, values: Vec<f64>| {
        let cells: Vec<String> = values.iter().map(|value| format!("{value:.1}")).collect();
        let _ = writeln!(text, "| {name} | {} |", cells.join(" | "));
    };
    let values = |ranks: &[(usize, f64)]| ranks.iter().map(|(_, rank)| *rank).collect::<Vec<_>>();
    for (finding, ranks) in &rows {
        line(finding.entry.title(), values(ranks));
    }
    for rival in [Row::Lora, Row::Pissa, Row::LoraWide] {
        let found = rows.iter().find(|(finding, _)| finding.entry.row == rival);
        let Some((of_rival, rival_ranks)) = found else {
            continue;
        };
        for (finding, ranks) in rows.iter().filter(|(f, _)| f.entry.row.is_hd_pissa()) {
            let ratios = ranks
                .iter()
                .zip(rival_ranks)
                .map(|(a, b)| a.1 / b.1)
                .collect();
            let (name, other) = (finding.entry.title(), of_rival.entry.title());
            line(format!("{name}, times {other}"), ratios);
        }
    }
    text
}

fn picture(experiment: &Experiment, parts: &[Answered]) -> Option<String> {
    let measure = experiment.picture?;
    let any = parts.iter().any(|answered| !complete(answered).is_empty());
    if !any {
        return None;
    }
    let mut names: Vec<&str> = parts
        .iter()
        .map(|answered| answered.part.panel.as_str())
        .collect();
    names.dedup();
    let panels: Vec<Panel> = names
        .into_iter()
        .map(|name| {
            let of_panel = parts.iter().filter(|answered| answered.part.panel == name);
            panel(experiment, measure, name, &of_panel.collect::<Vec<_>>())
        })
        .collect();
    Some(chart::svg(&experiment.title, &panels))
}

fn panel(experiment: &Experiment, measure: Measure, name: &str, parts: &[&Answered]) -> Panel {
    let (label, factor) = match measure {
        Measure::Missed => ("missed share, %; dashed: closed form", 100.0),
        Measure::Score => ("right answers, %", 100.0),
        Measure::Loss => ("loss per token on the test problems", 1.0),
        Measure::Rate => ("best learning rate", 1.0),
        Measure::RankBySteps | Measure::EffectiveRank => ("effective rank", 1.0),
        Measure::TextLoss => ("loss on texts of the pre-training", 1.0),
        Measure::PerParameter => ("right answers per 1000 trainable values", 1.0),
    };
    let mut curves = Vec::new();
    for (place, row) in experiment.rows.iter().enumerate() {
        let found = parts
            .iter()
            .map(|answered| (&answered.part, &answered.findings[place]));
        let found: Vec<_> = found.filter(|(_, finding)| finding.is_complete()).collect();
        let Some((_, first)) = found.first() else {
            continue;
        };
        let (rank, shards) = (first.entry.rank, first.entry.shards);
        let value = |finding: &Finding| match measure {
            Measure::Missed | Measure::Loss => estimate(finding, TrialResult::loss),
            Measure::Rate => Estimate {
                mean: finding.lr(),
                half_width: 0.0,
            },
            Measure::EffectiveRank => estimate(finding, |result| {
                measured(result).map_or(f64::NAN, |measured| measured.effective_rank)
            }),
            _ => estimate(finding, TrialResult::score),
        };
        let points: Vec<(f64, f64)> = match measure {
            Measure::RankBySteps => ranks(first)
                .into_iter()
                .map(|(step, rank)| (step as f64, rank))
                .collect(),
            _ => found
                .iter()
                .map(|(part, finding)| (part.at, factor * value(finding).mean))
                .collect(),
        };
        let band = match measure {
            Measure::RankBySteps | Measure::Rate => Vec::new(),
            _ => found
                .iter()
                .map(|(part, finding)| {
                    let Estimate { mean, half_width } = value(finding);
                    let low = (mean - half_width).max(0.0);
                    (part.at, factor * low, factor * (mean + half_width))
                })
                .collect(),
        };
        curves.push(Curve {
            name: row.short(rank, shards),
            color: row.color(),
            stroke: match measure {
                Measure::Missed => Stroke::Dots,
                Measure::RankBySteps => Stroke::Line,
                _ => Stroke::Dotted,
            },
            points,
            band,
        });
        if measure == Measure::Missed {
            let ranks = found.iter().map(|(part, _)| part.items);
            let (least, most) = (ranks.clone().min(), ranks.max());
            let next = |&rank: &usize| Some(rank + (rank / 4).max(1));
            let between = std::iter::successors(least, next);
            let between = between.take_while(|rank| Some(*rank) < most).chain(most);
            let forms = between.filter_map(|items| {
                let entry = Entry {
                    items,
                    ..first.entry
                };
                Some((items as f64, factor * closed_form(&entry)?))
            });
            curves.push(Curve {
                name: String::new(),
                color: row.color(),
                stroke: Stroke::Dashed,
                points: forms.collect(),
                band: Vec::new(),
            });
        }
    }
    let across = match measure {
        Measure::RankBySteps => Scale::Linear,
        _ => Scale::PowersOfTwo,
    };
    let up = match measure {
        Measure::Rate | Measure::RankBySteps => Scale::Logarithmic,
        _ => Scale::FromZero,
    };
    Panel {
        title: name.into(),
        labels: [experiment.axis.clone(), label.into()],
        scales: [across, up],
        curves,
    }
}

/// A finding with the numbers of every training.
#[derive(Serialize)]
struct Numbers<'a> {
    experiment: &'a str,
    part: &'a str,
    entry: Entry,
    title: String,
    known_rate: Option<f64>,
    /// Rate, seed, share of right answers and loss of what the rate was chosen by; no share where
    /// nothing was asked.
    tried: Vec<(f64, u64, Option<f64>, Option<f64>)>,
    fresh: Vec<Fresh>,
}

/// What one seed led to. Numbers are missing after a divergence.
#[derive(Serialize)]
struct Fresh {
    seed: u64,
    lr: f64,
    score: f64,
    loss: Option<f64>,
    text_loss: Option<f64>,
    numeric_rank: Option<f64>,
    effective_rank: Option<f64>,
    ranks: Vec<(usize, f64)>,
    trainable: Option<usize>,
    seconds: Option<f64>,
}

/// The untrained model on a task.
#[derive(Serialize)]
struct Untrained {
    task: Task,
    items: usize,
    score: f64,
    loss: Option<f64>,
    text_loss: Option<f64>,
}

/// Everything.
#[derive(Serialize)]
struct All<'a> {
    settings: &'a Settings,
    untrained: Vec<Untrained>,
    findings: Vec<Numbers<'a>>,
}

/// Four digits are more than any interval needs.
fn short(value: f64) -> Option<f64> {
    let is_finite = value.is_finite();
    is_finite.then(|| format!("{value:.4e}").parse().unwrap_or(value))
}

fn numbers<'a>(settings: &'a Settings, answers: &'a [Vec<Answered>]) -> All<'a> {
    let mut all = All {
        settings,
        untrained: Vec::new(),
        findings: Vec::new(),
    };
    for (experiment, parts) in settings.experiments.iter().zip(answers) {
        for answered in parts {
            let untrained = answered.base.iter().map(|base| Untrained {
                task: base.trial.task,
                items: base.trial.items,
                score: base.score(),
                loss: short(base.loss()),
                text_loss: measured(base)
                    .and_then(|measured| measured.text_loss)
                    .and_then(short),
            });
            all.untrained.extend(untrained);
            let findings = answered.findings.iter();
            let findings = findings.filter(|found| !found.tried.is_empty() || found.is_complete());
            all.findings.extend(findings.map(|finding| {
                Numbers {
                    experiment: &experiment.name,
                    part: &answered.part.label,
                    entry: finding.entry,
                    title: finding.entry.title(),
                    known_rate: finding.known,
                    tried: finding
                        .tried
                        .iter()
                        .map(|result| {
                            let trial = &result.trial;
                            let score = short(result.score()).filter(|_| !trial.loss_only);
                            (trial.lr, trial.seed, score, short(result.loss()))
                        })
                        .collect(),
                    fresh: finding.fresh.iter().map(fresh).collect(),
                }
            }));
        }
    }
    all
}

fn fresh(result: &TrialResult) -> Fresh {
    let of = measured(result);
    let number = |of_measured: fn(&Measured) -> f64| of.map(of_measured).and_then(short);
    Fresh {
        seed: result.trial.seed,
        lr: result.trial.lr,
        score: short(result.score()).unwrap_or_default(),
        loss: short(result.loss()),
        text_loss: of.and_then(|measured| measured.text_loss).and_then(short),
        numeric_rank: number(|measured| measured.numeric_rank),
        effective_rank: number(|measured| measured.effective_rank),
        ranks: of.map_or(Vec::new(), |measured| {
            let ranks = measured.ranks.iter();
            ranks
                .filter_map(|&(step, rank)| Some((step, short(rank)?)))
                .collect()
        }),
        trainable: of.map(|measured| measured.trainable),
        seconds: number(|measured| measured.seconds),
    }
}
