//! The figures of the comparison, as rows and as a table.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::table::table;

/// One row of the comparison. A contract.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Outcome {
    pub(super) domain: String,
    pub(super) method: &'static str,
    /// What tells models of one method apart, such as `level-2 mixture`; left out if there is one only.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) variant: String,
    pub(super) seed: u64,
    pub(super) stage: &'static str,
    pub(super) perplexity: f64,
    pub(super) stderr: f64,
    pub(super) bits_per_byte: f64,
    pub(super) train_tokens: u64,
    pub(super) seconds: f64,
    pub(super) flops: f64,
    /// The part of the cost that all domains share, and is paid once. [PE eq. 1]
    pub(super) generic: Cost,
}

/// What a model took to train.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Cost {
    pub(super) tokens: u64,
    pub(super) seconds: f64,
    pub(super) flops: f64,
}

impl std::ops::Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        let (tokens, seconds) = (self.tokens + other.tokens, self.seconds + other.seconds);
        Cost { tokens, seconds, flops: self.flops + other.flops }
    }
}

fn meaning(method: &str) -> &str {
    match method {
        "slm" => "slm (generic)",
        "slm-is" => "slm-is (resampled)",
        "slm-nopt" => "slm-nopt (domain only)",
        "slm-pn" => "slm-pn (projected)",
        "slm-mix" => "slm-mix (one per cluster)",
        "dsir" => "dsir (resampled by DSIR)",
        "llm" => "llm (larger)",
        "lora" => "lora (adapters)",
        "lora-mix" => "lora-mix (adapters per cluster)",
        "slm-d" => "slm-d (taught by llm)",
        other => other,
    }
}

/// Mean and, for several seeds, the standard deviation over them.
fn spread(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}

/// One row per domain and method, and the macro average over domains where there are several.
pub(crate) fn result_table(outcomes: &[Outcome]) -> String {
    let mut rows: BTreeMap<(&str, &str, &str), Vec<&Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        rows.entry((&outcome.domain, outcome.method, &outcome.variant)).or_default().push(outcome);
    }
    let mut cells: Vec<Vec<String>> = rows.iter().map(|(name, found)| row(*name, found)).collect();
    cells.extend(macro_averages(outcomes));
    table(&["domain", "pretrained on", "before tuning", "fine-tuned", "bits/byte", "tokens", "seconds"], 2, cells)
}

fn name_of(method: &str, variant: &str) -> String {
    if variant.is_empty() { meaning(method).to_owned() } else { format!("{} {variant}", meaning(method)) }
}

fn row((domain, method, variant): (&str, &str, &str), found: &[&Outcome]) -> Vec<String> {
    let of_stage = |stage: &str| -> Vec<&Outcome> { found.iter().copied().filter(|o| o.stage == stage).collect() };
    let perplexity = |stage: &str| match of_stage(stage)[..] {
        [] => "-".to_owned(),
        [one] => format!("{:.2} ± {:.2}", one.perplexity, one.stderr),
        ref seeds => {
            let (mean, deviation) = spread(&seeds.iter().map(|o| o.perplexity).collect::<Vec<_>>());
            format!("{mean:.2} ± {deviation:.2}")
        }
    };
    let tuned = of_stage("finetuned");
    let last = if tuned.is_empty() { of_stage("pretrained") } else { tuned };
    let mean = |get: fn(&Outcome) -> f64| spread(&last.iter().map(|o| get(o)).collect::<Vec<_>>()).0;
    vec![
        domain.to_owned(),
        name_of(method, variant),
        perplexity("pretrained"),
        perplexity("finetuned"),
        format!("{:.3}", mean(|o| o.bits_per_byte)),
        format!("{:.2}M", mean(|o| o.train_tokens as f64) / 1e6),
        format!("{:.0}", mean(|o| o.seconds)),
    ]
}

/// Losses per token over domains, by stage and seed.
type Losses<'a> = BTreeMap<(&'a str, u64), Vec<f64>>;

/// `exp` of the mean over domains of the loss per token, as METHOD says; mean and deviation over seeds.
fn macro_averages(outcomes: &[Outcome]) -> Vec<Vec<String>> {
    let mut losses: BTreeMap<(&str, &str), Losses> = BTreeMap::new();
    for o in outcomes {
        let by_seed = losses.entry((o.method, &o.variant)).or_default();
        by_seed.entry((o.stage, o.seed)).or_default().push(o.perplexity.ln());
    }
    let most = losses.values().flat_map(|l| l.values().map(Vec::len)).max().unwrap_or(0);
    let row = |((method, variant), by_seed): (&(&str, &str), &Losses)| {
        let stage = |stage: &str| {
            let seeds = by_seed.iter().filter(|((s, _), losses)| *s == stage && losses.len() == most);
            let means: Vec<f64> = seeds.map(|(_, losses)| spread(losses).0.exp()).collect();
            match (spread(&means), means.len()) {
                (_, 0) => "-".to_owned(),
                ((mean, _), 1) => format!("{mean:.2}"),
                ((mean, deviation), _) => format!("{mean:.2} ± {deviation:.2}"),
            }
        };
        let blank = || "-".to_owned();
        let name = name_of(method, variant);
        vec!["(macro average)".into(), name, stage("pretrained"), stage("finetuned"), blank(), blank(), blank()]
    };
    if most > 1 { losses.iter().map(row).collect() } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(domain: &str, seed: u64, perplexity: f64) -> Outcome {
        Outcome {
            domain: domain.into(),
            method: "slm",
            variant: String::new(),
            seed,
            stage: "finetuned",
            perplexity,
            stderr: 0.5,
            bits_per_byte: 1.0,
            train_tokens: 1_000_000,
            seconds: 1.0,
            flops: 1.0,
            generic: Cost::default(),
        }
    }

    #[test]
    fn seeds_are_averaged_and_domains_geometrically() {
        let rows = [outcome("a", 1, 10.0), outcome("a", 2, 12.0), outcome("b", 1, 40.0), outcome("b", 2, 48.0)];
        let text = result_table(&rows);
        assert!(text.contains("11.00 ± 1.41") && text.contains("44.00 ± 5.66"), "{text}");
        // The roots of 10 * 40 and of 12 * 48 are 20 and 24.
        assert!(text.contains("(macro average)") && text.contains("22.00 ± 2.83"), "{text}");
        let one = result_table(&rows[..1]);
        assert!(one.contains("10.00 ± 0.50") && !one.contains("macro"), "{one}");
    }
}
