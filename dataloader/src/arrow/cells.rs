//! Values of Arrow's arrays as values of rows.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch, StructArray, downcast_primitive_array};
use arrow_schema::DataType;
use ulmus_chat::{Cell, Row};

/// A row of a batch.
pub(crate) fn row(batch: &RecordBatch, row: usize) -> Row {
    let schema = batch.schema_ref();
    let columns = schema.fields().iter().zip(batch.columns());
    Row(columns.map(|(field, column)| (field.name().clone(), cell(column, row))).collect())
}

/// A value of an array.
pub(super) fn cell(array: &dyn Array, at: usize) -> Cell {
    if array.is_null(at) {
        return Cell::Null;
    }
    match array.data_type() {
        DataType::Null => Cell::Null,
        DataType::Boolean => Cell::Bool(array.as_boolean().value(at)),
        DataType::Int8 => Cell::Int(array.as_primitive::<Int8Type>().value(at).into()),
        DataType::Int16 => Cell::Int(array.as_primitive::<Int16Type>().value(at).into()),
        DataType::Int32 => Cell::Int(array.as_primitive::<Int32Type>().value(at).into()),
        DataType::Int64 => Cell::Int(array.as_primitive::<Int64Type>().value(at)),
        DataType::UInt8 => Cell::Int(array.as_primitive::<UInt8Type>().value(at).into()),
        DataType::UInt16 => Cell::Int(array.as_primitive::<UInt16Type>().value(at).into()),
        DataType::UInt32 => Cell::Int(array.as_primitive::<UInt32Type>().value(at).into()),
        DataType::UInt64 => Cell::from(array.as_primitive::<UInt64Type>().value(at)),
        DataType::Float16 => Cell::Float(array.as_primitive::<Float16Type>().value(at).into()),
        DataType::Float32 => Cell::Float(array.as_primitive::<Float32Type>().value(at).into()),
        DataType::Float64 => Cell::Float(array.as_primitive::<Float64Type>().value(at)),
        DataType::Utf8 => Cell::from(array.as_string::<i32>().value(at)),
        DataType::LargeUtf8 => Cell::from(array.as_string::<i64>().value(at)),
        DataType::Utf8View => Cell::from(array.as_string_view().value(at)),
        DataType::Binary => bytes(array.as_binary::<i32>().value(at)),
        DataType::LargeBinary => bytes(array.as_binary::<i64>().value(at)),
        DataType::BinaryView => bytes(array.as_binary_view().value(at)),
        DataType::List(_) => list(&array.as_list::<i32>().value(at)),
        DataType::LargeList(_) => list(&array.as_list::<i64>().value(at)),
        DataType::FixedSizeList(..) => list(&array.as_fixed_size_list().value(at)),
        DataType::Struct(_) => fields(array.as_struct(), at),
        DataType::Map(..) => map(&array.as_map().value(at)),
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            match cell(dictionary.keys(), at) {
                Cell::Int(key) => {
                    usize::try_from(key).map_or(Cell::Null, |key| cell(dictionary.values(), key))
                }
                _ => Cell::Null,
            }
        }
        // Dates and times as they are stored.
        _ => downcast_primitive_array!(
            array => number(&format!("{:?}", array.value(at))),
            other => Cell::Text(format!("a value of type {other}"))
        ),
    }
}

fn number(text: &str) -> Cell {
    text.parse().map_or_else(|_| Cell::from(text), Cell::Int)
}

/// Bytes, which are text where they can be.
fn bytes(bytes: &[u8]) -> Cell {
    std::str::from_utf8(bytes).map_or_else(|_| Cell::Bytes(bytes.to_vec()), Cell::from)
}

fn list(array: &dyn Array) -> Cell {
    Cell::List((0..array.len()).map(|at| cell(array, at)).collect())
}

fn fields(array: &StructArray, at: usize) -> Cell {
    let fields = array.fields().iter().zip(array.columns());
    Cell::Struct(fields.map(|(field, column)| (field.name().clone(), cell(column, at))).collect())
}

/// The entries of a map whose keys are text, and pairs of key and value where they are not.
fn map(entries: &StructArray) -> Cell {
    let entry = |at: usize| (cell(entries.column(0), at), cell(entries.column(1), at));
    let entries: Vec<(Cell, Cell)> = (0..entries.len()).map(entry).collect();
    let named = entries.iter().map(|(key, value)| match key {
        Cell::Text(key) => Some((key.clone(), value.clone())),
        _ => None,
    });
    match named.collect() {
        Some(named) => Cell::Struct(named),
        None => Cell::List(entries.into_iter().map(|(key, value)| Cell::List(vec![key, value])).collect()),
    }
}
