//! How far networks of experts are ahead of the plain model while both train on the same text.
//!
//! With one seed and one budget, a network and `slm` draw the same sequences in the same steps. So the difference of their losses
//! in a step is paired: what a step's text adds to both is gone, and a difference far below the noise of either loss shows.

use std::collections::BTreeMap;
use std::path::Path;

use trommel_core::error::{Error, Result};
use trommel_spec::pipeline::Method;
use trommel_trainer::checkpoint;
use trommel_trainer::log::Entry;

use super::chart::{Axis, Chart, Point, Series, extent};
use crate::compare::finished;
use crate::compare::outcome::Figure;

/// Stretches that a training is cut into; a mark is the mean of one.
const STRETCHES: usize = 24;

/// One mark of a network and seed.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Mark {
    /// Tokens trained on, per parameter of the plain model.
    tokens: f64,
    /// Loss of the network minus that of the plain model, nats per token.
    lead: f64,
}

/// Networks of a run against its plain model, one series per variant with means over seeds; `None` without a pair of them.
pub(super) fn chart(run_dir: &Path) -> anyhow::Result<Option<String>> {
    let models = finished(run_dir)?;
    let mut variants: BTreeMap<String, Vec<Vec<Mark>>> = BTreeMap::new();
    for network in models.iter().filter(|model| [Method::SlmPn, Method::LoraMix].contains(&model.method)) {
        let plain = models.iter().find(|model| model.method == Method::Slm && model.seed == network.seed);
        let Some(plain) = plain else { continue };
        let parameters = checkpoint::read_model(&plain.out.join(checkpoint::FOLDER))?.parameters.len();
        let [network_log, plain_log] = [network, plain].map(|model| read_log(&model.out.join("log.jsonl")));
        let marks = marks(&network_log?, &plain_log?, parameters as f64);
        variants.entry(format!("{} {}", network.method.name(), network.variant)).or_default().push(marks);
    }
    if variants.is_empty() {
        return Ok(None);
    }
    let series: Vec<Series> =
        variants.into_iter().enumerate().map(|(look, (name, seeds))| series(name, look, &seeds)).collect();
    let (low, high) = extent(series.iter().flat_map(|s| s.points.iter().map(|p| p.y)).chain([0.0]));
    let margin = 0.08 * (high - low).max(1e-3);
    let chart = Chart {
        x: Axis::Amount("tokens per parameter of the small model"),
        y: "loss minus that of slm, nats per token",
        range: (low - margin, high + margin),
        series,
    };
    chart.svg().map(Some)
}

fn read_log(path: &Path) -> Result<Vec<Entry>> {
    let damaged = || Error::data("the log of a training cannot be read").file(path.display()).hint("train the model again");
    let text = std::fs::read_to_string(path).map_err(|e| damaged().source(e))?;
    let entry = |(row, line): (usize, &str)| serde_json::from_str(line).map_err(|e| damaged().row(row as u64).source(e));
    text.lines().enumerate().map(entry).collect()
}

/// The lead of a network in each stretch of its training.
fn marks(network: &[Entry], plain: &[Entry], parameters: f64) -> Vec<Mark> {
    let pairs: Vec<(&Entry, &Entry)> = network.iter().zip(plain).collect();
    let mark = |stretch: &[(&Entry, &Entry)]| {
        let sum: f64 = stretch.iter().map(|(network, plain)| network.loss - plain.loss).sum();
        let tokens = stretch[stretch.len() / 2].0.tokens as f64 / parameters;
        Mark { tokens, lead: sum / stretch.len() as f64 }
    };
    pairs.chunks(pairs.len().div_ceil(STRETCHES).max(1)).map(mark).collect()
}

/// Mean and deviation over seeds of each mark.
fn series(name: String, look: usize, seeds: &[Vec<Mark>]) -> Series {
    let shortest = seeds.iter().map(Vec::len).min().unwrap_or(0);
    let point = |i: usize| {
        let lead = Figure::over_seeds(&seeds.iter().map(|marks| marks[i].lead).collect::<Vec<_>>());
        Point { x: seeds[0][i].tokens, y: lead.mean, error: lead.error.unwrap_or(0.0), size: 3 }
    };
    Series { name, look, points: (0..shortest).map(point).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lead_is_paired_step_by_step() {
        let entry = |step: u64, loss: f64| Entry {
            step,
            tokens: step * 100,
            loss,
            learning_rate: 0.1,
            gradient_norm: 1.0,
            tokens_per_second: 1.0,
            validation_loss: None,
        };
        // The text of every other step is harder; the network is ahead by 0.25 from the half on.
        let loss = |step: u64| 3.0 + (step % 2) as f64;
        let plain: Vec<Entry> = (1..=48).map(|step| entry(step, loss(step))).collect();
        let network: Vec<Entry> = (1..=48).map(|step| entry(step, loss(step) - if step > 24 { 0.25 } else { 0.0 })).collect();
        let marks = marks(&network, &plain, 50.0);
        assert_eq!(marks.len(), STRETCHES);
        assert_eq!((marks[0], marks[23]), (Mark { tokens: 4.0, lead: 0.0 }, Mark { tokens: 96.0, lead: -0.25 }));
        let both = series("n".into(), 0, &[marks.clone(), marks]);
        assert_eq!((both.points[23].y, both.points[23].error), (-0.25, 0.0));
    }
}
