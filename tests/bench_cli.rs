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
fn the_table_names_the_device_and_both_paths() {
    bench(&["--m", "33", "--k", "47", "--n", "29", "--device", "cpu"])
        .success()
        .stdout(
            contains("CPU (")
                .and(contains("threads"))
                .and(contains("f32 GEMM")),
        )
        .stdout(contains("ternary, packed 2-bit"))
        .stdout(predicate::function(|text: &str| {
            text.matches("exact").count() == 2
        }));
}

#[test]
fn the_json_is_one_object_whose_numbers_fit_together() {
    let (m, k, n) = (65.0, 130.0, 33.0);
    let args = [
        "--m", "65", "--k", "130", "--n", "33", "--device", "cpu", "--json",
    ];
    let output = bench(&args).success().get_output().stdout.clone();
    let report: Value = serde_json::from_slice(&output).unwrap();
    assert_eq!([&report["m"], &report["k"], &report["n"]], [65, 130, 33]);
    assert!(report["threads"].as_u64().unwrap() >= 1);

    let paths = report["paths"].as_array().unwrap();
    // The result once, and each operand: 4 bytes a value, or 1 for x and 4 for 16 values of w.
    let bytes = [
        4.0 * (m * k + n * k + m * n),
        m * k + 4.0 * n * 9.0 + 4.0 * m * n,
    ];
    assert_eq!(paths.len(), bytes.len());
    for (path, bytes) in paths.iter().zip(bytes) {
        assert_eq!(path["exact"], true, "{path}");
        assert_eq!(path["max_error"], 0.0, "{path}");
        assert_eq!(path["bytes"].as_f64().unwrap(), bytes);
        assert!(path["calls"].as_u64().unwrap() >= 3);
        let seconds = path["median_ms"].as_f64().unwrap() / 1e3;
        let close = |key: &str, expected: f64| {
            let value = path[key].as_f64().unwrap();
            assert!(
                (value / expected - 1.0).abs() < 1e-9,
                "{key}: {value}, not {expected}"
            );
        };
        close("tflops", 2.0 * m * k * n / seconds / 1e12);
        close("gb_per_s", bytes / seconds / 1e9);
    }
    let median = |path: usize| paths[path]["median_ms"].as_f64().unwrap();
    let speedup = report["speedup"].as_f64().unwrap();
    assert!((speedup / (median(0) / median(1)) - 1.0).abs() < 1e-9);
}

#[test]
fn every_dimension_of_one_works() {
    bench(&["--m", "1", "--k", "1", "--n", "1", "--device", "cpu"]).success();
}

#[test]
fn impossible_sizes_are_refused() {
    for flag in ["--m", "--k", "--n"] {
        refused(
            &[flag, "0"],
            &format!("{flag} 0: every dimension must be at least 1"),
        );
    }
    refused(&["--k", "16777216"], "--k 16777216: at most 16777215");
    let huge = usize::MAX.to_string();
    for args in [
        ["--m", "99999999", "--n", "99999999"],
        ["--m", &huge, "--n", &huge],
    ] {
        refused(
            &[args.as_slice(), &["--device", "cpu"]].concat(),
            "choose smaller sizes",
        );
    }
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
