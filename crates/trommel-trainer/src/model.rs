//! The shape of the model: a Llama-like decoder, its presets, and what it costs.
//!
//! RMSNorm before each block, rotary positions, causal attention, an MLP with `SwiGLU` or `GELU`, no biases, and one
//! matrix that is both embedding and output layer. With `SwiGLU` this is `LlamaForCausalLM` of `transformers`; with `GELU`,
//! whose MLP has two matrices, it is `ArceeForCausalLM`. Both open an exported checkpoint without custom code.

use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};

/// The nonlinearity of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `silu(x G) * (x U)`, then `D`: three matrices. [Shazeer, arXiv 2002.05202]
    SwiGlu,
    /// `gelu(x U)`, then `D`: two matrices, in the tanh form.
    Gelu,
}

impl Activation {
    /// Rows of the packed input matrix per unit of the MLP: gate and up, or up alone.
    pub fn packed(self) -> usize {
        match self {
            Activation::SwiGlu => 2,
            Activation::Gelu => 1,
        }
    }
}

/// The shape of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Numbers per position.
    pub width: usize,
    /// Blocks of attention and MLP.
    pub layers: usize,
    /// Attention heads; they divide `width`, and `width / heads` is even.
    pub heads: usize,
    /// Units of the MLP.
    pub mlp: usize,
    /// Nonlinearity of the MLP.
    pub activation: Activation,
    /// The longest sequence, in tokens, that the model is meant for.
    pub context: usize,
    /// Base of the rotary angles; 10,000 in every preset. [Su et al., arXiv 2104.09864]
    pub rope_theta: f64,
    /// Added to the mean square before its root is taken; 1e-5 in every preset.
    pub norm_eps: f64,
    /// What makes it a projected network: many such models in one. `None` for a plain model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projection: Option<Projection>,
    /// Low-rank adapters beside some of its matrices. `None` for a plain model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<Adapters>,
}

/// Low-rank adapters: `W + scale * B A` in place of a matrix `W`. [Hu et al., arXiv 2106.09685]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapters {
    /// Experts, each with adapters of its own; 1 for fine-tuning.
    pub experts: usize,
    /// Rows of `A` and columns of `B`.
    pub rank: usize,
    /// `scale` is `alpha / rank`.
    pub alpha: f64,
    /// The matrices that have one, by their names in `transformers`, such as `q_proj`.
    pub targets: Vec<String>,
    /// Whether the model beside them stays as it begins.
    pub frozen: bool,
}

impl Adapters {
    /// Adapters of every MLP, one for each of `experts` experts, which train with the model that they share. The rank is
    /// `width mlp / (width + mlp)`, so that they hold as many numbers as the MLPs of a [`Projection`] of as many experts.
    pub fn of_experts(experts: usize, model: &Config) -> Self {
        let rank = (model.width * model.mlp / (model.width + model.mlp)).max(1);
        let mlp = MLP_MATRICES.iter().skip(usize::from(model.activation == Activation::Gelu));
        Adapters { experts, rank, alpha: rank as f64, targets: mlp.map(|name| name.to_string()).collect(), frozen: false }
    }

    /// Adapters to fine-tune `model` through. Unless they are given, `alpha` is twice the rank, and every matrix is a target.
    pub fn for_tuning(model: &Config, rank: usize, alpha: Option<f64>, targets: Option<Vec<String>>) -> Self {
        let all = || model.matrices().into_iter().map(str::to_owned).collect();
        let (alpha, targets) = (alpha.unwrap_or(2.0 * rank as f64), targets.unwrap_or_else(all));
        Adapters { experts: 1, rank, alpha, targets, frozen: true }
    }

    /// What `B A` is multiplied by.
    pub fn scale(&self) -> f32 {
        (self.alpha / self.rank as f64) as f32
    }
}

/// How a projected network makes the MLP of an expert. [PE 2.5]
///
/// In layer `l`, expert `i` has the coefficients `alpha_r = sum_q E[i,q] M^(l)[q,r]`, and its MLP is
/// `W = sum_r alpha_r T^(l)_r`: all three (or two) matrices as one vector, since they share the coefficients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Projection {
    /// Experts, one per cluster: `k`.
    pub experts: usize,
    /// Numbers of an expert's own vector `E_i`: `m`; `k` unless set.
    pub expert_size: usize,
    /// MLPs that the basis `T` holds in each layer: `h`.
    pub capacity: usize,
    /// Whether `E` and `M` stay as they begin: with `h = k` this is the hard mixture of MLPs.
    pub frozen: bool,
}

impl Projection {
    /// A network of `experts` experts: one MLP that all share, and one of its own for each.
    pub fn new(experts: usize) -> Self {
        Projection { experts, expert_size: experts, capacity: experts + 1, frozen: false }
    }

    /// `h = k, E_i = delta_i, M = I`, kept so: each expert has an MLP of its own and shares the rest. [PE 2.5]
    pub fn hard_mixture(experts: usize) -> Self {
        Projection { experts, expert_size: experts, capacity: experts, frozen: true }
    }

    /// What the learning rate of each MLP of the basis (h) is multiplied by in a step that sees `seen` of the experts: 1 for the first
    /// one, which all experts share, and for the others the root of the share of steps that they have a gradient in, about
    /// `seen / (h - 1)`.
    ///
    /// `AdamW` divides by the root of a mean of squares over steps. So where most steps have nothing to add, we expect one gradient to
    /// move a parameter `sqrt(steps per gradient)` times as far as where all steps add something. With `slm-400k`, 16 experts and 5M
    /// tokens in steps of two sequences (one seed), the network ended 0.057 nats per token below the plain model without these
    /// factors, and 0.074 with 0.3 in their place. The hard mixture does without, like separate models.
    pub(crate) fn rates(&self, seen: usize) -> Vec<f32> {
        let own = self.capacity.saturating_sub(1).max(1);
        let own_rate = if self.frozen { 1.0 } else { (seen as f32 / own as f32).min(1.0).sqrt() };
        (0..self.capacity).map(|r| if r == 0 { 1.0 } else { own_rate }).collect()
    }
}

/// The most experts, or MLPs in a basis.
const MIXED_MAX: usize = 65_536;
/// No model that fits a machine has more, and what is counted or laid out below stays far from overflow.
const MOST_PARAMETERS: f64 = 1e12;
/// The most positions and the most tokens in a vocabulary: memory is taken for each, whatever the text.
const CONTEXT_MAX: usize = 1 << 20;
const VOCAB_MAX: usize = 1 << 22;

/// The presets: name, width, layers, heads, mlp, activation, context.
///
/// At a vocabulary of 4,096 they have 0.4, 0.6, 1.1, 2.6, 4.3, 7.6, 27.8 and 92.3 million parameters; `slm-9m` has 8.7 million at a
/// vocabulary of 8,192. `slm-126m` is the paper's small model, with its vocabulary of 32,000. [PE 3]
const PRESETS: [(&str, usize, usize, usize, usize, Activation, usize); 8] = [
    ("slm-400k", 64, 2, 4, 256, Activation::SwiGlu, 1024),
    ("slm-600k", 96, 2, 4, 256, Activation::SwiGlu, 1024),
    ("slm-1m", 128, 3, 4, 352, Activation::SwiGlu, 1024),
    ("slm-3m", 192, 4, 6, 512, Activation::SwiGlu, 1024),
    ("slm-5m", 256, 4, 8, 704, Activation::SwiGlu, 1024),
    ("slm-9m", 256, 6, 8, 1088, Activation::SwiGlu, 1024),
    ("slm-30m", 512, 8, 8, 1408, Activation::SwiGlu, 1024),
    ("slm-126m", 1024, 7, 8, 4096, Activation::Gelu, 1024),
];

/// The names that [`preset`] knows, smallest model first.
pub fn preset_names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|preset| preset.0)
}

/// The preset `name` with a vocabulary of `vocab` tokens.
pub fn preset(name: &str, vocab: usize) -> Result<Config> {
    let Some(&(_, width, layers, heads, mlp, activation, context)) = PRESETS.iter().find(|preset| preset.0 == name) else {
        let nearest = preset_names().min_by_key(|known| distance(known, name)).unwrap_or("slm-3m");
        let known = preset_names().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        return Err(
            Error::config(format!("unknown model `{name}`; did you mean `{nearest}`?")).hint(format!("known models: {known}"))
        );
    };
    Ok(Config {
        vocab,
        width,
        layers,
        heads,
        mlp,
        activation,
        context,
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        projection: None,
        adapters: None,
    })
}

/// Characters to insert, delete or replace until two names are equal. [Levenshtein 1966]
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

impl Config {
    /// Numbers per attention head.
    pub fn head(&self) -> usize {
        self.width / self.heads
    }

    /// A [`Error::config`] unless the sizes fit together.
    pub fn check(&self) -> Result<()> {
        let sizes = [self.vocab, self.width, self.layers, self.heads, self.mlp, self.context];
        if sizes.contains(&0) {
            return Err(Error::config("a size of the model is zero"));
        }
        if !self.width.is_multiple_of(2 * self.heads) {
            let (width, heads) = (self.width, self.heads);
            return Err(Error::config(format!("a width of {width} does not split into {heads} heads of even size")));
        }
        if let Some(Projection { experts, expert_size, capacity, .. }) = self.projection {
            let sizes = [("experts", experts), ("numbers per expert", expert_size), ("MLPs in the basis", capacity)];
            if let Some((name, n)) = sizes.into_iter().find(|(_, n)| *n == 0 || *n > MIXED_MAX) {
                return Err(Error::config(format!("a projected network of {n} {name}")).hint(format!("use 1 to {MIXED_MAX}")));
            }
        }
        if let Some(adapters) = &self.adapters {
            self.check_adapters(adapters)?;
        }
        for (name, size, most) in [("vocabulary", self.vocab, VOCAB_MAX), ("context", self.context, CONTEXT_MAX)] {
            if size > most {
                return Err(Error::config(format!("a {name} of {size} tokens")).hint(format!("use at most {most}")));
            }
        }
        let [vocab, width, layers, _, mlp, _] = sizes.map(|size| size as f64);
        let mlps = self.projection.map_or(1.0, |projection| projection.capacity as f64);
        let adapters = self.adapters.as_ref().map_or(0.0, |a| a.experts as f64 * a.rank as f64 * a.targets.len() as f64);
        let parameters = vocab * width + layers * (width * (4.0 * width + 3.0 * mlp * mlps) + adapters * (width + mlp));
        if parameters > MOST_PARAMETERS {
            return Err(Error::config(format!("a model of {parameters:.0e} parameters is too large")));
        }
        Ok(())
    }

    fn check_adapters(&self, adapters: &Adapters) -> Result<()> {
        let Adapters { experts, rank, alpha, targets, .. } = adapters;
        if self.projection.is_some() {
            return Err(Error::config("a projected network has no adapters"));
        }
        if *experts == 0 || *experts > MIXED_MAX || *rank == 0 || *rank > self.width || !(*alpha > 0.0 && alpha.is_finite()) {
            let message = format!("adapters of {experts} experts, rank {rank} and alpha {alpha}");
            let hint = format!("use a rank of 1 to {}, and an alpha above 0", self.width);
            return Err(Error::config(message).hint(hint));
        }
        let known = self.matrices();
        if targets.is_empty() {
            return Err(Error::config("the adapters have no target").hint(format!("a block has {}", known.join(", "))));
        }
        match targets.iter().find(|target| !known.contains(&target.as_str())) {
            Some(target) => {
                let hint = format!("a block has {}", known.join(", "));
                Err(Error::config(format!("the model has no matrix `{target}` to adapt")).hint(hint))
            }
            None => Ok(()),
        }
    }

    /// The matrices of a block, by their names in `transformers`.
    fn matrices(&self) -> Vec<&'static str> {
        let all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        all.into_iter().filter(|name| self.activation == Activation::SwiGlu || *name != "gate_proj").collect()
    }

    /// A [`Error::config`] if this is many models, where one is needed, or one whose adapters are not merged yet.
    pub fn check_plain(&self) -> Result<()> {
        if self.adapters.as_ref().is_some_and(|adapters| adapters.frozen) {
            let error = Error::config("the adapters are not merged into the model, which happens when its fine-tuning ends");
            return Err(error.hint("run the command that began the fine-tuning again, and it finishes"));
        }
        if self.projection.is_some() || self.adapters.is_some() {
            let error = Error::config("a network of several experts is many models, and one is needed");
            return Err(error.hint("`trommel project` makes one of it"));
        }
        Ok(())
    }

    /// Models in this one: the experts of a projected network, or of adapters; 1 for a plain model.
    pub fn experts(&self) -> usize {
        self.projection.map(|p| p.experts).or(self.adapters.as_ref().map(|a| a.experts)).unwrap_or(1)
    }

    /// The small model that one expert projects to; the model itself if it is plain.
    pub fn plain(&self) -> Config {
        Config { projection: None, adapters: None, ..self.clone() }
    }

    /// Numbers in the matrices of one block's MLP.
    pub fn mlp_weights(&self) -> usize {
        (self.activation.packed() + 1) * self.width * self.mlp
    }

    /// Numbers in the weight matrices of one block.
    fn block_weights(&self) -> usize {
        4 * self.width * self.width + self.mlp_weights()
    }

    /// All parameters; the embedding, which is also the output layer, counts once.
    pub fn parameters(&self) -> usize {
        let plain = self.vocab * self.width + self.layers * (self.block_weights() + 2 * self.width) + self.width;
        if let Some(adapters) = &self.adapters {
            let (width, mlp) = (self.width, self.mlp);
            let sides = |name: &String| if MLP_MATRICES.contains(&name.as_str()) { width + mlp } else { 2 * width };
            return plain + self.layers * adapters.experts * adapters.rank * adapters.targets.iter().map(sides).sum::<usize>();
        }
        let Some(Projection { experts, expert_size, capacity, .. }) = self.projection else { return plain };
        let basis = self.layers * (capacity * self.mlp_weights() + expert_size * capacity);
        plain - self.layers * self.mlp_weights() + basis + experts * expert_size
    }

    /// Floating-point operations of the forward pass per token, at sequences of `context` tokens:
    /// `2 (block weights * layers + vocab * width) + 2 layers * width * (context + 1)`.
    ///
    /// A product of a row and a matrix costs two operations per number of the matrix. The last term is attention: a token
    /// meets `(context + 1) / 2` keys on average, with two operations for the score and two for the value, per number of
    /// width. Norms, activations and the embedding look-up are left out, as is usual, and so is what document borders save.
    pub fn forward_flops_per_token(&self, context: usize) -> f64 {
        let weights = self.block_weights() * self.layers + self.vocab * self.width;
        2.0 * weights as f64 + 2.0 * (self.layers * self.width) as f64 * (context as f64 + 1.0)
    }

    /// Operations of forward and backward pass per token: three times the forward pass, because each product has two
    /// gradients of its own size. [Kaplan et al., arXiv 2001.08361] What a network of experts adds to a step is in
    /// [`Config::network_flops_per_step`].
    pub fn training_flops_per_token(&self, context: usize) -> f64 {
        3.0 * self.forward_flops_per_token(context)
    }

    /// Operations that a network adds to a step in which all of its `k` experts train, whatever the tokens; zero for a plain model.
    ///
    /// A projected network mixes its experts, takes the gradient of their coefficients, and that of the basis, `2 k h` operations
    /// per number of an MLP each, and multiplies all pairs of the experts' gradients, `2 k^2`. Adapters are merged, and their two
    /// gradients taken, `2 rank` per number of an adapted matrix each. The optimizer is left out, as it is for plain models.
    pub fn network_flops_per_step(&self) -> f64 {
        let experts = self.experts() as f64;
        let per_layer = match (&self.projection, &self.adapters) {
            (Some(p), _) => 2.0 * experts * (3.0 * p.capacity as f64 + experts) * self.mlp_weights() as f64,
            (None, Some(a)) => {
                let numbers = |name: &String| if MLP_MATRICES.contains(&name.as_str()) { self.mlp } else { self.width };
                let adapted = self.width * a.targets.iter().map(numbers).sum::<usize>();
                6.0 * experts * a.rank as f64 * adapted as f64
            }
            (None, None) => 0.0,
        };
        self.layers as f64 * per_layer
    }
}

/// The matrices of an MLP, by their names in `transformers`.
const MLP_MATRICES: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_the_sizes_that_their_names_say() {
        for (name, vocab, millions) in [
            ("slm-400k", 4096, 0.4),
            ("slm-600k", 4096, 0.6),
            ("slm-1m", 4096, 1.1),
            ("slm-3m", 4096, 2.6),
            ("slm-5m", 8192, 5.3),
            ("slm-9m", 8192, 8.7),
            ("slm-30m", 8192, 29.9),
            ("slm-126m", 32_000, 120.9),
        ] {
            let config = preset(name, vocab).unwrap();
            config.check().unwrap();
            let rounded = (config.parameters() as f64 / 1e5).round() / 10.0;
            assert_eq!(rounded, millions, "{name}");
        }
    }

    #[test]
    fn what_few_steps_move_moves_slowly() {
        let network = Projection::new(16);
        for (seen, own) in [(1, 0.25), (4, 0.5), (16, 1.0)] {
            assert_eq!(network.rates(seen), [vec![1.0], vec![own; 16]].concat());
        }
        // Four MLPs beside the shared one serve sixteen experts, so any eight of them give each about two gradients.
        assert_eq!(Projection { capacity: 5, ..network }.rates(8), [1.0; 5]);
        assert_eq!(Projection { capacity: 1, ..network }.rates(1), [1.0]);
        assert_eq!(Projection::hard_mixture(16).rates(1), [1.0; 16]);
    }

    #[test]
    fn an_unknown_preset_names_the_nearest() {
        let error = preset("slm-3", 4096).unwrap_err();
        assert!(error.message().contains("`slm-3m`"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn flops_are_six_per_weight_and_token_plus_attention() {
        let config = preset("slm-3m", 4096).unwrap();
        let weights = (config.parameters() - 192 * 9) as f64;
        assert_eq!(config.training_flops_per_token(255), 6.0 * weights + 6.0 * (4 * 192) as f64 * 256.0);
    }

    #[test]
    fn a_network_costs_more_per_step() {
        let plain = preset("slm-3m", 4096).unwrap();
        assert_eq!(plain.network_flops_per_step(), 0.0);
        let network = Config { projection: Some(Projection::new(4)), ..plain.clone() };
        // Four layers; 4 experts, 5 MLPs in the basis.
        assert_eq!(network.network_flops_per_step(), 4.0 * 2.0 * 4.0 * (3.0 * 5.0 + 4.0) * plain.mlp_weights() as f64);
        let targets = vec!["q_proj".to_owned(), "up_proj".to_owned()];
        let adapters = Adapters { experts: 4, rank: 8, alpha: 8.0, targets, frozen: false };
        let adapted = Config { adapters: Some(adapters), ..plain };
        assert_eq!(adapted.network_flops_per_step(), 4.0 * 6.0 * 4.0 * 8.0 * (192.0 * 192.0 + 192.0 * 512.0));
    }

    #[test]
    fn what_is_not_one_model_says_why() {
        let plain = preset("slm-1m", 100).unwrap();
        let said = |config: Config| config.check_plain().unwrap_err().to_string();
        assert!(plain.check_plain().is_ok());
        let experts = Adapters::of_experts(4, &plain);
        assert!(said(Config { adapters: Some(experts), ..plain.clone() }).contains("a network of several experts"));
        let tuned = Adapters::for_tuning(&plain, 8, None, None);
        assert!(said(Config { adapters: Some(tuned), ..plain }).contains("not merged into the model"));
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        for config in
            [(5, 352), (0, 352), (4, usize::MAX)].map(|(heads, mlp)| Config { heads, mlp, ..preset("slm-1m", 100).unwrap() })
        {
            assert!(config.check().is_err(), "{config:?}");
        }
    }
}
