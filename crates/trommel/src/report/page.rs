//! The page: plain HTML in the colours that the reader's system has chosen.

use std::path::Path;

use maud::{DOCTYPE, Markup, PreEscaped, html};
use trommel_pipeline::results::Cost;

use super::networks::{Network, values};
use super::{Report, plots};
use crate::compare::outcome::{Summary, by_domain, known, macro_averages, meaning, signed};

/// Black in a chart is the colour of the text.
const STYLE: &str = r#"
:root { color-scheme: light dark; }
body { background: Canvas; color: CanvasText; font: 16px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0 1rem; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid color-mix(in srgb, CanvasText 20%, transparent); text-align: left; vertical-align: top; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.all td { font-weight: 600; }
.heat th { white-space: nowrap; }
.heat td { text-align: center; min-width: 1.6rem; padding: 0.2rem 0.3rem; }
.missing { font-style: italic; }
figure { margin: 1rem 0 2rem; }
svg { max-width: 100%; height: auto; }
svg [fill="\#000000"] { fill: currentColor; }
svg [stroke="\#000000"] { stroke: currentColor; }
"#;

/// The page of a report.
pub(super) fn page(report: &Report, run_dir: &Path) -> anyhow::Result<String> {
    let folder = run_dir.file_name().unwrap_or_default().to_string_lossy();
    let name = if report.name.is_empty() { &folder } else { report.name.as_str() };
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "trommel: " (name) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (name) }
                p { "A report on the run in " code { (run_dir.display()) } "." }
                (domains(report))
                (results(report))
                @if !report.outcomes.is_empty() { (charts(report)?) }
                @if !report.networks.is_empty() { (networks(&report.networks)?) }
                @if let Some(chart) = &report.lead { (lead(chart)) }
            }
        }
    };
    Ok(page.into_string())
}

/// A table whose first `texts` columns are texts and whose others are figures; rows that say so stand out.
fn table(header: &[&str], texts: usize, rows: impl IntoIterator<Item = (Vec<String>, bool)>) -> Markup {
    let class = |column: usize| (column >= texts).then_some("number");
    html! {
        div.wide {
            table {
                thead { tr { @for (i, name) in header.iter().enumerate() { th class=[class(i)] { (name) } } } }
                tbody {
                    @for (row, all) in rows {
                        tr class=[all.then_some("all")] { @for (i, cell) in row.iter().enumerate() { td class=[class(i)] { (cell) } } }
                    }
                }
            }
        }
    }
}

fn missing(what: &str) -> Markup {
    html! { p.missing { (what) } }
}

fn domains(report: &Report) -> Markup {
    let number = |number: Option<f64>| number.map_or_else(|| "-".to_owned(), |number| format!("{number:.4}"));
    let diagnostics = report.diagnostics.iter().map(|d| {
        let numbers = [d.kl_before, d.kl_after, d.ess_share, d.lost_mass, d.repeat_share, d.entropy].map(number);
        ([vec![d.domain.clone()], numbers.to_vec()].concat(), false)
    });
    let weights = report.weights.iter().map(|w| {
        let numbers = [number(Some(w.weight)), number(Some(w.p_domain)), number(Some(w.p_corpus)), number(w.epochs)];
        let texts = vec![w.domain.clone(), w.cluster_id.to_string(), w.top_terms.join(", ")];
        ([texts, numbers.to_vec()].concat(), false)
    });
    let header = ["domain", "KL before", "KL after", "ESS share", "lost mass", "repeat share", "entropy"];
    let header_of_weights = ["domain", "cluster", "top terms", "weight", "P(c | domain)", "P(c | corpus)", "epochs"];
    html! {
        h2 { "Domains" }
        @if report.diagnostics.is_empty() {
            (missing("There are no diagnostics: the run has not come to its stage `resample`. Run it on, and report again."))
        } @else {
            p {
                "KL is the divergence of the domain's clusters from the corpus's, before and after resampling (nats); ESS share is "
                "the effective sample size over the corpus. Much lost mass is text of the domain that the corpus has nothing like; "
                "a high repeat share means that small clusters are drawn again and again."
            }
            (table(&header, 1, diagnostics))
        }
        @if !report.weights.is_empty() {
            h3 { "Largest weights" }
            p { "What each domain has most of, compared with the corpus: weight = P(c | domain) / P(c | corpus)." }
            (table(&header_of_weights, 3, weights))
        }
    }
}

/// Tokens, FLOPs and hours, as `-` where there is no cost.
fn cost(cost: Cost) -> [String; 3] {
    if cost.tokens == 0 {
        return ["-"; 3].map(str::to_owned);
    }
    [format!("{:.2}M", cost.tokens as f64 / 1e6), format!("{:.2e}", cost.flops), format!("{:.4}", cost.seconds / 3600.0)]
}

/// Over all domains, the best method first.
fn best_first(report: &Report) -> Vec<Summary> {
    let mut summaries = macro_averages(&report.outcomes);
    let reached = |s: &Summary| s.after.or(s.before).map_or(f64::INFINITY, |figure| figure.mean);
    summaries.sort_by(|a, b| reached(a).total_cmp(&reached(b)));
    summaries
}

fn results(report: &Report) -> Markup {
    let summaries = best_first(report);
    let overview = summaries.iter().map(|s| {
        let reached = vec![s.name(), known(s.before), known(s.after), signed(s.minus_slm)];
        ([reached, cost(s.generic).to_vec(), cost(s.specialise()).to_vec()].concat(), false)
    });
    let header = [
        "method",
        "before tuning",
        "fine-tuned",
        "minus slm",
        "shared tokens",
        "FLOPs",
        "hours",
        "tokens/domain",
        "FLOPs",
        "hours",
    ];
    let mut methods: Vec<&str> = summaries.iter().map(|s| s.method.as_str()).collect();
    methods.sort_unstable();
    methods.dedup();
    let domains = by_domain(&report.outcomes);
    html! {
        h2 { "Results" }
        @if report.outcomes.is_empty() {
            (missing("There are no results: no model of this run has been evaluated. A pipeline file with `train`, `finetune` and test \
                      sets, run to its stage `eval`, makes them."))
        } @else {
            p {
                "Perplexity on held-out documents, the macro average over domains: exp of the mean over domains of the loss per token; "
                "mean and standard deviation over seeds; of a single model on one domain, the standard error over documents. "
                "“Minus slm” is the loss per token after tuning minus that of slm with the same seed, in nats: below zero is better. Costs are means over seeds and domains: what is paid once for all domains, and "
                "what each domain adds."
            }
            (table(&header, 1, overview))
            @for method in methods {
                h3 { (method) " (" (meaning(method)) ")" }
                (of_method(method, &domains, &summaries))
            }
        }
    }
}

/// The figures of one method on each domain, and over all of them.
fn of_method(method: &str, domains: &[(String, Summary)], summaries: &[Summary]) -> Markup {
    let mut rows: Vec<(&Summary, Option<&str>)> = domains.iter().map(|(domain, s)| (s, Some(domain.as_str()))).collect();
    rows.extend(summaries.iter().map(|s| (s, None)));
    rows.retain(|(s, _)| s.method == method);
    // The average stands below the domains of its variant.
    rows.sort_by_key(|(s, domain)| (s.variant.clone(), domain.is_none()));
    let row = |(s, domain): (&Summary, Option<&str>)| {
        let texts = vec![s.variant.clone(), domain.unwrap_or("(macro average)").to_owned()];
        let figures = vec![known(s.before), known(s.after), signed(s.minus_slm), format!("{:.3}", s.bits_per_byte)];
        ([texts, figures].concat(), domain.is_none())
    };
    table(&["variant", "domain", "before tuning", "fine-tuned", "minus slm", "bits/byte"], 2, rows.into_iter().map(row))
}

fn charts(report: &Report) -> anyhow::Result<Markup> {
    let summaries = best_first(report);
    let numbers_of_domains = plots::DOMAINS.map(|n| n.to_string()).join(", ");
    let shared = figure_or(
        plots::shared_cost(&summaries),
        "Lower is better, and further to the left is cheaper. A bar is that deviation or error; a mark at the upper edge \
         lies above it, and its name gives the number.",
        "This chart is left out: no fine-tuned method of the run has a cost that all domains share.",
    )?;
    let total = figure_or(
        plots::total_cost(&summaries),
        &format!(
            "C_total(N) = C_generic + N C_specialise: the small, middle and large mark of a method are its cost for \
             {numbers_of_domains} domains. The lowest line whose mark lies left of your budget is the method to choose; a short \
             line has paid most of its cost once."
        ),
        "This chart is left out: no method of the run is fine-tuned on all domains.",
    )?;
    let clusters = figure_or(
        plots::clusters(&summaries, &report.clusters),
        "More clusters match a domain more closely, and fewer give each cluster, or expert, more text.",
        "This chart is left out: no fine-tuned method of the run has clusters of several levels.",
    )?;
    Ok(html! {
        h2 { "What it costs" }
        h3 { "Perplexity over the cost that all domains share" }
        (shared)
        h3 { "Perplexity over the cost of " (numbers_of_domains) " domains" }
        (total)
        h3 { "Perplexity over the number of clusters" }
        (clusters)
    })
}

/// A chart with how to read it.
fn figure(chart: anyhow::Result<String>, reading: &str) -> anyhow::Result<Markup> {
    Ok(html! { figure { (PreEscaped(chart?)) figcaption { (reading) } } })
}

/// A chart, or why it is not there.
fn figure_or(chart: Option<anyhow::Result<String>>, reading: &str, left_out: &str) -> anyhow::Result<Markup> {
    chart.map_or_else(|| Ok(missing(left_out)), |chart| figure(chart, reading))
}

fn networks(networks: &[Network]) -> anyhow::Result<Markup> {
    let mut sections = Vec::new();
    for network in networks {
        let mlps = figure(
            values("singular value of the MLPs", &network.spectrum.mlps),
            "Singular values of the experts' MLPs minus their mean, relative to the mean. A curve that falls at once: a few directions \
             tell the experts apart; a flat one: each expert has learnt something of its own. Its height is how much.",
        )?;
        let coefficients = figure(
            values("singular value of the coefficients", &network.spectrum.coefficients),
            "Singular values of the coefficients that mix the basis for each expert. The first is what all experts share; as many of \
             the others as are well above zero, so many directions the experts can move in.",
        )?;
        sections.push(html! {
            h3 { (network.name) }
            (mlps)
            (coefficients)
            (distances(network))
        });
    }
    Ok(html! {
        h2 { "Projected networks" }
        p { "Those of at most 64 experts." }
        @for section in &sections { (section) }
    })
}

fn lead(chart: &str) -> Markup {
    html! {
        h2 { "Networks of experts against the plain model" }
        figure {
            (PreEscaped(chart))
            figcaption {
                "Both read the same text in the same steps; below zero the network is ahead, each sequence going through the expert of \
                 its cluster. A curve that rises first and falls later shows from how many tokens on experts pay. A bar is the standard \
                 deviation over seeds."
            }
        }
    }
}

/// The distances between experts, as a table that is coloured by them.
fn distances(network: &Network) -> Markup {
    let distances = &network.spectrum.distances;
    let top = distances.iter().copied().fold(0.0, f64::max);
    let term = |i: usize| network.terms.get(i).map_or("", String::as_str);
    // The text stays readable on seven tenths of the colour.
    let colour = |distance: f64| format!("background: rgb(0 114 178 / {:.0}%)", 70.0 * distance / top.max(f64::MIN_POSITIVE));
    let title = |i: usize, j: usize| format!("{i} ({}) and {j} ({})", term(i), term(j));
    html! {
        figure {
            div.wide {
                table.heat {
                    thead { tr { th { "expert" } @for j in 0..distances.ncols() { th.number title=(term(j)) { (j) } } } }
                    tbody {
                        @for (i, row) in distances.rows().into_iter().enumerate() {
                            tr {
                                th title=(term(i)) { (i) " " (term(i)) }
                                @for (j, distance) in row.iter().enumerate() {
                                    td style=(colour(*distance)) title=(title(i, j)) { (format!("{distance:.2}")) }
                                }
                            }
                        }
                    }
                }
            }
            figcaption {
                "Norm of the difference of two experts' MLPs, relative to the norm of the mean MLP. Dark: the network has learnt other "
                "things for these two clusters; a light block: it treats these clusters alike, and one expert would do for them."
            }
        }
    }
}
