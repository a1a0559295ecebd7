//! Figures as tables.

use comfy_table::{CellAlignment, Table, presets};

/// A table whose first `texts` columns are texts and whose others are figures, set to the right.
pub(crate) fn table(header: &[&str], texts: usize, rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header.iter().copied());
    rows.into_iter().for_each(|row| {
        table.add_row(row);
    });
    table.column_iter_mut().skip(texts).for_each(|column| {
        column.set_cell_alignment(CellAlignment::Right);
    });
    table.to_string()
}

/// A number that is not known as `-`.
pub(crate) fn known(number: Option<u64>) -> String {
    number.map_or_else(|| "-".to_owned(), |n| n.to_string())
}

/// Bytes in a unit that people read.
pub(crate) fn bytes(number: Option<u64>) -> String {
    number.map_or_else(|| "-".to_owned(), |n| bytesize::ByteSize(n).display().si().to_string())
}
