//! TensorBoard event files: TFRecord framing around protobuf `Event` messages.
//!
//! A record is `length: u64 | masked crc32c(length): u32 | data | masked crc32c(data): u32`, little-endian
//! (`tensorflow/core/lib/io/record_writer.h`). Only the handful of fields in use are encoded, by hand, with the numbers
//! of `tensorflow/core/util/event.proto` and `framework/summary.proto`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{IoContext, Result};

/// Appends scalars and texts to one event file. Call [`flush`](Self::flush) for TensorBoard to see them.
pub struct EventWriter {
    out: BufWriter<File>,
    path: PathBuf,
}

impl EventWriter {
    /// Starts a new event file in `dir`, which is made if need be. Files already there are left alone: TensorBoard shows
    /// all of a directory's files as one run.
    ///
    /// # Errors
    /// `Io` when the directory or the file cannot be made or written.
    pub fn create(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        fs::create_dir_all(dir).at("create", dir)?;
        let (file, path) = create_event_file(dir)?;
        let mut writer = Self {
            out: BufWriter::new(file),
            path,
        };
        writer.event(0, |event| event.bytes(3, b"brain.Event:2"))?;
        writer.flush()?;
        Ok(writer)
    }

    /// Says that training (re)starts at `step`: TensorBoard drops what was recorded for `step` and later before this,
    /// so that a resumed or rolled-back run shows one curve.
    ///
    /// # Errors
    /// `Io` when the file cannot be written, as for every method below.
    pub fn session_start(&mut self, step: u64) -> Result<()> {
        const START: u64 = 1;
        self.event(step, |event| {
            event.message(7, |session_log| session_log.varint(1, START))
        })
    }

    /// Records one point of the curve `tag`.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f64) -> Result<()> {
        self.summary(step, tag, |summary_value| {
            summary_value.float(2, value as f32)
        })
    }

    /// Records `text` (Markdown) for TensorBoard's text page: a string tensor marked for its `text` plugin.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<()> {
        const DT_STRING: u64 = 7;
        self.summary(step, tag, |summary_value| {
            summary_value.message(9, |metadata| {
                metadata.message(1, |plugin| plugin.bytes(1, b"text"));
            });
            summary_value.message(8, |tensor| {
                tensor.varint(1, DT_STRING);
                tensor.message(2, |shape| shape.message(2, |dim| dim.varint(1, 1)));
                tensor.bytes(8, text.as_bytes());
            });
        })
    }

    /// Hands everything recorded so far to the operating system.
    pub fn flush(&mut self) -> Result<()> {
        self.out.flush().at("write", &self.path)
    }

    fn summary(
        &mut self,
        step: u64,
        tag: &str,
        fill_value: impl FnOnce(&mut Message),
    ) -> Result<()> {
        self.event(step, |event| {
            event.message(5, |summary| {
                summary.message(1, |summary_value| {
                    summary_value.bytes(1, tag.as_bytes());
                    fill_value(summary_value);
                })
            })
        })
    }

    fn event(&mut self, step: u64, fill: impl FnOnce(&mut Message)) -> Result<()> {
        let mut event = Message::default();
        event.double(1, unix_time());
        event.varint(2, step);
        fill(&mut event);
        write_record(&mut self.out, &event.0).at("write", &self.path)
    }
}

/// TensorBoard reads any file with `tfevents` in its name, in the order of the names.
fn create_event_file(dir: &Path) -> Result<(File, PathBuf)> {
    let seconds = unix_time() as u64;
    let process = std::process::id();
    let mut number = 0;
    loop {
        let name = format!("events.out.tfevents.{seconds:010}.titanbit.{process}.{number}");
        let path = dir.join(name);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => number += 1,
            opened => return Ok((opened.at("create", &path)?, path)),
        }
    }
}

/// Seconds since 1970.
fn unix_time() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

/// A protobuf message under construction: its bytes on the wire.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, field: u32, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u32, value: f64) {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u32, value: &[u8]) {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend(value);
    }

    fn message(&mut self, field: u32, fill: impl FnOnce(&mut Message)) {
        let mut inner = Message::default();
        fill(&mut inner);
        self.bytes(field, &inner.0);
    }

    fn float(&mut self, field: u32, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    fn key(&mut self, field: u32, wire_type: u32) {
        self.raw_varint(u64::from(field << 3 | wire_type));
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

fn write_record(out: &mut impl Write, data: &[u8]) -> io::Result<()> {
    let length = (data.len() as u64).to_le_bytes();
    out.write_all(&length)?;
    out.write_all(&masked_crc32c(&length).to_le_bytes())?;
    out.write_all(data)?;
    out.write_all(&masked_crc32c(data).to_le_bytes())
}

/// The checksum that TFRecord stores: rotated and offset, so that a checksum of data holding checksums stays sound.
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc: u32, &byte| {
        CRC32C[usize::from(crc as u8 ^ byte)] ^ crc >> 8
    })
}

/// CRC-32C (Castagnoli) of each byte, in the reflected form.
const CRC32C: [u32; 256] = {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ POLYNOMIAL
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};
