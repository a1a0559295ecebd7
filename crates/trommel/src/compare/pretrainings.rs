//! Which models a plan pretrains, on which text.

use std::path::{Path, PathBuf};

use serde::Serialize;
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::schema::CORPUS;
use trommel_pipeline::outputs::Outputs;
use trommel_pipeline::proportions::Proportions;
use trommel_spec::pipeline::{Method, ShardBy, Train};
use trommel_spec::plan::Plan;
use trommel_trainer::mixture::Share;
use trommel_trainer::model::{Adapters, Config, Projection};

use super::DomainDocuments;
use super::choose::{expected, top};

/// One model to pretrain.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Pretraining {
    pub(super) method: Method,
    /// What tells it from the others of its method, such as `level-2`; empty if there are none.
    pub(super) variant: String,
    pub(super) seed: u64,
    /// `None` for a model that serves every domain.
    pub(super) domain: Option<String>,
    pub(super) text: Text,
    pub(super) phase: Phase,
}

/// What a model reads.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Text {
    /// The shards of a domain, or of the corpus.
    Shards(String),
    /// Clusters in the proportions of a domain, or of the corpus, at a level of the tree.
    Clusters { of: String, level: u32 },
    /// Clusters in the proportions of the corpus, each for the expert of its node at a level.
    Experts { level: u32 },
    /// Those clusters of the corpus that lie in one node of a level.
    Node { level: u32, node: usize },
}

/// Which part of the schedule a model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Whole,
    Trunk,
    /// The decay, from the trunk of the same method and seed on.
    Decay,
}

/// Every model of a plan, a trunk before its decays. Without `proportions`, as before the clusters are known, each level has as
/// many nodes as the plan says.
pub(super) fn pretrainings(plan: &Plan, train: &Train, proportions: Option<&Proportions>) -> Result<Vec<Pretraining>> {
    let mut all = Vec::new();
    for &method in &train.methods {
        for offset in 0..train.seeds(method) {
            let seed = plan.spec.seed + u64::from(offset);
            let listing = Listing { plan, train, proportions, method, seed };
            listing.add(&mut all)?;
        }
    }
    Ok(all)
}

struct Listing<'a> {
    plan: &'a Plan,
    train: &'a Train,
    proportions: Option<&'a Proportions>,
    method: Method,
    seed: u64,
}

impl Listing<'_> {
    fn add(&self, all: &mut Vec<Pretraining>) -> Result<()> {
        let leaves = self.plan.spec.cluster.levels().len() as u32;
        let by_cluster = self.plan.spec.shard.by == ShardBy::Cluster;
        let of = |source: &str, level: u32| {
            let of = source.to_owned();
            if by_cluster { Text::Clusters { of, level } } else { Text::Shards(of) }
        };
        let domains = || self.plan.spec.domains.keys();
        let model = |variant: String, domain: Option<&String>, text: Text, phase: Phase| Pretraining {
            method: self.method,
            variant,
            seed: self.seed,
            domain: domain.cloned(),
            text,
            phase,
        };
        // The first of several levels is the method's, with every seed; the others show what a level does, and have the first seed.
        let levels = |given: &Option<Vec<u32>>| {
            let mut levels = given.clone().unwrap_or_else(|| vec![leaves]);
            if self.seed != self.plan.spec.seed {
                levels.truncate(1);
            }
            levels
        };
        match self.method {
            Method::Slm | Method::Llm => all.push(model(String::new(), None, of(CORPUS, leaves), Phase::Whole)),
            Method::SlmIs => {
                for level in levels(&self.train.levels) {
                    let variant = self.train.levels.as_ref().map_or(String::new(), |_| format!("level-{level}"));
                    all.extend(domains().map(|d| model(variant.clone(), Some(d), of(d, level), Phase::Whole)));
                }
            }
            Method::SlmNopt | Method::SlmD | Method::Lora => {}
            Method::Dsir => {
                all.extend(domains().map(|d| model(String::new(), Some(d), Text::Shards(d.clone()), Phase::Whole)));
            }
            Method::SlmPn | Method::LoraMix => {
                for level in levels(&self.train.experts.levels) {
                    all.push(model(format!("level-{level}"), None, Text::Experts { level }, Phase::Whole));
                }
            }
            Method::SlmMix => {
                for level in levels(&self.train.experts.levels) {
                    let nodes = (0..self.nodes(level)?).map(|node| Text::Node { level, node });
                    all.extend(nodes.map(|text| model(format!("level-{level}"), None, text, Phase::Whole)));
                }
            }
            Method::TrunkDecay => {
                all.push(model(String::new(), None, of(CORPUS, leaves), Phase::Trunk));
                all.extend(domains().map(|d| model(String::new(), Some(d), of(d, leaves), Phase::Decay)));
            }
        }
        Ok(())
    }

    fn nodes(&self, level: u32) -> Result<usize> {
        match self.proportions {
            Some(proportions) => proportions.clusters(level),
            None => Ok(self.plan.spec.cluster.levels().iter().take(level as usize).map(|n| *n as usize).product()),
        }
    }
}

impl Pretraining {
    /// The preset of its model.
    pub(super) fn preset<'a>(&self, train: &'a Train) -> &'a str {
        train.llm.as_deref().filter(|_| self.method == Method::Llm).unwrap_or(&train.model)
    }

    /// `model` as it is, or as a network of experts if this is one.
    pub(super) fn network(&self, model: Config, train: &Train, proportions: Option<&Proportions>) -> Result<Config> {
        let Text::Experts { level } = self.text else { return Ok(model) };
        let experts = known(proportions)?.clusters(level)?;
        if self.method == Method::LoraMix {
            return Ok(Config { adapters: Some(Adapters::of_experts(experts, &model)), ..model });
        }
        let mut projection = Projection::new(experts);
        if let Some(capacity) = train.experts.capacity {
            projection.capacity = capacity as usize;
        }
        Ok(Config { projection: Some(projection), ..model })
    }

    /// The shares of the clusters that it draws; `None` if it reads shards in their order.
    pub(super) fn mixture(&self, proportions: Option<&Proportions>) -> Result<Option<Vec<Share>>> {
        let (source, level) = match &self.text {
            Text::Shards(_) => return Ok(None),
            Text::Clusters { of, level } => (of.as_str(), *level),
            Text::Experts { level } | Text::Node { level, .. } => (CORPUS, *level),
        };
        let proportions = known(proportions)?;
        let share = |leaf: trommel_pipeline::proportions::LeafShare| -> Result<Share> {
            let node = proportions.node_of(leaf.cluster_id, level)?;
            let (expert, share) = match self.text {
                Text::Experts { .. } => (node, leaf.share),
                Text::Node { node: only, .. } => (0, if node == only { leaf.share } else { 0.0 }),
                _ => (0, leaf.share),
            };
            Ok(Share { cluster_id: leaf.cluster_id, share, expert })
        };
        proportions.shares(source, level)?.into_iter().map(share).collect::<Result<Vec<_>>>().map(Some)
    }

    /// Tokens to train on: the budget, or the part of it that a model of one cluster has.
    pub(super) fn tokens(&self, train: &Train, proportions: Option<&Proportions>) -> Result<u64> {
        let Text::Node { level, .. } = self.text else { return Ok(train.tokens.0) };
        let sum = |shares: &[f64]| shares.iter().sum::<f64>();
        let own: Vec<f64> = self.mixture(proportions)?.into_iter().flatten().map(|s| s.share).collect();
        let all: Vec<f64> = known(proportions)?.shares(CORPUS, level)?.iter().map(|s| s.share).collect();
        Ok(((train.tokens.0 as f64 * sum(&own) / sum(&all)) as u64).max(1))
    }

    /// The name of the model among those of its plan.
    pub(super) fn name(&self) -> String {
        let node = if let Text::Node { node, .. } = self.text { format!("expert-{node}") } else { String::new() };
        let trunk = if self.phase == Phase::Trunk { "trunk" } else { "" };
        let seed = format!("seed-{}", self.seed);
        let parts = [self.method.name(), &self.variant, &node, trunk, self.domain.as_deref().unwrap_or(""), &seed];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
    }

    /// Whether a domain starts from it: a trunk serves through its decays, and one model of a mixture serves those domains whose
    /// most frequent cluster it was trained on.
    pub(super) fn serves(&self, domain: &str, proportions: Option<&Proportions>) -> Result<bool> {
        if self.phase == Phase::Trunk || self.domain.as_ref().is_some_and(|d| d != domain) {
            return Ok(false);
        }
        let Text::Node { level, node } = self.text else { return Ok(true) };
        Ok(top(&known(proportions)?.histogram(domain, level)?) == node)
    }

    /// The folders of the models that a domain starts from, once it is trained into `out`: itself, or a network's projections,
    /// those of one choice together; `None` before they can be known.
    pub(super) fn starts(
        &self,
        plan: &Plan,
        train: &Train,
        domain: &DomainDocuments,
        out: &Path,
        proportions: Option<&Proportions>,
    ) -> Result<Option<Vec<Vec<PathBuf>>>> {
        let Text::Experts { level } = self.text else { return Ok(Some(vec![vec![out.to_owned()]])) };
        let histogram = known(proportions)?.histogram(&domain.name, level)?;
        Ok(expected(plan, train, domain, out, &histogram))
    }

    /// The folder of its training: the name says what it is, the key what it depends on. So a new domain leaves alone what others
    /// are trained on.
    pub(super) fn folder(
        &self,
        plan: &Plan,
        train: &Train,
        outputs: &Outputs,
        proportions: Option<&Proportions>,
    ) -> Result<PathBuf> {
        let preset = self.preset(train);
        let capacity = train.experts.capacity.filter(|_| self.method == Method::SlmPn);
        let schedule = (self.phase == Phase::Whole).then_some(train.schedule);
        let settings = json(&(preset, train.context, train.tokens, schedule, train.precision, capacity));
        // Shards by cluster do not depend on the proportions that they are drawn in.
        let mixture = json(&if proportions.is_some() { self.mixture(proportions)? } else { None });
        let shards = outputs.shards_key_of(self.method).0.to_le_bytes();
        let depends_on = [&shards[..], &settings, &mixture, &self.seed.to_le_bytes()];
        Ok(folder(plan, "train", &self.name(), &depends_on))
    }
}

/// The folder of one step of training in a run.
pub(super) fn folder(plan: &Plan, stage: &str, name: &str, depends_on: &[&[u8]]) -> PathBuf {
    let key = Key::of(depends_on.iter().copied());
    plan.run_dir.join(stage).join(format!("{name}-{}", key.short()))
}

/// Settings as bytes. Serializing plain data cannot fail; an empty text would only make the key coarser.
pub(super) fn json(settings: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(settings).unwrap_or_default()
}

fn known(proportions: Option<&Proportions>) -> Result<&Proportions> {
    proportions.ok_or_else(|| Error::internal("clusters are drawn before they are counted"))
}
