//! The one error type of the libraries.
//!
//! An error says whose fault it was (`Kind`), what happened, where (stage, file, row, line), and what to do about it.
//! Places are fields and not text, so that `--json` and tests can read them.

use std::fmt;

/// The result of everything that can fail in a library crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose fault it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The user's configuration or command line; exit code 2.
    Config,
    /// An input file's content; exit code 1.
    Data,
    /// The machine: a full disk, a directory that cannot be written, a run directory in use; exit code 1.
    System,
    /// The user asked to stop; what is finished stays, and the same command continues; exit code 130.
    Interrupted,
    /// A broken invariant, which is a bug in trommel; exit code 1.
    Internal,
}

/// Where it happened; what is unknown is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// The stage that was running.
    pub stage: Option<String>,
    /// The file, as the user would name it.
    pub file: Option<String>,
    /// Line, from 1.
    pub line: Option<u64>,
    /// Column, from 1.
    pub column: Option<u64>,
    /// Row of a table file, from 0.
    pub row: Option<u64>,
}

/// What went wrong, where, and what to do about it.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    place: Place,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of the given kind. `message` has literals in backticks and no final stop.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error(Box::new(Inner { kind, message: message.into(), place: Place::default(), hint: None, source: None }))
    }

    /// The user's configuration is at fault.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Kind::Config, message)
    }

    /// An input file is at fault.
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(Kind::Data, message)
    }

    /// The machine is at fault.
    pub fn system(message: impl Into<String>) -> Self {
        Self::new(Kind::System, message)
    }

    /// A broken invariant.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// The user asked to stop.
    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted; what is finished is kept").hint("run the same command again to continue")
    }

    /// Adds the remedy.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Adds the stage, unless a deeper level already named one.
    #[must_use]
    pub fn stage(mut self, stage: impl Into<String>) -> Self {
        self.0.place.stage.get_or_insert_with(|| stage.into());
        self
    }

    /// Adds the file, unless a deeper level already named one.
    #[must_use]
    pub fn file(mut self, file: impl fmt::Display) -> Self {
        self.0.place.file.get_or_insert_with(|| file.to_string());
        self
    }

    /// Adds the line and the column of a text file, both from 1.
    #[must_use]
    pub fn at(mut self, line: u64, column: u64) -> Self {
        self.0.place.line = Some(line);
        self.0.place.column = Some(column);
        self
    }

    /// Adds the row of a table file, from 0.
    #[must_use]
    pub fn row(mut self, row: u64) -> Self {
        self.0.place.row = Some(row);
        self
    }

    /// Adds the error of the library below.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Whose fault it was.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Where it happened.
    pub fn place(&self) -> &Place {
        &self.0.place
    }

    /// What happened, in one sentence, without place and hint.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The remedy, if there is one.
    pub fn remedy(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The exit code that the command line promises for this kind.
    pub fn exit_code(&self) -> u8 {
        match self.0.kind {
            Kind::Config => 2,
            Kind::Interrupted => 130,
            Kind::Data | Kind::System | Kind::Internal => 1,
        }
    }
}

impl fmt::Display for Error {
    /// `file:line:column: stage `s`: message: cause`, then a blank line and the hint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { message, place, hint, source, kind } = &*self.0;
        if let Some(file) = &place.file {
            write!(f, "{file}")?;
            for number in [place.line, place.column].into_iter().flatten() {
                write!(f, ":{number}")?;
            }
            if let Some(row) = place.row {
                write!(f, " (row {row})")?;
            }
            write!(f, ": ")?;
        }
        if let Some(stage) = &place.stage {
            write!(f, "stage `{stage}`: ")?;
        }
        write!(f, "{message}")?;
        let mut cause = source.as_deref().map(|s| s as &dyn std::error::Error);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        if let Some(hint) = hint {
            write!(f, "\n\nhint: {hint}")?;
        } else if *kind == Kind::Internal {
            write!(f, "\n\nhint: this is a bug in trommel; please report it with the pipeline file")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_reads_from_place_to_remedy() {
        let error = Error::data("column `text` is missing").file("a.parquet").stage("windows").hint("set `corpus.text`");
        assert_eq!(error.to_string(), "a.parquet: stage `windows`: column `text` is missing\n\nhint: set `corpus.text`");
        assert_eq!(error.exit_code(), 1);
    }

    #[test]
    fn the_deepest_place_wins() {
        let error = Error::config("unknown key").file("in.yaml").at(3, 5).file("outer");
        assert_eq!(error.to_string(), "in.yaml:3:5: unknown key");
    }
}
