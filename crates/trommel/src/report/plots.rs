//! The comparison as charts: what a method reaches, over what it costs. [PE eq. 1]

use std::collections::BTreeMap;

use super::chart::{Axis, Chart, Point, Series, extent};
use crate::compare::outcome::Summary;

/// Numbers of domains that the shared cost is spread over.
pub(super) const DOMAINS: [u32; 3] = [1, 7, 50];

/// Methods in the order of their looks, so that a method has the same one in every chart.
const METHODS: [&str; 11] =
    ["slm", "slm-is", "slm-pn", "slm-nopt", "slm-mix", "llm", "trunk-decay", "dsir", "slm-d", "lora", "lora-mix"];

fn look(method: &str) -> usize {
    METHODS.iter().position(|known| *known == method).unwrap_or(METHODS.len())
}

/// Macro perplexity over the cost that all domains share; `None` if nothing was fine-tuned, or shares a cost.
pub(super) fn shared_cost(summaries: &[Summary]) -> Option<anyhow::Result<String>> {
    if summaries.iter().all(|s| s.after.is_none() || s.generic.flops == 0.0) {
        return None;
    }
    let points = |s: &Summary| vec![(s.generic.flops, 4)];
    chart(Axis::Cost("cost that all domains share (FLOPs)"), summaries, points)
}

/// Macro perplexity over all of the cost, for each of [`DOMAINS`]; `None` if nothing was fine-tuned.
pub(super) fn total_cost(summaries: &[Summary]) -> Option<anyhow::Result<String>> {
    let points = |s: &Summary| DOMAINS.iter().zip([3, 5, 7]).map(|(n, size)| (s.total_flops(*n), size)).collect();
    chart(Axis::Cost("cost of all domains (FLOPs)"), summaries, points)
}

/// One series per method and variant, at the height of its perplexity.
fn chart(
    axis: Axis<'_>,
    summaries: &[Summary],
    points: impl Fn(&Summary) -> Vec<(f64, u32)>,
) -> Option<anyhow::Result<String>> {
    let series = summaries.iter().filter_map(|s| {
        let after = s.after?;
        let point = |(x, size)| Point { x, y: after.mean, error: after.error.unwrap_or(0.0), size };
        let name = format!("{}  {:.2}", s.name(), after.mean);
        Some(Series { name, look: look(&s.method), points: points(s).into_iter().map(point).collect() })
    });
    perplexities(axis, series.collect())
}

/// Macro perplexity over the number of clusters; `None` unless a method has several levels of the tree.
pub(super) fn clusters(summaries: &[Summary], clusters: &BTreeMap<u32, usize>) -> Option<anyhow::Result<String>> {
    let mut series: BTreeMap<(usize, String), Vec<Point>> = BTreeMap::new();
    for s in summaries {
        let Some((level, rest)) = level(&s.variant) else { continue };
        let (Some(after), Some(k)) = (s.after, clusters.get(&level)) else { continue };
        let point = Point { x: *k as f64, y: after.mean, error: after.error.unwrap_or(0.0), size: 4 };
        let name = format!("{} {rest}", s.method).trim_end().to_owned();
        series.entry((look(&s.method), name)).or_default().push(point);
    }
    let several = series.into_iter().filter(|(_, points)| points.len() > 1).map(|((look, name), mut points)| {
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        Series { name, look, points }
    });
    perplexities(Axis::Counts("clusters"), several.collect())
}

/// The level of a variant such as `level-2 mixture`, and what else it says.
fn level(variant: &str) -> Option<(u32, &str)> {
    let rest = variant.strip_prefix("level-")?;
    let (level, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    Some((level.parse().ok()?, rest))
}

fn perplexities(x: Axis<'_>, series: Vec<Series>) -> Option<anyhow::Result<String>> {
    if series.is_empty() {
        return None;
    }
    let (low, high) = extent(series.iter().flat_map(|s| s.points.iter().map(|p| p.y)));
    // One method far above the others would leave no room to tell them apart.
    let high = high.min(2.0 * low);
    let margin = 0.06 * (high - low).max(0.1 * low);
    let range = (low - margin, high + margin);
    Some(Chart { x, y: "perplexity after tuning, macro average", range, series }.svg())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_names_its_level_first() {
        assert_eq!(level("level-2 mixture"), Some((2, "mixture")));
        assert_eq!(level("level-3"), Some((3, "")));
        assert_eq!((level(""), level("on slm-is")), (None, None));
    }
}
