//! How a projected network becomes one small model for a domain. [PE 2.5; the mixture is that of SE]

use std::path::{Path, PathBuf};

use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::storage::write_bytes;
use trommel_pipeline::proportions::Proportions;
use trommel_spec::pipeline::{Choice, Train};
use trommel_spec::plan::Plan;
use trommel_trainer::checkpoint;
use trommel_trainer::evaluate::expert_losses;
use trommel_trainer::projected;

use super::{Candidate, Comparison, DomainDocuments, Trained, cost_of, stem};

/// Bytes of text that suffice to tell experts apart: every expert reads all of them.
const TRIED_BYTES: usize = 256 << 10;

/// A trained network, and what its experts stand for.
pub(super) struct Network<'a> {
    pub(super) model: &'a Trained,
    pub(super) level: u32,
    pub(super) proportions: &'a Proportions,
}

impl Comparison<'_> {
    /// The small models that a network becomes for a domain, one for each choice of the plan.
    pub(super) fn projections(
        &self,
        train: &Train,
        domain: &DomainDocuments,
        network: &Network<'_>,
        candidate: &Candidate,
        cached: &mut bool,
    ) -> Result<Vec<Candidate>> {
        let histogram = network.proportions.histogram(&domain.name, network.level)?;
        let only = |expert: usize| only(expert, histogram.len());
        let mut made = Vec::new();
        for choice in &train.experts.choices {
            let mut cost = candidate.cost;
            let shares = match choice {
                Choice::TopCluster => only(top(&histogram)),
                Choice::Mixture => histogram.clone(),
                Choice::LowestLoss => {
                    let losses = self.losses(network, domain, train.context as usize, cached)?;
                    only(lowest(&losses))
                }
                Choice::BestTuned => {
                    let mut tries = Vec::new();
                    for expert in 0..histogram.len() {
                        let start = Candidate { out: self.project(network, &only(expert), cached)?, ..candidate.clone() };
                        tries.push(self.finetune(train, domain, &start, cached)?.1);
                    }
                    let best = top(&tries.iter().map(|tried| -tried.loss_after).collect::<Vec<_>>());
                    // The best one's own tuning is counted with the fine-tuned model, like everyone's.
                    tries.remove(best);
                    cost = tries.iter().fold(cost, |sum, tried| sum + cost_of(tried));
                    only(best)
                }
            };
            let variant = format!("{} {}", candidate.variant, choice.name());
            made.push(Candidate { variant, cost, out: self.project(network, &shares, cached)?, ..candidate.clone() });
        }
        Ok(made)
    }

    /// Makes the small model that a mixture of a network's experts projects to.
    fn project(&self, network: &Network<'_>, shares: &[f64], cached: &mut bool) -> Result<PathBuf> {
        let out = projection(self.plan, &network.model.out, shares);
        let folder = out.join(checkpoint::FOLDER);
        if checkpoint::read_state::<serde_json::Value>(&folder)?.is_none() {
            *cached = false;
            projected::write(&network.model.out.join(checkpoint::FOLDER), shares, &folder)?;
        }
        Ok(out)
    }

    /// The loss of every expert on [`tried_on`] a domain, before fine-tuning; kept in a file.
    fn losses(&self, network: &Network<'_>, domain: &DomainDocuments, context: usize, cached: &mut bool) -> Result<Vec<f64>> {
        let path = losses_file(self.plan, &network.model.out, domain);
        if let Some(found) = read_losses(&path) {
            return Ok(found);
        }
        *cached = false;
        self.progress.line(&format!("trying the experts of {} on {}", stem(&network.model.out), domain.name));
        let checkpoint = network.model.out.join(checkpoint::FOLDER);
        let losses = expert_losses(&checkpoint, &tried_on(domain), context, self.device, self.interrupt)?;
        let text = serde_json::to_vec(&losses).map_err(|e| Error::internal("no losses").source(e))?;
        write_bytes(&path, &text)?;
        Ok(losses)
    }
}

/// The projections of the network in `out` that a domain starts from, for each choice of the plan; `None` before a choice can be made.
/// For the best one after tuning that is every expert's.
pub(super) fn expected(
    plan: &Plan,
    train: &Train,
    domain: &DomainDocuments,
    out: &Path,
    histogram: &[f64],
) -> Option<Vec<Vec<PathBuf>>> {
    let experts = histogram.len();
    let of = |shares: &[f64]| projection(plan, out, shares);
    let starts = |choice: &Choice| {
        Some(match choice {
            Choice::TopCluster => vec![of(&only(top(histogram), experts))],
            Choice::Mixture => vec![of(histogram)],
            Choice::LowestLoss => vec![of(&only(lowest(&read_losses(&losses_file(plan, out, domain))?), experts))],
            Choice::BestTuned => (0..experts).map(|expert| of(&only(expert, experts))).collect(),
        })
    };
    train.experts.choices.iter().map(starts).collect()
}

/// The folder of a projection of the network in `out`; equal mixtures share it.
fn projection(plan: &Plan, out: &Path, shares: &[f64]) -> PathBuf {
    let bytes: Vec<u8> = shares.iter().flat_map(|share| share.to_le_bytes()).collect();
    plan.run_dir.join("project").join(format!("{}-{}", stem(out), Key::of_bytes(&bytes).short()))
}

/// The documents that experts are tried on before fine-tuning, when all of a domain's training documents are new to them: those that
/// are held out, then the others, until [`TRIED_BYTES`] are reached.
fn tried_on(domain: &DomainDocuments) -> Vec<String> {
    let mut bytes = 0;
    let documents = domain.validation.iter().chain(&domain.train);
    let before = |document: &&String| {
        let more = bytes < TRIED_BYTES;
        bytes += document.len();
        more
    };
    documents.take_while(before).cloned().collect()
}

/// The file that keeps the losses of the experts of the network in `out`.
fn losses_file(plan: &Plan, out: &Path, domain: &DomainDocuments) -> PathBuf {
    let key = Key::of(tried_on(domain)).short();
    plan.run_dir.join("project").join(format!("{}-losses-on-{}-{key}.json", stem(out), domain.name))
}

fn read_losses(path: &Path) -> Option<Vec<f64>> {
    std::fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok())
}

/// All of one expert.
pub(crate) fn only(expert: usize, experts: usize) -> Vec<f64> {
    (0..experts).map(|i| f64::from(u8::from(i == expert))).collect()
}

/// The place of the smallest number; the first one of equals.
pub(crate) fn lowest(numbers: &[f64]) -> usize {
    top(&numbers.iter().map(|x| -x).collect::<Vec<_>>())
}

/// The place of the largest number; the first one of equals.
pub(crate) fn top(numbers: &[f64]) -> usize {
    let largest = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    numbers.iter().position(|x| *x == largest).unwrap_or(0)
}
