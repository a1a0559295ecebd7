//! Every mistake in a tree, with line, column and the nearest right word.
//!
//! The types of the spec give a JSON Schema; the schema finds all mistakes of shape at once; what is left deserializes.
//! So a field is described in one place, its Rust type, and editors, `check` and the run agree on it.

use jsonschema::error::ValidationErrorKind;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use schemars::transform::{Transform, transform_subschemas};
use serde::de::DeserializeOwned;
use serde_json::Value;
use trommel_core::error::Error;

use crate::yaml::{Document, escape};

/// The JSON Schema of a spec type.
pub fn schema<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|s| s.inline_subschemas = true).with_transform(AbsentNotNull);
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

/// The spec in a document, or every mistake of shape in it.
pub fn read<T: JsonSchema + DeserializeOwned>(document: &Document) -> Result<T, Vec<Error>> {
    let schema = schema::<T>();
    let validator = jsonschema::validator_for(&schema)
        .map_err(|e| vec![Error::internal(format!("the schema of the spec is not valid: {e}"))])?;
    let mistakes: Vec<Error> = validator.iter_errors(&document.value).flat_map(|e| describe(document, &schema, &e)).collect();
    if !mistakes.is_empty() {
        return Err(in_file_order(mistakes));
    }
    serde_json::from_value(document.value.clone()).map_err(|e| {
        let mut immense = Vec::new();
        add_immense(document, &document.value, "", &mut immense);
        if immense.is_empty() { vec![Error::config(e.to_string()).file(&document.file)] } else { in_file_order(immense) }
    })
}

/// Adds a mistake for each whole number that no integer type holds: JSON Schema takes it for an integer.
fn add_immense(document: &Document, value: &Value, pointer: &str, mistakes: &mut Vec<Error>) {
    match value {
        Value::Object(fields) => {
            fields
                .iter()
                .for_each(|(key, value)| add_immense(document, value, &format!("{pointer}/{}", escape(key)), mistakes));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| add_immense(document, item, &format!("{pointer}/{i}"), mistakes));
        }
        Value::Number(number) if number.is_f64() && number.as_f64().is_some_and(|x| x.fract() == 0.0) => {
            let message = format!("`{}` is {number}, which is too large", name_of(pointer));
            mistakes.push(document.error(pointer, message).hint("use a number below 9,000,000,000,000,000"));
        }
        _ => {}
    }
}

fn name_of(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

/// Mistakes in the order in which a reader meets them.
pub fn in_file_order(mut mistakes: Vec<Error>) -> Vec<Error> {
    mistakes.sort_by_key(|mistake| (mistake.place().line, mistake.place().column));
    mistakes
}

/// An optional field is left out, never `null`: without this, the mistakes within it would hide behind `anyOf`.
#[derive(Debug, Clone)]
struct AbsentNotNull;

impl Transform for AbsentNotNull {
    fn transform(&mut self, schema: &mut schemars::Schema) {
        transform_subschemas(self, schema);
        let Some(object) = schema.as_object_mut() else { return };
        if let Some(Value::Array(types)) = object.get_mut("type") {
            types.retain(|t| t != "null");
            if let [only] = types.as_slice() {
                let only = only.clone();
                object.insert("type".into(), only);
            }
        }
        if let Some(Value::Array(variants)) = object.get_mut("anyOf") {
            variants.retain(|v| v.get("type").is_none_or(|t| t != "null"));
            if let [Value::Object(only)] = variants.as_mut_slice() {
                let only = std::mem::take(only);
                object.remove("anyOf");
                for (key, value) in only {
                    object.entry(key).or_insert(value);
                }
            }
        }
        if object.get("default").is_some_and(Value::is_null) {
            object.remove("default");
        }
    }
}

fn describe(document: &Document, schema: &Value, error: &jsonschema::ValidationError) -> Vec<Error> {
    let pointer = error.instance_path().to_string();
    let name = name_of(&pointer);
    let value = error.instance();
    let wrong_word = |known: &mut dyn Iterator<Item = &Value>| {
        let known: Vec<String> = known.filter_map(|word| word.as_str().map(str::to_owned)).collect();
        let wrong = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        vec![document.error(&pointer, format!("`{name}` cannot be `{wrong}`")).hint(nearest(&wrong, &known))]
    };
    match error.kind() {
        ValidationErrorKind::AdditionalProperties { unexpected } => unexpected
            .iter()
            .map(|key| {
                let known = known_keys(schema, &error.schema_path().to_string());
                let place = document.error(&format!("{pointer}/{}", escape(key)), format!("unknown key `{key}`"));
                place.hint(nearest(key, &known))
            })
            .collect(),
        ValidationErrorKind::Required { property } => {
            let key = property.as_str().unwrap_or_default();
            let within = if name.is_empty() { String::new() } else { format!(" in `{name}`") };
            vec![document.error(&format!("{pointer}/{}", escape(key)), format!("the key `{key}` is missing{within}"))]
        }
        ValidationErrorKind::Enum { options } => wrong_word(&mut options.as_array().into_iter().flatten()),
        // Words with a description each are constants.
        ValidationErrorKind::OneOfNotValid { .. } => {
            let holder = error_schema(schema, &error.schema_path().to_string());
            let variants = holder.and_then(|s| s.get("oneOf")).and_then(Value::as_array);
            wrong_word(&mut variants.into_iter().flatten().filter_map(|variant| variant.get("const")))
        }
        ValidationErrorKind::Type { .. } | ValidationErrorKind::Pattern { .. } => {
            let expected = error_schema(schema, &error.schema_path().to_string());
            vec![document.error(&pointer, format!("`{name}` is {}, but must be {}", shown(value), expectation(expected)))]
        }
        _ => vec![document.error(&pointer, format!("`{name}`: {error}"))],
    }
}

/// The schema object that holds the keyword at `path`.
fn error_schema<'a>(schema: &'a Value, path: &str) -> Option<&'a Value> {
    schema.pointer(path.rsplit_once('/').map_or("", |(parent, _)| parent))
}

fn known_keys(schema: &Value, path: &str) -> Vec<String> {
    let properties = error_schema(schema, path).and_then(|s| s.get("properties")).and_then(Value::as_object);
    properties.into_iter().flat_map(|p| p.keys().cloned()).collect()
}

fn expectation(schema: Option<&Value>) -> String {
    let field = |name| schema.and_then(|s| s.get(name));
    let types = field("type");
    let one = |name: &str| match name {
        "object" => "a mapping of keys".to_owned(),
        "array" => "a list".to_owned(),
        "string" => "a text".to_owned(),
        "integer" => "a whole number".to_owned(),
        "boolean" => "`true` or `false`".to_owned(),
        other => format!("a {other}"),
    };
    match types {
        Some(Value::String(name)) => match field("pattern").and_then(Value::as_str) {
            Some(pattern) => format!("{} like `{pattern}`", one(name)),
            None => one(name),
        },
        Some(Value::Array(_)) => "a whole number such as `250000`, `250k` or `20M`".to_owned(),
        _ => "something else".to_owned(),
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "empty".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::String(text) => format!("`{text}`"),
        other => format!("`{other}`"),
    }
}

/// A hint that names the most similar known word, or all of them when none is similar.
pub fn nearest(wrong: &str, known: &[String]) -> String {
    let best = known.iter().max_by(|a, b| strsim::jaro_winkler(wrong, a).total_cmp(&strsim::jaro_winkler(wrong, b)));
    match best {
        Some(word) if strsim::jaro_winkler(wrong, word) > 0.75 => format!("did you mean `{word}`?"),
        Some(_) => format!("use one of {}", known.iter().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ")),
        None => "there is none to choose".to_owned(),
    }
}
