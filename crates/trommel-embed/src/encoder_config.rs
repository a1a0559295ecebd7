//! What a sentence-transformers folder says about its model, checked against what we can run.
//!
//! Only what changes the numbers is read. A setting that we do not follow is an error and never ignored, because vectors
//! that are slightly wrong look like vectors that are right.

use serde::Deserialize;
use serde_json::Value;
use trommel_core::error::{Error, Result};

use crate::model_folder::ModelFolder;

/// `config.json`: the encoder's sizes, named as there.
#[derive(Debug, Deserialize)]
pub(crate) struct BertConfig {
    hidden_act: String,
    #[serde(default)]
    position_embedding_type: Option<String>,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) num_hidden_layers: usize,
    pub(crate) max_position_embeddings: usize,
    pub(crate) type_vocab_size: usize,
    pub(crate) vocab_size: usize,
    pub(crate) layer_norm_eps: f64,
}

/// The part of `config.json` that every model has; read first, so that another architecture is named as such rather
/// than by the first BERT setting that it lacks.
#[derive(Deserialize)]
struct Architecture {
    #[serde(default)]
    model_type: String,
    #[serde(default)]
    architectures: Vec<String>,
}

const CONFIG: &str = "config.json";
const ARCHITECTURE_HINT: &str = "only BERT encoders are supported: `model_type` `bert`, `architectures` [`BertModel`], such as \
     `sentence-transformers/all-MiniLM-L6-v2`";

impl BertConfig {
    /// Reads and checks `config.json`.
    pub(crate) fn read(folder: &mut ModelFolder) -> Result<Self> {
        let value: Value = folder.read_json(CONFIG)?;
        let path = folder.file(CONFIG);
        let damaged =
            |e: serde_json::Error| Error::data("the model's configuration is incomplete").file(path.display()).source(e);
        let Architecture { model_type, architectures } = Architecture::deserialize(&value).map_err(damaged)?;
        if model_type != "bert" || architectures.iter().any(|a| !a.starts_with("Bert")) {
            let found = format!("`model_type` `{model_type}`, `architectures` [{}]", architectures.join(", "));
            return Err(Error::config(format!("the model is no BERT encoder: {found}"))
                .file(path.display())
                .hint(ARCHITECTURE_HINT));
        }
        let config = BertConfig::deserialize(&value).map_err(damaged)?;
        config.check().map_err(|e| e.file(path.display()).hint(ARCHITECTURE_HINT))?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        // In `transformers`, `gelu` is the exact one, with the error function; `gelu_new` is the tanh approximation.
        if self.hidden_act != "gelu" {
            return Err(Error::config(format!("`hidden_act` is `{}`, supported is `gelu`", self.hidden_act)));
        }
        if let Some(kind) = self.position_embedding_type.as_deref().filter(|kind| *kind != "absolute") {
            return Err(Error::config(format!("`position_embedding_type` is `{kind}`, supported is `absolute`")));
        }
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
            ("vocab_size", self.vocab_size),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::config(format!("`{name}` is 0")));
        }
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if !hidden.is_multiple_of(heads) {
            return Err(Error::config(format!("`hidden_size` {hidden} is not a multiple of `num_attention_heads` {heads}")));
        }
        if !(hidden / heads).is_multiple_of(2) {
            let message =
                format!("`hidden_size` {hidden} / `num_attention_heads` {heads} is odd, supported are heads of even size");
            return Err(Error::config(message));
        }
        Ok(())
    }
}

/// `sentence_bert_config.json`: how texts are prepared.
#[derive(Debug, Deserialize)]
pub(crate) struct TextConfig {
    /// Tokens of a text, with `[CLS]` and `[SEP]`; the rest of a longer text is not read.
    pub(crate) max_seq_length: usize,
    /// Whether texts are lower-cased before the tokenizer sees them.
    #[serde(default)]
    pub(crate) do_lower_case: bool,
}

impl TextConfig {
    /// Reads `sentence_bert_config.json`. `positions` is what the encoder has been trained for.
    pub(crate) fn read(folder: &mut ModelFolder, positions: usize) -> Result<Self> {
        let name = "sentence_bert_config.json";
        let config: TextConfig = folder.read_json(name)?;
        let found = config.max_seq_length;
        if (3..=positions).contains(&found) {
            return Ok(config);
        }
        let message = format!("`max_seq_length` is {found}, possible is 3 to {positions}, the `max_position_embeddings`");
        Err(Error::config(message).file(folder.file(name).display()))
    }
}

/// One entry of `modules.json`.
#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

/// Checks that `modules.json` says Transformer, then mean Pooling, then at most Normalize.
pub(crate) fn check_modules(folder: &mut ModelFolder) -> Result<()> {
    let name = "modules.json";
    let modules: Vec<Module> = folder.read_json(name)?;
    // `sentence_transformers.models.Pooling`; newer releases have longer module paths with the same last word.
    let kinds: Vec<&str> = modules.iter().map(|m| m.kind.rsplit('.').next().unwrap_or_default()).collect();
    match kinds[..] {
        ["Transformer", "Pooling"] | ["Transformer", "Pooling", "Normalize"] => {
            check_pooling(folder, &format!("{}/config.json", modules[1].path))
        }
        _ => Err(Error::config(format!("the model's modules are {}", kinds.join(", ")))
            .file(folder.file(name).display())
            .hint("supported are Transformer, Pooling and an optional Normalize, in this order")),
    }
}

/// Checks that pooling is the mean over tokens and nothing else.
fn check_pooling(folder: &mut ModelFolder, name: &str) -> Result<()> {
    let config: serde_json::Map<String, Value> = folder.read_json(name)?;
    // Older releases write one flag per mode, newer ones the name of the mode.
    let flags = config.iter().filter(|(key, value)| key.starts_with("pooling_mode_") && **value == Value::Bool(true));
    let mut modes: Vec<&str> = flags.map(|(key, _)| key.trim_start_matches("pooling_mode_")).collect();
    modes.extend(config.get("pooling_mode").and_then(Value::as_str));
    modes.dedup();
    if !modes.is_empty() && modes.iter().all(|mode| matches!(*mode, "mean_tokens" | "mean")) {
        return Ok(());
    }
    let found = if modes.is_empty() { "none".to_string() } else { modes.join(", ") };
    Err(Error::config(format!("the pooling mode is `{found}`, supported is `mean_tokens` alone"))
        .file(folder.file(name).display())
        .hint("choose a model with mean pooling, such as `sentence-transformers/all-MiniLM-L6-v2`"))
}
