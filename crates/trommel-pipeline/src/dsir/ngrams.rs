//! The features of DSIR: the words of a text, and the buckets that their n-grams are hashed into.

use sha2::{Digest, Sha256};
use trommel_core::key::Key;

/// Buckets that n-grams are hashed into. \[DS\]
pub const BUCKETS: usize = 10_000;
/// Bytes of the longest n-gram that is remembered; an entry then has 32 bytes.
const REMEMBERED_BYTES: usize = 29;
/// N-grams that are remembered at once: 2 MB.
const REMEMBERED: usize = 1 << 16;

/// The words of a text: the longest runs of word characters, and of characters that are neither those nor white space.
///
/// It is NLTK's `WordPunctTokenizer`, `\w+|[^\w\s]+`, with `\w` as of UTS #18, as NLTK has it since it uses the module `regex`
/// (3.10 does; before, combining marks were no word characters, but superscripts and fractions were).
///
/// ```
/// let words: Vec<&str> = trommel_pipeline::dsir::ngrams::words("can't stop... 3.5 %").collect();
/// assert_eq!(words, ["can", "'", "t", "stop", "...", "3", ".", "5", "%"]);
/// ```
pub fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        rest = rest.trim_start();
        let kind = kind(rest.chars().next()?);
        let (word, after) = rest.split_at(rest.find(|c| self::kind(c) != kind).unwrap_or(rest.len()));
        rest = after;
        Some(word)
    })
}

/// What a character is to [`words`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Space,
    Word,
    Other,
}

/// [`Kind`] of the ASCII characters.
const ASCII: [Kind; 128] = {
    let mut kinds = [Kind::Other; 128];
    let mut code = 0;
    while code < 128 {
        let c = code as u8;
        if c.is_ascii_alphanumeric() || c == b'_' {
            kinds[code] = Kind::Word;
        } else if matches!(c, b'\t'..=b'\r' | b' ') {
            kinds[code] = Kind::Space;
        }
        code += 1;
    }
    kinds
};

fn kind(c: char) -> Kind {
    match ASCII.get(c as usize) {
        Some(kind) => *kind,
        None if regex_syntax::is_word_character(c) => Kind::Word,
        None if c.is_whitespace() => Kind::Space,
        None => Kind::Other,
    }
}

/// The bucket of an n-gram, words joined by one space: its SHA-256, a big-endian number, modulo 10,000.
fn hash(ngram: &[u8]) -> u16 {
    let digest = Sha256::digest(ngram);
    let fold = |rest: u64, word: &[u8]| word.iter().fold(rest, |n, &byte| n << 8 | u64::from(byte)) % BUCKETS as u64;
    digest.chunks_exact(4).fold(0, fold) as u16
}

/// An n-gram whose bucket is remembered.
#[derive(Debug, Clone, Copy)]
struct Entry {
    bucket: u16,
    /// 0 in an entry that was never used.
    length: u8,
    bytes: [u8; REMEMBERED_BYTES],
}

/// Turns texts into buckets. What it remembers saves time and changes no result.
#[derive(Debug, Clone)]
pub struct Featurizer {
    /// At the place that a hash of the n-gram gives, the last one that came there.
    memory: Vec<Entry>,
    bigram: Vec<u8>,
}

impl Default for Featurizer {
    fn default() -> Self {
        let unused = Entry { bucket: 0, length: 0, bytes: [0; REMEMBERED_BYTES] };
        Featurizer { memory: vec![unused; REMEMBERED], bigram: Vec::new() }
    }
}

impl Featurizer {
    /// Calls `each` with the bucket of every word and of every pair of neighbours of the lower-cased text; returns the number
    /// of words.
    pub fn ngrams(&mut self, text: &str, mut each: impl FnMut(u16)) -> usize {
        let lower = text.to_lowercase();
        let mut bigram = std::mem::take(&mut self.bigram);
        let mut count = 0;
        for word in words(&lower) {
            each(self.bucket(word.as_bytes()));
            // The buffer holds the word before.
            if count > 0 {
                let before = bigram.len();
                bigram.push(b' ');
                bigram.extend(word.as_bytes());
                each(self.bucket(&bigram));
                bigram.drain(..=before);
            } else {
                bigram.clear();
                bigram.extend(word.as_bytes());
            }
            count += 1;
        }
        self.bigram = bigram;
        count
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.memory[..]) + self.bigram.capacity()
    }

    fn bucket(&mut self, ngram: &[u8]) -> u16 {
        if ngram.len() > REMEMBERED_BYTES {
            return hash(ngram);
        }
        let entry = &mut self.memory[Key::of_bytes(ngram).0 as usize % REMEMBERED];
        if &entry.bytes[..entry.length as usize] != ngram {
            entry.bucket = hash(ngram);
            entry.length = ngram.len() as u8;
            entry.bytes[..ngram.len()].copy_from_slice(ngram);
        }
        entry.bucket
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buckets(featurizer: &mut Featurizer, text: &str) -> Vec<u16> {
        let mut buckets = Vec::new();
        featurizer.ngrams(text, |bucket| buckets.push(bucket));
        buckets
    }

    #[test]
    fn buckets_are_those_of_sha_256() {
        // python3: int(hashlib.sha256(ngram.encode()).hexdigest(), 16) % 10000
        let expected = [("gold", 1_395), ("gold and", 8_083), ("é", 588)];
        for (ngram, bucket) in expected {
            assert_eq!(hash(ngram.as_bytes()), bucket, "{ngram}");
        }
    }

    #[test]
    fn a_text_gives_its_words_and_their_pairs() {
        let mut featurizer = Featurizer::default();
        let found = buckets(&mut featurizer, " Gold,\nand GOLD");
        let ngrams = ["gold", ",", "gold ,", "and", ", and", "gold", "and gold"];
        assert_eq!(found, ngrams.map(|ngram| hash(ngram.as_bytes())));
        assert_eq!(featurizer.ngrams("", |_| unreachable!()), 0);
        assert_eq!(featurizer.ngrams(" \u{a0}\u{3000}", |_| unreachable!()), 0);
    }

    #[test]
    fn what_is_remembered_changes_nothing() {
        let mut used = Featurizer::default();
        let texts: Vec<String> = (0..40_000).map(|i| format!("w{i} {}", "long".repeat(i % 9))).collect();
        for text in texts.iter().chain(&texts) {
            let expected: Vec<u16> = match words(text).collect::<Vec<_>>()[..] {
                [one] => vec![hash(one.as_bytes())],
                [one, two] => [one, two, &format!("{one} {two}")].map(|ngram| hash(ngram.as_bytes())).to_vec(),
                _ => unreachable!(),
            };
            assert_eq!(buckets(&mut used, text), expected, "{text}");
        }
    }

    #[test]
    fn words_of_other_scripts_keep_their_marks() {
        // As `regex.findall(r"\w+|[^\w\s]+", text)` gives them.
        let found: Vec<&str> = words("हिन्दी में x² «Ελλάς» 日本語、e\u{301}\u{1c}_a").collect();
        assert_eq!(found, ["हिन्दी", "में", "x", "²", "«", "Ελλάς", "»", "日本語", "、", "e\u{301}", "\u{1c}", "_a"]);
    }
}
