//! Documents from Parquet and JSON lines: batches of bounded size, and a list of the rows that cannot be used.
//!
//! A file that is damaged as a whole is an error. A row that cannot be used is a `Reject`: it is listed with its place,
//! and the run fails when rejects exceed the share that the pipeline file allows.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, StringViewBuilder, new_null_array};
use arrow::compute::{cast, filter_record_batch};
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::arrow::{ProjectionMask, parquet_to_arrow_schema};
use parquet::basic::{ConvertedType, Repetition, Type as PhysicalType};
use parquet::errors::ParquetError;
use parquet::schema::types::{SchemaDescriptor, Type};
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use trommel_core::error::{Error, Result};
use trommel_spec::plan::Source;

/// What can be said of sources before they are read.
pub mod check;

/// Text bytes that a batch aims at; one document can exceed it.
const BATCH_BYTES: usize = 4 << 20;
/// Rows that a batch never exceeds.
const BATCH_ROWS: usize = 8192;
/// The longest document, in bytes: Arrow's string columns end here, and so do Parquet's.
const DOCUMENT_BYTES_MAX: usize = i32::MAX as usize;

/// One file of documents.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// Where it lies.
    pub path: PathBuf,
    /// The column that holds the text.
    pub text: String,
    /// The column that identifies a document, if any.
    pub id: Option<String>,
}

/// A row that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reject {
    /// Row of the file, from 0; for JSON lines, the line minus one.
    pub row: i64,
    /// Why, in words.
    pub reason: String,
}

/// Some usable documents, in the order of the file, and the rows among them that are not.
#[derive(Debug)]
pub struct Rows {
    /// Columns of [`schema`].
    pub batch: RecordBatch,
    /// Rows left out of the batch.
    pub rejects: Vec<Reject>,
    /// Bytes of the file, as it lies on disk, that were read for this batch, about.
    pub consumed: u64,
}

/// The columns of a batch: `row`, `id` (null without an id column), `text`.
pub fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("row", DataType::Int64, false),
        Field::new("id", DataType::Utf8View, true),
        Field::new("text", DataType::Utf8View, false),
    ]))
}

/// An iterator over the documents of a file.
pub type RowsIterator = Box<dyn Iterator<Item = Result<Rows>> + Send>;

impl SourceFile {
    /// Opens the file and checks its columns.
    pub fn read(&self) -> Result<RowsIterator> {
        let result = match is_parquet(&self.path) {
            true => self.read_parquet(),
            false => self.read_lines(),
        };
        let name = self.path.display().to_string();
        let rows = result.map_err(|e| e.file(&name))?;
        Ok(Box::new(rows.map(move |r| r.map_err(|e| e.file(&name)))))
    }

    /// A reader of a Parquet file, and the columns that matter.
    fn open_columns(&self) -> Result<(ParquetRecordBatchReaderBuilder<File>, Vec<usize>)> {
        let broken = |e| {
            Error::data("not a whole Parquet file")
                .source(e)
                .hint("the file is cut short or of another kind: copy it again or remove it")
        };
        let (fields, builder) = open_parquet(open(&self.path)?).map_err(broken)?;
        let mut columns = vec![text_column(&fields, &self.text)?];
        if let Some(id) = &self.id {
            columns.push(column(&fields, id, "id")?);
        }
        Ok((builder, columns))
    }

    fn read_parquet(&self) -> Result<RowsIterator> {
        let (builder, columns) = self.open_columns()?;
        let rows = builder.metadata().file_metadata().num_rows().max(1) as usize;
        let bytes: i64 = builder
            .metadata()
            .row_groups()
            .iter()
            .flat_map(|g| g.columns())
            .filter(|c| c.column_path().parts().first() == Some(&self.text))
            .map(|c| c.uncompressed_size())
            .sum();
        let batch_rows = (BATCH_BYTES * rows / (bytes.max(1) as usize)).clamp(1, BATCH_ROWS);
        let mask = ProjectionMask::roots(builder.parquet_schema(), columns);
        let reader = builder.with_projection(mask).with_batch_size(batch_rows).build().map_err(unreadable)?;
        let row_bytes = size(&self.path) as f64 / rows as f64;
        Ok(Box::new(ParquetRows { reader, text: self.text.clone(), id: self.id.clone(), row: 0, row_bytes }))
    }

    fn read_lines(&self) -> Result<RowsIterator> {
        let (lines, consumed) = open_lines(&self.path)?;
        Ok(Box::new(Lines {
            lines,
            text: self.text.clone(),
            id: self.id.clone(),
            line: 0,
            buffer: Vec::new(),
            ended: false,
            consumed,
        }))
    }
}

/// The columns of a Parquet file, and a reader that gives those of strings as views of bytes: where the encoding of a text is
/// broken, a cast to strings loses that text, and not the file.
pub fn open_parquet(file: File) -> Result<(Fields, ParquetRecordBatchReaderBuilder<File>), ParquetError> {
    let declared = ArrowReaderMetadata::load(&file, ArrowReaderOptions::new())?;
    let root = declared.parquet_schema().root_schema();
    let is_string = |field: &Type| {
        let info = field.get_basic_info();
        field.is_primitive() && info.repetition() != Repetition::REPEATED && info.converted_type() == ConvertedType::UTF8
    };
    let strings: Vec<&str> = root.get_fields().iter().filter(|field| is_string(field)).map(|field| field.name()).collect();
    let fields = root.get_fields().iter().map(|field| {
        if !is_string(field) {
            return Ok(Arc::clone(field));
        }
        let bytes = Type::primitive_type_builder(field.name(), PhysicalType::BYTE_ARRAY);
        bytes.with_repetition(field.get_basic_info().repetition()).build().map(Arc::new)
    });
    let root = Type::group_type_builder(root.name()).with_fields(fields.collect::<Result<_, _>>()?).build()?;
    let schema = Arc::new(SchemaDescriptor::new(Arc::new(root)));
    let fields = parquet_to_arrow_schema(&schema, None)?.fields().clone();
    let views = fields.iter().map(|field| match strings.contains(&field.name().as_str()) {
        true => Arc::new(field.as_ref().clone().with_data_type(DataType::BinaryView)),
        false => Arc::clone(field),
    });
    let views = Arc::new(Schema::new(views.collect::<Fields>()));
    let options = ArrowReaderOptions::new().with_parquet_schema(schema).with_schema(views);
    let builder = ParquetRecordBatchReaderBuilder::try_new_with_options(file, options)?;
    Ok((declared.schema().fields().clone(), builder))
}

/// Whether a file's name says that it is Parquet; else it holds JSON lines.
pub fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("parquet"))
}

/// A buffered reader of decompressed text.
pub type TextReader = BufReader<Box<dyn Read + Send>>;

/// Opens a text file, decompressing as its name says; the number counts the bytes read from disk.
pub fn open_lines(path: &Path) -> Result<(TextReader, Arc<AtomicU64>)> {
    let consumed = Arc::new(AtomicU64::new(0));
    let file = Counted { file: open(path)?, consumed: Arc::clone(&consumed) };
    let name = path.to_string_lossy().to_lowercase();
    let decoder: Box<dyn Read + Send> = if name.ends_with(".gz") {
        Box::new(flate2::read::MultiGzDecoder::new(file))
    } else if name.ends_with(".zst") {
        Box::new(zstd::Decoder::new(file).map_err(|e| Error::data("cannot start to decompress").source(e))?)
    } else {
        Box::new(file)
    };
    let mut lines = BufReader::with_capacity(1 << 18, decoder);
    // The byte order mark, which some programs write before UTF-8.
    if lines.fill_buf().map_err(|e| unreadable(e).at(1, 1))?.starts_with("\u{feff}".as_bytes()) {
        lines.consume("\u{feff}".len());
    }
    Ok((lines, consumed))
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| Error::data("cannot open the file").source(e).hint("check the path and its permissions"))
}

/// The documents of a small source, such as a domain set.
#[derive(Debug, Clone, Default)]
pub struct Texts {
    /// The usable ones, in order.
    pub texts: Vec<String>,
    /// Rows that cannot be used, with their file.
    pub rejects: Vec<(PathBuf, Reject)>,
}

/// Reads every document of a small source into memory; at least one must be usable.
pub fn read_texts(source: &Source) -> Result<Texts> {
    let mut found = Texts::default();
    for path in &source.files {
        let file = SourceFile { path: path.clone(), text: source.text.clone(), id: None };
        for rows in file.read()? {
            let rows = rows?;
            found.texts.extend(rows.batch.column(2).as_string_view().iter().flatten().map(str::to_owned));
            found.rejects.extend(rows.rejects.into_iter().map(|reject| (path.clone(), reject)));
        }
    }
    match found.texts.is_empty() {
        true => {
            Err(Error::data(format!("`{}` holds no text", source.name)).hint("check the path and the name of the text column"))
        }
        false => Ok(found),
    }
}

/// The size in bytes of a file on disk, 0 if it is gone.
pub fn size(path: &Path) -> u64 {
    path.metadata().map_or(0, |m| m.len())
}

fn column(fields: &Fields, name: &str, key: &str) -> Result<usize> {
    fields.iter().position(|f| f.name() == name).ok_or_else(|| none_named(name, key, fields.iter().map(|f| f.name().as_str())))
}

/// No column, or key of JSON, has the name that the setting `key` gives.
fn none_named<'a>(name: &str, key: &str, others: impl Iterator<Item = &'a str>) -> Error {
    let others = others.map(|other| format!("`{other}`")).collect::<Vec<_>>().join(", ");
    Error::data(format!("there is no column `{name}`"))
        .hint(format!("the columns are {others}; name one of them with the setting `{key}`"))
}

fn text_column(fields: &Fields, name: &str) -> Result<usize> {
    let is_text = |t: &DataType| match t {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, value) => matches!(**value, DataType::Utf8 | DataType::LargeUtf8),
        _ => false,
    };
    let index = column(fields, name, "text")?;
    if is_text(fields[index].data_type()) {
        return Ok(index);
    }
    let texts: Vec<String> = fields.iter().filter(|f| is_text(f.data_type())).map(|f| format!("`{}`", f.name())).collect();
    let hint = match texts.is_empty() {
        true => "no column of this file holds text".to_owned(),
        false => format!("the columns that hold text are {}; name one of them with the setting `text`", texts.join(", ")),
    };
    Err(Error::data(format!("the column `{name}` holds {}, not text", fields[index].data_type())).hint(hint))
}

fn unreadable(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::data("the file is damaged").source(error).hint("copy it again, or leave it out")
}

struct ParquetRows {
    reader: ParquetRecordBatchReader,
    text: String,
    id: Option<String>,
    row: i64,
    row_bytes: f64,
}

impl ParquetRows {
    fn convert(&mut self, batch: &RecordBatch) -> Result<Rows> {
        let first = self.row;
        self.row += batch.num_rows() as i64;
        let get = |name: &str| batch.column_by_name(name).ok_or_else(|| Error::internal("a projected column is missing"));
        let text = cast(get(&self.text)?, &DataType::Utf8View).map_err(unreadable)?;
        let id = match &self.id {
            Some(name) => cast(get(name)?, &DataType::Utf8View)
                .map_err(|e| Error::data(format!("the column `{name}` cannot identify documents")).source(e))?,
            None => new_null_array(&DataType::Utf8View, batch.num_rows()),
        };
        let rows = Int64Array::from_iter_values(first..self.row);
        let batch = RecordBatch::try_new(nullable(), vec![Arc::new(rows), id, text]).map_err(unreadable)?;
        let consumed = (batch.num_rows() as f64 * self.row_bytes) as u64;
        let broken = |name: &str, i: usize| {
            let value = get(name).ok()?.as_binary_view_opt()?;
            let error = value.is_valid(i).then(|| std::str::from_utf8(value.value(i)).err())??;
            Some(format!("`{name}` is invalid UTF-8 at byte {}", error.valid_up_to() + 1))
        };
        Ok(Rows { consumed, ..keep_usable(&batch, (&self.text, self.id.as_deref()), Vec::new(), broken)? })
    }
}

impl Iterator for ParquetRows {
    type Item = Result<Rows>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.reader.next()?;
        Some(batch.map_err(|e| unreadable(e).row(self.row as u64)).and_then(|b| self.convert(&b)))
    }
}

/// [`schema`] before unusable rows are taken out.
fn nullable() -> SchemaRef {
    Arc::new(Schema::new(
        schema().fields().iter().map(|f| f.as_ref().clone().with_nullable(f.name() != "row")).collect::<Vec<_>>(),
    ))
}

/// Moves the rows without text, or without an identifier where there should be one, to the rejects. `broken` says what is
/// wrong with a value of a column that is null here and not in the file.
fn keep_usable(
    batch: &RecordBatch,
    (text_column, id_column): (&str, Option<&str>),
    mut rejects: Vec<Reject>,
    broken: impl Fn(&str, usize) -> Option<String>,
) -> Result<Rows> {
    let (rows, ids, texts) = (batch.column(0), batch.column(1).as_string_view(), batch.column(2).as_string_view());
    let rows = rows.as_primitive::<arrow::datatypes::Int64Type>();
    let reason = |i: usize| match () {
        () if texts.is_null(i) => Some(broken(text_column, i).unwrap_or_else(|| "the text is null".to_owned())),
        () if texts.value(i).trim_ascii().is_empty() => Some("the text is empty".to_owned()),
        () => {
            let name = id_column.filter(|_| ids.is_null(i))?;
            Some(broken(name, i).unwrap_or_else(|| format!("the identifier `{name}` is null")))
        }
    };
    let mut usable = Vec::with_capacity(batch.num_rows());
    for i in 0..batch.num_rows() {
        let reason = reason(i);
        usable.push(reason.is_none());
        rejects.extend(reason.map(|reason| Reject { row: rows.value(i), reason }));
    }
    let kept =
        filter_record_batch(batch, &BooleanArray::from(usable)).and_then(|b| b.with_schema(nullable())).map_err(unreadable)?;
    let batch = RecordBatch::try_new(schema(), kept.columns().to_vec()).map_err(unreadable)?;
    Ok(Rows { batch, rejects, consumed: 0 })
}

struct Lines {
    lines: TextReader,
    text: String,
    id: Option<String>,
    line: i64,
    buffer: Vec<u8>,
    ended: bool,
    consumed: Arc<AtomicU64>,
}

/// A file that counts the bytes read from it, below any decompression.
struct Counted {
    file: File,
    consumed: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.consumed.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

impl Lines {
    fn batch(&mut self) -> Result<Option<Rows>> {
        let (mut rows, mut ids, mut texts) = (Vec::new(), StringViewBuilder::new(), StringViewBuilder::new());
        let (mut rejects, mut bytes) = (Vec::new(), 0);
        while !self.ended && bytes < BATCH_BYTES && rows.len() + rejects.len() < BATCH_ROWS {
            self.buffer.clear();
            let read = self.read_line().map_err(|e| unreadable(e).at(self.line as u64 + 1, 1))?;
            self.ended = read == 0;
            if self.buffer.trim_ascii().is_empty() {
                self.line += i64::from(!self.ended);
                continue;
            }
            bytes += read;
            let row = self.line;
            self.line += 1;
            match self.document() {
                Ok((text, id)) => {
                    rows.push(row);
                    texts.append_option(text);
                    ids.append_option(id);
                }
                Err(reason) => rejects.push(Reject { row, reason: format!("line {}: {reason}", row + 1) }),
            }
        }
        if rows.is_empty() && rejects.is_empty() {
            return Ok(None);
        }
        let columns: Vec<ArrayRef> = vec![Arc::new(Int64Array::from(rows)), Arc::new(ids.finish()), Arc::new(texts.finish())];
        let batch = RecordBatch::try_new(nullable(), columns).map_err(unreadable)?;
        let consumed = self.consumed.swap(0, Ordering::Relaxed);
        Ok(Some(Rows { consumed, ..keep_usable(&batch, (&self.text, self.id.as_deref()), rejects, |_, _| None)? }))
    }

    /// Reads a line into the buffer, at most one byte more of it than a document may have, and passes over the rest.
    fn read_line(&mut self) -> std::io::Result<usize> {
        let read = self.lines.by_ref().take(DOCUMENT_BYTES_MAX as u64 + 1).read_until(b'\n', &mut self.buffer)?;
        if read > DOCUMENT_BYTES_MAX && self.buffer.last() != Some(&b'\n') {
            self.lines.skip_until(b'\n')?;
        }
        Ok(read)
    }

    /// Text and identifier of the line in the buffer, or why it has none.
    fn document(&self) -> Result<(Option<String>, Option<String>), String> {
        if self.buffer.len() > DOCUMENT_BYTES_MAX {
            return Err(format!(
                "{} bytes are more than the {DOCUMENT_BYTES_MAX} that one document may have",
                self.buffer.len()
            ));
        }
        let line = std::str::from_utf8(self.buffer.trim_ascii_end())
            .map_err(|e| format!("invalid UTF-8 at byte {}", e.valid_up_to() + 1))?;
        let mut deserializer = serde_json::Deserializer::from_str(line);
        let found = Keys { text: &self.text, id: self.id.as_deref() }.deserialize(&mut deserializer);
        let (text, id) = found.and_then(|f| deserializer.end().map(|()| f)).map_err(not_an_object)?;
        let text = match text {
            None => return Err(format!("there is no key `{}`", self.text)),
            Some(Value::String(text)) => Some(text),
            Some(Value::Null) => None,
            Some(other) => return Err(format!("`{}` is {}, not text", self.text, kind(&other))),
        };
        let id = match id {
            Some(Value::String(id)) => Some(id),
            Some(Value::Number(id)) => Some(id.to_string()),
            _ => None,
        };
        Ok((text, id))
    }
}

impl Iterator for Lines {
    type Item = Result<Rows>;

    fn next(&mut self) -> Option<Self::Item> {
        self.batch().transpose()
    }
}

/// The parser names the line too, of the one line that it sees.
fn not_an_object(error: serde_json::Error) -> String {
    let text = error.to_string();
    let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
    format!("not a JSON object: {what}, at column {}", error.column())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::Array(_) => "a list",
        _ => "an object",
    }
}

/// The two keys of a JSON object that matter; all others are skipped without being built.
struct Keys<'a> {
    text: &'a str,
    id: Option<&'a str>,
}

impl<'de> DeserializeSeed<'de> for Keys<'_> {
    type Value = (Option<Value>, Option<Value>);

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Keys<'_> {
    type Value = (Option<Value>, Option<Value>);

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut text, mut id) = (None, None);
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            if key == self.text {
                let value: Value = map.next_value()?;
                if self.id == Some(self.text) {
                    id = Some(value.clone());
                }
                text = Some(value);
            } else if Some(&*key) == self.id {
                id = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok((text, id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    type Found = (Vec<(i64, String)>, Vec<Reject>);

    fn read(name: &str, content: &[u8], id: Option<&str>) -> Result<Found> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let file = SourceFile { path, text: "text".into(), id: id.map(str::to_owned) };
        let (mut documents, mut rejects) = (Vec::new(), Vec::new());
        for rows in file.read()? {
            let rows = rows?;
            let numbers = rows.batch.column(0).as_primitive::<arrow::datatypes::Int64Type>();
            let texts = rows.batch.column(2).as_string_view();
            documents.extend((0..rows.batch.num_rows()).map(|i| (numbers.value(i), texts.value(i).to_owned())));
            rejects.extend(rows.rejects);
        }
        Ok((documents, rejects))
    }

    #[test]
    fn bad_lines_are_listed_with_their_line() {
        let lines = b"{\"text\":\"one\",\"n\":{\"a\":[1]}}\n\nnot json\n{\"text\":null}\n{\"text\":7}\n{\"txt\":\"x\"}\n{\"text\":\"\xff\"}\n{\"text\":\" \"}\n{\"text\":\"two\"}";
        let (documents, rejects) = read("a.jsonl", lines, None).unwrap();
        assert_eq!(documents, [(0, "one".to_owned()), (8, "two".to_owned())]);
        let mut listed: Vec<String> = rejects.iter().map(|r| format!("{} {}", r.row, r.reason)).collect();
        listed.sort();
        assert_eq!(
            listed,
            [
                "2 line 3: not a JSON object: expected ident, at column 2",
                "3 the text is null",
                "4 line 5: `text` is a number, not text",
                "5 line 6: there is no key `text`",
                "6 line 7: invalid UTF-8 at byte 10",
                "7 the text is empty",
            ]
        );
    }

    #[test]
    fn a_broken_encoding_in_parquet_costs_its_row() {
        use parquet::data_type::{ByteArray, ByteArrayType};
        use parquet::file::writer::SerializedFileWriter;
        let message = "message m { optional binary text (UTF8); required binary id (UTF8); required int32 n; }";
        let schema = Arc::new(parquet::schema::parser::parse_message_type(message).unwrap());
        let mut content = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut content, schema, Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let texts: [&[u8]; 4] = [b"one", b"caf\xe9", b" ", "zw\u{f6}lf".as_bytes()];
        let ids: [&[u8]; 5] = [b"a", b"b", b"c", b"d", b"\xff"];
        for (values, levels) in [(&texts[..], Some(&[1, 1, 0, 1, 1][..])), (&ids[..], None)] {
            let mut column = group.next_column().unwrap().unwrap();
            let values: Vec<ByteArray> = values.iter().map(|value| ByteArray::from(value.to_vec())).collect();
            column.typed::<ByteArrayType>().write_batch(&values, levels, None).unwrap();
            column.close().unwrap();
        }
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<parquet::data_type::Int32Type>().write_batch(&[1, 2, 3, 4, 5], None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();

        let listed =
            |rejects: Vec<Reject>| -> Vec<String> { rejects.iter().map(|r| format!("{} {}", r.row, r.reason)).collect() };
        let (documents, rejects) = read("a.parquet", &content, None).unwrap();
        assert_eq!(documents, [(0, "one".to_owned()), (4, "zw\u{f6}lf".to_owned())]);
        let broken = ["1 `text` is invalid UTF-8 at byte 4", "2 the text is null", "3 the text is empty"];
        assert_eq!(listed(rejects), broken);
        let (documents, rejects) = read("a.parquet", &content, Some("id")).unwrap();
        assert_eq!(documents, [(0, "one".to_owned())]);
        assert_eq!(listed(rejects), [&broken[..], &["4 `id` is invalid UTF-8 at byte 1"]].concat());
    }

    #[test]
    fn compressed_lines_and_identifiers() {
        let lines = b"\xef\xbb\xbf{\"text\":\"one\",\"id\":7}\n{\"text\":\"two\"}\n";
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(lines).unwrap();
        let gz = gz.finish().unwrap();
        for (name, content) in [("a.jsonl.gz", gz.clone()), ("a.jsonl.zst", zstd::encode_all(&lines[..], 1).unwrap())] {
            let (documents, rejects) = read(name, &content, Some("id")).unwrap();
            assert_eq!(documents.len(), 1, "{name}");
            assert_eq!(rejects[0].reason, "the identifier `id` is null");
        }
        let error = read("a.jsonl.gz", &gz[..gz.len() - 9], None).unwrap_err().to_string();
        assert!(error.contains("a.jsonl.gz:") && error.contains("damaged"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_parquet() {
        let error = read("a.parquet", b"PAR2 nothing", None).unwrap_err().to_string();
        assert!(error.contains("a.parquet: not a whole Parquet file"), "{error}");
    }
}
