//! `trommel project`: from a projected network to one small model.

use std::io::Write;

use clap::ValueEnum;
use trommel_core::error::{Error, Result};
use trommel_core::progress::Interrupt;
use trommel_pipeline::proportions::Proportions;
use trommel_trainer::evaluate::expert_losses;
use trommel_trainer::{checkpoint, device, projected};

use crate::args::{DocumentsArgument, ProjectArguments};
use crate::compare::choose::{lowest, only, top};
use crate::compare::usable_texts;
use crate::progress;
use crate::training::source;

/// Which expert, or which mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ChoiceArgument {
    /// The expert of the domain's most frequent cluster.
    TopCluster,
    /// The expert with the lowest loss on `--documents`.
    LowestLoss,
    /// All experts in the proportions of the domain's histogram.
    Mixture,
}

/// Writes the small model that an expert, or a mixture of them, projects to.
pub(crate) fn run(arguments: &ProjectArguments, interrupt: &Interrupt) -> anyhow::Result<()> {
    let config = checkpoint::read_model(&arguments.checkpoint)?.config;
    if config.check_plain().is_ok() {
        let error = Error::config("the checkpoint is a plain model, not a network of experts");
        return Err(error.file(arguments.checkpoint.display()).hint("train one with the method `slm-pn`").into());
    }
    let folder = arguments.out.join(checkpoint::FOLDER);
    if folder.exists() {
        let error = Error::config("there is a checkpoint already").file(folder.display());
        return Err(error.hint("name another folder with `--out`, or remove this one").into());
    }
    let shares = shares(arguments, config.experts(), config.context, interrupt)?;
    projected::write(&arguments.checkpoint, &shares, &folder)?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::json!({ "checkpoint": folder, "shares": shares }))?;
        return Ok(());
    }
    let used: Vec<String> = shares
        .iter()
        .enumerate()
        .filter(|(_, share)| **share > 0.0)
        .map(|(expert, share)| format!("expert {expert}: {:.1}%", share * 100.0))
        .collect();
    writeln!(out, "{} holds {}", folder.display(), used.join(", "))?;
    Ok(())
}

fn shares(arguments: &ProjectArguments, experts: usize, context: usize, interrupt: &Interrupt) -> Result<Vec<f64>> {
    if let Some(expert) = arguments.expert {
        if expert >= experts {
            let message = format!("the network has no expert {expert}");
            return Err(Error::config(message).hint(format!("it has the experts 0 to {}", experts - 1)));
        }
        return Ok(only(expert, experts));
    }
    if arguments.choice == ChoiceArgument::LowestLoss {
        let Some(documents) = &arguments.documents else {
            return Err(
                Error::config("`lowest-loss` needs documents to try the experts on").hint("name them with `--documents`")
            );
        };
        let from = DocumentsArgument { documents: documents.clone(), text: arguments.text.clone() };
        let texts = usable_texts(&source(&from)?, &*progress::for_stderr())?;
        let device = device::parse(&arguments.device.device)?;
        let losses = expert_losses(&arguments.checkpoint, &texts, context, &device, interrupt)?;
        return Ok(only(lowest(&losses), experts));
    }
    let (Some(run), Some(domain)) = (&arguments.run, &arguments.domain) else {
        let hint = "or name an expert with `--expert`";
        return Err(Error::config("the histogram of a domain needs `--run` and `--domain`").hint(hint));
    };
    let proportions = Proportions::read(run)?;
    let level = proportions.level_of(experts).ok_or_else(|| {
        let message = format!("no level of the run's cluster tree has {experts} clusters, one for each expert of the network");
        Error::config(message).file(run.display()).hint("name the run whose shards the network was trained on")
    })?;
    let histogram = proportions.histogram(domain, level)?;
    Ok(if arguments.choice == ChoiceArgument::Mixture { histogram } else { only(top(&histogram), experts) })
}
