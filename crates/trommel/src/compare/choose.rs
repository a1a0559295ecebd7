//! How a projected network becomes one small model for a domain. [PE 2.5; the mixture is that of SE]

use std::path::PathBuf;

use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::storage::write_bytes;
use trommel_pipeline::proportions::Proportions;
use trommel_spec::pipeline::{Choice, Train};
use trommel_trainer::checkpoint;
use trommel_trainer::evaluate::expert_losses;
use trommel_trainer::projected;

use super::{Candidate, Comparison, DomainDocuments, Trained, cost_of};

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
        let only = |expert: usize| (0..histogram.len()).map(|i| f64::from(u8::from(i == expert))).collect::<Vec<_>>();
        let mut made = Vec::new();
        for choice in &train.experts.choices {
            let mut cost = candidate.cost;
            let shares = match choice {
                Choice::TopCluster => only(top(&histogram)),
                Choice::Mixture => histogram.clone(),
                Choice::LowestLoss => {
                    let losses = self.losses(network, domain, train.context as usize, cached)?;
                    only(top(&losses.iter().map(|loss| -loss).collect::<Vec<_>>()))
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

    /// The folder of the small model that a mixture of a network's experts projects to; equal mixtures share it.
    fn project(&self, network: &Network<'_>, shares: &[f64], cached: &mut bool) -> Result<PathBuf> {
        let from = network.model.out.file_name().unwrap_or_default().to_string_lossy();
        let bytes: Vec<u8> = shares.iter().flat_map(|share| share.to_le_bytes()).collect();
        let out = self.plan.run_dir.join("project").join(format!("{from}-{}", Key::of_bytes(&bytes).short()));
        let folder = out.join(checkpoint::FOLDER);
        if checkpoint::read_state::<serde_json::Value>(&folder)?.is_none() {
            *cached = false;
            projected::write(&network.model.out.join(checkpoint::FOLDER), shares, &folder)?;
        }
        Ok(out)
    }

    /// The loss of every expert on the validation documents, before fine-tuning; kept in a file.
    fn losses(&self, network: &Network<'_>, domain: &DomainDocuments, context: usize, cached: &mut bool) -> Result<Vec<f64>> {
        let from = network.model.out.file_name().unwrap_or_default().to_string_lossy();
        let key = Key::of(domain.validation.iter()).short();
        let path = self.plan.run_dir.join("project").join(format!("{from}-losses-on-{}-{key}.json", domain.name));
        if let Some(found) = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
            return Ok(found);
        }
        *cached = false;
        self.progress.line(&format!("trying the experts of {from} on {}", domain.name));
        let checkpoint = network.model.out.join(checkpoint::FOLDER);
        let losses = expert_losses(&checkpoint, &domain.validation, context, self.device, self.interrupt)?;
        let text = serde_json::to_vec(&losses).map_err(|e| Error::internal("no losses").source(e))?;
        write_bytes(&path, &text)?;
        Ok(losses)
    }
}

/// The place of the largest number; the first one of equals.
pub(crate) fn top(numbers: &[f64]) -> usize {
    let largest = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    numbers.iter().position(|x| *x == largest).unwrap_or(0)
}
