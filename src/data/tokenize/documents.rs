//! What a batch of raw bytes holds: documents, checked and counted.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};
use xxhash_rust::xxh3::xxh3_64;

use super::reader::{Piece, PieceKind, TextBatch};
use crate::{Error, Result};

/// A document, or a part of a long one.
pub struct Document<'a> {
    pub text: Cow<'a, str>,
    /// xxh3-64 of the whole document.
    pub hash: u64,
    /// The document ends with this text.
    pub complete: bool,
}

/// How documents are found in a batch.
#[derive(Clone)]
pub struct Rules {
    /// The field of a JSON line that holds the document.
    pub text_field: String,
    /// Text that is not UTF-8 is an error instead of skipped.
    pub strict: bool,
}

/// Documents that were left out, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    pub empty: u64,
    pub not_utf8: u64,
}

impl Skipped {
    pub fn add(&mut self, other: Skipped) {
        self.empty += other.empty;
        self.not_utf8 += other.not_utf8;
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.empty, self.not_utf8) {
            (0, 0) => write!(f, "none"),
            (empty, 0) => write!(f, "{empty} (empty)"),
            (0, not_utf8) => write!(f, "{not_utf8} (not UTF-8)"),
            (empty, not_utf8) => write!(
                f,
                "{} ({empty} empty, {not_utf8} not UTF-8)",
                empty + not_utf8
            ),
        }
    }
}

/// Calls `each` with the documents of a batch in order, and counts those left out.
///
/// # Errors
/// `Format` when a line is not a JSON object with the text field, or, under `strict`, when a
/// document is not UTF-8; whatever `each` returns.
pub fn for_each_document<'a>(
    batch: &'a TextBatch,
    rules: &Rules,
    mut each: impl FnMut(Document<'a>) -> Result<()>,
) -> Result<Skipped> {
    let mut skipped = Skipped::default();
    for piece in &batch.pieces {
        let bytes = &batch.buffer[piece.range.clone()];
        let utf8 = match piece.kind {
            PieceKind::NotUtf8 => None,
            _ => std::str::from_utf8(bytes).ok(),
        };
        let Some(raw) = utf8 else {
            if rules.strict {
                return Err(piece.error("not UTF-8: convert it, or leave --strict away to skip it"));
            }
            skipped.not_utf8 += 1;
            continue;
        };
        let text = match piece.kind {
            PieceKind::JsonLine => {
                Cow::Owned(text_of_line(raw, &rules.text_field).map_err(|what| piece.error(what))?)
            }
            _ => Cow::Borrowed(raw),
        };
        let (hash, complete) = match piece.kind {
            PieceKind::Part { hash, last } => (hash, last),
            _ if text.is_empty() => {
                skipped.empty += 1;
                continue;
            }
            _ => (xxh3_64(text.as_bytes()), true),
        };
        each(Document {
            text,
            hash,
            complete,
        })?;
    }
    Ok(skipped)
}

impl Piece {
    fn error(&self, what: impl fmt::Display) -> Error {
        let path = &self.source.path;
        match (self.row, self.kind) {
            (0, _) => Error::format(path, what),
            (line, PieceKind::JsonLine) => Error::format(path, format!("line {line}: {what}")),
            (row, _) => Error::format(path, format!("row {row}: {what}")),
        }
    }
}

/// The text in one field of a JSON object, or what is wrong with the line.
fn text_of_line(line: &str, field: &str) -> std::result::Result<String, String> {
    // Some programs begin a file with a byte order mark.
    let line = line.strip_prefix('\u{feff}').unwrap_or(line);
    let mut json = serde_json::Deserializer::from_str(line);
    let found = json
        .deserialize_map(TextField(field))
        .and_then(|text| json.end().map(|()| text));
    match found {
        Ok(Some(text)) => Ok(text),
        // Off the fast path: say what is there instead.
        Ok(None) | Err(_) => Err(match serde_json::from_str::<Map<String, Value>>(line) {
            Err(error) => {
                // serde_json counts the lines of this one.
                let error = error
                    .to_string()
                    .replace(" at line 1 column ", " at column ");
                format!("not a JSON object: {error}")
            }
            Ok(object) if object.contains_key(field) => {
                format!("field `{field}` is not a string")
            }
            Ok(object) => {
                let fields: Vec<_> = object.keys().map(String::as_str).collect();
                format!(
                    "no field `{field}`, only {}: name the field with --text-field",
                    fields.join(", ")
                )
            }
        }),
    }
}

/// Takes one string out of a JSON object and passes over the rest.
struct TextField<'f>(&'f str);

impl<'de> Visitor<'de> for TextField<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with the field `{}`", self.0)
    }

    fn visit_map<A>(self, mut object: A) -> std::result::Result<Self::Value, A::Error>
    where
        A: MapAccess<'de>,
    {
        let mut found = None;
        while let Some(key) = object.next_key::<String>()? {
            if key == self.0 {
                found = Some(object.next_value()?);
            } else {
                object.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}
