//! The spec of a pipeline file: pure data, one struct per section, in the order of the data.
//!
//! The doc comment of each field is its published reference (`trommel schema`, editors).

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::count::Count;

/// One run: a corpus, its domains, and what to make of them.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    /// Name of the run; its directory is `runs/<name>/`.
    #[schemars(regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"))]
    pub name: String,
    /// Seed of every random decision. Default 0.
    #[serde(default)]
    pub seed: u64,
    /// The generic corpus that is searched for the domains' kind of text.
    pub corpus: Corpus,
    /// The domain sets, and mixtures of them, by name. A name is lower-case letters, digits, `-` and `_`; `corpus` is taken.
    #[schemars(extend("minProperties" = 1))]
    pub domains: BTreeMap<String, Domain>,
    /// How documents are cut.
    #[serde(default)]
    pub windows: Windows,
    /// How windows become vectors.
    #[serde(default)]
    pub embed: Embed,
    /// How vectors become clusters.
    #[serde(default)]
    pub cluster: Cluster,
    /// How cluster histograms become importance weights.
    #[serde(default)]
    pub weigh: Weigh,
    /// How much text is drawn.
    pub resample: Resample,
    /// How draws become training shards.
    #[serde(default)]
    pub shard: Shard,
    /// The models to pretrain on the shards; without it the run ends with the shards.
    pub train: Option<Train>,
    /// The fine-tuning on each domain that follows each pretraining; without it there is none.
    pub finetune: Option<Finetune>,
}

/// Where the corpus lies and which of its columns matter.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Corpus {
    /// Files, folders (searched recursively) and globs of Parquet (`.parquet`) or JSON lines (`.jsonl`, `.jsonl.gz`,
    /// `.jsonl.zst`; `.json`, `.ndjson` likewise).
    #[schemars(length(min = 1))]
    pub paths: Vec<String>,
    /// The column that holds the text. Default `text`.
    #[serde(default = "text_column")]
    pub text: String,
    /// A column that identifies a document. Default: a 128-bit hash of its text.
    pub id: Option<String>,
    /// The run fails when more than this share of a source's rows cannot be used (0 to 1). Default 0.01.
    #[serde(default = "max_reject_share")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_reject_share: f64,
}

/// Where a domain's documents lie (`train`), or which other domains it mixes (`mixture`).
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Domain {
    /// File, folder or glob of the documents that weights and fine-tuning may use.
    pub train: Option<String>,
    /// File, folder or glob of the held-out documents; used for the final evaluation and nothing else.
    pub test: Option<String>,
    /// The column that holds the text. Default `text`.
    #[serde(default = "text_column")]
    pub text: String,
    /// A column that identifies a document. Default: a 128-bit hash of its text.
    pub id: Option<String>,
    /// In place of `train`, `test`, `text` and `id`: other domains and their proportions, such as `{law: 0.3, medicine: 0.7}`
    /// (above 0, on any scale). The corpus is weighed and drawn for the mean of their cluster shares in these proportions.
    /// Fine-tuning and evaluation take all of their documents as they are; there is no evaluation unless each has a `test`.
    /// In averages over domains it counts as one more domain.
    #[schemars(extend("minProperties" = 1))]
    pub mixture: Option<BTreeMap<String, f64>>,
}

/// How documents are cut. [PE 2.3]
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Windows {
    /// Longest window in UTF-8 bytes (16 to 1,000,000); cut at white space where there is any. Default 4096, which is
    /// about 1,024 tokens of English.
    #[serde(default = "window_bytes")]
    #[schemars(range(min = 16, max = 1_000_000))]
    pub bytes: u32,
}

/// How windows become vectors.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Embed {
    /// `static` (a table that is built in), `learnt` (a table that the run learns from the corpus, which it reads once more; equal
    /// on equal processors), or the folder of a table that `trommel fit-embedder` learnt (for windows of the same size) or
    /// `trommel distill-embedder` made from an encoder, or of a sentence-transformers model. Default `static`.
    #[serde(default = "static_model")]
    pub model: String,
    /// Numbers that a sentence encoder multiplies; sums are `f32` always, and a static table has none. Default `bf16`.
    #[serde(default)]
    pub precision: Precision,
}

/// How vectors become clusters. Set `k` for flat k-means, or `levels` for a tree.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Number of clusters (2 to 65,536). Default 1024 [PE 2.3], unless `levels` is set.
    #[schemars(range(min = 2, max = 65_536))]
    pub k: Option<u32>,
    /// Children per node, from root to leaves, such as `[32, 32]` for 1,024 leaves.
    #[schemars(length(min = 1, max = 8))]
    pub levels: Option<Vec<u32>>,
    /// A cluster above this multiple of the uniform share is split, and the smallest one dissolved (CR) (at least 1).
    /// Default: 1.5 with `levels`, off with `k`.
    #[schemars(range(min = 1.0))]
    pub balance: Option<f64>,
    /// Windows that the clustering is fitted on, chosen by hash. Default: 256 per cluster.
    pub sample: Option<Count>,
    /// Rounds of k-means after the k-means++ start (1 to 1,000). Default 20 (CR).
    #[schemars(range(min = 1, max = 1_000))]
    pub iterations: Option<u32>,
}

/// How cluster histograms become importance weights `w_c = P(c|domain) / P(c|corpus)`. [PE 2.4]
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Weigh {
    /// Windows added to each cluster's count in a domain's histogram (0 or more). Off unless set.
    #[schemars(range(min = 0.0))]
    pub smoothing: Option<f64>,
    /// Weights become `w_c^(1/temperature)`: above 1 flatter, below 1 sharper (more than 0). Off unless set.
    pub temperature: Option<f64>,
    /// No window is drawn more often than this, on average over its cluster (more than 0). What a capped cluster
    /// cannot give is drawn from the others, and reported. Off unless set.
    pub max_epochs: Option<f64>,
}

/// How much text is drawn.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Resample {
    /// Tokens to draw per domain; met within one window.
    pub tokens: Count,
}

/// How draws become training shards.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// The tokenizer of the shards and of the models trained on them.
    #[serde(default)]
    pub tokenizer: Tokenizer,
    /// Tokens per shard file, about. Default 16M.
    #[serde(default = "shard_tokens")]
    pub shard_tokens: Count,
    /// What a folder of shards holds. Default `domain`.
    #[serde(default)]
    pub by: ShardBy,
}

/// What a folder of shards holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ShardBy {
    /// `resample.tokens` tokens that were drawn for one domain, in random order; a folder for each domain.
    #[default]
    Domain,
    /// The whole corpus once, cluster by cluster. A training draws the clusters in any proportions, so one folder serves every
    /// domain, a projected network and a mixture of models; `resample.tokens` only plans the table `weights`.
    Cluster,
}

/// A tokenizer that is given or trained. Default: trained with 8,192 entries.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tokenizer {
    /// Trains a byte-level BPE on a sample of the corpus.
    pub train: Option<TrainTokenizer>,
    /// A `tokenizer.json` to use as it is.
    pub path: Option<PathBuf>,
}

/// The training of a byte-level BPE tokenizer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainTokenizer {
    /// Entries of the vocabulary, bytes and the end-of-text token included (260 to 1,000,000).
    #[schemars(range(min = 260, max = 1_000_000))]
    pub vocab: u32,
}

/// The models to pretrain on the shards.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// A preset: `slm-400k`, `slm-600k`, `slm-1m`, `slm-3m`, `slm-5m`, `slm-9m`, `slm-30m` or `slm-126m`.
    pub model: String,
    /// Tokens that a prediction can look back on, and the length of a training sequence (8 to 65,536). Default 1024.
    #[serde(default = "context")]
    #[schemars(range(min = 8, max = 65_536))]
    pub context: u32,
    /// Tokens of pretraining, the same for every method.
    pub tokens: Count,
    /// What to compare. Default: `slm`, `slm-is` and `slm-nopt`.
    #[serde(default = "default_methods")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    pub methods: Vec<Method>,
    /// Models of a method that differ in their seed only, which counts from the run's `seed`; such as `{slm: 3}`. Default 1 each. Of
    /// several levels, the first one is trained with every seed, and the others with the first seed.
    #[serde(default)]
    pub seeds: BTreeMap<Method, u32>,
    /// Levels of the cluster tree whose clusters `slm-is` draws by, a model for each, the main one first; 1 is below the root.
    /// Needs `shard.by: cluster`. Default: the leaves.
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    pub levels: Option<Vec<u32>>,
    /// What `slm-pn`, `lora-mix` and `slm-mix` are made of.
    #[serde(default)]
    pub experts: Experts,
    /// The preset of `llm`.
    pub llm: Option<String>,
    /// How the learning rate moves. Default `cosine`.
    #[serde(default)]
    pub schedule: Schedule,
    /// Numbers that are multiplied; weights and sums are `f32` always. Default `bf16`.
    #[serde(default)]
    pub precision: Precision,
}

/// What a projected network, a model with adapters and a mixture of models are made of: an expert for each cluster of a level.
/// [PE 2.5]
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// Levels of the cluster tree, a model of each method for each, the main one first. Default: the leaves.
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    pub levels: Option<Vec<u32>>,
    /// MLPs that the basis of a network holds in each layer (`h`; at least 1). Default: one more than experts.
    #[schemars(range(min = 1))]
    pub capacity: Option<u32>,
    /// How a network becomes one small model for a domain. Default: `top-cluster`, the paper's.
    #[serde(default = "default_choices")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    pub choices: Vec<Choice>,
}

/// Which expert, or which mixture of experts, a network projects to for a domain. [PE 2.5]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// The expert of the domain's most frequent cluster.
    TopCluster,
    /// The expert with the lowest loss on the domain's training documents (the first 256 KB), before fine-tuning.
    LowestLoss,
    /// The expert with the lowest loss on the held-out part of them after fine-tuning; fine-tunes all of them.
    BestTuned,
    /// All experts in the proportions of the domain's histogram.
    Mixture,
}

impl Choice {
    /// The name in YAML, JSON and tables.
    pub fn name(self) -> &'static str {
        match self {
            Choice::TopCluster => "top-cluster",
            Choice::LowestLoss => "lowest-loss",
            Choice::BestTuned => "best-tuned",
            Choice::Mixture => "mixture",
        }
    }
}

/// What a model is pretrained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// The unweighted corpus.
    Slm,
    /// The corpus resampled for the domain.
    SlmIs,
    /// The domain set only.
    SlmNopt,
    /// A projected network, which becomes one small model for each domain. Needs `shard.by: cluster`.
    SlmPn,
    /// A small model for each cluster; a domain takes that of its most frequent one. Needs `shard.by: cluster`.
    SlmMix,
    /// The unweighted corpus, and the last fifth (the decay of the schedule `wsd`) resampled for each domain. Needs
    /// `shard.by: cluster`.
    TrunkDecay,
    /// A larger model on the unweighted corpus; `train.llm` names it.
    Llm,
    /// The model of `slm`, fine-tuned on the domain and on the next-word distributions of the fine-tuned `llm`. Needs both.
    SlmD,
    /// The model of `slm` or `llm`, fine-tuned through low-rank adapters; `finetune.lora` says of which.
    Lora,
    /// A model with low-rank adapters for each cluster, as many numbers as a projected network of as many experts has. Needs
    /// `shard.by: cluster`.
    LoraMix,
    /// The corpus's windows that DSIR selects for the domain, by importance resampling on hashed n-grams (arXiv 2302.03169).
    Dsir,
}

impl Method {
    /// The name in YAML, JSON and tables.
    pub fn name(self) -> &'static str {
        match self {
            Method::Slm => "slm",
            Method::SlmIs => "slm-is",
            Method::SlmNopt => "slm-nopt",
            Method::SlmPn => "slm-pn",
            Method::SlmMix => "slm-mix",
            Method::TrunkDecay => "trunk-decay",
            Method::Llm => "llm",
            Method::SlmD => "slm-d",
            Method::Lora => "lora",
            Method::LoraMix => "lora-mix",
            Method::Dsir => "dsir",
        }
    }

    /// Whether it draws clusters from shards that were written by cluster.
    pub fn needs_clusters(self) -> bool {
        matches!(self, Method::SlmPn | Method::SlmMix | Method::LoraMix | Method::TrunkDecay)
    }
}

/// How the learning rate moves after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Half a cosine, down to a tenth.
    #[default]
    Cosine,
    /// Constant, then a linear decay over the last fifth.
    Wsd,
}

/// Numbers that matrix products multiply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// Rounded to 8 bits of mantissa: up to twice as fast where the processor multiplies them, and as fast elsewhere.
    #[default]
    Bf16,
    /// As they are.
    F32,
}

/// The fine-tuning on a domain set.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Finetune {
    /// At most this many tokens; stops early when the held-out loss no longer falls.
    pub tokens: Count,
    /// The peak learning rate, as a multiple of pretraining's (above 0). Default 1; the paper takes a third, after a long pretraining.
    #[serde(default = "learning_rate_multiplier")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub learning_rate_multiplier: f64,
    /// How `slm-d` learns from its teacher.
    #[serde(default)]
    pub distill: Distill,
    /// The adapters of `lora`.
    #[serde(default)]
    pub lora: Lora,
}

/// Low-rank adapters, trained in place of the model and merged into it at the end: `W + alpha / rank * B A`. (arXiv 2106.09685)
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Rows of `A` and columns of `B` (1 up to the width of the model). Default 8.
    #[serde(default = "lora_rank")]
    #[schemars(range(min = 1))]
    pub rank: u32,
    /// What `B A` is multiplied by, times the rank (above 0). Default: twice the rank.
    pub alpha: Option<f64>,
    /// The matrices of each block that have one, by their names in `transformers`. Default: all of them.
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    pub targets: Option<Vec<LoraTarget>>,
    /// The pretrained models that are adapted. Default: `slm`.
    #[serde(default = "lora_of")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    pub of: Vec<LoraBase>,
}

/// A matrix of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoraTarget {
    /// Queries.
    QProj,
    /// Keys.
    KProj,
    /// Values.
    VProj,
    /// The output of attention.
    OProj,
    /// The gate of the MLP; not in `slm-126m`, which has none.
    GateProj,
    /// The input of the MLP.
    UpProj,
    /// The output of the MLP.
    DownProj,
}

impl LoraTarget {
    /// The name in `transformers`.
    pub fn name(self) -> &'static str {
        match self {
            LoraTarget::QProj => "q_proj",
            LoraTarget::KProj => "k_proj",
            LoraTarget::VProj => "v_proj",
            LoraTarget::OProj => "o_proj",
            LoraTarget::GateProj => "gate_proj",
            LoraTarget::UpProj => "up_proj",
            LoraTarget::DownProj => "down_proj",
        }
    }
}

/// A pretrained model that adapters are trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LoraBase {
    /// The model of `slm`.
    Slm,
    /// The model of `llm`.
    Llm,
}

impl LoraBase {
    /// The method that pretrains it.
    pub fn method(self) -> Method {
        match self {
            LoraBase::Slm => Method::Slm,
            LoraBase::Llm => Method::Llm,
        }
    }
}

impl Default for Lora {
    fn default() -> Self {
        Lora { rank: lora_rank(), alpha: None, targets: None, of: lora_of() }
    }
}

/// How a student learns from a teacher's next-word distributions beside the documents. [PE 3]
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Distill {
    /// The share of the loss against the teacher's distributions (0 to 1). Default 0.5.
    #[serde(default = "distill_weight")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub weight: f64,
    /// What logits are divided by before distributions are compared (0.1 to 100). Default 1.
    #[serde(default = "distill_temperature")]
    #[schemars(range(min = 0.1, max = 100.0))]
    pub temperature: f64,
}

impl Default for Distill {
    fn default() -> Self {
        Distill { weight: distill_weight(), temperature: distill_temperature() }
    }
}

fn text_column() -> String {
    "text".into()
}
fn max_reject_share() -> f64 {
    0.01
}
fn window_bytes() -> u32 {
    4096
}
/// The value of `embed.model` for a table that the run learns from the corpus.
pub const LEARNT: &str = "learnt";

fn static_model() -> String {
    "static".into()
}
fn shard_tokens() -> Count {
    Count(16_000_000)
}
fn context() -> u32 {
    1024
}
fn lora_rank() -> u32 {
    8
}
fn lora_of() -> Vec<LoraBase> {
    vec![LoraBase::Slm]
}
fn distill_weight() -> f64 {
    0.5
}
fn distill_temperature() -> f64 {
    1.0
}
fn learning_rate_multiplier() -> f64 {
    1.0
}
fn default_choices() -> Vec<Choice> {
    vec![Choice::TopCluster]
}
fn default_methods() -> Vec<Method> {
    vec![Method::Slm, Method::SlmIs, Method::SlmNopt]
}

impl Train {
    /// Models of a method that differ in their seed.
    pub fn seeds(&self, method: Method) -> u32 {
        self.seeds.get(&method).copied().unwrap_or(1)
    }
}

impl Default for Experts {
    fn default() -> Self {
        Experts { levels: None, capacity: None, choices: default_choices() }
    }
}

impl Default for Windows {
    fn default() -> Self {
        Windows { bytes: window_bytes() }
    }
}

impl Default for Embed {
    fn default() -> Self {
        Embed { model: static_model(), precision: Precision::default() }
    }
}

impl Default for Shard {
    fn default() -> Self {
        Shard { tokenizer: Tokenizer::default(), shard_tokens: shard_tokens(), by: ShardBy::default() }
    }
}

impl Cluster {
    /// Children per node, from root to leaves: one level for flat k-means.
    pub fn levels(&self) -> Vec<u32> {
        self.levels.clone().unwrap_or_else(|| vec![self.k.unwrap_or(1024)])
    }

    /// Number of leaves.
    pub fn leaves(&self) -> u64 {
        self.levels().iter().fold(1, |product, &n| u64::saturating_mul(product, u64::from(n)))
    }

    /// The multiple of the uniform share above which a cluster is split, if any.
    pub fn balance(&self) -> Option<f64> {
        self.balance.or(self.levels.is_some().then_some(1.5))
    }

    /// Windows that the clustering is fitted on.
    pub fn sample(&self) -> u64 {
        self.sample.map_or(self.leaves().saturating_mul(256), |c| c.0)
    }

    /// Rounds of k-means.
    pub fn iterations(&self) -> u32 {
        self.iterations.unwrap_or(20)
    }
}

impl Tokenizer {
    /// Entries of the vocabulary when it is trained.
    pub fn vocab(&self) -> u32 {
        self.train.as_ref().map_or(8192, |t| t.vocab)
    }
}
