//! `titanbit bench` through the binary.

mod common;

use assert_cmd::Command;
use common::assert_refused;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;

fn bench(args: &[&str]) -> assert_cmd::assert::Assert {
    let mut command = Command::cargo_bin("titanbit").unwrap();
    command.arg("bench").args(args).assert()
}

#[track_caller]
fn refused(args: &[&str], message: &str) {
    assert_refused(bench(args).stdout("").get_output(), 2, &[message]);
}

#[test]
fn the_table_names_the_machine_and_the_kernel() {
    let args = "--m 33 --k 47 --n 29 --device cpu --kernels portable";
    bench(&args.split(' ').collect::<Vec<_>>())
        .success()
        .stdout(
            contains("CPU (")
                .and(contains("threads"))
                .and(contains("GB/s measured reading"))
                .and(contains("beside f32 GEMM"))
                .and(contains("portable"))
                .and(contains("vs f32")),
        )
        .stdout(predicate::function(|text: &str| {
            text.matches("exact").count() == 1
        }));
}

#[test]
fn the_json_is_one_object_whose_numbers_fit_together() {
    let args = "--m 3,65 --k 130 --n 33 --device cpu --json";
    let args: Vec<&str> = args.split(' ').collect();
    let output = bench(&args).success().get_output().stdout.clone();
    let report: Value = serde_json::from_slice(&output).unwrap();
    assert!(report["machine"]["threads"].as_u64().unwrap() >= 1);
    let bandwidth = report["machine"]["bandwidth"].as_f64().unwrap();
    assert!(bandwidth > 1e8, "{bandwidth}");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for (row, m) in rows.iter().zip([3.0, 65.0]) {
        let (k, n) = (130.0, 33.0);
        assert_eq!([&row["m"], &row["k"], &row["n"]], [m as u64, 130, 33]);
        let (ternary, dense) = (&row["ternary"], &row["baselines"][0]);
        // The result once, and each operand: 4 bytes a value, or 1 for x and 4 for 16 values of w.
        let bytes = [
            m * k + 4.0 * n * 9.0 + 4.0 * m * n,
            4.0 * (m * k + n * k + m * n),
        ];
        for (path, bytes) in [ternary, dense].into_iter().zip(bytes) {
            assert_eq!(path["exact"], true, "{path}");
            assert_eq!(path["max_error"], 0.0, "{path}");
            assert_eq!(path["bytes"].as_f64().unwrap(), bytes);
            for cache in ["cold", "warm"] {
                let times = &path[cache];
                let [p20, p50, p80] =
                    ["p20_us", "p50_us", "p80_us"].map(|key| times[key].as_f64().unwrap());
                assert!(0.0 < p20 && p20 <= p50 && p50 <= p80, "{times}");
                assert!(times["samples"].as_u64().unwrap() >= 5);
            }
        }
        let seconds = |path: &Value| path["cold"]["p50_us"].as_f64().unwrap() / 1e6;
        let close = |value: &Value, expected: f64| {
            let value = value.as_f64().unwrap();
            let off = (value / expected - 1.0).abs();
            assert!(off < 1e-9, "{value}, not {expected}");
        };
        let rate = bytes[0] / seconds(ternary);
        close(&row["gb_per_s"], rate / 1e9);
        close(&row["bandwidth_share"], rate / bandwidth);
        close(&row["tops"], 2.0 * m * k * n / seconds(ternary) / 1e12);
        close(&dense["speedup"], seconds(dense) / seconds(ternary));
        assert_eq!(row["peak_share"], Value::Null);
    }
}

#[test]
fn every_dimension_of_one_works() {
    bench(&["--m", "1", "--k", "1", "--n", "1", "--device", "cpu"]).success();
}

#[test]
fn reports_and_plots_go_to_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (table, plot) = (path("table.txt"), path("plot.svg"));
    let args = "--m 1,2 --k 64 --n 32 --device cpu --output";
    let mut args: Vec<&str> = args.split(' ').collect();
    args.extend([&table, "--plot", &plot]);
    bench(&args).success().stdout("");
    let table = std::fs::read_to_string(table).unwrap();
    assert_eq!(table.matches("exact").count(), 2, "{table}");
    let plot = std::fs::read_to_string(plot).unwrap();
    for part in ["<svg", "speed-up over f32 GEMM", "32 x 64", "</svg>"] {
        assert!(plot.contains(part), "`{part}` in the plot");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);

    let nowhere = path("nowhere/plot.svg");
    refused(
        &["--m", "1", "--k", "64", "--n", "32", "--plot", &nowhere],
        "there is no directory",
    );
    let directory = dir.path().display().to_string();
    refused(
        &["--m", "1", "--k", "64", "--n", "32", "--output", &directory],
        "that is a directory",
    );
}

#[test]
fn shapes_are_whole_or_a_suite() {
    refused(&["--n", "64"], "--k <K>");
    refused(&["--k", "64"], "--n <N>");
    refused(
        &["--suite", "bitnet", "--n", "64", "--k", "64"],
        "cannot be used with",
    );
    refused(&["--suite", "llama"], "possible values: bitnet");
}

#[test]
fn impossible_sizes_are_refused() {
    let shape = |m: &str, k: &str, n: &str, message: &str| {
        refused(&["--m", m, "--k", k, "--n", n, "--device", "cpu"], message);
    };
    let zero = "0: every dimension must be at least 1";
    shape("0", "64", "64", &format!("--m {zero}"));
    shape("1", "0", "64", &format!("--k {zero}"));
    shape("1", "64", "0", &format!("--n {zero}"));
    shape("1", "16777216", "64", "--k 16777216: at most 16777215");
    let huge = usize::MAX.to_string();
    shape("99999999", "64", "99999999", "choose smaller sizes");
    shape(&huge, "64", &huge, "choose smaller sizes");
}

#[test]
fn decoding_reads_every_weight_but_the_embedding() {
    let args = [
        "decode", "--device", "cpu", "--prompt", "3", "--tokens", "4", "--json",
    ];
    let output = bench(&args).success().get_output().stdout.clone();
    let report: Value = serde_json::from_slice(&output).unwrap();
    let number = |pointer: &str| report.pointer(pointer).unwrap().as_f64().unwrap();
    // 75.5 M codes of 2 bits, a head of 32000 x 768 in 16, norms in 32.
    let norms = 12 * (3 * 768 + 2048) + 768;
    let bytes = 75_497_472 / 4 + 2 * 32_000 * 768 + 4 * norms;
    assert_eq!(number("/bytes_per_token"), f64::from(bytes));
    let rate = number("/bytes_per_token") / (number("/token_ms/p50") / 1e3);
    assert!((number("/bytes_per_s") / rate - 1.0).abs() < 1e-9);
    assert!(number("/token_ms/p20") <= number("/token_ms/p80"));
    assert!(number("/prefill_tokens_per_s") > 0.0);
}

#[test]
fn decoding_beyond_the_context_is_refused() {
    let huge = usize::MAX.to_string();
    refused(&["decode", "--prompt", &huge], "exceed the context of 2048");
    refused(&["decode", "--tokens", "0"], "--tokens 0");
    refused(&["decode", "--model-size", "9B"], "unknown model size");
}

#[test]
fn unknown_devices_are_refused() {
    for device in ["tpu", "cuda:", "cuda:x", "cuda:-1", ""] {
        refused(
            &["--device", device],
            &format!("unknown device '{device}': use auto, cpu, cuda or cuda:N"),
        );
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_cpu_build_says_how_to_get_cuda() {
    for device in ["cuda", "cuda:1"] {
        refused(
            &["--device", device],
            "this binary was built without CUDA support; \
             rebuild with `cargo build --release --features cuda` or use --device cpu",
        );
    }
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_that_is_not_there_is_refused() {
    refused(
        &["--device", "cuda:9999"],
        "no usable NVIDIA GPU as cuda:9999",
    );
}

/// The smallest preset on few tokens: a whole step runs on the CPU too.
#[test]
fn training_steps_are_timed() {
    let args = [
        "train",
        "--model-size",
        "125m",
        "--micro-batch",
        "1",
        "--seq-len",
        "8",
        "--accum",
        "2",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--json",
    ];
    let output = bench(&args).success().get_output().stdout.clone();
    let report: Value = serde_json::from_slice(&output).unwrap();
    let number = |key: &str| report[key].as_f64().unwrap();
    // Two micro-batches of 8 tokens a step.
    let tokens_per_s = 16.0 / (number("step_ms") / 1e3);
    assert!((number("tokens_per_s") / tokens_per_s - 1.0).abs() < 1e-9);
    // An untrained model guesses among 32000 tokens.
    assert!((number("loss") - 32000f64.ln()).abs() < 1.0, "{report}");
}

#[test]
fn wrong_training_benchmarks() {
    refused(&["train", "--steps", "0"], "--steps 0");
    refused(&["train", "--accum", "0"], "train.grad_accum is 0");
    refused(&["train", "--model-size", "9B"], "125M, 350M");
    refused(&["train", "--recompute", "some"], "none");
    refused(&["train", "--backward", "fp4"], "`bf16` or `fp8`");
    refused(
        &["train", "--profile", "--device", "cpu"],
        "--profile times the kernels of a GPU and this is the CPU: use --device cuda",
    );
}
