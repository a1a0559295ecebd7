//! Documents are cut into windows, the unit that is embedded, clustered, weighed and drawn. [PE 2.3]

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, Int32Array, Int64Array, ListArray, StringArray, StringViewBuilder, StructArray, UInt32Array,
};
use arrow::buffer::{Buffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, Fields};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::{ColumnarValue, ScalarUDF, Volatility, create_udf};
use trommel_core::key::Key;

/// The byte ranges of a text's windows: about as few as `bytes_max` allows, of nearly equal length, cut after white
/// space where there is any and never within a character. They cover the text without overlap.
///
/// ```
/// let text = "gold and gravel, gravel and gold";
/// let parts: Vec<&str> = trommel_pipeline::window::cut(text, 20).map(|range| &text[range]).collect();
/// assert_eq!(parts, ["gold and gravel, ", "gravel and gold"]);
/// ```
pub fn cut(text: &str, bytes_max: usize) -> impl Iterator<Item = Range<usize>> {
    // A character has at most 4 bytes, so a shorter limit could not advance.
    let bytes_max = bytes_max.max(4);
    let mut start = 0;
    std::iter::from_fn(move || {
        let left = text.len() - start;
        if left == 0 {
            return None;
        }
        let end = if left <= bytes_max { text.len() } else { start + cut_point(&text[start..], bytes_max) };
        let range = start..end;
        start = end;
        Some(range)
    })
}

/// Where the first window of a text longer than `bytes_max` ends.
fn cut_point(text: &str, bytes_max: usize) -> usize {
    let even = text.len().div_ceil(text.len().div_ceil(bytes_max));
    // A little above the even share is allowed, so that the last window does not become a crumb.
    let highest = text.floor_char_boundary((even + even / 16).min(bytes_max));
    let bytes = text.as_bytes();
    let lowest = even / 2;
    match (lowest..highest).rev().find(|&i| bytes[i].is_ascii_whitespace()) {
        Some(space) => space + 1,
        None => text.floor_char_boundary(even.min(bytes_max)),
    }
}

/// The type of one window within a document.
fn window_fields() -> Fields {
    Fields::from(vec![
        Field::new("window", DataType::UInt32, false),
        Field::new("byte_start", DataType::Int64, false),
        Field::new("byte_len", DataType::Int32, false),
        Field::new("text", DataType::Utf8View, false),
    ])
}

/// SQL `windows(text)`: a list of (window, byte_start, byte_len, text) per document.
pub fn windows_function(bytes_max: u32) -> ScalarUDF {
    let item = Arc::new(Field::new("item", DataType::Struct(window_fields()), false));
    let returns = DataType::List(Arc::clone(&item));
    let compute = move |arguments: &[ColumnarValue]| -> Result<ColumnarValue> {
        let texts = ColumnarValue::values_to_arrays(arguments)?;
        let list = windows(&texts[0], bytes_max as usize, &item)?;
        Ok(ColumnarValue::Array(Arc::new(list)))
    };
    create_udf("windows", vec![DataType::Utf8View], returns, Volatility::Immutable, Arc::new(compute))
}

fn windows(texts: &ArrayRef, bytes_max: usize, item: &Arc<Field>) -> Result<ListArray> {
    let texts = texts.as_string_view();
    let (mut numbers, mut starts, mut lengths, mut counts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    // All windows point into one block. Were some appended by value between blocks, each of those would begin a block of up to
    // 2 MB for itself.
    let whole = texts.iter().flatten().map(str::as_bytes).collect::<Vec<_>>().concat();
    let mut parts = StringViewBuilder::new();
    let block = parts.append_block(Buffer::from_vec(whole));
    let mut first = 0;
    for text in texts.iter().map(Option::unwrap_or_default) {
        let before = numbers.len();
        for (number, range) in cut(text, bytes_max).enumerate() {
            parts.try_append_view(block, offset(first + range.start)?, offset(range.len())?)?;
            numbers.push(offset(number)?);
            starts.push(range.start as i64);
            lengths.push(range.len() as i32);
        }
        first += text.len();
        counts.push(numbers.len() - before);
    }
    let columns: Vec<ArrayRef> = vec![
        Arc::new(UInt32Array::from(numbers)),
        Arc::new(Int64Array::from(starts)),
        Arc::new(Int32Array::from(lengths)),
        Arc::new(parts.finish()),
    ];
    let structs = StructArray::try_new(window_fields(), columns, None)?;
    Ok(ListArray::try_new(Arc::clone(item), OffsetBuffer::from_lengths(counts), Arc::new(structs), None)?)
}

fn offset(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| DataFusionError::Execution("a document is longer than 4 GiB".into()))
}

/// SQL `content_key(text)`: 32 hexadecimal digits of the text's hash, which identify a document without an id column.
pub fn content_key_function() -> ScalarUDF {
    let compute = |arguments: &[ColumnarValue]| -> Result<ColumnarValue> {
        let texts = ColumnarValue::values_to_arrays(arguments)?;
        let keys: StringArray =
            texts[0].as_string_view().iter().map(|t| t.map(|t| Key::of_bytes(t.as_bytes()).to_string())).collect();
        Ok(ColumnarValue::Array(Arc::new(keys)))
    };
    create_udf("content_key", vec![DataType::Utf8View], DataType::Utf8, Volatility::Immutable, Arc::new(compute))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_a_text_and_respect_the_limit() {
        let texts = [
            "",
            "a",
            "a b",
            &"x".repeat(1000),
            &"word ".repeat(999),
            &"é".repeat(777),
            &" \n".repeat(300),
            &"日本 語".repeat(200),
        ];
        for text in texts {
            for bytes_max in [1, 16, 100, 5000] {
                let ranges: Vec<_> = cut(text, bytes_max).collect();
                let joined: String = ranges.iter().map(|r| &text[r.clone()]).collect();
                assert_eq!(joined, *text);
                assert!(ranges.iter().all(|r| !r.is_empty() && r.len() <= bytes_max.max(4)));
            }
        }
    }

    #[test]
    fn windows_are_nearly_equal_and_end_after_a_word() {
        let text = "alpha beta gamma ".repeat(100);
        let lengths: Vec<usize> = cut(&text, 512).map(|r| r.len()).collect();
        assert_eq!(lengths.len(), 4);
        assert!(lengths.iter().all(|&n| n > 350), "{lengths:?}");
        assert!(cut(&text, 512).all(|r| text[r].ends_with(' ')));
    }

    #[test]
    fn windows_hold_the_text_once() {
        let long = "long text ".repeat(50);
        let texts: ArrayRef =
            Arc::new(arrow::array::StringViewArray::from_iter_values(["short one", &long, "a text that no view holds", &long]));
        let item = Arc::new(Field::new("item", DataType::Struct(window_fields()), false));
        let list = windows(&texts, 64, &item).unwrap();
        assert_eq!(list.value_length(0), 1);
        assert_eq!(list.value_length(1), 9);
        let parts = list.values().as_struct().column(3).as_string_view().clone();
        assert_eq!(parts.value(0), "short one");
        assert_eq!(parts.iter().skip(1).take(9).flatten().collect::<String>(), long);
        assert_eq!(parts.value(10), "a text that no view holds");
        let blocks: usize = parts.data_buffers().iter().map(Buffer::capacity).sum();
        assert!(blocks <= 2 * long.len() + 64, "{blocks}");
    }
}
