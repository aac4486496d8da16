//! `titanbit tokenize` through the binary: what it reads, what it writes, and that the output
//! depends on the input alone.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use assert_cmd::Command;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use tempfile::TempDir;
use titanbit::data::tokenize::encoder::Encoder;
use titanbit::data::{TokenDtype, TokenFile, TokenSet};
use tokenizers::Tokenizer;

fn tokenize(dir: &Path) -> Command {
    let mut command = Command::cargo_bin("titanbit").unwrap();
    command.current_dir(dir).arg("tokenize");
    command
}

/// Runs with the arguments, separated by blanks, and returns standard output.
fn run(dir: &Path, arguments: &str) -> String {
    let output = tokenize(dir)
        .args(arguments.split_whitespace())
        .assert()
        .success()
        .get_output()
        .clone();
    assert!(output.stderr.is_empty(), "no bar without a terminal");
    String::from_utf8(output.stdout).unwrap()
}

/// Documents with some variety, a few hundred bytes each.
fn documents(count: usize) -> Vec<String> {
    (0..count)
        .map(|i| {
            let mut text = format!("Document {i}: ");
            for j in 0..20 + i % 30 {
                let word = (i * 7919 + j * j * 104_729) % 5000;
                text += &format!("word{word} größer {} don't\n", word * j);
            }
            text
        })
        .collect()
}

fn jsonl(documents: &[String], field: &str) -> Vec<u8> {
    let lines = documents.iter().map(|text| {
        format!(
            "{}\n",
            serde_json::json!({"id": 1, field: text, "meta": {"a": [1]}})
        )
    });
    lines.collect::<String>().into_bytes()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// A Parquet file with two row groups; `None` is a null.
fn parquet(path: &Path, column: &str, rows: &[Option<&str>]) {
    let schema = format!("message m {{ required int64 id; optional binary {column} (UTF8); }}");
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
    for rows in rows.chunks(rows.len().div_ceil(2)) {
        let mut group = writer.next_row_group().unwrap();
        let mut ids = group.next_column().unwrap().unwrap();
        ids.typed::<parquet::data_type::Int64Type>()
            .write_batch(&vec![7; rows.len()], None, None)
            .unwrap();
        ids.close().unwrap();
        let mut texts = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = rows.iter().flatten().map(|&text| text.into()).collect();
        let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
        texts
            .typed::<ByteArrayType>()
            .write_batch(&values, Some(&levels), None)
            .unwrap();
        texts.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

fn all_tokens(file: &TokenFile) -> Vec<u32> {
    let mut ids = Vec::new();
    file.read(0..file.len(), &mut ids);
    ids
}

fn tokenizer(dir: &Path) -> Tokenizer {
    Tokenizer::from_file(dir.join("tokenizer.json")).unwrap()
}

/// The documents in a token file, decoded.
fn decoded(bin: &Path) -> Vec<String> {
    let file = TokenFile::open(bin, None).unwrap();
    assert!(file.verify_checksum().unwrap());
    let eos = file.sidecar().unwrap().eos_id;
    let tokenizer = tokenizer(bin.parent().unwrap());
    let ids = all_tokens(&file);
    assert_eq!(
        ids.last(),
        Some(&eos),
        "a document ends with the end-of-text token"
    );
    let mut documents: Vec<_> = ids
        .split(|&id| id == eos)
        .map(|ids| tokenizer.decode(ids, false).unwrap())
        .collect();
    documents.pop();
    documents
}

/// The file's bytes and what its sidecar says, but for the command.
fn content(bin: &Path) -> (Vec<u8>, serde_json::Value) {
    let sidecar = fs::read(bin.with_extension("json")).unwrap();
    let mut sidecar: serde_json::Value = serde_json::from_slice(&sidecar).unwrap();
    sidecar.as_object_mut().unwrap().remove("command");
    (fs::read(bin).unwrap(), sidecar)
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// A directory with `in.jsonl` of `count` documents.
fn with_jsonl(count: usize) -> (TempDir, Vec<String>) {
    let dir = TempDir::new().unwrap();
    let documents = documents(count);
    fs::write(dir.path().join("in.jsonl"), jsonl(&documents, "text")).unwrap();
    (dir, documents)
}

#[test]
fn every_kind_of_input_is_read_in_order_of_name() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("data");
    fs::create_dir_all(data.join("g")).unwrap();
    let d = documents(14);
    let put = |name: &str, bytes: &[u8]| fs::write(data.join(name), bytes).unwrap();
    put("a.txt", d[0].as_bytes());
    put(
        "b.jsonl",
        &[
            jsonl(&d[1..3], "text"),
            b"\n  \n".to_vec(),
            jsonl(&d[3..4], "text"),
        ]
        .concat(),
    );
    put(
        "c.txt.gz",
        &[gzip(&d[4].as_bytes()[..50]), gzip(&d[4].as_bytes()[50..])].concat(),
    );
    put("d.jsonl.zst", &zstd(&jsonl(&d[5..7], "text")));
    put("e.md.zst", &zstd(d[7].as_bytes()));
    put("f.jsonl.gz", &gzip(&jsonl(&d[8..9], "text")));
    put("g/h.md", d[9].as_bytes());
    let rows = [Some(&*d[10]), None, Some(&*d[11]), Some(""), Some(&*d[12])];
    parquet(&data.join("p.parquet"), "text", &rows);
    put("q.txt", b"");
    put("r.rs", b"not read");
    put("s.txt", b"caf\xe9 in Latin-1");
    let last = dir.path().join("last.weird");
    fs::write(&last, &d[13]).unwrap();

    let out = run(
        dir.path(),
        "--input data last.weird --train-vocab 400 --output out/train.bin",
    );
    let bin = dir.path().join("out/train.bin");
    assert_eq!(decoded(&bin), d);
    assert!(out.contains("train       14 documents"), "{out}");
    assert!(
        out.contains("skipped     4 (3 empty, 1 not UTF-8)"),
        "{out}"
    );
    let file = TokenFile::open(&bin, None).unwrap();
    let sidecar = file.sidecar().unwrap();
    assert_eq!(sidecar.documents, 14);
    assert_eq!(
        sidecar.source_bytes,
        d.iter().map(|text| text.len() as u64).sum::<u64>()
    );
    assert_eq!(sidecar.vocab_size, 400);
    assert!(file.max_id().unwrap().0 < 400);
    assert!(sidecar.command.contains("tokenize --input data last.weird"));
    assert_eq!(sidecar.tokenizer, "tokenizer.json");
}

#[test]
fn named_extensions_fields_and_columns() {
    let dir = TempDir::new().unwrap();
    let d = documents(3);
    let data = dir.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("a.rs"), &d[0]).unwrap();
    fs::write(data.join("b.txt"), "not read").unwrap();
    fs::write(data.join("c.jsonl"), jsonl(&d[1..2], "content")).unwrap();
    parquet(&data.join("d.parquet"), "content", &[Some(&d[2])]);
    let arguments = "--input data --ext rs,.jsonl,parquet --text-field content";
    run(
        dir.path(),
        &format!("{arguments} --train-vocab 300 --output t.bin"),
    );
    assert_eq!(decoded(&dir.path().join("t.bin")), d);
}

/// A byte order mark is no text, a link to nothing no reason to stop.
#[cfg(unix)]
#[test]
fn files_as_they_are_found_in_the_wild() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("in")).unwrap();
    let text = "some words, and some more words. ".repeat(20);
    let lines = [
        b"\xef\xbb\xbf".to_vec(),
        jsonl(std::slice::from_ref(&text), "text"),
    ]
    .concat();
    fs::write(path("in/bom.jsonl"), lines).unwrap();
    std::os::unix::fs::symlink("nowhere", path("in/broken.jsonl")).unwrap();
    std::os::unix::fs::symlink(".", path("in/loop")).unwrap();
    let output = tokenize(dir.path())
        .args(["--input", "in", "--train-vocab", "270", "--output", "a.bin"])
        .assert()
        .success();
    let warnings = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(
        warnings.contains("in/broken.jsonl") && warnings.contains("in/loop"),
        "{warnings}"
    );
    assert_eq!(decoded(&path("a.bin")), [text]);
}

#[test]
fn the_output_does_not_depend_on_the_number_of_threads() {
    let (dir, _) = with_jsonl(5000); // several batches
    let split = "--val-fraction 0.1 --max-shard-tokens 400000";
    for threads in ["1", "2", "5"] {
        let out = format!("--output {threads}/train.bin --val-output {threads}/val.bin");
        run(
            dir.path(),
            &format!("--input in.jsonl --train-vocab 500 --threads {threads} {split} {out}"),
        );
    }
    let one = dir.path().join("1");
    let files: Vec<_> = names(&one)
        .into_iter()
        .filter(|name| name.ends_with("bin"))
        .collect();
    assert!(files.len() >= 3, "{files:?}");
    for other in ["2", "5"].map(|threads| dir.path().join(threads)) {
        assert_eq!(names(&one), names(&other));
        for name in &files {
            assert!(
                content(&one.join(name)) == content(&other.join(name)),
                "{name}"
            );
        }
        let tokenizer = |dir: &Path| fs::read(dir.join("tokenizer.json")).unwrap();
        assert!(tokenizer(&one) == tokenizer(&other));
    }
}

#[test]
fn documents_are_split_by_their_hash() {
    let (dir, d) = with_jsonl(2000);
    let split = "--val-fraction 0.25 --output train.bin --val-output val.bin";
    run(
        dir.path(),
        &format!("--input in.jsonl --train-vocab 300 {split}"),
    );
    let split = |name: &str| decoded(&dir.path().join(name));
    let (train, val) = (split("train.bin"), split("val.bin"));
    assert_eq!(train.len() + val.len(), d.len());
    // Binomial with n = 2000, p = 0.25: standard deviation 19.4.
    assert!((400..600).contains(&val.len()), "{}", val.len());
    let in_val: BTreeSet<_> = val.iter().collect();
    let expected: Vec<_> = d
        .iter()
        .filter(|text| !in_val.contains(text))
        .cloned()
        .collect();
    assert_eq!(train, expected, "the rest, in order");

    // In another file, in another order, with other threads: the same documents.
    let mut reversed = d.clone();
    reversed.reverse();
    fs::write(dir.path().join("in.jsonl"), jsonl(&reversed, "text")).unwrap();
    let split = "--val-fraction 0.25 --output 2/train.bin --val-output 2/val.bin";
    run(
        dir.path(),
        &format!("--input in.jsonl --tokenizer tokenizer.json {split} --threads 1"),
    );
    let again = decoded(&dir.path().join("2/val.bin"));
    assert_eq!(again.iter().collect::<BTreeSet<_>>(), in_val);
}

#[test]
fn shards_hold_the_same_tokens_and_replace_earlier_ones() {
    let (dir, d) = with_jsonl(50);
    let path = |name: &str| dir.path().join(name);
    run(
        dir.path(),
        "--input in.jsonl --train-vocab 300 --output whole.bin",
    );
    let whole = TokenFile::open(path("whole.bin"), None).unwrap();
    let expected = all_tokens(&whole);
    let shards = "--input in.jsonl --tokenizer tokenizer.json --output s.bin --max-shard-tokens";
    run(dir.path(), &format!("{shards} 2000"));
    let set = TokenSet::open(&[path("s.bin")], None).unwrap();
    assert_eq!(set.shards().len() as u64, whole.len().div_ceil(2000));
    let (tokens, documents, bytes) = set.shards().iter().fold((vec![], 0, 0), |mut sum, shard| {
        assert!(shard.len() <= 2000 && shard.verify_checksum().unwrap());
        let sidecar = shard.sidecar().unwrap();
        sum.0.extend(all_tokens(shard));
        (
            sum.0,
            sum.1 + sidecar.documents,
            sum.2 + sidecar.source_bytes,
        )
    });
    assert_eq!(tokens, expected);
    assert_eq!(documents, 50);
    assert_eq!(bytes, d.iter().map(|text| text.len() as u64).sum::<u64>());

    // Fewer, larger shards: none of the earlier ones is left to be read with them.
    run(dir.path(), &format!("{shards} 1000000"));
    let left: Vec<_> = names(dir.path())
        .into_iter()
        .filter(|n| n.starts_with("s"))
        .collect();
    assert_eq!(left, ["s_000.bin", "s_000.json"]);
    run(
        dir.path(),
        "--input in.jsonl --tokenizer tokenizer.json --output s.bin",
    );
    let left: Vec<_> = names(dir.path())
        .into_iter()
        .filter(|n| n.starts_with("s"))
        .collect();
    assert_eq!(left, ["s.bin", "s.json"]);
}

#[test]
fn a_long_file_read_in_parts_is_one_document_with_the_same_ids() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut text = documents(22_000).concat();
    // No blank for longer than a part, in characters of three bytes.
    text += &"漢字".repeat(200_000);
    text += " end";
    assert!(text.len() > 18 << 20);
    fs::write(path("small.txt"), &text[..100_000]).unwrap();
    fs::write(path("long.txt"), &text).unwrap();
    fs::write(path("long.txt.gz"), gzip(text.as_bytes())).unwrap();
    run(
        dir.path(),
        "--input small.txt --train-vocab 400 --output small.bin",
    );
    let tokenizer = tokenizer(dir.path());
    let mut expected = Vec::new();
    Encoder::new(&tokenizer)
        .encode(&text, &mut expected)
        .unwrap();
    expected.push(0);
    for (input, bin) in [("long.txt", "plain.bin"), ("long.txt.gz", "gz.bin")] {
        let options = "--tokenizer tokenizer.json --output";
        let out = run(dir.path(), &format!("--input {input} {options} {bin}"));
        assert!(out.contains("train       1 documents"), "{out}");
        let file = TokenFile::open(path(bin), None).unwrap();
        assert!(all_tokens(&file) == expected, "{input}");
        assert_eq!(file.sidecar().unwrap().source_bytes, text.len() as u64);
    }

    // One wrong byte near the end, and nothing of the document is used.
    let mut bytes = text.into_bytes();
    let at = bytes.len() - 10;
    bytes[at] = 0xff;
    fs::write(path("bad.txt"), &bytes).unwrap();
    let out = run(
        dir.path(),
        "--input bad.txt small.txt --tokenizer tokenizer.json --output bad.bin",
    );
    assert!(out.contains("skipped     1 (not UTF-8)"), "{out}");
    assert!(content(&path("bad.bin")).0 == content(&path("small.bin")).0);
}

#[test]
fn a_large_vocabulary_is_stored_in_32_bits() {
    let (dir, d) = with_jsonl(3);
    run(
        dir.path(),
        "--input in.jsonl --train-vocab 300 --output small.bin",
    );
    let json = fs::read(dir.path().join("tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    for id in 300..70_000 {
        vocab.insert(format!("unused{id}"), id.into());
    }
    fs::write(dir.path().join("wide.json"), json.to_string()).unwrap();
    run(
        dir.path(),
        "--input in.jsonl --tokenizer wide.json --output wide/train.bin",
    );
    let bin = dir.path().join("wide/train.bin");
    assert_eq!(decoded(&bin), d);
    let file = TokenFile::open(&bin, None).unwrap();
    assert_eq!(file.dtype(), TokenDtype::U32);
    assert_eq!(file.sidecar().unwrap().vocab_size, 70_000);
}

#[test]
fn the_quickstart_input_a_sample_of_the_cargo_registry() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("home/registry/src/index-1");
    let d = documents(60);
    for (i, text) in d.iter().enumerate() {
        let package = root.join(format!("package-{}", i % 7));
        fs::create_dir_all(&package).unwrap();
        fs::write(package.join(format!("{i}.rs")), text).unwrap();
    }
    let arguments = [
        "--input",
        "${TITANBIT_TEST_HOME:-~/.nowhere}/registry/src/*",
        "--ext",
        "rs",
        "--train-vocab",
        "300",
        "--output",
    ];
    let sampled = |home: &Path, output: &str, extra: &[&str]| {
        tokenize(dir.path())
            .args(arguments)
            .arg(output)
            .args(extra)
            .env("TITANBIT_TEST_HOME", home)
            .assert()
            .success();
        decoded(&dir.path().join(output))
    };
    let home = dir.path().join("home");
    assert_eq!(sampled(&home, "all/t.bin", &[]).len(), 60);
    // A megabyte takes everything; the library takes bytes, so it is asked for less.
    let sample = |root: &str| -> Vec<PathBuf> {
        let found =
            titanbit::data::tokenize::sources::find(&[root.to_string()], Some(&["rs".to_string()]));
        let sampled = titanbit::data::tokenize::sources::sample(found.unwrap(), 20_000);
        let total: u64 = sampled.iter().map(|source| source.bytes).sum();
        let last = sampled.last().unwrap().bytes;
        assert!(total >= 20_000 && total - last < 20_000, "{total}");
        let below = |path: &Path| path.strip_prefix(root).unwrap().to_path_buf();
        sampled.iter().map(|source| below(&source.path)).collect()
    };
    let first = sample(root.to_str().unwrap());
    let moved = dir.path().join("elsewhere");
    fs::rename(&root, &moved).unwrap();
    assert_eq!(
        sample(moved.to_str().unwrap()),
        first,
        "paths above the input do not matter"
    );
    let packages: BTreeSet<_> = first.iter().map(|path| path.parent().unwrap()).collect();
    assert!(packages.len() > 3, "spread over the packages: {packages:?}");

    let error = tokenize(dir.path())
        .args(arguments)
        .arg("t.bin")
        .env_remove("TITANBIT_TEST_HOME")
        .assert()
        .code(2)
        .get_output()
        .stderr
        .clone();
    let error = String::from_utf8(error).unwrap();
    assert!(
        error.contains("no input ${TITANBIT_TEST_HOME") && error.contains(".nowhere"),
        "{error}"
    );
}
