//! The figures of the comparison: averaged over seeds and domains, and as a table.

use std::collections::BTreeMap;
use std::fmt;

use trommel_pipeline::results::{Cost, Outcome};

use crate::table::table;

/// What a method does, in a word.
pub(crate) fn meaning(method: &str) -> &str {
    match method {
        "slm" => "generic",
        "slm-is" => "resampled",
        "slm-nopt" => "domain only",
        "slm-pn" => "projected",
        "slm-mix" => "one per cluster",
        "trunk-decay" => "decay resampled",
        "dsir" => "resampled by DSIR",
        "llm" => "larger",
        "lora" => "adapters",
        "lora-mix" => "adapters per cluster",
        "slm-d" => "taught by llm",
        _ => "",
    }
}

/// A mean and what it is uncertain by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Figure {
    pub(crate) mean: f64,
    /// The standard deviation over seeds; of a perplexity with one seed, the standard error over the documents of one domain.
    pub(crate) error: Option<f64>,
}

impl Figure {
    pub(crate) fn over_seeds(values: &[f64]) -> Figure {
        let n = values.len() as f64;
        let mean = mean(values.iter().copied());
        let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
        Figure { mean, error: (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt()) }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2}", self.mean)?;
        self.error.map_or(Ok(()), |error| write!(f, " ± {error:.2}"))
    }
}

/// Models that differ in their seeds only, on one domain or on all of them.
#[derive(Debug, Clone)]
pub(crate) struct Summary {
    pub(crate) method: String,
    pub(crate) variant: String,
    /// Perplexity before and after tuning; over several domains, `exp` of the mean of the loss per token.
    pub(crate) before: Option<Figure>,
    pub(crate) after: Option<Figure>,
    /// Loss per token after tuning minus that of `slm` with the same seed, in nats: what a seed does to both is gone.
    pub(crate) minus_slm: Option<Figure>,
    pub(crate) bits_per_byte: f64,
    /// Means over seeds and domains: all of the cost, and the part of it that all domains share.
    pub(crate) cost: Cost,
    pub(crate) generic: Cost,
}

impl Summary {
    /// That of the outcomes of one method and variant, and of `slm`. A seed counts if it is there for each of `domains`.
    fn of(found: &[&Outcome], slm: &[&Outcome], domains: usize) -> Summary {
        let (before, after) = (at_stage(found, "pretrained"), at_stage(found, "finetuned"));
        let last = if after.is_empty() { &before } else { &after };
        let costs = |get: fn(&Outcome) -> Cost| {
            let mean = |part: fn(Cost) -> f64| mean(last.iter().map(|o| part(get(o))));
            Cost { tokens: mean(|c| c.tokens as f64) as u64, seconds: mean(|c| c.seconds), flops: mean(|c| c.flops) }
        };
        Summary {
            method: found[0].method.clone(),
            variant: found[0].variant.clone(),
            before: perplexity(&before, domains),
            after: perplexity(&after, domains),
            minus_slm: difference(&after, &at_stage(slm, "finetuned"), domains).filter(|_| found[0].method != "slm"),
            bits_per_byte: mean(last.iter().map(|o| o.bits_per_byte)),
            cost: costs(|o| Cost { tokens: o.train_tokens, seconds: o.seconds, flops: o.flops }),
            generic: costs(|o| o.generic),
        }
    }

    /// Method and variant.
    pub(crate) fn name(&self) -> String {
        format!("{} {}", self.method, self.variant).trim_end().to_owned()
    }

    /// What each further domain costs.
    pub(crate) fn specialise(&self) -> Cost {
        let (all, shared) = (self.cost, self.generic);
        Cost {
            tokens: all.tokens.saturating_sub(shared.tokens),
            seconds: all.seconds - shared.seconds,
            flops: all.flops - shared.flops,
        }
    }

    /// `C_total(N) = C_generic + N * C_specialise` of `N` domains, in FLOPs. [PE eq. 1]
    pub(crate) fn total_flops(&self, domains: u32) -> f64 {
        self.generic.flops + f64::from(domains) * self.specialise().flops
    }
}

fn mean(values: impl Iterator<Item = f64> + Clone) -> f64 {
    values.clone().sum::<f64>() / values.count() as f64
}

fn at_stage<'a>(found: &[&'a Outcome], stage: &str) -> Vec<&'a Outcome> {
    found.iter().copied().filter(|o| o.stage == stage).collect()
}

fn perplexity(found: &[&Outcome], domains: usize) -> Option<Figure> {
    if let ([one], 1) = (found, domains) {
        return Some(Figure { mean: one.perplexity, error: Some(one.stderr) });
    }
    over_seeds(losses(found, domains).into_values().map(f64::exp))
}

fn difference(found: &[&Outcome], slm: &[&Outcome], domains: usize) -> Option<Figure> {
    let plain = losses(slm, domains);
    over_seeds(losses(found, domains).into_iter().filter_map(|(seed, loss)| Some(loss - plain.get(&seed)?)))
}

/// The mean over domains of the loss per token, for each seed that is there for all of `domains`.
fn losses(found: &[&Outcome], domains: usize) -> BTreeMap<u64, f64> {
    let mut losses: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    found.iter().for_each(|o| losses.entry(o.seed).or_default().push(o.perplexity.ln()));
    let whole = losses.into_iter().filter(|(_, of_seed)| of_seed.len() == domains);
    whole.map(|(seed, of_seed)| (seed, mean(of_seed.into_iter()))).collect()
}

fn over_seeds(values: impl Iterator<Item = f64>) -> Option<Figure> {
    let values: Vec<f64> = values.collect();
    (!values.is_empty()).then(|| Figure::over_seeds(&values))
}

fn grouped<'a, K: Ord>(outcomes: &'a [Outcome], key: impl Fn(&'a Outcome) -> K) -> BTreeMap<K, Vec<&'a Outcome>> {
    let mut groups: BTreeMap<K, Vec<&'a Outcome>> = BTreeMap::new();
    outcomes.iter().for_each(|outcome| groups.entry(key(outcome)).or_default().push(outcome));
    groups
}

/// One summary per domain, method and variant, with the domain.
pub(crate) fn by_domain(outcomes: &[Outcome]) -> Vec<(String, Summary)> {
    let groups = grouped(outcomes, |o| (o.domain.clone(), o.method.clone(), o.variant.clone()));
    let slm =
        |domain: &str| groups.get(&(domain.to_owned(), "slm".to_owned(), String::new())).map(Vec::as_slice).unwrap_or_default();
    groups.iter().map(|((domain, ..), found)| (domain.clone(), Summary::of(found, slm(domain), 1))).collect()
}

/// One summary per method and variant, over all domains.
pub(crate) fn macro_averages(outcomes: &[Outcome]) -> Vec<Summary> {
    let domains = grouped(outcomes, |o| o.domain.clone()).len();
    let groups = grouped(outcomes, |o| (o.method.clone(), o.variant.clone()));
    let slm = groups.get(&("slm".to_owned(), String::new())).map(Vec::as_slice).unwrap_or_default();
    groups.values().map(|found| Summary::of(found, slm, domains)).collect()
}

/// A figure that is not there as `-`.
pub(crate) fn known(figure: Option<Figure>) -> String {
    figure.map_or_else(|| "-".to_owned(), |figure| figure.to_string())
}

/// A difference of losses, with its sign.
pub(crate) fn signed(difference: Option<Figure>) -> String {
    let error = |figure: Figure| figure.error.map_or_else(String::new, |error| format!(" ± {error:.3}"));
    difference.map_or_else(|| "-".to_owned(), |figure| format!("{:+.3}{}", figure.mean, error(figure)))
}

/// What the figures of [`result_table`] are.
pub(crate) fn legend(outcomes: &[Outcome]) -> String {
    let models = grouped(outcomes, |o| (&o.domain, &o.method, &o.variant, &o.stage));
    let mut legend = match models.values().any(|seeds| seeds.len() > 1) {
        true => "with its standard deviation over seeds, or of one seed its standard error over documents".to_owned(),
        false => "with its standard error over documents".to_owned(),
    };
    if grouped(outcomes, |o| &o.domain).len() > 1 {
        legend.push_str("; the macro average is the geometric mean over domains");
    }
    legend
}

/// One row per domain and method, and the macro average over domains where there are several.
pub(crate) fn result_table(outcomes: &[Outcome]) -> String {
    let mut summaries = by_domain(outcomes);
    if summaries.iter().any(|(domain, _)| *domain != summaries[0].0) {
        summaries.extend(macro_averages(outcomes).into_iter().map(|s| ("(macro average)".to_owned(), s)));
    }
    let row = |(domain, s): (String, Summary)| {
        let name = format!("{} ({}) {}", s.method, meaning(&s.method), s.variant).trim_end().to_owned();
        let (bits, tokens) = (format!("{:.3}", s.bits_per_byte), format!("{:.2}M", s.cost.tokens as f64 / 1e6));
        vec![domain, name, known(s.before), known(s.after), bits, tokens, format!("{:.0}", s.cost.seconds)]
    };
    let header = ["domain", "pretrained on", "before tuning", "fine-tuned", "bits/byte", "tokens", "seconds"];
    table(&header, 2, summaries.into_iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(domain: &str, seed: u64, perplexity: f64) -> Outcome {
        Outcome {
            domain: domain.into(),
            method: "slm".into(),
            variant: String::new(),
            seed,
            stage: "finetuned".into(),
            perplexity,
            stderr: 0.5,
            bits_per_byte: 1.0,
            train_tokens: 1_000_000,
            seconds: 10.0,
            flops: 100.0,
            generic: Cost { tokens: 900_000, seconds: 9.0, flops: 80.0 },
        }
    }

    #[test]
    fn seeds_are_averaged_and_domains_geometrically() {
        let rows = [outcome("a", 1, 10.0), outcome("a", 2, 12.0), outcome("b", 1, 40.0), outcome("b", 2, 48.0)];
        let text = result_table(&rows);
        assert!(text.contains("11.00 ± 1.41") && text.contains("44.00 ± 5.66"), "{text}");
        // The roots of 10 * 40 and of 12 * 48 are 20 and 24.
        assert!(text.contains("(macro average)") && text.contains("22.00 ± 2.83"), "{text}");
        assert_eq!(
            legend(&rows),
            "with its standard deviation over seeds, or of one seed its standard error over documents; \
             the macro average is the geometric mean over domains"
        );
        assert_eq!(legend(&rows[..1]), "with its standard error over documents");
        let one = result_table(&rows[..1]);
        assert!(one.contains("10.00 ± 0.50") && !one.contains("macro"), "{one}");
        // A seed that lacks a domain has no macro average.
        assert_eq!(known(macro_averages(&rows[..3])[0].after), "20.00");
    }

    #[test]
    fn a_difference_is_paired_by_seed() {
        let network = |domain, seed, perplexity| Outcome { method: "slm-pn".into(), ..outcome(domain, seed, perplexity) };
        let mut rows = vec![outcome("a", 1, 10.0), outcome("a", 2, 20.0), outcome("b", 1, 10.0), outcome("b", 2, 30.0)];
        // 0.2 and 0.4 nats below on `a`, level on `b`; the third seed has no partner.
        let below = |perplexity: f64, nats: f64| perplexity * (-nats).exp();
        rows.extend([network("a", 1, below(10.0, 0.2)), network("a", 2, below(20.0, 0.4)), network("a", 3, 1.0)]);
        rows.extend([network("b", 1, 10.0), network("b", 2, 30.0), network("b", 3, 1.0)]);
        let summaries = macro_averages(&rows);
        assert_eq!(summaries.iter().map(|s| signed(s.minus_slm)).collect::<Vec<_>>(), ["-", "-0.150 ± 0.071"]);
        let of_domains = by_domain(&rows);
        assert_eq!(signed(of_domains[1].1.minus_slm), "-0.300 ± 0.141");
        assert_eq!(signed(macro_averages(&rows[4..])[0].minus_slm), "-");
    }

    #[test]
    fn the_shared_cost_is_paid_once() {
        let cheap = Outcome { flops: 90.0, train_tokens: 950_000, ..outcome("b", 1, 40.0) };
        let [summary] = &macro_averages(&[outcome("a", 1, 10.0), cheap])[..] else { panic!("one method") };
        // 20 and 10 FLOPs beyond the shared 80, 100,000 and 50,000 tokens beyond 900,000.
        assert_eq!(summary.specialise(), Cost { tokens: 75_000, seconds: 1.0, flops: 15.0 });
        assert_eq!([1, 7, 50].map(|n| summary.total_flops(n)), [95.0, 185.0, 830.0]);
    }
}
