//! The report as text.

use super::cost::Sample;
use super::{Fit, Report};

pub fn of(report: &Report) -> String {
    let mut text = String::new();
    let llama = &report.llama;
    let settings = &llama.settings;
    text += &format!(
        "Tiny Llama: rank {}, {} steps of {} problems for each shard; {} held-out problems, loss \
         {:.4} before\n{:>5} {:>9} {:>9} {:>9} {:>9} {}\n",
        settings.rank,
        settings.steps,
        settings.batch_size,
        settings.test_problems,
        llama.base_loss,
        "K",
        "loss",
        "rank",
        "eff. rank",
        "fwd+bwd",
        update_header("step")
    );
    for row in &llama.rows {
        text += &format!(
            "{:>5} {:>9.4} {:>9.1} {:>9.1} {} {}\n",
            row.shards,
            row.test_loss,
            row.numeric_rank,
            row.effective_rank,
            milliseconds(row.measured.time.forward_backward),
            update(&row.measured, row.measured.time.total(), &report.llama_fit)
        );
    }
    text += &fit(&report.llama_fit);

    let layer = &report.layer;
    let settings = &layer.settings;
    text += &format!(
        "\nLayer of {size} x {size}: rank {}, {} steps towards a planted change of rank {}\n\
         {:>5} {:>9} {:>9} {:>9} {:>9} {}\n",
        settings.rank,
        settings.steps,
        settings.size / 2,
        "K",
        "loss",
        "floor",
        "rank",
        "eff. rank",
        update_header("update"),
        size = settings.size
    );
    for row in &layer.rows {
        text += &format!(
            "{:>5} {:>9.4} {:>9.4} {:>9} {:>9.1} {}\n",
            row.shards,
            row.loss,
            row.out_of_reach,
            row.numeric_rank,
            row.effective_rank,
            update(&row.measured, row.measured.time.update(), &report.layer_fit)
        );
    }
    text += &fit(&report.layer_fit);
    text += "loss: squared norm of what is missing, relative to the change; floor: (1 - K·r/d)², \
             the share\nthat the shards cannot reach; rank and eff. rank: of the update; times in \
             ms per step;\npredicted: from constants fitted to the rows marked so\n";

    let question = &report.question;
    text += &format!(
        "\nPrediction for {}: {} shards of rank {}, {:.0} tokens for each per step, {} GB/s into \
         each worker\n{:>8} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9} {:>11} {:>11}\n",
        question.model,
        question.layout.shards,
        question.work.rank,
        question.work.tokens,
        question.bandwidth / 1e9,
        "workers",
        "fwd+bwd s",
        "optim. s",
        "exchange s",
        "merge s",
        "step s",
        "speed-up",
        "SVD s",
        "frames s"
    );
    for row in &report.predictions {
        text += &format!(
            "{:>8} {:>10.3} {:>10.3} {:>10.3} {:>10.3} {:>10.3} {:>9.1} {:>11.1} {:>11.2}\n",
            row.layout.workers,
            row.step.forward_backward,
            row.step.optimizer,
            row.step.exchange,
            row.step.merge,
            row.total,
            report.predictions[0].total / row.total,
            row.start.svd,
            row.start.frames
        );
    }
    text += "every worker a device like this one; constants of the layer above, attention and \
             embeddings not counted\n";
    text
}

fn update_header(whole: &str) -> String {
    format!(
        "{:>9} {:>9} {whole:>9} {:>10}",
        "optim.", "merge", "predicted"
    )
}

fn milliseconds(seconds: f64) -> String {
    format!("{:>9.2}", 1e3 * seconds)
}

/// The parts after the backward passes, then `whole`, and its prediction.
fn update(sample: &Sample, whole: f64, fit: &Fit) -> String {
    let check = fit
        .checks
        .iter()
        .find(|check| check.shards == sample.shards);
    let predicted = match check {
        Some(check) => {
            let error = 1e2 * check.error;
            format!("{:>10.2} ({error:+.0} %)", 1e3 * check.predicted)
        }
        None => format!("{:>10}", "fitted"),
    };
    format!(
        "{} {} {} {predicted}",
        milliseconds(sample.time.optimizer),
        milliseconds(sample.time.merge),
        milliseconds(whole)
    )
}

fn fit(fit: &Fit) -> String {
    let rates = &fit.rates;
    format!(
        "{:.1} µs per token; optimizer {:.1} µs per weight and {:.2} ns per hosted value; merge \
         {:.1} µs per weight\nand {:.1} GFLOP/s; decomposition {:.2} ns · max(d) · min(d)²\n",
        1e6 * rates.token,
        1e6 * rates.optimizer_weight,
        1e9 * rates.optimizer_value,
        1e6 * rates.merge_weight,
        rates.merge_flops / 1e9,
        1e9 * rates.svd
    )
}
