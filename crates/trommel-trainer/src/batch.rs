//! Sequences of tokens, packed without padding.
//!
//! Windows and documents are laid end to end, each preceded by the end-of-text token, which so serves as the start token
//! of what follows and as the last target of what came before. The stream is cut every `time` tokens. A document that is
//! cut goes on in the next sequence, without sight of its first part. Every token is a target exactly once.
//!
//! ```text
//!   stream    <end> a b c <end> d e f g <end> ...
//!   tokens    <end> a b c <end> d  |  e f g <end> ...
//!   targets     a b c <end> d e    |  f g <end> ...
//!   starts      0 0 0 0   4 4      |  0 0 0 3 ...
//! ```

use serde::{Deserialize, Serialize};
use trommel_core::error::Result;
use trommel_kernels::cross_entropy::IGNORED;

/// Sequences of equal length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Tokens per sequence.
    pub time: usize,
    /// What the model reads, (sequences, time).
    pub tokens: Vec<u32>,
    /// What it should predict at each position, or [`IGNORED`]; (sequences, time).
    pub targets: Vec<u32>,
    /// Where the document of each position begins within its sequence, (sequences, time).
    pub starts: Vec<u32>,
}

impl Batch {
    /// No sequences yet, of `time` tokens each.
    pub fn new(time: usize) -> Self {
        Batch { time, ..Batch::default() }
    }

    /// Sequences.
    pub fn sequences(&self) -> usize {
        self.tokens.len() / self.time
    }

    /// The same sequences, at most `sequences` of them at a time.
    pub fn parts(&self, sequences: usize) -> impl Iterator<Item = Batch> {
        let step = sequences.max(1) * self.time;
        let rows = self.tokens.chunks(step).zip(self.targets.chunks(step)).zip(self.starts.chunks(step));
        rows.map(|((tokens, targets), starts)| Batch {
            time: self.time,
            tokens: tokens.to_vec(),
            targets: targets.to_vec(),
            starts: starts.to_vec(),
        })
    }

    /// Adds the sequences of another batch, of equal length.
    pub fn append(&mut self, other: Batch) {
        assert_eq!(self.time, other.time);
        self.tokens.extend(other.tokens);
        self.targets.extend(other.targets);
        self.starts.extend(other.starts);
    }

    /// Positions that have a target.
    pub fn targets_len(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORED).count()
    }

    /// Adds the sequence that reads `previous` and all but the last of `next`, and predicts `next`, which has `time` tokens.
    pub fn push(&mut self, previous: u32, next: &[u32], end_of_text: u32) {
        assert_eq!(next.len(), self.time);
        let mut start = 0;
        let tokens = std::iter::once(previous).chain(next[..self.time - 1].iter().copied());
        for (position, token) in tokens.enumerate() {
            if token == end_of_text {
                start = position as u32;
            }
            self.tokens.push(token);
            self.starts.push(start);
        }
        self.targets.extend_from_slice(next);
    }
}

/// An endless stream of sequences that can go to any of its places.
pub trait Source {
    /// A place in the stream.
    type Position: Clone;

    /// The place of the next sequence.
    fn position(&self) -> Self::Position;

    /// Goes to a place that [`Source::position`] returned.
    fn seek(&mut self, position: Self::Position) -> Result<()>;

    /// Adds the next sequence to `batch`.
    fn next_sequence(&mut self, batch: &mut Batch) -> Result<()>;
}

/// Sequences that are dealt at a time.
const BLOCK: usize = 64;
/// Piles that they are dealt from.
const PILES: usize = 8;

/// Deals the sequences of a source like cards, so that those of one step come from different documents.
///
/// A window of the corpus fills several sequences, and a step of neighbours would see little else. `BLOCK` sequences are
/// read at a time and laid out as `PILES` piles of neighbours; then one is taken from each pile in turn.
#[derive(Debug)]
pub struct Dealer<S: Source> {
    source: S,
    time: usize,
    start: S::Position,
    block: Batch,
    dealt: usize,
}

/// A place in the order of a [`Dealer`]: where its block begins in the source, and how many sequences of it were dealt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dealt<P> {
    /// The block's first sequence.
    pub start: P,
    /// Sequences of the block that were dealt.
    pub dealt: usize,
}

impl<S: Source> Dealer<S> {
    /// Deals sequences of `time` tokens from where `source` stands.
    pub fn new(source: S, time: usize) -> Self {
        Dealer { start: source.position(), source, time, block: Batch::new(time), dealt: 0 }
    }

    /// What is dealt from; it has read to the end of the block.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// The place of the next sequence.
    pub fn position(&self) -> Dealt<S::Position> {
        Dealt { start: self.start.clone(), dealt: self.dealt }
    }

    /// Goes to a place that [`Dealer::position`] returned.
    pub fn seek(&mut self, position: Dealt<S::Position>) -> Result<()> {
        self.source.seek(position.start.clone())?;
        (self.start, self.dealt) = (position.start, position.dealt);
        self.block = Batch::new(self.time);
        Ok(())
    }

    /// The next `sequences` sequences.
    pub fn deal(&mut self, sequences: usize) -> Result<Batch> {
        let mut batch = Batch::new(self.time);
        for _ in 0..sequences {
            if self.block.tokens.is_empty() {
                self.read_block()?;
            }
            if self.dealt == BLOCK {
                (self.start, self.dealt) = (self.source.position(), 0);
                self.read_block()?;
            }
            let place = self.dealt % PILES * (BLOCK / PILES) + self.dealt / PILES;
            let at = place * self.time..(place + 1) * self.time;
            batch.tokens.extend_from_slice(&self.block.tokens[at.clone()]);
            batch.targets.extend_from_slice(&self.block.targets[at.clone()]);
            batch.starts.extend_from_slice(&self.block.starts[at]);
            self.dealt += 1;
        }
        Ok(batch)
    }

    fn read_block(&mut self) -> Result<()> {
        self.block = Batch::new(self.time);
        (0..BLOCK).try_for_each(|_| self.source.next_sequence(&mut self.block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts.
    struct Numbers(u32);

    impl Source for Numbers {
        type Position = u32;

        fn position(&self) -> u32 {
            self.0
        }

        fn seek(&mut self, position: u32) -> Result<()> {
            self.0 = position;
            Ok(())
        }

        fn next_sequence(&mut self, batch: &mut Batch) -> Result<()> {
            batch.push(self.0, &[self.0 + 1, self.0 + 2], u32::MAX);
            self.0 += 2;
            Ok(())
        }
    }

    #[test]
    fn every_sequence_is_dealt_once_and_any_place_resumes() {
        let mut dealer = Dealer::new(Numbers(0), 2);
        let mut seen = Vec::new();
        for _ in 0..3 * BLOCK {
            let mut resumed = Dealer::new(Numbers(9), 2);
            resumed.seek(dealer.position()).unwrap();
            let batch = dealer.deal(1).unwrap();
            assert_eq!(resumed.deal(1).unwrap(), batch);
            seen.extend(batch.tokens);
        }
        assert_eq!(seen[..6], [0, 1, 16, 17, 32, 33]);
        seen.sort_unstable();
        assert_eq!(seen, (0..6 * BLOCK as u32).collect::<Vec<_>>());
    }

    #[test]
    fn the_figure_holds() {
        let stream = [9, 1, 2, 3, 9, 4, 5, 6, 7, 9, 8, 8, 8];
        let mut batch = Batch::new(6);
        batch.push(stream[0], &stream[1..7], 9);
        batch.push(stream[6], &stream[7..13], 9);
        assert_eq!(batch.tokens, stream[..12]);
        assert_eq!(batch.targets, stream[1..13]);
        assert_eq!(batch.starts, [0, 0, 0, 0, 4, 4, 0, 0, 0, 3, 3, 3]);
        assert_eq!((batch.sequences(), batch.targets_len()), (2, 12));
    }
}
