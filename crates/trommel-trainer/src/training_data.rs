//! What a pretraining reads: a folder of shards from the first to the last, or its clusters in proportions.

use serde::{Deserialize, Serialize};
use trommel_core::error::Result;
use trommel_core::key::Key;

use crate::batch::{Batch, Dealer, Dealt};
use crate::loader::{self, Loader};
use crate::mixture::{self, Mixture};
use crate::pretrain::PretrainPlan;

/// The sequences of a pretraining.
pub(crate) enum TrainingData {
    /// In the order of the shards.
    Shards(Box<Dealer<Loader>>),
    /// From clusters.
    Clusters(Mixture),
}

/// A place in [`TrainingData`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Place {
    Shards(Dealt<loader::Position>),
    Clusters(mixture::Position),
}

impl Place {
    /// Passes over the shards; over the cluster that was read most often.
    pub(crate) fn epochs(&self) -> u64 {
        match self {
            Place::Shards(place) => place.start.epoch,
            Place::Clusters(place) => Mixture::epochs(place),
        }
    }
}

impl TrainingData {
    pub(crate) fn open(plan: &PretrainPlan) -> Result<TrainingData> {
        let vocab = plan.model.vocab;
        Ok(match &plan.mixture {
            Some(shares) => TrainingData::Clusters(Mixture::open(&plan.shards, vocab, shares, plan.seed)?),
            None => TrainingData::Shards(Box::new(Dealer::new(Loader::open(&plan.shards, vocab)?, plan.context))),
        })
    }

    pub(crate) fn fingerprint(&self) -> Key {
        match self {
            TrainingData::Shards(dealer) => dealer.source().fingerprint(),
            TrainingData::Clusters(mixture) => mixture.fingerprint(),
        }
    }

    pub(crate) fn end_of_text(&self) -> u32 {
        match self {
            TrainingData::Shards(dealer) => dealer.source().manifest().end_of_text,
            TrainingData::Clusters(mixture) => mixture.end_of_text(),
        }
    }

    /// The next `sequences` sequences of `time` tokens, for each expert that they train; a plain model is expert 0.
    pub(crate) fn deal(&mut self, sequences: usize, time: usize) -> Result<Vec<(usize, Batch)>> {
        match self {
            TrainingData::Shards(dealer) => Ok(vec![(0, dealer.deal(sequences)?)]),
            TrainingData::Clusters(mixture) => mixture.deal(sequences, time),
        }
    }

    pub(crate) fn place(&self) -> Place {
        match self {
            TrainingData::Shards(dealer) => Place::Shards(dealer.position()),
            TrainingData::Clusters(mixture) => Place::Clusters(mixture.position()),
        }
    }

    pub(crate) fn seek(&mut self, place: Place) -> Result<()> {
        match (self, place) {
            (TrainingData::Shards(dealer), Place::Shards(place)) => dealer.seek(place),
            (TrainingData::Clusters(mixture), Place::Clusters(place)) => mixture.seek(&place),
            (TrainingData::Shards(dealer), Place::Clusters(_)) => Err(other_kind().file(dealer.source().folder().display())),
            (TrainingData::Clusters(_), Place::Shards(_)) => Err(other_kind()),
        }
    }

    /// Begins each cluster where another training on the same shards has stopped. Shards in their order begin anew: those of
    /// another domain are other ones.
    pub(crate) fn follow(&mut self, place: &Place) -> Result<()> {
        match (self, place) {
            (TrainingData::Clusters(mixture), Place::Clusters(place)) => mixture.follow(place),
            _ => Ok(()),
        }
    }

    /// Words for the stretch before `place`, for messages.
    pub(crate) fn describe(&self, place: &Place) -> String {
        match (self, place) {
            (TrainingData::Shards(dealer), Place::Shards(place)) => dealer.source().describe(place.start),
            (_, Place::Clusters(place)) => format!("about sequence {} of the mixture", place.drawn),
            (TrainingData::Clusters(_), Place::Shards(_)) => other_kind().to_string(),
        }
    }
}

fn other_kind() -> trommel_core::error::Error {
    trommel_core::error::Error::internal("the place belongs to another kind of training data")
}
