//! WordPiece for words of plain ASCII, which most words of English text are: a piece is at most 16 bytes, so it is a number,
//! and a vocabulary is a map from numbers to ids.
//!
//! The `tokenizers` crate stays the reference and takes every other word: it is some thirty times slower, because it keeps
//! offsets, alignments and strings that nobody asks for here.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use tokenizers::{ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

/// Bytes of the longest word and piece that are taken.
const LONGEST: usize = 16;

/// Ids of pieces; a piece is its bytes as a little-endian number, with zeros above.
type Pieces = HashMap<u128, u32, BuildHasherDefault<Fold>>;

/// What WordPiece needs of a BERT tokenizer, for words of plain ASCII.
pub(crate) struct WordPiece {
    /// Pieces that begin a word.
    first: Pieces,
    /// Pieces that continue one, without their prefix.
    later: Pieces,
    unknown: u32,
    /// What each byte becomes: a letter its lower case if the tokenizer asks for that.
    folded: [u8; 256],
}

/// Whether a text's tokens are those of its words, one after the other: BERT's normalizer looks at single characters, its
/// pre-tokenizer splits at white space, and there is no added token that could span two words.
pub(crate) fn is_separable(tokenizer: &Tokenizer) -> bool {
    matches!(tokenizer.get_normalizer(), Some(NormalizerWrapper::BertNormalizer(_)))
        && matches!(tokenizer.get_pre_tokenizer(), Some(PreTokenizerWrapper::BertPreTokenizer(_)))
        && tokenizer.get_added_tokens_decoder().is_empty()
}

impl WordPiece {
    /// The pieces of `tokenizer`, or `None` if it is not BERT's.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let (Some(NormalizerWrapper::BertNormalizer(normalizer)), ModelWrapper::WordPiece(model)) =
            (tokenizer.get_normalizer(), tokenizer.get_model())
        else {
            return None;
        };
        if !is_separable(tokenizer) || model.max_input_chars_per_word < LONGEST {
            return None;
        }
        let mut folded: [u8; 256] = std::array::from_fn(|byte| byte as u8);
        if normalizer.lowercase {
            folded.make_ascii_lowercase();
        }
        let (mut first, mut later) = (Pieces::default(), Pieces::default());
        for (piece, id) in tokenizer.get_vocab(false) {
            // A word can be spelled like a prefixed piece, so that one belongs to both.
            if let Some(rest) = piece.strip_prefix(&model.continuing_subword_prefix).and_then(number) {
                later.insert(rest, id);
            }
            if let Some(piece) = number(&piece) {
                first.insert(piece, id);
            }
        }
        Some(WordPiece { first, later, unknown: tokenizer.token_to_id(&model.unk_token)?, folded })
    }

    /// Appends the ids of `word`, which has no white space, or returns false: then it has to go to the tokenizer.
    pub(crate) fn encode(&self, word: &[u8], ids: &mut Vec<u32>) -> bool {
        let start = ids.len();
        let mut rest = word;
        while let Some(byte) = rest.first() {
            if byte.is_ascii_punctuation() {
                ids.push(self.first.get(&u128::from(*byte)).copied().unwrap_or(self.unknown));
                rest = &rest[1..];
                continue;
            }
            let mut bytes = [0; LONGEST];
            let mut len = 0;
            while let Some(byte) = rest.get(len).filter(|byte| byte.is_ascii_alphanumeric()) {
                if len == LONGEST {
                    ids.truncate(start);
                    return false;
                }
                bytes[len] = self.folded[usize::from(*byte)];
                len += 1;
            }
            if len == 0 {
                // Neither letter, digit nor punctuation of ASCII.
                ids.truncate(start);
                return false;
            }
            self.pieces(u128::from_le_bytes(bytes), len, ids);
            rest = &rest[len..];
        }
        true
    }

    /// Appends the longest piece that begins the word, then the longest that continues it, and so on; or the unknown token,
    /// if no piece does. [Wu et al., arXiv 1609.08144]
    fn pieces(&self, mut word: u128, mut len: usize, ids: &mut Vec<u32>) {
        let start = ids.len();
        let mut pieces = &self.first;
        while len > 0 {
            let found = (1..=len).rev().find_map(|n| Some((n, *pieces.get(&(word & (u128::MAX >> (128 - 8 * n))))?)));
            let Some((n, id)) = found else {
                ids.truncate(start);
                ids.push(self.unknown);
                return;
            };
            ids.push(id);
            len -= n;
            word = word.checked_shr(8 * n as u32).unwrap_or(0);
            pieces = &self.later;
        }
    }
}

/// A piece as a number, unless it is too long to meet one of our words, or has a zero byte, which would end it.
fn number(piece: &str) -> Option<u128> {
    if piece.contains('\0') {
        return None;
    }
    let mut bytes = [0; LONGEST];
    bytes.get_mut(..piece.len())?.copy_from_slice(piece.as_bytes());
    Some(u128::from_le_bytes(bytes))
}

/// Hashes one number by a wide product, of which both halves are used.
#[derive(Default)]
struct Fold(u64);

impl Hasher for Fold {
    fn write(&mut self, _: &[u8]) {
        unreachable!("only numbers are hashed");
    }

    fn write_u128(&mut self, number: u128) {
        let mixed = number as u64 ^ ((number >> 64) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let product = u128::from(mixed) * 0xA076_1D64_78BD_642F;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_folder::parse_tokenizer;

    #[test]
    fn words_have_the_tokens_of_the_reference() {
        let tokenizer = parse_tokenizer(include_bytes!("../../../data/models/static/tokenizer.json")).unwrap();
        let fast = WordPiece::of(&tokenizer).unwrap();
        let windows = include_str!("../tests/fixtures/windows.jsonl");
        let odd = "The QUICK un-believ-able [UNK] ##ing #x a##b zzzzqqqq x1y2z3 1234567890123456 abcdefghijklmnop \
                   abcdefghijklmnopq ~`|{}^ --- $1,234.56 caf\u{e9} na\u{ef}ve \u{4e00} a\u{0}b tab\u{b}bed \u{7f} \u{1b}[0m";
        let (mut taken, mut all) = (0, 0);
        for word in windows.split_ascii_whitespace().chain(odd.split([' ', '\n'])).filter(|word| !word.is_empty()) {
            let mut ids = vec![7];
            all += 1;
            if fast.encode(word.as_bytes(), &mut ids) {
                taken += 1;
                assert_eq!(ids[1..], *tokenizer.encode_fast(word, false).unwrap().get_ids(), "{word}");
            } else {
                assert_eq!(ids, [7], "{word}");
            }
        }
        assert!(taken * 10 > all * 9, "{taken} of {all}");
    }
}
