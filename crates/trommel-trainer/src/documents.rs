//! Documents of a domain, tokenized in memory: a stream to fine-tune on, and rows to evaluate on.

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::seed::Stream;
use trommel_kernels::cross_entropy::IGNORED;

use crate::batch::{Batch, Source};

/// The tokens of each document, without special tokens.
pub fn tokenize(tokenizer: &Tokenizer, documents: &[String]) -> Result<Vec<Vec<u32>>> {
    use rayon::prelude::*;
    let encode = |text: &String| tokenizer.encode_fast(text.as_str(), false).map(|encoding| encoding.get_ids().to_vec());
    documents
        .par_iter()
        .map(encode)
        .collect::<Result<_, _>>()
        .map_err(|e| Error::data("a document cannot be tokenized").source(e))
}

/// Refuses a token that a model with `vocab` of them does not have.
pub fn check_tokens<'a>(mut tokens: impl Iterator<Item = &'a u32>, vocab: usize) -> Result<()> {
    let Some(token) = tokens.find(|token| **token as usize >= vocab) else { return Ok(()) };
    let message = format!("the tokenizer makes token {token}, and the model has only {vocab}");
    Err(Error::data(message).hint("the tokenizer does not belong to this model"))
}

/// A place in the stream of [`Documents`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// How many times all documents were read.
    pub epoch: u64,
    /// The next document's place in the order of the epoch.
    pub document: usize,
    /// The next token in that document; its length stands for its end-of-text token.
    pub offset: usize,
    /// The token before the next one.
    pub previous: u32,
}

/// The endless stream of a set of documents, each followed by the end-of-text token; every epoch has an order of its own.
#[derive(Debug)]
pub struct Documents {
    tokens: Vec<Vec<u32>>,
    end_of_text: u32,
    shuffle: Stream,
    order: Vec<usize>,
    position: Position,
}

impl Source for Documents {
    type Position = Position;

    fn position(&self) -> Position {
        self.position
    }

    fn seek(&mut self, position: Position) -> Result<()> {
        self.position = position;
        self.shuffle();
        Ok(())
    }

    fn next_sequence(&mut self, batch: &mut Batch) -> Result<()> {
        let previous = self.position.previous;
        let mut next = Vec::with_capacity(batch.time);
        while next.len() < batch.time {
            let tokens = &self.tokens[self.order[self.position.document]];
            let rest = &tokens[self.position.offset..];
            let part = &rest[..rest.len().min(batch.time - next.len())];
            next.extend_from_slice(part);
            self.position.offset += part.len();
            if next.len() < batch.time {
                next.push(self.end_of_text);
                self.position.offset = 0;
                self.position.document += 1;
                if self.position.document == self.tokens.len() {
                    self.position.document = 0;
                    self.position.epoch += 1;
                    self.shuffle();
                }
            }
        }
        self.position.previous = next[batch.time - 1];
        batch.push(previous, &next, self.end_of_text);
        Ok(())
    }
}

impl Documents {
    /// The stream of `tokens`, one vector per document. The order of an epoch is by the hash of seed, epoch and content, so
    /// it does not depend on the order in which the documents are given, apart from equal ones.
    pub fn new(tokens: Vec<Vec<u32>>, end_of_text: u32, seed: u64) -> Result<Documents> {
        if tokens.iter().all(Vec::is_empty) {
            return Err(Error::data("there are no documents to train on").hint("check the domain's `train` files"));
        }
        let position = Position { epoch: 0, document: 0, offset: 0, previous: end_of_text };
        let shuffle = Stream::new(seed, "finetune.shuffle");
        let mut documents = Documents { tokens, end_of_text, shuffle, order: Vec::new(), position };
        documents.shuffle();
        Ok(documents)
    }

    /// Tokens of one epoch, end-of-text tokens included.
    pub fn epoch_tokens(&self) -> u64 {
        self.tokens.iter().map(|tokens| tokens.len() as u64 + 1).sum()
    }

    fn shuffle(&mut self) {
        let epoch = self.position.epoch.to_le_bytes();
        let rank = |document: &usize| {
            let content: Vec<u8> = self.tokens[*document].iter().flat_map(|token| token.to_le_bytes()).collect();
            self.shuffle.bits(&[epoch.as_slice(), &Key::of_bytes(&content).0.to_le_bytes()].concat())
        };
        let mut order: Vec<usize> = (0..self.tokens.len()).collect();
        order.sort_by_cached_key(rank);
        self.order = order;
    }
}

/// Rows that score every token of each document once, and the document that each position belongs to.
///
/// A document is read as `<end> t1 .. t(n-1)` and predicts `t1 .. tn`; the end-of-text token that follows it in training is
/// not scored. What is longer than `time` is cut into consecutive sequences, the first of which is full; the first token of
/// a further sequence is predicted from the one token before it. Pieces share a row where they fit, apart by the mask, so a
/// score does not depend on the neighbours.
pub fn scoring_rows(tokens: &[Vec<u32>], end_of_text: u32, time: usize) -> (Batch, Vec<Option<usize>>) {
    let mut batch = Batch::new(time);
    let mut owners = Vec::new();
    let fill = |batch: &mut Batch, owners: &mut Vec<Option<usize>>| {
        while !batch.tokens.len().is_multiple_of(time) {
            let position = (batch.tokens.len() % time) as u32;
            batch.tokens.push(end_of_text);
            batch.targets.push(IGNORED);
            batch.starts.push(position);
            owners.push(None);
        }
    };
    for (document, tokens) in tokens.iter().enumerate() {
        let mut previous = end_of_text;
        for piece in tokens.chunks(time) {
            if batch.tokens.len() % time + piece.len() > time {
                fill(&mut batch, &mut owners);
            }
            let start = (batch.tokens.len() % time) as u32;
            for token in piece {
                batch.tokens.push(previous);
                batch.targets.push(*token);
                batch.starts.push(start);
                owners.push(Some(document));
                previous = *token;
            }
        }
    }
    fill(&mut batch, &mut owners);
    (batch, owners)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents() -> Vec<Vec<u32>> {
        vec![vec![1, 2, 3], vec![4], vec![5, 6, 7, 8, 9, 10, 11], vec![]]
    }

    #[test]
    fn every_epoch_holds_every_token_in_an_order_of_its_own() {
        let mut stream = Documents::new(documents(), 0, 3).unwrap();
        assert_eq!(stream.epoch_tokens(), 15);
        let mut orders = Vec::new();
        for epoch in 0..4 {
            let mut batch = Batch::new(15);
            stream.next_sequence(&mut batch).unwrap();
            let mut sorted = batch.targets.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], "epoch {epoch}");
            orders.push(batch.targets);
        }
        assert!(orders.windows(2).any(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn the_order_does_not_depend_on_how_documents_are_given() {
        let mut reversed = documents();
        reversed.reverse();
        let read = |documents| {
            let (mut stream, mut batch) = (Documents::new(documents, 0, 3).unwrap(), Batch::new(7));
            (0..5).for_each(|_| stream.next_sequence(&mut batch).unwrap());
            batch
        };
        assert_eq!(read(documents()), read(reversed));
    }

    #[test]
    fn a_place_resumes() {
        let mut stream = Documents::new(documents(), 0, 3).unwrap();
        for _ in 0..20 {
            let mut resumed = Documents::new(documents(), 0, 3).unwrap();
            resumed.seek(stream.position()).unwrap();
            let (mut a, mut b) = (Batch::new(4), Batch::new(4));
            stream.next_sequence(&mut a).unwrap();
            resumed.next_sequence(&mut b).unwrap();
            assert_eq!(a, b);
        }
    }

    #[test]
    fn scoring_rows_hold_each_token_once() {
        let (batch, owners) = scoring_rows(&documents(), 0, 4);
        assert_eq!(batch.targets, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, IGNORED]);
        assert_eq!(batch.tokens, [0, 1, 2, 0, 0, 5, 6, 7, 8, 9, 10, 0]);
        assert_eq!(batch.starts, [0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 3]);
        assert_eq!(owners[3..5], [Some(1), Some(2)]);
        assert_eq!((owners[11], owners.len()), (None, 12));
    }
}
