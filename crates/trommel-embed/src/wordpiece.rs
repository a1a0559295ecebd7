//! WordPiece of a BERT tokenizer, for ids and nothing else.
//!
//! BERT's normalizer and pre-tokenizer look at one character at a time, but for some rare marks, so what they make of each is
//! asked for once and kept in a table. A piece of at most 16 bytes is a number, and a vocabulary is a map from numbers to ids.
//!
//! The `tokenizers` crate stays the reference: it says what becomes of a character, and takes words that have characters beyond
//! the table. It is some thirty times slower, because it keeps offsets, alignments and strings that nobody asks for here.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::OnceLock;

use tokenizers::{
    Model, ModelWrapper, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    PreTokenizerWrapper, Tokenizer,
};
use trommel_core::error::Result;

/// Bytes of the longest piece that is a number.
const NUMBER_BYTES: usize = 16;
/// Bytes at the head of a word by which the lengths of its pieces are looked up.
const HEAD_BYTES: usize = 3;
/// What ends a word, among letters.
const SPACE: u8 = b' ';
/// Characters of the table: those of the Basic Multilingual Plane.
const TABLE_CHARACTERS: usize = 1 << 16;

/// What WordPiece needs of a BERT tokenizer.
pub(crate) struct WordPiece {
    /// Pieces that begin a word.
    first: Pieces,
    /// Pieces that continue one, without their prefix.
    later: Pieces,
    unknown: u32,
    /// Characters of the longest word that is not unknown.
    longest_word: usize,
    /// The letter that a byte of ASCII becomes, [`SPACE`] if that is one, or zero.
    letters: [u8; 256],
    /// By code point; each is asked for when it is met.
    characters: Vec<OnceLock<Character>>,
}

/// What the normalizer and the pre-tokenizer make of a character, wherever it stands.
enum Character {
    Removed,
    Space,
    /// A part of a word, as it is spelled there.
    Part(Box<[u8]>),
    /// A word by itself, of these tokens.
    Word(Box<[u32]>),
    /// Something else, or it depends on the characters beside it.
    Other,
}

/// Whether a text's tokens are those of its words, one after the other: BERT's normalizer looks at single characters, its
/// pre-tokenizer splits at white space, and there is no added token that could span two words.
fn is_separable(tokenizer: &Tokenizer) -> bool {
    matches!(tokenizer.get_normalizer(), Some(NormalizerWrapper::BertNormalizer(_)))
        && matches!(tokenizer.get_pre_tokenizer(), Some(PreTokenizerWrapper::BertPreTokenizer(_)))
        && tokenizer.get_added_tokens_decoder().is_empty()
}

impl WordPiece {
    /// The pieces of `tokenizer`, or `None` if it is not BERT's.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let ModelWrapper::WordPiece(model) = tokenizer.get_model() else { return None };
        if !is_separable(tokenizer) {
            return None;
        }
        let (mut first, mut later) = (Pieces::new(), Pieces::new());
        for (piece, id) in tokenizer.get_vocab(false) {
            if let Some(rest) = piece.strip_prefix(&model.continuing_subword_prefix) {
                later.insert(rest.as_bytes(), id);
            }
            first.insert(piece.as_bytes(), id);
        }
        let letter = |byte: u8| match Character::of(tokenizer, char::from(byte)) {
            Character::Part(part) if byte.is_ascii() && part.len() == 1 => part[0],
            Character::Space if byte.is_ascii() => SPACE,
            _ => 0,
        };
        Some(WordPiece {
            first,
            later,
            unknown: tokenizer.token_to_id(&model.unk_token)?,
            longest_word: model.max_input_chars_per_word,
            letters: std::array::from_fn(|byte| letter(byte as u8)),
            characters: (0..TABLE_CHARACTERS).map(|_| OnceLock::new()).collect(),
        })
    }

    /// Appends the ids of `text`. Words with characters that are not in the table go to `other`. `tokenizer` is the one whose
    /// pieces these are.
    pub(crate) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        words: &mut Words,
        ids: &mut Vec<u32>,
        mut other: impl FnMut(&str, &mut Vec<u32>) -> Result<()>,
    ) -> Result<()> {
        words.clear();
        let mut rest = text;
        loop {
            rest = &rest[words.take(rest.as_bytes(), &self.letters)..];
            let mut characters = rest.chars();
            let Some(character) = characters.next() else { break };
            rest = characters.as_str();
            match self.character(tokenizer, character) {
                Character::Removed => {}
                Character::Part(part) => words.add(part),
                Character::Space => words.end(),
                Character::Word(tokens) => {
                    words.end();
                    words.tokens.extend(tokens.iter().map(|token| (words.count, *token)));
                }
                Character::Other => {
                    let is_border = |other| matches!(self.character(tokenizer, other), Character::Space | Character::Word(_));
                    let before = &text[..text.len() - rest.len() - character.len_utf8()];
                    let begins = before.len() - before.rsplit(is_border).next().map_or(0, str::len);
                    rest = &rest[rest.find(is_border).unwrap_or(rest.len())..];
                    words.filled = words.ended;
                    self.look_up(words, ids);
                    other(&text[begins..text.len() - rest.len()], ids)?;
                }
            }
        }
        words.end();
        self.look_up(words, ids);
        Ok(())
    }

    /// Appends the ids of `words` and clears them.
    fn look_up(&self, words: &mut Words, ids: &mut Vec<u32>) {
        let Words { letters, ends, count, tokens, whole, .. } = words;
        let starts = std::iter::once(&0).chain(&*ends);
        let parts = starts.zip(&ends[..*count]).map(|(start, end)| (&letters[*start..], end - start));
        // Most words are one piece. These are looked up first, without a condition to wait for: the processor then has several of
        // them on their way from memory.
        whole.clear();
        whole.extend(parts.clone().map(|(word, len)| self.first.whole(word, len).filter(|_| len <= self.longest_word)));
        let mut tokens = tokens.iter().peekable();
        for (before, ((word, len), whole)) in parts.zip(&*whole).enumerate() {
            while let Some((_, token)) = tokens.next_if(|(words, _)| *words == before) {
                ids.push(*token);
            }
            match whole {
                Some(id) => ids.push(*id),
                None => self.add_pieces(word, len, ids),
            }
        }
        ids.extend(tokens.map(|(_, token)| token));
        words.clear();
    }

    fn character(&self, tokenizer: &Tokenizer, character: char) -> &Character {
        let slot = self.characters.get(character as usize);
        slot.map_or(&Character::Other, |slot| slot.get_or_init(|| Character::of(tokenizer, character)))
    }

    /// Appends the longest piece that begins the word of `len` bytes, then the longest that continues it, and so on, or the unknown
    /// token if no piece does. [Wu et al., arXiv 1609.08144]
    fn add_pieces(&self, word: &[u8], len: usize, ids: &mut Vec<u32>) {
        let start = ids.len();
        let is_long = len > self.longest_word && count_characters(&word[..len]) > self.longest_word;
        let (mut pieces, mut at) = (&self.first, 0);
        while at < len {
            let Some((piece, id)) = pieces.longest(&word[at..], len - at).filter(|_| !is_long) else {
                ids.truncate(start);
                ids.push(self.unknown);
                break;
            };
            ids.push(id);
            at += piece;
            pieces = &self.later;
        }
    }
}

/// The words of a text, before they are looked up.
#[derive(Default)]
pub(crate) struct Words {
    /// Of all words, one after the other. What lies behind the first `filled` is left over, and at least as much as a piece.
    letters: Vec<u8>,
    filled: usize,
    /// Where words end in `letters`; as many as `count`.
    ends: Vec<usize>,
    count: usize,
    /// Where the last word has ended.
    ended: usize,
    /// Tokens that are not looked up, and how many words lie before each.
    tokens: Vec<(usize, u32)>,
    /// The ids of words that are one piece.
    whole: Vec<Option<u32>>,
}

impl Words {
    fn clear(&mut self) {
        (self.filled, self.count, self.ended) = (0, 0, 0);
        self.tokens.clear();
    }

    /// Takes the bytes that `letters` has at the head of a text, and returns their number. There is no condition on whether one is
    /// a space, because the processor cannot foresee where a word ends.
    fn take(&mut self, text: &[u8], letters: &[u8; 256]) -> usize {
        self.reserve(text.len());
        let (mut filled, mut count, mut ended) = (self.filled, self.count, self.ended);
        let (out, ends) = (&mut self.letters[..], &mut self.ends[..]);
        let mut taken = text.len();
        for (at, byte) in text.iter().enumerate() {
            let letter = letters[usize::from(*byte)];
            if letter == 0 {
                taken = at;
                break;
            }
            let is_letter = letter != SPACE;
            out[filled] = letter;
            filled += usize::from(is_letter);
            ends[count] = filled;
            count += usize::from(!is_letter & (filled > ended));
            ended = if is_letter { ended } else { filled };
        }
        (self.filled, self.count, self.ended) = (filled, count, ended);
        taken
    }

    /// Makes room for so many bytes, each of which may end a word, and for the last word's end.
    fn reserve(&mut self, bytes: usize) {
        let letters = self.filled + bytes + NUMBER_BYTES;
        if self.letters.len() < letters {
            self.letters.resize(letters, 0);
        }
        if self.ends.len() < self.count + bytes + 1 {
            self.ends.resize(self.count + bytes + 1, 0);
        }
    }

    /// Adds to the word at hand.
    fn add(&mut self, part: &[u8]) {
        self.reserve(part.len());
        self.letters[self.filled..self.filled + part.len()].copy_from_slice(part);
        self.filled += part.len();
    }

    /// Ends the word at hand, if it has any letter.
    fn end(&mut self) {
        if self.filled > self.ended {
            self.ends[self.count] = self.filled;
            self.count += 1;
            self.ended = self.filled;
        }
    }
}

impl Character {
    fn of(tokenizer: &Tokenizer, character: char) -> Self {
        let words = words(tokenizer, format!("a{character}b"));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words[..] {
            ["ab"] => Character::Removed,
            ["a", "b"] => Character::Space,
            ["a", word, "b"] => match tokenizer.get_model().tokenize(word) {
                Ok(tokens) => Character::Word(tokens.into_iter().map(|token| token.id).collect()),
                Err(_) => Character::Other,
            },
            // A zero byte would end a piece.
            [word] if !word.contains('\0') => match word.strip_prefix('a').and_then(|word| word.strip_suffix('b')) {
                Some(part) if Self::stays(tokenizer, character, part) => Character::Part(part.as_bytes().into()),
                _ => Character::Other,
            },
            _ => Character::Other,
        }
    }

    /// Whether it becomes `part` where it stands. Where accents are stripped, marks are sorted by their class before; a mark that
    /// stays goes before the first of these two, or behind the second.
    fn stays(tokenizer: &Tokenizer, character: char, part: &str) -> bool {
        words(tokenizer, format!("a\u{302e}{character}\u{1b44}b")) == [format!("a\u{302e}{part}\u{1b44}b")]
    }
}

/// What the normalizer and the pre-tokenizer make of a text; nothing if they fail.
fn words(tokenizer: &Tokenizer, text: String) -> Vec<String> {
    let mut text = PreTokenizedString::from(text);
    let normalized = text.normalize(|text| tokenizer.get_normalizer().map_or(Ok(()), |normalizer| normalizer.normalize(text)));
    let split = tokenizer.get_pre_tokenizer().map_or(Ok(()), |splitter| splitter.pre_tokenize(&mut text));
    if normalized.and(split).is_err() {
        return Vec::new();
    }
    let words = text.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
    words.into_iter().map(|(word, ..)| word.to_owned()).collect()
}

/// The number of characters of a word.
fn count_characters(word: &[u8]) -> usize {
    String::from_utf8_lossy(word).chars().count()
}

/// Ids of pieces.
struct Pieces {
    /// Those of at most 16 bytes: these as a little-endian number, with zeros above.
    numbers: HashMap<u128, u32, BuildHasherDefault<Fold>>,
    /// Longer ones.
    long: HashMap<Box<[u8]>, u32>,
    /// Bytes of the longest one.
    longest: usize,
    /// Bit n - 1 is set if a piece of `HEAD_BYTES` <= n <= 16 bytes begins with bytes of this slot.
    lengths: Vec<u16>,
}

impl Pieces {
    /// Binary digits of a slot's number.
    const SLOT_BITS: u32 = 15;

    fn new() -> Self {
        Pieces { numbers: HashMap::default(), long: HashMap::new(), longest: 0, lengths: vec![0; 1 << Self::SLOT_BITS] }
    }

    fn slot(number: u128) -> usize {
        let head = number as u32 & (u32::MAX >> (32 - 8 * HEAD_BYTES));
        (head.wrapping_mul(0x9E37_79B1) >> (32 - Self::SLOT_BITS)) as usize
    }

    fn insert(&mut self, piece: &[u8], id: u32) {
        // No word has it: the reference splits at punctuation.
        if piece.is_empty() || piece.iter().any(|byte| *byte == 0 || byte.is_ascii_punctuation()) {
            return;
        }
        self.longest = self.longest.max(piece.len());
        let mut bytes = [0; NUMBER_BYTES];
        let Some(number) = bytes.get_mut(..piece.len()) else {
            self.long.insert(piece.into(), id);
            return;
        };
        number.copy_from_slice(piece);
        let number = u128::from_le_bytes(bytes);
        self.numbers.insert(number, id);
        if piece.len() >= HEAD_BYTES {
            self.lengths[Self::slot(number)] |= 1 << (piece.len() - 1);
        }
    }

    /// The id of the whole `word`, of `len` bytes and at least 16 more, if it is a piece of at most 16 bytes.
    fn whole(&self, word: &[u8], len: usize) -> Option<u32> {
        let number = u128::from_le_bytes(*word.first_chunk()?);
        if len > NUMBER_BYTES {
            return None;
        }
        self.numbers.get(&(number & (u128::MAX >> (128 - 8 * len)))).copied()
    }

    /// The longest piece that begins `word`, of `len` bytes and at least 16 more, and its id.
    fn longest(&self, word: &[u8], len: usize) -> Option<(usize, u32)> {
        for piece in (NUMBER_BYTES + 1..=len.min(self.longest)).rev() {
            if let Some(id) = self.long.get(&word[..piece]) {
                return Some((piece, *id));
            }
        }
        let number = u128::from_le_bytes(*word.first_chunk()?);
        let mut lengths = (1u32 << len.min(NUMBER_BYTES)) - 1;
        if len >= HEAD_BYTES {
            lengths &= u32::from(self.lengths[Self::slot(number)]) | ((1 << (HEAD_BYTES - 1)) - 1);
        }
        while lengths > 0 {
            let piece = lengths.ilog2() as usize + 1;
            if let Some(id) = self.numbers.get(&(number & (u128::MAX >> (128 - 8 * piece)))) {
                return Some((piece, *id));
            }
            lengths ^= 1 << (piece - 1);
        }
        None
    }
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
    use serde_json::json;
    use tokenizers::normalizers::BertNormalizer;

    use super::*;
    use crate::model_folder::parse_tokenizer;

    /// The ids of a text, and how many of its words were not taken.
    fn encode(fast: &WordPiece, tokenizer: &Tokenizer, text: &str) -> (Vec<u32>, usize) {
        let (mut ids, mut others) = (vec![7], 0);
        let left_over = b"left over".to_vec();
        let mut words = Words { letters: left_over, filled: 7, count: 2, ended: 4, tokens: vec![(1, 9)], ..Words::default() };
        let other = |word: &str, ids: &mut Vec<u32>| {
            assert!(!word.contains(' '), "{word}");
            others += 1;
            ids.extend(tokenizer.encode_fast(word, false).unwrap().get_ids());
            Ok(())
        };
        fast.encode(tokenizer, text, &mut words, &mut ids, other).unwrap();
        assert_eq!(ids.remove(0), 7);
        (ids, others)
    }

    #[test]
    fn texts_have_the_tokens_of_the_reference() {
        let mut tokenizer = parse_tokenizer(include_bytes!("../../../data/models/static/tokenizer.json")).unwrap();
        let long = "\u{e9}".repeat(100);
        let odd = format!(
            "The QUICK un-believ-able [UNK] ##ing #x a##b zzzzqqqq x1y2z3 1234567890123456 abcdefghijklmnop telecommunications \
             untelecommunicationsy abcdefghijklmnopq ~`|{{}}^ --- $1,234.56 caf\u{e9} nai\u{308}ve \u{301}x \u{4e00}x\u{4e01} a\u{0}b \
             tab\u{b}bed \u{7f} \u{1b}[0m a\u{a0}b\u{2003}c \u{3a3}\u{391}\u{3a3} \u{130}x \u{201c}don\u{2019}t\u{201d}\u{2014}so\u{2026} \
             \u{d55c}\u{ae00} \u{fb01}n \u{fffd}x \u{200b}y \u{1f600} a\u{1f600}b\u{2019}c\u{a0}d e {long} {long}x"
        );
        let windows = include_str!("../tests/fixtures/windows.jsonl").lines().chain([odd.as_str(), "", " ", "\u{1f600}"]);
        let windows: Vec<&str> = windows.collect();
        for normalizer in normalizers() {
            tokenizer.with_normalizer(Some(normalizer)).unwrap();
            let fast = WordPiece::of(&tokenizer).unwrap();
            for text in &windows {
                let (ids, others) = encode(&fast, &tokenizer, text);
                assert_eq!(ids, *tokenizer.encode_fast(*text, false).unwrap().get_ids(), "{text}");
                // A zero byte that is not removed ends no word either, but is not in the table.
                assert_eq!(
                    others,
                    text.matches('\u{1f600}').count() + usize::from(!normalizer.clean_text && text.contains('\0')),
                    "{text}"
                );
            }
        }
    }

    /// The settings of a normalizer, at which characters become other words.
    fn normalizers() -> [BertNormalizer; 4] {
        let settings = [(true, None, true), (true, Some(false), true), (false, None, false), (false, Some(true), true)];
        settings.map(|(lowercase, strip, clean)| BertNormalizer::new(clean, lowercase, strip, lowercase))
    }

    fn tokenizer(pieces: impl IntoIterator<Item = String>, prefix: &str, longest_word: usize) -> Tokenizer {
        let model = json!({
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": prefix,
            "max_input_chars_per_word": longest_word, "vocab": pieces.into_iter().zip(0..).collect::<HashMap<String, u32>>(),
        });
        let tokenizer = json!({ "version": "1.0", "pre_tokenizer": { "type": "BertPreTokenizer" }, "model": model });
        tokenizer.to_string().parse().unwrap()
    }

    #[test]
    fn every_character_has_the_tokens_of_the_reference_between_others() {
        let characters: Vec<char> = (0..TABLE_CHARACTERS as u32).filter_map(char::from_u32).collect();
        // Each is a piece, so that tokens tell them apart.
        let pieces = ["[UNK]".to_owned()].into_iter().chain(characters.iter().map(char::to_string));
        let mut tokenizer = tokenizer(pieces, "", usize::MAX);
        for normalizer in normalizers() {
            tokenizer.with_normalizer(Some(normalizer)).unwrap();
            let fast = WordPiece::of(&tokenizer).unwrap();
            // Marks in the order in which no text has them after they are sorted.
            let mut texts = vec!["x\u{302e}\u{1b44} x\u{8d4}\u{301}\u{302e}\u{a953}y".to_owned()];
            // Each beside others that are far away in the table, which may not change what it becomes.
            for (i, nearby) in characters.chunks(50).enumerate() {
                let far = characters.iter().skip(i).step_by(997);
                texts.push(nearby.iter().zip(far.cycle()).flat_map(|(near, far)| [*near, *far, 'a']).collect());
            }
            let mut all_others = 0;
            for text in &texts {
                let (ids, others) = encode(&fast, &tokenizer, text);
                assert_eq!(ids, *tokenizer.encode_fast(text.as_str(), false).unwrap().get_ids(), "{text:?}");
                all_others += others;
            }
            assert!(all_others < 100, "{all_others}");
        }
    }

    #[test]
    fn odd_vocabularies_have_the_tokens_of_the_reference() {
        let pieces =
            ["[UNK]", "", "a", "ab", "A", "a\0", "a.b", ".", "##b", "##", "##.", "b", "xb", "x", "##bbbbbbbbbbbbbbbbbbbb"];
        let text =
            "a ab abb A Ab a\0 a.b . b bb xb xxb abbbbbbbbbbbbbbbbbbbb abbbbbbbbbbbbbbbbbbbbb ##b aab ba abbb \u{e9}a \u{4e00}";
        for normalizer in normalizers() {
            for (prefix, longest_word) in [("##", 100), ("##", 3), ("", 100), ("x", 100), ("##", 0)] {
                let mut tokenizer = tokenizer(pieces.map(str::to_owned), prefix, longest_word);
                tokenizer.with_normalizer(Some(normalizer)).unwrap();
                let fast = WordPiece::of(&tokenizer).unwrap();
                let expected = tokenizer.encode_fast(text, false).unwrap();
                assert_eq!(encode(&fast, &tokenizer, text).0, *expected.get_ids(), "{prefix} {longest_word}");
            }
        }
    }
}
