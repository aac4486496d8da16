//! Files to batches of raw documents, in order, on one thread and in bounded memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::read::MultiGzDecoder;
use xxhash_rust::xxh3::Xxh3Default;

use super::gpt2::last_safe_cut;
use super::parquet::read_parquet;
use super::sources::{Compression, Format, Source};
use crate::error::IoContext;
use crate::{Error, Result};

/// A batch is full when it holds this many bytes.
const BATCH_BYTES: usize = 1 << 20;

/// A text file longer than this is read in parts.
const MAX_WHOLE_FILE: usize = 16 << 20;

/// Length of those parts, and of the longest JSON line.
const PART_BYTES: usize = 1 << 20;
const MAX_LINE: usize = 64 << 20;

/// Raw documents that lie one after the other in a buffer.
#[derive(Default)]
pub struct TextBatch {
    pub buffer: Vec<u8>,
    pub pieces: Vec<Piece>,
    /// Bytes of the input files that were read to make this batch.
    pub disk_bytes: u64,
}

/// A document, or a part of a long one.
pub struct Piece {
    pub source: Arc<Source>,
    /// Number of the line or row, from 1; 0 for a whole file.
    pub row: u64,
    pub range: Range<usize>,
    pub kind: PieceKind,
}

#[derive(Clone, Copy)]
pub enum PieceKind {
    Document,
    /// The document is in a field of this JSON object.
    JsonLine,
    /// A part of a document whose hash is known already; it is known to be UTF-8, too.
    Part {
        hash: u64,
        last: bool,
    },
    /// A long file that turned out not to be UTF-8.
    NotUtf8,
}

/// Reads the sources and hands each batch to `emit`, until it returns `false`.
pub fn read_sources(
    sources: &[Source],
    text_field: &str,
    emit: &mut dyn FnMut(TextBatch) -> bool,
) -> Result<()> {
    let mut batcher = Batcher {
        batch: TextBatch::default(),
        emit,
        stopped: false,
    };
    for source in sources {
        let source = Arc::new(source.clone());
        match source.format {
            Format::Text => read_text(&source, &mut batcher)?,
            Format::JsonLines => read_lines(&source, &mut batcher)?,
            Format::Parquet => read_parquet(&source, text_field, &mut batcher)?,
        }
        if batcher.stopped {
            return Ok(());
        }
    }
    batcher.flush();
    Ok(())
}

/// Collects documents into batches.
pub(super) struct Batcher<'a> {
    batch: TextBatch,
    emit: &'a mut dyn FnMut(TextBatch) -> bool,
    /// Nobody wants more.
    pub(super) stopped: bool,
}

impl Batcher<'_> {
    /// Adds a document (or a part of one) that lies in `bytes`.
    pub(super) fn push(&mut self, source: &Arc<Source>, row: u64, kind: PieceKind, bytes: &[u8]) {
        let start = self.batch.buffer.len();
        self.batch.buffer.extend_from_slice(bytes);
        self.add_piece(source, row, kind, start);
    }

    pub(super) fn add_disk_bytes(&mut self, bytes: u64) {
        self.batch.disk_bytes += bytes;
    }

    /// Adds what was appended to the buffer since `start`.
    fn add_piece(&mut self, source: &Arc<Source>, row: u64, kind: PieceKind, start: usize) {
        self.batch.pieces.push(Piece {
            source: Arc::clone(source),
            row,
            range: start..self.batch.buffer.len(),
            kind,
        });
        if self.batch.buffer.len() >= BATCH_BYTES {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        if !self.stopped && !(self.emit)(batch) {
            self.stopped = true;
        }
    }
}

/// A source's text, decompressed, which counts the bytes that it takes from the disk.
struct Stream {
    text: Box<dyn Read>,
    disk_bytes: Arc<AtomicU64>,
}

struct Counted {
    file: File,
    bytes: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let bytes = self.file.read(buffer)?;
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}

impl Stream {
    fn open(source: &Source) -> Result<Self> {
        let disk_bytes = Arc::new(AtomicU64::new(0));
        let file = Counted {
            file: File::open(&source.path).at("open", &source.path)?,
            bytes: Arc::clone(&disk_bytes),
        };
        let text: Box<dyn Read> = match source.compression {
            Compression::None => Box::new(file),
            Compression::Gzip => Box::new(MultiGzDecoder::new(BufReader::new(file))),
            Compression::Zstd => Box::new(zstd::Decoder::new(file).at("decompress", &source.path)?),
        };
        Ok(Self { text, disk_bytes })
    }

    /// Bytes read from the disk since the last call.
    fn take_disk_bytes(&self) -> u64 {
        self.disk_bytes.swap(0, Ordering::Relaxed)
    }

    /// Appends up to `limit` bytes to `buffer`; fewer only at the end.
    fn read_up_to(&mut self, limit: usize, buffer: &mut Vec<u8>) -> std::io::Result<usize> {
        (&mut self.text).take(limit as u64).read_to_end(buffer)
    }
}

/// A text file: one document.
fn read_text(source: &Arc<Source>, batcher: &mut Batcher) -> Result<()> {
    let mut stream = Stream::open(source)?;
    let start = batcher.batch.buffer.len();
    let bytes = stream
        .read_up_to(MAX_WHOLE_FILE + 1, &mut batcher.batch.buffer)
        .at("read", &source.path)?;
    if bytes > MAX_WHOLE_FILE {
        batcher.batch.buffer.truncate(start);
        return read_long_text(source, batcher);
    }
    batcher.add_disk_bytes(stream.take_disk_bytes());
    batcher.add_piece(source, 0, PieceKind::Document, start);
    Ok(())
}

/// A long text file, read twice: whether it is UTF-8 and what its hash is must be known before
/// its first part can be used.
fn read_long_text(source: &Arc<Source>, batcher: &mut Batcher) -> Result<()> {
    let Some(hash) = hash_if_utf8(source)? else {
        batcher.add_disk_bytes(source.bytes);
        batcher.push(source, 0, PieceKind::NotUtf8, &[]);
        return Ok(());
    };
    let mut stream = Stream::open(source)?;
    let mut text = Vec::new();
    loop {
        let wanted = PART_BYTES + text.len();
        let bytes = stream
            .read_up_to(PART_BYTES, &mut text)
            .at("read", &source.path)?;
        batcher.add_disk_bytes(stream.take_disk_bytes());
        let last = bytes < PART_BYTES;
        let cut = match last {
            true => Some(text.len()),
            false => last_safe_cut(&text),
        };
        // Text without a blank is cut anywhere between two characters, once it gets too long.
        let cut = cut.or_else(|| (wanted > MAX_WHOLE_FILE).then(|| last_char_start(&text)));
        if let Some(cut) = cut {
            batcher.push(source, 0, PieceKind::Part { hash, last }, &text[..cut]);
            text.drain(..cut);
        }
        if last || batcher.stopped {
            return Ok(());
        }
    }
}

/// The hash of a whole text, or `None` when it is not UTF-8.
fn hash_if_utf8(source: &Source) -> Result<Option<u64>> {
    let mut stream = Stream::open(source)?;
    let mut hash = Xxh3Default::new();
    let mut text = Vec::new();
    loop {
        let bytes = stream
            .read_up_to(PART_BYTES, &mut text)
            .at("read", &source.path)?;
        let valid = match std::str::from_utf8(&text) {
            Ok(_) => text.len(),
            Err(error) if error.error_len().is_none() && bytes > 0 => error.valid_up_to(),
            Err(_) => return Ok(None),
        };
        hash.update(&text[..valid]);
        text.drain(..valid);
        if bytes == 0 {
            return Ok(Some(hash.digest()));
        }
    }
}

fn last_char_start(text: &[u8]) -> usize {
    let starts_char = |byte: &u8| byte & 0xc0 != 0x80;
    text.iter().rposition(starts_char).unwrap_or(text.len())
}

/// JSON lines; what a line holds is looked at by the thread that encodes it.
fn read_lines(source: &Arc<Source>, batcher: &mut Batcher) -> Result<()> {
    let stream = Stream::open(source)?;
    let disk_bytes = Arc::clone(&stream.disk_bytes);
    let mut lines = BufReader::with_capacity(1 << 18, stream.text);
    for row in 1.. {
        let start = batcher.batch.buffer.len();
        let bytes = (&mut lines)
            .take(MAX_LINE as u64 + 1)
            .read_until(b'\n', &mut batcher.batch.buffer)
            .at("read", &source.path)?;
        batcher.add_disk_bytes(disk_bytes.swap(0, Ordering::Relaxed));
        if bytes == 0 || batcher.stopped {
            return Ok(());
        }
        if bytes > MAX_LINE {
            return Err(Error::format(
                &source.path,
                format!("line {row} is longer than {MAX_LINE} bytes: one document a line is read"),
            ));
        }
        match batcher.batch.buffer[start..].trim_ascii().is_empty() {
            true => batcher.batch.buffer.truncate(start),
            false => batcher.add_piece(source, row, PieceKind::JsonLine, start),
        }
    }
    Ok(())
}
