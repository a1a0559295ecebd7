//! Numbers such as `20M`: whole numbers that people write with a decimal suffix.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of tokens or windows: `250000`, `250k`, `20M`, `1.5G`, `1T` (powers of 1,000).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Count(pub u64);

const PATTERN: &str = r"^[0-9]+(\.[0-9]+)?[kKMGT]?$";

impl Count {
    /// The number that `text` spells, if it does.
    pub fn parse(text: &str) -> Option<Count> {
        let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
        let (digits, suffix) = text.split_at(split);
        let scale = match suffix {
            "" => 1e0,
            "k" | "K" => 1e3,
            "M" => 1e6,
            "G" => 1e9,
            "T" => 1e12,
            _ => return None,
        };
        let value = digits.parse::<f64>().ok()? * scale;
        ((0.0..1e18).contains(&value) && value.fract() == 0.0).then_some(Count(value as u64))
    }
}

impl fmt::Display for Count {
    /// The shortest exact spelling, such as `20M`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (suffix, scale) in [("T", 1_000_000_000_000), ("G", 1_000_000_000), ("M", 1_000_000), ("k", 1_000)] {
            if self.0 >= scale && self.0.is_multiple_of(scale / 10) {
                let tenths = self.0 / (scale / 10);
                return match tenths % 10 {
                    0 => write!(f, "{}{suffix}", tenths / 10),
                    rest => write!(f, "{}.{rest}{suffix}", tenths / 10),
                };
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CountVisitor;
        impl Visitor<'_> for CountVisitor {
            type Value = Count;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number such as `250000`, `250k` or `20M`")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Count, E> {
                Ok(Count(value))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Count, E> {
                Count::parse(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(CountVisitor)
    }
}

impl JsonSchema for Count {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Count".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["integer", "string"], "minimum": 0, "pattern": PATTERN })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_parse_and_print() {
        for (text, value) in [("250k", 250_000), ("20M", 20_000_000), ("1.5G", 1_500_000_000), ("7", 7)] {
            assert_eq!(Count::parse(text), Some(Count(value)));
            assert_eq!(Count(value).to_string(), text);
        }
        for wrong in ["", "M", "1.0000001k", "-3", "20MB", "1e3"] {
            assert_eq!(Count::parse(wrong), None, "{wrong}");
        }
    }
}
