//! What is wrong with the sources of a plan, found before hours are spent on them: of each file, the end or the first lines are read.

use std::collections::BTreeSet;
use std::io::BufRead;

use rayon::prelude::*;
use serde_json::{Map, Value};
use trommel_core::error::{Error, Result};
use trommel_spec::plan::{Plan, Source};

use super::{SourceFile, is_parquet, none_named, open_lines};

/// Lines of JSON that are looked at, of each file.
const LINES: usize = 100;

/// Every file of a plan that cannot be opened or lacks a column, and every set that has no documents, in the order of the plan.
pub fn check(plan: &Plan) -> Vec<Error> {
    let sets = plan.domains.iter().flat_map(|domain| {
        let name = &domain.train.name;
        let test = domain.test.as_ref().map(|test| (test, format!("`domains.{name}.test`")));
        std::iter::once((&domain.train, format!("`domains.{name}.train`"))).chain(test)
    });
    std::iter::once((&plan.corpus, "the corpus".to_owned())).chain(sets).flat_map(|(set, name)| check_set(set, &name)).collect()
}

fn check_set(set: &Source, name: &str) -> Vec<Error> {
    let file = |path| SourceFile { path, text: set.text.clone(), id: set.id.clone() };
    let found: Vec<Result<bool>> = set.files.par_iter().map(|path| file(path.clone()).has_rows()).collect();
    if found.iter().all(|rows| matches!(rows, Ok(false))) {
        let error = Error::data(format!("{name} holds no documents")).file(set.files[0].display());
        return vec![error.hint("name other files, or leave the set out")];
    }
    found.into_iter().filter_map(Result::err).collect()
}

impl SourceFile {
    /// Whether there are rows, of which none may be usable. Fails if the file cannot be opened or lacks a column.
    fn has_rows(&self) -> Result<bool> {
        let found = if is_parquet(&self.path) {
            self.open_columns().map(|(builder, _)| builder.metadata().file_metadata().num_rows() > 0)
        } else {
            self.has_lines()
        };
        found.map_err(|e| e.file(self.path.display()))
    }

    fn has_lines(&self) -> Result<bool> {
        // What cannot be read or is no JSON is told with its line when the file is read as a whole.
        let lines: Vec<Vec<u8>> = open_lines(&self.path)?.0.split(b'\n').map_while(std::io::Result::ok).take(LINES).collect();
        let objects = lines.iter().filter_map(|line| serde_json::from_slice::<Map<String, Value>>(line).ok());
        let keys: BTreeSet<String> = objects.flat_map(|object| object.into_iter().map(|(key, _)| key)).collect();
        for (name, key) in std::iter::once((&self.text, "text")).chain(self.id.iter().map(|id| (id, "id"))) {
            if !keys.is_empty() && !keys.contains(name) {
                return Err(none_named(name, key, keys.iter().map(String::as_str)));
            }
        }
        Ok(!lines.is_empty())
    }
}
