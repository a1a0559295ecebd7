//! YAML text to a tree of values with positions; `--set` overlays.

use std::collections::HashMap;

use saphyr::{LoadableYamlNode, MarkedYaml, Scalar, YamlData};
use serde_json::{Map, Number, Value};
use trommel_core::error::{Error, Result};

/// A YAML document as JSON values, and where each of them stands.
#[derive(Debug)]
pub struct Document {
    /// The file, as errors name it.
    pub file: String,
    /// The values.
    pub value: Value,
    /// Where the value of a JSON pointer comes from.
    origins: HashMap<String, Origin>,
}

#[derive(Debug)]
enum Origin {
    /// Line and column, from 1, of its key or, within a list, of itself.
    File(u64, u64),
    /// The overlay that set it.
    Overlay(String),
}

impl Document {
    /// Parses the text of `file`, then applies overlays of the form `key.sub=value` in order; `null` leaves a key out.
    pub fn parse(file: &str, text: &str, overlays: &[String]) -> Result<Document> {
        let parsed = MarkedYaml::load_from_str(text).map_err(|e| {
            let error = Error::config(format!("not valid YAML: {e}")).file(file);
            error.hint("indent with spaces, and quote texts that contain `: ` or start with `*`, `&`, `{` or `[`")
        })?;
        let mut document = Document::empty(file);
        match parsed.as_slice() {
            [] => {}
            [root] => document.value = document.convert(root, "")?,
            _ => {
                return Err(Error::config("the file holds more than one YAML document")
                    .file(file)
                    .hint("remove the `---` lines"));
            }
        }
        if document.value.is_null() {
            document.value = Value::Object(Map::new());
        }
        for overlay in overlays {
            document.overlay(overlay)?;
        }
        Ok(document)
    }

    fn empty(file: &str) -> Document {
        Document { file: file.to_owned(), value: Value::Object(Map::new()), origins: HashMap::new() }
    }

    /// A configuration error at the value that `pointer` names, or at its nearest ancestor whose place is known.
    pub fn error(&self, pointer: &str, message: impl Into<String>) -> Error {
        self.place(pointer, Error::config(message))
    }

    /// An error with that place.
    pub fn place(&self, pointer: &str, error: Error) -> Error {
        let mut pointer = pointer;
        loop {
            match (self.origins.get(pointer), pointer.rfind('/')) {
                (Some(&Origin::File(line, column)), _) => return error.file(&self.file).at(line, column),
                (Some(Origin::Overlay(overlay)), _) => return error.file(format!("--set {overlay}")),
                (None, Some(parent)) => pointer = &pointer[..parent],
                (None, None) => return error.file(&self.file),
            }
        }
    }

    fn convert(&mut self, node: &MarkedYaml, pointer: &str) -> Result<Value> {
        let place = |node: &MarkedYaml| (node.span.start.line() as u64, node.span.start.col() as u64 + 1);
        let origin = |node: &MarkedYaml| {
            let (line, column) = place(node);
            Origin::File(line, column)
        };
        Ok(match &node.data {
            YamlData::Mapping(mapping) => {
                let mut object = Map::new();
                for (key, value) in mapping {
                    let name = key_text(key).ok_or_else(|| {
                        let (line, column) = place(key);
                        Error::config("a key must be a plain word").file(&self.file).at(line, column)
                    })?;
                    let pointer = format!("{pointer}/{}", escape(&name));
                    self.origins.insert(pointer.clone(), origin(key));
                    object.insert(name, self.convert(value, &pointer)?);
                }
                Value::Object(object)
            }
            YamlData::Sequence(items) => {
                let mut list = Vec::new();
                for (index, item) in items.iter().enumerate() {
                    let pointer = format!("{pointer}/{index}");
                    self.origins.insert(pointer.clone(), origin(item));
                    list.push(self.convert(item, &pointer)?);
                }
                Value::Array(list)
            }
            YamlData::Value(Scalar::Null) => Value::Null,
            YamlData::Value(Scalar::Boolean(flag)) => Value::Bool(*flag),
            YamlData::Value(Scalar::Integer(number)) => Value::Number((*number).into()),
            YamlData::Value(Scalar::FloatingPoint(number)) => number_of(number.into_inner()),
            YamlData::Value(Scalar::String(text)) => Value::String(text.to_string()),
            YamlData::Tagged(_, inner) => self.convert(inner, pointer)?,
            _ => {
                let (line, column) = place(node);
                return Err(Error::config("this value cannot be read").file(&self.file).at(line, column));
            }
        })
    }

    fn overlay(&mut self, overlay: &str) -> Result<()> {
        let wrong =
            |message: String| Error::config(message).hint("write `--set key=value`, such as `--set resample.tokens=5M`");
        let Some((path, text)) = overlay.split_once('=') else {
            return Err(wrong(format!("`--set {overlay}` has no `=`")));
        };
        if text.trim().is_empty() {
            let error = Error::config(format!("`--set {overlay}` has no value"));
            return Err(error.hint(format!("write `--set {path}=null` to leave the key out")));
        }
        let value = MarkedYaml::load_from_str(text).ok().and_then(|parsed| match parsed.as_slice() {
            [root] => Document::empty("--set").convert(root, "").ok(),
            _ => None,
        });
        // What YAML takes for a comment is a text here.
        let is_null = ["null", "~"].contains(&text.trim());
        let value = value.filter(|value| is_null || !value.is_null()).unwrap_or_else(|| Value::String(text.to_owned()));
        let mut target = &mut self.value;
        let keys: Vec<&str> = path.split('.').collect();
        for key in &keys[..keys.len() - 1] {
            let Value::Object(object) = target else {
                return Err(wrong(format!("`{path}`: `{key}` is inside a value that is no mapping")));
            };
            if is_null && !object.contains_key(*key) {
                return Ok(());
            }
            target = object.entry(key.to_string()).or_insert_with(|| Value::Object(Map::new()));
            if target.is_null() {
                *target = Value::Object(Map::new());
            }
        }
        let Value::Object(object) = target else { return Err(wrong(format!("`{path}` is inside a value that is no mapping"))) };
        let key = keys[keys.len() - 1];
        match value {
            Value::Null => _ = object.remove(key),
            value => _ = object.insert(key.to_owned(), value),
        }
        let pointer: String = keys.iter().map(|key| format!("/{}", escape(key))).collect();
        let below = format!("{pointer}/");
        self.origins.retain(|known, _| *known != pointer && !known.starts_with(&below));
        self.origins.insert(pointer, Origin::Overlay(overlay.to_owned()));
        Ok(())
    }
}

/// A whole number is an integer however it is written, such as `1e6`; what JSON has no number for is a text.
fn number_of(number: f64) -> Value {
    const EXACT: f64 = (1u64 << f64::MANTISSA_DIGITS) as f64;
    if number.fract() == 0.0 && number.abs() < EXACT {
        return Value::from(number as i64);
    }
    Number::from_f64(number).map_or_else(|| Value::String(number.to_string()), Value::Number)
}

fn key_text(key: &MarkedYaml) -> Option<String> {
    match &key.data {
        YamlData::Value(Scalar::String(text)) => Some(text.to_string()),
        YamlData::Value(Scalar::Integer(number)) => Some(number.to_string()),
        _ => None,
    }
}

/// One step of a JSON pointer (RFC 6901).
pub fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
