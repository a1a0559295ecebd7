//! What is wrong with the sources of a plan, found before hours are spent on them: the end or the first lines of each file are read,
//! and all of the domains' sets, which are small.

use std::collections::BTreeSet;
use std::io::{BufRead, Read};

use rayon::prelude::*;
use serde_json::{Map, Value};
use trommel_core::error::{Error, Result};
use trommel_spec::plan::{Plan, Source};

use super::{SourceFile, is_parquet, none_named, open_lines, read_texts, unreadable};

/// Lines of JSON that are looked at, of each file, and the bytes of the longest one that is.
const LINES: usize = 100;
const LINE_BYTES: u64 = 1 << 20;

/// Every file of a plan that cannot be opened or lacks a column, and every set whose rows cannot be used, in the order of the plan.
pub fn check(plan: &Plan) -> Vec<Error> {
    let mut mistakes = check_files(&plan.corpus, "the corpus");
    for domain in &plan.domains {
        for (split, set) in std::iter::once(("train", &domain.train)).chain(domain.test.iter().map(|test| ("test", test))) {
            let name = format!("`domains.{}.{split}`", set.name);
            let mut found = check_files(set, &name);
            if found.is_empty() {
                found.extend(check_rows(set, &name, plan.spec.corpus.max_reject_share).err());
            }
            mistakes.extend(found);
        }
    }
    mistakes
}

/// What the ends or the first lines of the files tell.
fn check_files(set: &Source, name: &str) -> Vec<Error> {
    let file = |path| SourceFile { path, text: set.text.clone(), id: set.id.clone() };
    let looks: Vec<Result<Look>> = set.files.par_iter().map(|path| file(path.clone()).look()).collect();
    let at = |error: Error| error.file(set.files[0].display());
    if looks.iter().all(|look| matches!(look, Ok(look) if !look.has_rows)) {
        return vec![at(Error::data(format!("{name} holds no documents")).hint("name other files"))];
    }
    // A file may begin with rows of another kind, which are counted later. That none has a line with the key is a mistake.
    let keys: BTreeSet<&String> = looks.iter().flatten().flat_map(|look| &look.keys).collect();
    let are_lines = looks.iter().all(|look| matches!(look, Ok(look) if look.is_known)) && !keys.is_empty();
    for (column, setting) in std::iter::once((&set.text, "text")).chain(set.id.iter().map(|id| (id, "id"))) {
        if are_lines && !keys.contains(column) {
            return vec![at(none_named(column, setting, keys.iter().map(|key| key.as_str())))];
        }
    }
    looks.into_iter().filter_map(Result::err).collect()
}

/// Fails if no row can be used, or more cannot than are allowed.
fn check_rows(set: &Source, name: &str, limit: f64) -> Result<()> {
    let found = read_texts(set).map_err(|e| e.file(name))?;
    let (bad, all) = (found.rejects.len(), found.rejects.len() + found.texts.len());
    let Some((file, first)) = found.rejects.first().filter(|_| bad as f64 > limit * all as f64) else { return Ok(()) };
    let message = format!("{bad} of {all} rows of {name} cannot be used, the first one is row {}: {}", first.row, first.reason);
    let error = Error::data(format!("{message}; {:.2}% are allowed", limit * 100.0)).file(file.display());
    Err(error.hint("mend the file, or raise `corpus.max_reject_share`"))
}

/// What a look at a file tells.
struct Look {
    has_rows: bool,
    /// The keys of the lines of JSON.
    keys: BTreeSet<String>,
    /// Whether these are all keys that the lines have.
    is_known: bool,
}

impl SourceFile {
    /// Fails if the file cannot be opened, or lacks a column.
    fn look(&self) -> Result<Look> {
        let look = if is_parquet(&self.path) {
            let rows = self.open_columns().map(|(builder, _)| builder.metadata().file_metadata().num_rows());
            rows.map(|rows| Look { has_rows: rows > 0, keys: BTreeSet::new(), is_known: false })
        } else {
            self.look_at_lines()
        };
        look.map_err(|e| e.file(self.path.display()))
    }

    fn look_at_lines(&self) -> Result<Look> {
        let mut lines = open_lines(&self.path)?.0;
        let mut look = Look { has_rows: false, keys: BTreeSet::new(), is_known: true };
        let mut line = Vec::new();
        for number in 1..=LINES as u64 {
            line.clear();
            let read = lines.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line);
            let read = read.map_err(|e| unreadable(e).at(number, 1))?;
            if read as u64 == LINE_BYTES {
                return Ok(Look { has_rows: true, is_known: false, ..look });
            }
            if read == 0 {
                break;
            }
            look.has_rows |= !line.trim_ascii().is_empty();
            let object = serde_json::from_slice::<Map<String, Value>>(&line);
            look.keys.extend(object.into_iter().flatten().map(|(key, _)| key));
        }
        Ok(look)
    }
}
