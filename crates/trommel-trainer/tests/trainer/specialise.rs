//! Fine-tuning, evaluation and generation on a model of a toy language.

use std::fs;
use std::path::Path;

use trommel_core::progress::{Interrupt, Silent};
use trommel_kernels::panels::Precision;
use trommel_trainer::evaluate::evaluate;
use trommel_trainer::finetune::{FinetunePlan, Start, TeacherPlan, finetune};
use trommel_trainer::generate::{Sampling, generate};
use trommel_trainer::model::Activation;
use trommel_trainer::pretrain::pretrain;
use trommel_trainer::recipe::Recipe;

use crate::fixtures::{CONTEXT, device, plan, text, tiny, write_shards};

/// Documents whose stride is two, one third of the language.
fn domain(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|i| text(3 * i + 1)).collect()
}

pub(crate) fn finetune_plan(folder: &Path, start: Start, out: &str) -> FinetunePlan {
    let model = FinetunePlan::model(&start).unwrap();
    // Evaluations of a finished model are in `f32`; so is this training, that the two can be compared.
    let precision = Precision::F32;
    let tuning = Recipe::finetuning(&model, 1, 1.0);
    let recipe = Recipe { batch_tokens: 4 * CONTEXT, warmup_steps: 2, learning_rate: 5e-3, precision, ..tuning };
    FinetunePlan {
        start,
        train: domain(20..40),
        validation: domain(40..46),
        tokenizer: folder.join("shards/tokenizer.json"),
        context: CONTEXT,
        tokens: 40 * 4 * CONTEXT as u64,
        recipe,
        seed: 5,
        patience: 4,
        teacher: None,
        adapters: None,
        out: folder.join(out),
    }
}

#[test]
fn tuning_helps_on_the_domain_and_everything_repeats() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(&folder.path().join("shards"));
    let interrupt = Interrupt::default();
    let pretrained = pretrain(&plan(folder.path(), "pretrained"), &device(), &Silent, &interrupt).unwrap();
    let start = Start::Checkpoint(pretrained.checkpoint.clone());
    let tune = |start: &Start, out: &str| {
        finetune(&finetune_plan(folder.path(), start.clone(), out), &device(), &Silent, &Interrupt::default()).unwrap()
    };
    let report = tune(&start, "tuned");
    assert!(report.best_step > 0 && report.loss_after < report.loss_before - 0.1, "{report:?}");
    let weights = |out: &str| fs::read(folder.path().join(out).join("checkpoint/model.safetensors")).unwrap();
    tune(&start, "again");
    assert_eq!(weights("tuned"), weights("again"));
    assert!(tune(&start, "tuned").cached);

    // The weights on disk are those of the best evaluation.
    let documents = domain(40..46);
    let score = |folder: &Path| evaluate(folder, &documents, CONTEXT, &device(), &Silent, &interrupt).unwrap();
    let (before, after) = (score(&pretrained.checkpoint), score(&report.checkpoint));
    assert!((before.nll_per_token - report.loss_before).abs() < 1e-9);
    assert!((after.nll_per_token - report.loss_after).abs() < 1e-9);
    assert!(after.perplexity < before.perplexity && after.stderr > 0.0);
    assert_eq!(after.bytes, documents.iter().map(|d| d.len() as u64).sum::<u64>());
    assert_eq!(after.tokens, documents.iter().map(|d| d.split(' ').count() as u64).sum::<u64>());

    let scratch = tune(&Start::Scratch { model: tiny(Activation::SwiGlu), end_of_text: 0 }, "scratch");
    assert!((scratch.loss_before - 30f64.ln()).abs() < 0.3);
    assert!(scratch.loss_after > report.loss_after, "training on little text alone should be worse: {scratch:?}");
}

#[test]
fn tuning_that_only_harms_keeps_the_start() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(&folder.path().join("shards"));
    let pretrained = pretrain(&plan(folder.path(), "pretrained"), &device(), &Silent, &Interrupt::default()).unwrap();
    let plan = finetune_plan(folder.path(), Start::Checkpoint(pretrained.checkpoint.clone()), "tuned");
    let recipe = Recipe { learning_rate: 0.5, warmup_steps: 1, ..plan.recipe.clone() };
    let report = finetune(&FinetunePlan { recipe, ..plan }, &device(), &Silent, &Interrupt::default()).unwrap();
    assert_eq!((report.best_step, report.steps), (0, 8), "four evaluations without gain, two steps apart");
    let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    assert_eq!(weights(&report.checkpoint), weights(&pretrained.checkpoint));
}

#[test]
fn generated_text_is_of_the_language_and_repeats() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(&folder.path().join("shards"));
    let pretrained = pretrain(&plan(folder.path(), "pretrained"), &device(), &Silent, &Interrupt::default()).unwrap();
    let write = |seed| {
        let sampling = Sampling { max_tokens: 40, temperature: 0.7, top_k: Some(5), seed };
        generate(&pretrained.checkpoint, "w1 w2 w3", &sampling, &device(), &Interrupt::default()).unwrap()
    };
    assert_eq!(write(1), write(1));
    assert!((1..5).any(|seed| !write(seed).is_empty()));
}

#[test]
fn a_teacher_is_learnt_from_and_must_fit() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(&folder.path().join("shards"));
    let interrupt = Interrupt::default();
    let run = |plan: &FinetunePlan| finetune(plan, &device(), &Silent, &Interrupt::default());
    let pretrained = pretrain(&plan(folder.path(), "pretrained"), &device(), &Silent, &interrupt).unwrap();
    let teacher = run(&finetune_plan(folder.path(), Start::Checkpoint(pretrained.checkpoint.clone()), "teacher")).unwrap();
    let student = Start::Scratch { model: tiny(Activation::SwiGlu), end_of_text: 0 };
    let plan = |out: &str, teacher: Option<TeacherPlan>| FinetunePlan {
        teacher,
        ..finetune_plan(folder.path(), student.clone(), out)
    };
    let alone = run(&plan("alone", None)).unwrap();
    let of = |weight: f64| TeacherPlan { checkpoint: teacher.checkpoint.clone(), weight, temperature: 1.5 };
    // At a weight of one the targets have no part, so all that is learnt comes from the teacher.
    let taught = run(&plan("taught", Some(of(1.0)))).unwrap();
    assert!(taught.loss_after < taught.loss_before - 0.8, "{taught:?}");
    assert!(taught.loss_after != alone.loss_after);
    assert!(taught.flops / taught.tokens as f64 > alone.flops / alone.tokens as f64);
    assert!(run(&plan("taught", Some(of(1.0)))).unwrap().cached);

    let refused = |teacher: TeacherPlan| run(&plan("refused", Some(teacher))).unwrap_err().to_string();
    assert!(refused(of(1.5)).contains("weight 1.5"));
    let other = folder.path().join("other");
    fs::create_dir_all(&other).unwrap();
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        fs::copy(teacher.checkpoint.join(name), other.join(name)).unwrap();
    }
    let tokenizer = fs::read_to_string(other.join("tokenizer.json")).unwrap().replace("w29", "word29");
    fs::write(other.join("tokenizer.json"), tokenizer).unwrap();
    let error = refused(TeacherPlan { checkpoint: other, ..of(0.5) });
    assert!(error.contains("another tokenizer") && error.contains("hint"), "{error}");
    assert!(!folder.path().join("refused").exists());
}
