//! What a user can do wrong with `titanbit tokenize`: one clear line, the right exit code, and
//! nothing changed under the names of the output.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{assert_refused, files};
use tempfile::TempDir;

const GOOD: &str = "A good document, long enough to be worth reading.\n";

/// A directory with `good.txt`, and a token file made of it.
fn workplace() -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("good.txt"), GOOD.repeat(20)).unwrap();
    let (code, error) = run(
        dir.path(),
        "--input good.txt --train-vocab 300 --output train.bin",
    );
    assert_eq!((code, error.as_str()), (0, ""));
    dir
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("titanbit"));
    command.current_dir(dir).arg("tokenize");
    command
}

/// Exit code and standard error.
fn run(dir: &Path, arguments: &str) -> (i32, String) {
    let output = command(dir)
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), error)
}

/// Runs what must fail: every file must be as it was before.
#[track_caller]
fn refused(dir: &Path, arguments: &str, code: i32, says: &[&str]) {
    let before = files(dir);
    let arguments = arguments.split_whitespace();
    assert_refused(&command(dir).args(arguments).output().unwrap(), code, says);
    assert!(before == files(dir), "no file may change");
}

const TRAIN: &str = "--train-vocab 300 --output train.bin";

#[test]
fn missing_and_empty_inputs() {
    let dir = workplace();
    let dir = dir.path();
    refused(
        dir,
        &format!("--input nowhere {TRAIN}"),
        2,
        &["no input nowhere"],
    );
    refused(dir, &format!("--input no*where {TRAIN}"), 2, &["no*where"]);
    refused(
        dir,
        &format!("--input ${{TITANBIT_UNSET}}/x {TRAIN}"),
        2,
        &["TITANBIT_UNSET is not set"],
    );
    fs::create_dir(dir.join("empty")).unwrap();
    refused(
        dir,
        &format!("--input empty {TRAIN}"),
        2,
        &["empty is empty"],
    );
    fs::create_dir(dir.join("code")).unwrap();
    fs::write(dir.join("code/a.rs"), GOOD).unwrap();
    refused(
        dir,
        &format!("--input code {TRAIN}"),
        2,
        &["1 .rs files", "--ext rs"],
    );
    fs::write(dir.join("zero.txt"), "").unwrap();
    refused(
        dir,
        &format!("--input zero.txt {TRAIN}"),
        2,
        &["holds no document", "1 (empty)"],
    );
}

#[test]
fn text_that_is_not_utf8() {
    let dir = workplace();
    let dir = dir.path();
    fs::write(dir.join("latin1.txt"), b"caf\xe9").unwrap();
    refused(
        dir,
        &format!("--input latin1.txt {TRAIN}"),
        2,
        &["holds no document", "1 (not UTF-8)"],
    );
    refused(
        dir,
        &format!("--input good.txt latin1.txt --strict {TRAIN}"),
        1,
        &["latin1.txt: not UTF-8"],
    );
    fs::write(
        dir.join("lines.jsonl"),
        b"{\"text\": \"x\"}\n{\"text\": \"caf\xe9\"}\n",
    )
    .unwrap();
    refused(
        dir,
        &format!("--input lines.jsonl --strict {TRAIN}"),
        1,
        &["lines.jsonl: line 2: not UTF-8"],
    );
    let (code, error) = run(
        dir,
        &format!("--input good.txt latin1.txt lines.jsonl {TRAIN}"),
    );
    assert_eq!((code, error.as_str()), (0, ""), "skipped without --strict");
}

#[test]
fn json_that_is_not_as_said() {
    let dir = workplace();
    let dir = dir.path();
    for (line, says) in [
        (
            r#"{"body": "x", "url": "y"}"#,
            "line 2: no field `text`, only body, url",
        ),
        (r#"{"text": "x""#, "line 2: not a JSON object"),
        (r#"{"text": "x"} {}"#, "line 2: not a JSON object"),
        (r#"["text"]"#, "line 2: not a JSON object"),
        (r#"{"text": 5}"#, "line 2: field `text` is not a string"),
        (r#"{"text": null}"#, "line 2: field `text` is not a string"),
    ] {
        fs::write(
            dir.join("in.jsonl"),
            format!("{{\"text\": \"good\"}}\n{line}\n"),
        )
        .unwrap();
        // Both while the vocabulary is trained and while the text is encoded.
        let says = ["in.jsonl: ", says];
        refused(dir, &format!("--input in.jsonl {TRAIN}"), 1, &says);
        let given = "--tokenizer tokenizer.json --output train.bin";
        refused(dir, &format!("--input in.jsonl {given}"), 1, &says);
    }
}

#[test]
fn damaged_compressed_and_parquet_files() {
    let dir = workplace();
    let dir = dir.path();
    let zst = zstd::encode_all(&GOOD.repeat(500).into_bytes()[..], 1).unwrap();
    fs::write(dir.join("cut.txt.zst"), &zst[..zst.len() - 5]).unwrap();
    refused(
        dir,
        &format!("--input cut.txt.zst {TRAIN}"),
        1,
        &["cannot read cut.txt.zst"],
    );
    fs::write(dir.join("plain.txt.gz"), GOOD).unwrap();
    refused(
        dir,
        &format!("--input plain.txt.gz {TRAIN}"),
        1,
        &["cannot read plain.txt.gz"],
    );
    fs::write(dir.join("x.parquet"), GOOD).unwrap();
    refused(
        dir,
        &format!("--input x.parquet {TRAIN}"),
        1,
        &["x.parquet: damaged Parquet"],
    );
}

#[test]
fn outputs_that_cannot_be() {
    let dir = workplace();
    let dir = dir.path();
    let input = "--input good.txt --train-vocab 300";
    refused(
        dir,
        &format!("{input} --output good.txt/train.bin"),
        1,
        &["good.txt", "cannot"],
    );
    refused(
        dir,
        &format!("{input} --output train"),
        2,
        &["ends in .bin"],
    );
    refused(
        dir,
        &format!("{input} --output tokenizer.bin"),
        2,
        &["tokenizer.json"],
    );
    fs::create_dir_all(dir.join("taken.bin/x")).unwrap();
    refused(
        dir,
        &format!("{input} --output taken.bin"),
        2,
        &["taken.bin", "directory"],
    );
    let same = "--output a.bin --val-fraction 0.5 --val-output a.bin";
    refused(dir, &format!("{input} {same}"), 2, &["both a.bin"]);
}

/// A tokenizer that no token file names is someone's all the same.
#[test]
fn a_foreign_tokenizer_is_not_replaced() {
    let dir = workplace();
    let foreign = dir.path().join("new/tokenizer.json");
    fs::create_dir(dir.path().join("new")).unwrap();
    let text = fs::read_to_string(dir.path().join("tokenizer.json")).unwrap();
    fs::write(foreign, text + "\n").unwrap();
    refused(
        dir.path(),
        "--input good.txt --train-vocab 280 --output new/train.bin",
        2,
        &["new/tokenizer.json would be replaced", "another directory"],
    );
}

/// `train.bin` would be left without the tokenizer that it was made with.
#[test]
fn the_tokenizer_of_another_token_file_is_not_replaced() {
    let dir = workplace();
    let dir = dir.path();
    let says = [
        "./tokenizer.json would be replaced",
        "./train.bin was made with it",
        "another directory",
        "--tokenizer",
    ];
    fs::write(dir.join("other.txt"), "Quite another text.\n".repeat(20)).unwrap();
    let trained = "--input other.txt --train-vocab 280";
    refused(dir, &format!("{trained} --output other.bin"), 2, &says);

    let accepted = |arguments: &str| {
        let (code, error) = run(dir, arguments);
        assert_eq!((code, error.as_str()), (0, ""), "{arguments}");
    };
    accepted(&format!("{trained} --output other/other.bin"));
    let given = "--input other.txt --tokenizer other/tokenizer.json";
    refused(dir, &format!("{given} --output other.bin"), 2, &says);

    // The same tokenizer, or nothing but the run's own files: no file loses its tokenizer.
    accepted("--input other.txt --tokenizer tokenizer.json --output other.bin");
    let own = format!("{given} --output train.bin --max-shard-tokens 20");
    refused(dir, &own, 2, &["./other.bin was made with it"]);
    fs::remove_file(dir.join("other.bin")).unwrap();
    accepted(&own);
    accepted(&format!("--input good.txt {TRAIN}"));
    let lines: String = (0..40)
        .map(|n| format!("{{\"text\": \"{n}\"}}\n"))
        .collect();
    fs::write(dir.join("lines.jsonl"), lines).unwrap();
    let outputs = format!("--output {}/part.bin --val-output train.bin", dir.display());
    let given = "--input lines.jsonl --tokenizer other/tokenizer.json";
    accepted(&format!("{given} --val-fraction 0.5 {outputs}"));
}

#[test]
fn options_that_cannot_be() {
    let dir = workplace();
    let dir = dir.path();
    let input = "--input good.txt --output train.bin";
    refused(
        dir,
        &format!("{input} --train-vocab 200"),
        2,
        &["200", "257"],
    );
    refused(
        dir,
        &format!("{input} --train-vocab 999999999999"),
        2,
        &["999999999999", "1048576"],
    );
    refused(dir, &format!("{input} --threads 0"), 2, &["--threads"]);
    let many = format!("{input} --threads 100000");
    refused(dir, &many, 2, &["--threads 100000", "at most 1024"]);
    refused(
        dir,
        &format!("{input} --sample-mb 0"),
        2,
        &["--sample-mb 0"],
    );
    refused(
        dir,
        &format!("{input} --max-shard-tokens 0"),
        2,
        &["--max-shard-tokens"],
    );
    refused(
        dir,
        &format!("{input} --max-shard-tokens 9999999999"),
        2,
        &["2147483647"],
    );
    for fraction in ["0", "1", "nan", "7"] {
        let split = format!("--val-fraction {fraction} --val-output val.bin");
        refused(
            dir,
            &format!("{input} {split}"),
            2,
            &["--val-fraction", "between 0 and 1"],
        );
    }
    let split = "--val-fraction 0.000001 --val-output val.bin";
    refused(
        dir,
        &format!("{input} --train-vocab 300 {split}"),
        2,
        &["validation split", "raise"],
    );
    refused(
        dir,
        &format!("{input} --tokenizer none.json"),
        2,
        &["none.json does not exist"],
    );
    refused(
        dir,
        &format!("{input} --tokenizer good.txt"),
        1,
        &["good.txt: not a tokenizer"],
    );
    let eos = "--tokenizer tokenizer.json --eos-token <none>";
    refused(dir, &format!("{input} {eos}"), 2, &["has no token <none>"]);
    // clap's own refusals say more than one line.
    for arguments in [
        "--val-fraction 0.1",
        "--tokenizer a --train-vocab 300",
        "--nonsense",
    ] {
        let (code, error) = run(dir, &format!("{input} {arguments}"));
        assert_eq!(code, 2, "{error}");
        assert!(!error.contains("panicked"), "{error}");
    }
}

/// A run that is killed while it writes: an input that never ends, a named pipe, holds it there.
#[cfg(unix)]
#[test]
fn a_killed_run_leaves_the_old_files_and_the_next_run_cleans_up() {
    let dir = workplace();
    let path = |name: &str| dir.path().join(name);
    let old = fs::read(path("train.bin")).unwrap();
    fs::write(path("long.txt"), GOOD.repeat(100_000)).unwrap();
    let pipe = Command::new("mkfifo")
        .arg(path("pipe.txt"))
        .status()
        .unwrap();
    assert!(pipe.success());
    let options = "--tokenizer tokenizer.json --output train.bin --max-shard-tokens 50000";
    let mut child = command(dir.path())
        .args(["--input", "long.txt", "pipe.txt"])
        .args(options.split_whitespace())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while !path("train_002.bin.tmp").exists() {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "the run writes nothing"
        );
        assert!(
            child.try_wait().unwrap().is_none(),
            "the run ended by itself"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    assert!(fs::read(path("train.bin")).unwrap() == old);
    assert!(!path("train_000.bin").exists() && !path("train_000.json").exists());
    assert!(
        path("train_001.bin.tmp").exists(),
        "it was killed in the middle"
    );

    let (code, error) = run(dir.path(), &format!("--input good.txt {options}"));
    assert_eq!((code, error.as_str()), (0, ""));
    let left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("train"))
        .collect();
    assert_eq!(left.len(), 2, "train_000.bin and its sidecar: {left:?}");
    assert!(path("train_000.bin").exists());
}
