//! `data.prepare`: token files are made on first use, found again, and those that come from
//! elsewhere are left alone.

mod common;

use std::fs;
use std::path::Path;

use common::{counting, files, write_bin};
use indicatif::ProgressBar;
use tempfile::TempDir;
use titanbit::config::{Data, Prepare, Source};
use titanbit::data::prepare::prepare;
use titanbit::data::{TokenFile, TokenSet};

/// A directory of fifty small texts, and the section that makes `train.bin` and `val.bin` of it.
fn workplace() -> (TempDir, Data) {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("text")).unwrap();
    for number in 0..50 {
        let text = format!("This is text number {number}. ").repeat(10);
        fs::write(path("text").join(format!("{number}.txt")), text).unwrap();
    }
    let data = Data {
        train: vec![Source {
            path: path("train.bin"),
            weight: 1.0,
        }],
        val: Some(path("val.bin")),
        tokenizer: Some(path("tokenizer.json")),
        dtype: None,
        prepare: Some(Prepare {
            input: vec![path("text").display().to_string()],
            ext: vec![],
            sample_mb: None,
            train_vocab: 300,
            val_fraction: 0.3,
        }),
    };
    (dir, data)
}

/// Whether token files were made.
fn made(data: &Data) -> bool {
    prepare(data, &ProgressBar::hidden()).unwrap().is_some()
}

/// Preparing must fail with one line about `file` and change nothing.
#[track_caller]
fn refused(dir: &Path, data: &Data, file: &str) {
    let before = files(dir);
    let error = prepare(data, &ProgressBar::hidden()).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    assert_eq!(
        error.to_string(),
        format!(
            "{} was not made from this config's data.prepare: delete it to make it anew, or drop \
             data.prepare to use it as it is",
            dir.join(file).display()
        )
    );
    assert!(before == files(dir), "no file may change");
}

#[test]
fn files_are_made_once_and_made_whole_again() {
    let (dir, data) = workplace();
    assert!(made(&data));
    let first = files(dir.path());
    let train = TokenFile::open(dir.path().join("train.bin"), None).unwrap();
    let val = TokenFile::open(dir.path().join("val.bin"), None).unwrap();
    let documents = |file: &TokenFile| file.sidecar().unwrap().documents;
    assert_eq!(documents(&train) + documents(&val), 50);
    let set = TokenSet::open(&[train.path()], None).unwrap();
    set.check_tokenizer(&dir.path().join("tokenizer.json"))
        .unwrap();

    assert!(!made(&data), "they are there");
    assert!(first == files(dir.path()));

    for lost in ["val.bin", "tokenizer.json"] {
        fs::remove_file(dir.path().join(lost)).unwrap();
        assert!(made(&data), "{lost}");
        assert!(first == files(dir.path()), "the same text, the same files");
    }
}

#[test]
fn without_validation_all_text_is_for_training() {
    let (dir, mut data) = workplace();
    data.val = None;
    data.prepare.as_mut().unwrap().val_fraction = 0.0;
    assert!(made(&data));
    let train = TokenFile::open(dir.path().join("train.bin"), None).unwrap();
    assert_eq!(train.sidecar().unwrap().documents, 50);
    assert!(!made(&data));
}

#[test]
fn a_changed_section_does_not_pass_for_the_same_data() {
    let (dir, mut data) = workplace();
    assert!(made(&data));
    data.prepare.as_mut().unwrap().train_vocab = 280;
    refused(dir.path(), &data, "train.bin");
    fs::remove_file(dir.path().join("val.bin")).unwrap();
    refused(dir.path(), &data, "train.bin");
}

#[test]
fn foreign_files_are_left_alone() {
    for name in ["train.bin", "val.bin"] {
        let (dir, data) = workplace();
        write_bin(&dir.path().join(name), &counting(100));
        refused(dir.path(), &data, name);
    }
}

#[test]
fn foreign_shards_are_left_alone() {
    // With sidecars: only such shards would be cleaned up by a run of the same name.
    let (elsewhere, mut other) = workplace();
    other.train[0].path = elsewhere.path().join("train_000.bin");
    assert!(made(&other));
    let (dir, data) = workplace();
    let bring_shard = || {
        for file in ["train_000.bin", "train_000.json"] {
            fs::copy(elsewhere.path().join(file), dir.path().join(file)).unwrap();
        }
    };
    bring_shard();
    assert!(TokenSet::open(&[&data.train[0].path], None).is_ok());
    refused(dir.path(), &data, "train_000.bin");

    fs::remove_file(dir.path().join("train_000.bin")).unwrap();
    assert!(made(&data), "a sidecar alone is no data");
    bring_shard();
    refused(dir.path(), &data, "train_000.bin");
}
