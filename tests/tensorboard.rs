//! Event files, read back by a reader written here from the format's description and, where there is one, by TensorBoard's.

use std::path::Path;
use std::process::Command;

use serde_json::json;
use titanbit::train::tensorboard::EventWriter;

const TEXT: &str = "Zwölf Boxkämpfer — **jagen** Viktor";

fn write_sample_run(dir: &Path) {
    let mut writer = EventWriter::create(dir).unwrap();
    writer.scalar(1, "train/loss", 8.25).unwrap();
    writer.scalar(1, "train/lr", 1.5e-3).unwrap();
    writer.scalar(300, "train/loss", 4.5).unwrap();
    writer
        .scalar(1 << 40, "train/loss", f64::from(f32::MIN_POSITIVE))
        .unwrap();
    writer.text(300, "sample", TEXT).unwrap();
    writer.flush().unwrap();
}

#[test]
fn an_independent_reader_finds_every_event() {
    assert_eq!(
        bitwise_crc32c(b"123456789"),
        0xE306_9283,
        "the reader's own CRC"
    );
    let dir = tempfile::tempdir().unwrap();
    write_sample_run(dir.path());

    let events = read_events(&only_file_in(dir.path()));
    assert_eq!(events.len(), 6);
    assert_eq!(events[0].bytes(3), b"brain.Event:2");
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    for event in &events {
        let wall_time = f64::from_bits(event.number(1));
        assert!(
            (0.0..60.0).contains(&(now - wall_time)),
            "wall time {wall_time}"
        );
    }
    let scalars: Vec<_> = events[1..5]
        .iter()
        .map(|event| {
            let value = summary_value(event);
            let tag = String::from_utf8(value.bytes(1).to_vec()).unwrap();
            (event.number(2), tag, f32::from_bits(value.number(2) as u32))
        })
        .collect();
    assert_eq!(
        scalars,
        [
            (1, "train/loss".to_string(), 8.25),
            (1, "train/lr".to_string(), 1.5e-3),
            (300, "train/loss".to_string(), 4.5),
            (1 << 40, "train/loss".to_string(), f32::MIN_POSITIVE),
        ]
    );

    let value = summary_value(&events[5]);
    assert_eq!((events[5].number(2), value.bytes(1)), (300, &b"sample"[..]));
    let tensor = Fields::parse(value.bytes(8));
    assert_eq!(tensor.number(1), 7, "DT_STRING");
    assert_eq!(tensor.bytes(8), TEXT.as_bytes());
    let plugin = Fields::parse(value.bytes(9));
    assert_eq!(Fields::parse(plugin.bytes(1)).bytes(1), b"text");
}

#[test]
fn two_writers_in_one_directory_do_not_overwrite_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let first = EventWriter::create(dir.path()).unwrap();
    let second = EventWriter::create(dir.path()).unwrap();
    drop((first, second));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn an_unusable_directory_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("taken");
    std::fs::write(&file, "").unwrap();
    let error = EventWriter::create(&file).err().unwrap().to_string();
    assert!(error.contains(file.to_str().unwrap()), "{error}");
}

#[test]
fn tensorboard_reads_the_same_values() {
    let Some(python) = python_with_tensorboard() else {
        return println!(
            "skipped: no python with tensorboard (set TITANBIT_PYTHON to one that has it)"
        );
    };
    let dir = tempfile::tempdir().unwrap();
    write_sample_run(dir.path());
    assert_eq!(
        read_with_tensorboard(&python, dir.path()),
        json!({
            "scalars": {
                "train/loss": [[1, 8.25], [300, 4.5], [1u64 << 40, f64::from(f32::MIN_POSITIVE)]],
                "train/lr": [[1, f64::from(1.5e-3f32)]],
            },
            "texts": { "sample": [[300, TEXT]] },
        })
    );
}

#[test]
fn tensorboard_shows_one_curve_after_a_restart() {
    let Some(python) = python_with_tensorboard() else {
        return println!(
            "skipped: no python with tensorboard (set TITANBIT_PYTHON to one that has it)"
        );
    };
    let dir = tempfile::tempdir().unwrap();
    for (start, value) in [(1, 1.0), (3, 2.0)] {
        let mut writer = EventWriter::create(dir.path()).unwrap();
        writer.session_start(start).unwrap();
        for step in start..=4 {
            writer.scalar(step, "loss", value).unwrap();
        }
    }
    let read = read_with_tensorboard(&python, dir.path());
    assert_eq!(
        read["scalars"]["loss"],
        json!([[1, 1.0], [2, 1.0], [3, 2.0], [4, 2.0]])
    );
}

/// `TITANBIT_PYTHON` as given (then it must work), else `python3` if it can import tensorboard.
fn python_with_tensorboard() -> Option<String> {
    if let Ok(python) = std::env::var("TITANBIT_PYTHON") {
        return Some(python);
    }
    let found = Command::new("python3")
        .args(["-c", "import tensorboard"])
        .output()
        .is_ok_and(|out| out.status.success());
    found.then(|| "python3".to_string())
}

fn read_with_tensorboard(python: &str, run: &Path) -> serde_json::Value {
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/reference/read_tensorboard.py"
    );
    let out = Command::new(python)
        .arg(script)
        .arg(run)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {python}: {e}"));
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{errors}");
    serde_json::from_slice(&out.stdout).unwrap()
}

fn only_file_in(dir: &Path) -> Vec<u8> {
    let files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(files.len(), 1);
    assert!(
        files[0]
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .contains("tfevents")
    );
    std::fs::read(&files[0]).unwrap()
}

/// Splits TFRecords, checking both checksums of each.
fn read_events(mut file: &[u8]) -> Vec<Fields> {
    let mut events = Vec::new();
    while !file.is_empty() {
        let (length, rest) = file.split_at(8);
        let (length_crc, rest) = rest.split_at(4);
        assert_eq!(unmasked(length_crc), bitwise_crc32c(length));
        let (data, rest) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
        let (data_crc, rest) = rest.split_at(4);
        assert_eq!(unmasked(data_crc), bitwise_crc32c(data));
        events.push(Fields::parse(data));
        file = rest;
    }
    events
}

fn unmasked(stored: &[u8]) -> u32 {
    let rotated = u32::from_le_bytes(stored.try_into().unwrap()).wrapping_sub(0xa282_ead8);
    rotated.rotate_left(15)
}

/// CRC-32C by polynomial division, a bit at a time.
fn bitwise_crc32c(data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let low = crc & 1;
            crc >>= 1;
            if low == 1 {
                crc ^= 0x82F6_3B78;
            }
        }
    }
    !crc
}

fn summary_value(event: &Fields) -> Fields {
    Fields::parse(Fields::parse(event.bytes(5)).bytes(1))
}

/// A decoded protobuf message: its fields in order.
struct Fields(Vec<(u64, Field)>);

enum Field {
    /// A varint, or the bits of a double or float.
    Number(u64),
    Bytes(Vec<u8>),
}

impl Fields {
    fn parse(mut data: &[u8]) -> Self {
        let mut fields = Vec::new();
        while !data.is_empty() {
            let key = take_varint(&mut data);
            let field = match key & 7 {
                0 => Field::Number(take_varint(&mut data)),
                1 => Field::Number(u64::from_le_bytes(take(&mut data, 8).try_into().unwrap())),
                2 => {
                    let length = take_varint(&mut data) as usize;
                    Field::Bytes(take(&mut data, length).to_vec())
                }
                5 => {
                    Field::Number(u32::from_le_bytes(take(&mut data, 4).try_into().unwrap()).into())
                }
                wire_type => panic!("wire type {wire_type}"),
            };
            fields.push((key >> 3, field));
        }
        Self(fields)
    }

    fn number(&self, number: u64) -> u64 {
        match self.get(number) {
            Field::Number(value) => *value,
            Field::Bytes(_) => panic!("field {number} holds bytes"),
        }
    }

    fn bytes(&self, number: u64) -> &[u8] {
        match self.get(number) {
            Field::Bytes(value) => value,
            Field::Number(_) => panic!("field {number} holds a number"),
        }
    }

    fn get(&self, number: u64) -> &Field {
        let mut matches = self.0.iter().filter(|(n, _)| *n == number);
        let (_, field) = matches
            .next()
            .unwrap_or_else(|| panic!("no field {number}"));
        assert!(matches.next().is_none(), "field {number} is repeated");
        field
    }
}

fn take<'a>(data: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (taken, rest) = data.split_at(length);
    *data = rest;
    taken
}

fn take_varint(data: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(data, 1)[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return value;
        }
    }
    panic!("a varint longer than ten bytes")
}
