//! Documents from one column of a Parquet file.

use std::fs::File;
use std::sync::Arc;

use parquet::basic::Type;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::ByteArrayType;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::reader::{Batcher, PieceKind};
use super::sources::{Compression, Source};
use crate::error::IoContext;
use crate::{Error, Result};

/// Rows decoded at a time.
const ROWS: usize = 64;

/// Hands every row of column `text_field` to the batcher; a null counts as an empty document.
///
/// # Errors
/// `Format` when the file is not Parquet, damaged, or has no such column of strings.
pub(super) fn read_parquet(
    source: &Arc<Source>,
    text_field: &str,
    batcher: &mut Batcher,
) -> Result<()> {
    let path = &source.path;
    if source.compression != Compression::None {
        return Err(Error::format(
            path,
            "a compressed Parquet file cannot be read (Parquet compresses inside): unpack it",
        ));
    }
    let damaged = |error: ParquetError| Error::format(path, format!("damaged Parquet: {error}"));
    let file = SerializedFileReader::new(File::open(path).at("open", path)?).map_err(damaged)?;
    let column = text_column(&file, text_field).map_err(|what| Error::format(path, what))?;
    let columns = file.metadata().file_metadata().schema_descr();
    let max_level = columns.column(column).max_def_level();
    let mut row = 0;
    let mut disk_bytes = 0;
    for number in 0..file.num_row_groups() {
        let group = file.get_row_group(number).map_err(damaged)?;
        let ColumnReader::ByteArrayColumnReader(mut reader) =
            group.get_column_reader(column).map_err(damaged)?
        else {
            unreachable!("`text_column` takes columns of byte arrays only");
        };
        while read_rows(&mut reader, max_level, source, batcher, &mut row).map_err(damaged)? {
            if batcher.stopped {
                return Ok(());
            }
        }
        let group_bytes = group.metadata().compressed_size().max(0) as u64;
        batcher.add_disk_bytes(group_bytes);
        disk_bytes += group_bytes;
    }
    batcher.add_disk_bytes(source.bytes.saturating_sub(disk_bytes));
    Ok(())
}

/// Number of the column of strings with that name, or what is wrong.
fn text_column(
    file: &SerializedFileReader<File>,
    name: &str,
) -> std::result::Result<usize, String> {
    let columns = file.metadata().file_metadata().schema_descr().columns();
    let found = columns
        .iter()
        .position(|column| column.path().string() == name);
    let Some(index) = found else {
        let names: Vec<_> = columns
            .iter()
            .map(|column| column.path().string())
            .collect();
        return Err(format!(
            "no column `{name}`: name one of {} with --text-field",
            names.join(", ")
        ));
    };
    let column = &columns[index];
    if column.physical_type() != Type::BYTE_ARRAY || column.max_rep_level() > 0 {
        return Err(format!(
            "column `{name}` does not hold text ({}): name another with --text-field",
            column.physical_type()
        ));
    }
    Ok(index)
}

/// Reads some rows; `false` when there are none left. A row whose definition level is below
/// `max_level` is null.
fn read_rows(
    reader: &mut ColumnReaderImpl<ByteArrayType>,
    max_level: i16,
    source: &Arc<Source>,
    batcher: &mut Batcher,
    row: &mut u64,
) -> parquet::errors::Result<bool> {
    let (mut values, mut levels) = (Vec::new(), Vec::new());
    let (rows, ..) = reader.read_records(ROWS, Some(&mut levels), None, &mut values)?;
    let mut values = values.iter();
    for index in 0..rows {
        *row += 1;
        // A column without nulls has no levels.
        let is_null = levels.get(index).is_some_and(|&level| level < max_level);
        let text = match is_null {
            true => None,
            false => values.next(),
        };
        let bytes = text.map_or(&[][..], |text| text.data());
        batcher.push(source, *row, PieceKind::Document, bytes);
    }
    Ok(rows > 0)
}
