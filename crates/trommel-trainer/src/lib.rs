//! The trainer: a Llama-shaped decoder, its operations, its loop, its evaluation.

/// Sequences of tokens, packed without padding.
pub mod batch;
/// A model on disk, and the state of an unfinished run.
pub mod checkpoint;
/// Operations composed of candle's differentiable ones.
mod composed;
/// Where the trainer computes.
pub mod device;
/// Documents of a domain, tokenized in memory.
pub mod documents;
/// A model that can be trained: the same few verbs on every device.
pub mod engine;
/// How well a model predicts held-out documents.
pub mod evaluate;
/// A model in the formats that other programs open.
pub mod export;
/// Fine-tuning with early stop.
pub mod finetune;
/// The model on a GPU, by hand.
pub mod gpu;
/// Text from a model.
pub mod generate;
/// The stream of training tokens of a folder of shards.
pub mod loader;
/// Training sequences drawn from the clusters of a corpus.
pub mod mixture;
/// A model as one file for llama.cpp.
mod gguf;
/// A tokenizer as the metadata of that file.
mod gguf_tokenizer;
/// `config.json` of a model, in the words of `transformers`.
mod llama_config;
/// One line per training step.
pub mod log;
/// Low-rank adapters.
mod lora;
/// The shape of the model, its presets, and what it costs.
pub mod model;
/// The model on the CPU, by hand.
mod native;
/// The parameters as one flat buffer.
pub mod parameters;
/// Pretraining on shards.
pub mod pretrain;
/// The projected network.
pub mod projected;
/// How far apart the experts of a projected network have grown.
pub mod spectrum;
/// How a model is trained, as functions of model size and token budget.
pub mod recipe;
/// What a pretraining reads.
mod training_data;
/// The model on candle's tape.
pub mod tape;
/// The weights of a model as safetensors.
mod weights;
