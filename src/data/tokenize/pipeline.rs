//! One thread reads, several encode, the caller's takes the results in order: the output does not
//! depend on the number of threads. Text in flight is bounded, and with it the memory used.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

use tokenizers::Tokenizer;

use super::documents::{Rules, Skipped, for_each_document};
use super::encoder::Encoder;
use super::reader::{TextBatch, read_sources};
use super::sources::Source;
use crate::Result;

/// Bytes of text that have been read but not been taken yet.
const MAX_IN_FLIGHT: usize = 128 << 20;

/// An encoded batch.
#[derive(Default)]
pub struct Encoded {
    pub train: EncodedDocuments,
    pub validation: EncodedDocuments,
    pub skipped: Skipped,
    /// Bytes of the input files that the batch was made of.
    pub disk_bytes: u64,
}

/// The ids of documents, one after the other.
#[derive(Default)]
pub struct EncodedDocuments {
    pub ids: Vec<u32>,
    pub ends: Vec<DocumentEnd>,
}

/// Where a document, or a part of a long one, ends.
pub struct DocumentEnd {
    /// Number of ids up to here.
    pub ids: usize,
    /// Bytes of its text.
    pub source_bytes: u64,
    /// Whether the document itself ends here.
    pub complete: bool,
}

/// How to encode.
pub struct Encoding<'a> {
    pub tokenizer: &'a Tokenizer,
    pub eos_id: u32,
    pub rules: &'a Rules,
    /// Whether a document of that hash belongs to the validation split.
    pub is_validation: &'a (dyn Fn(u64) -> bool + Sync),
}

/// Reads and encodes the sources with `threads` encoding threads and hands the batches to `take`
/// in order. The first error, in order of the input, ends it.
pub fn encode_sources(
    sources: &[Source],
    encoding: &Encoding,
    threads: usize,
    mut take: impl FnMut(Encoded) -> Result<()>,
) -> Result<()> {
    let budget = Budget::default();
    let (batch_sender, batches) = channel();
    let batches = Mutex::new(batches);
    let (encoded_sender, encoded) = channel();
    thread::scope(|scope| {
        // Dropped on every way out, before the scope waits for its threads.
        let closer = CloseOnDrop(&budget);
        scope.spawn(|| read(sources, &encoding.rules.text_field, &budget, batch_sender));
        for _ in 0..threads {
            let encoded_sender = encoded_sender.clone();
            scope.spawn(|| encode(encoding, &batches, encoded_sender));
        }
        drop(encoded_sender);
        let outcome = in_order(encoded, |bytes, batch| {
            take(batch)?;
            closer.0.release(bytes);
            Ok(())
        });
        drop(closer);
        outcome
    })
}

/// A batch, or the error that stands in its place, with its number and its size.
struct Numbered<T> {
    number: u64,
    bytes: usize,
    content: Result<T>,
}

fn read(
    sources: &[Source],
    text_field: &str,
    budget: &Budget,
    sender: Sender<Numbered<TextBatch>>,
) {
    let mut number = 0;
    let mut send = |bytes, content| {
        let numbered = Numbered {
            number,
            bytes,
            content,
        };
        number += 1;
        sender.send(numbered).is_ok()
    };
    let outcome = read_sources(sources, text_field, &mut |batch| {
        let bytes = batch.buffer.len();
        budget.acquire(bytes) && send(bytes, Ok(batch))
    });
    if let Err(error) = outcome {
        send(0, Err(error));
    }
}

fn encode(
    encoding: &Encoding,
    batches: &Mutex<Receiver<Numbered<TextBatch>>>,
    sender: Sender<Numbered<Encoded>>,
) {
    let mut encoder = Encoder::new(encoding.tokenizer);
    loop {
        let next = batches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        let Ok(batch) = next else {
            return;
        };
        let encoded = Numbered {
            number: batch.number,
            bytes: batch.bytes,
            content: batch
                .content
                .and_then(|batch| encode_batch(&batch, encoding, &mut encoder)),
        };
        if sender.send(encoded).is_err() {
            return;
        }
    }
}

fn encode_batch(batch: &TextBatch, encoding: &Encoding, encoder: &mut Encoder) -> Result<Encoded> {
    let mut encoded = Encoded {
        disk_bytes: batch.disk_bytes,
        ..Encoded::default()
    };
    encoded.skipped = for_each_document(batch, encoding.rules, |document| {
        let split = match (encoding.is_validation)(document.hash) {
            true => &mut encoded.validation,
            false => &mut encoded.train,
        };
        encoder.encode(&document.text, &mut split.ids)?;
        if document.complete {
            split.ids.push(encoding.eos_id);
        }
        split.ends.push(DocumentEnd {
            ids: split.ids.len(),
            source_bytes: document.text.len() as u64,
            complete: document.complete,
        });
        Ok(())
    })?;
    Ok(encoded)
}

/// Hands on the batches by their numbers, whatever the order they arrive in.
fn in_order(
    encoded: Receiver<Numbered<Encoded>>,
    mut take: impl FnMut(usize, Encoded) -> Result<()>,
) -> Result<()> {
    let mut waiting = BTreeMap::new();
    let mut next = 0;
    for arrived in encoded {
        waiting.insert(arrived.number, arrived);
        while let Some(batch) = waiting.remove(&next) {
            take(batch.bytes, batch.content?)?;
            next += 1;
        }
    }
    Ok(())
}

/// Bytes in flight; the reader waits when there are too many.
#[derive(Default)]
struct Budget {
    state: Mutex<InFlight>,
    changed: Condvar,
}

#[derive(Default)]
struct InFlight {
    bytes: usize,
    closed: bool,
}

impl Budget {
    /// Waits for room (a batch that is larger than all of it waits to be alone); `false` when
    /// nobody wants more.
    fn acquire(&self, bytes: usize) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self
            .changed
            .wait_while(state, |state| {
                !state.closed && state.bytes > 0 && state.bytes + bytes > MAX_IN_FLIGHT
            })
            .unwrap_or_else(PoisonError::into_inner);
        state.bytes += bytes;
        !state.closed
    }

    fn release(&self, bytes: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.bytes -= bytes;
        self.changed.notify_all();
    }

    fn close(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.closed = true;
        self.changed.notify_all();
    }
}

struct CloseOnDrop<'a>(&'a Budget);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}
