//! A run that is killed, interrupted or robbed of its newest checkpoint goes on bit by bit as the
//! one that was not.

#![cfg(unix)]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use common::*;

fn train(config: &Path, out: &Path, more: &[&str]) -> std::process::Command {
    let mut command = titanbit();
    command.args(["train", "--config"]).arg(config);
    command.arg("--out").arg(out).args(more);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn finish(config: &Path, out: &Path, more: &[&str]) -> Output {
    let output = train(config, out, more).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    output
}

/// Waits until `condition`, or until the child has ended.
fn wait_for(child: &mut Child, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() && child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "nothing happened in two minutes");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn lines_in(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[test]
fn a_killed_run_resumes_bit_by_bit() {
    let dir = tempfile::tempdir().unwrap();
    let config = write_config(dir.path());
    let whole = dir.path().join("whole");
    finish(&config, &whole, &[]);
    let expected = losses(&whole);
    assert_eq!(expected.len() as u64, STEPS);

    let killed = dir.path().join("killed");
    let recorded = killed.join("metrics.jsonl");
    // At moments that fall before, inside and after the writing of checkpoints.
    for (kill, lines) in [3usize, 12, 23, 24, 31, 57, 88].into_iter().enumerate() {
        let started = killed.join("checkpoints/latest").exists();
        if !started && recorded.exists() {
            fs::remove_dir_all(&killed).unwrap();
        }
        let more: &[&str] = if started {
            &["--resume", "latest"]
        } else {
            &[]
        };
        let mut child = train(&config, &killed, more).spawn().unwrap();
        let target = lines;
        wait_for(&mut child, || lines_in(&recorded) >= target);
        std::thread::sleep(Duration::from_micros(700 * kill as u64));
        let _ = child.kill();
        child.wait().unwrap();
    }
    finish(&config, &killed, &["--resume", "latest"]);
    assert_eq!(losses(&killed), expected);
}

/// A rollback that happened before the kill is part of the state, too.
#[test]
fn a_run_with_a_rollback_resumes_bit_by_bit() {
    let dir = tempfile::tempdir().unwrap();
    let config = write_config(dir.path());
    let mut tokens = counting(16 * 1000 + 1);
    // Half of the data is foreign: some window will spike once the rest is learnt.
    for window in (500..1000).step_by(97) {
        for (i, token) in tokens[window * 16..][..17].iter_mut().enumerate() {
            *token = 50 + ((i * 5) % 14) as u16;
        }
    }
    write_bin(&dir.path().join("train.bin"), &tokens);
    let whole = dir.path().join("whole");
    finish(&config, &whole, &[]);
    let rollbacks = |run: &Path| {
        let all = metrics(run)
            .into_iter()
            .filter(|line| line["event"] == "rollback");
        all.collect::<Vec<_>>()
    };
    assert!(
        !rollbacks(&whole).is_empty(),
        "the data was meant to cause a rollback"
    );

    let killed = dir.path().join("killed");
    let mut child = train(&config, &killed, &[]).spawn().unwrap();
    let recorded = killed.join("metrics.jsonl");
    wait_for(&mut child, || {
        fs::read_to_string(&recorded).is_ok_and(|text| text.contains("rollback"))
    });
    let _ = child.kill();
    child.wait().unwrap();
    finish(&config, &killed, &["--resume", "latest"]);
    // By step, the last time it was taken: what the weights at the end are made of.
    let last_taken = |run: &Path| {
        let pairs = losses(run)
            .into_iter()
            .map(|(step, loss, norm)| (step, (loss, norm)));
        pairs.collect::<std::collections::BTreeMap<_, _>>()
    };
    assert_eq!(last_taken(&killed), last_taken(&whole));
    assert_eq!(rollbacks(&killed).last(), rollbacks(&whole).last());
    for run in [&killed, &whole] {
        let all = metrics(run);
        let after = all.iter().rposition(|line| line["event"] == "rollback");
        let steps = all[after.unwrap()..]
            .iter()
            .filter(|line| line["event"].is_null());
        let steps: Vec<u64> = steps.map(|line| line["step"].as_u64().unwrap()).collect();
        assert!(
            steps.is_sorted_by(|a, b| a < b),
            "recorded twice: {steps:?}"
        );
    }
}

#[test]
fn an_interrupt_saves_and_exits_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    let config = write_config(dir.path());
    let whole = dir.path().join("whole");
    finish(&config, &whole, &[]);
    // Whoever started these tests may want a hang-up ignored, and a child inherits that.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let heeds_hang_up =
        ignored.is_none_or(|mask| mask.ends_with(['0', '2', '4', '6', '8', 'a', 'c', 'e']));
    for signal in ["-INT", "-TERM", "-HUP"] {
        if signal == "-HUP" && !heeds_hang_up {
            continue;
        }
        let run = dir.path().join(signal);
        let child = train(&config, &run, &[]).spawn().unwrap();
        let output = send(child, &run, signal);
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{stdout}");
        assert!(
            stdout.contains("stopped at step") && stdout.contains("--resume latest"),
            "{stdout}"
        );
        finish(&config, &run, &["--resume", "latest"]);
        assert_eq!(losses(&run), losses(&whole));
    }
}

/// Sends a signal once a run has taken fifteen steps, and waits for its end.
fn send(mut child: Child, run: &Path, signal: &str) -> Output {
    wait_for(&mut child, || lines_in(&run.join("metrics.jsonl")) >= 15);
    let pid = child.id().to_string();
    let mut kill = std::process::Command::new("kill");
    assert!(kill.args([signal, &pid]).status().unwrap().success());
    child.wait_with_output().unwrap()
}

/// What `nohup` started outlives the terminal.
#[cfg(target_os = "linux")]
#[test]
fn an_ignored_hang_up_stays_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let config = write_config(dir.path());
    let run = dir.path().join("run");
    let child = std::process::Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$@\"", "sh"])
        .arg(env!("CARGO_BIN_EXE_titanbit"))
        .args(["train", "--config"])
        .arg(&config)
        .arg("--out")
        .arg(&run)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = send(child, &run, "-HUP");
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        stdout.contains(&format!("finished step {STEPS}")),
        "{stdout}"
    );
}

/// What is finished is neither evaluated nor recorded again.
#[test]
fn a_finished_run_has_nothing_left_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let config = write_config(dir.path());
    let run = dir.path().join("run");
    finish(&config, &run, &["--max-steps", "20"]);
    let before = files(&run.join("checkpoints"));
    let recorded = metrics(&run);
    let output = finish(&config, &run, &["--resume", "latest", "--max-steps", "15"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("step 20 is there already"));
    assert!(files(&run.join("checkpoints")) == before);
    assert_eq!(metrics(&run), recorded);
}

#[test]
fn a_torn_checkpoint_is_noticed_and_the_one_before_it_used() {
    let dir = tempfile::tempdir().unwrap();
    let config = write_config(dir.path());
    let whole = dir.path().join("whole");
    finish(&config, &whole, &[]);

    for (name, file) in [("model", "model.safetensors"), ("state", "state.json")] {
        let run = dir.path().join(name);
        finish(&config, &run, &["--max-steps", "50"]);
        let torn = run.join("checkpoints/step_0000050").join(file);
        let bytes = fs::read(&torn).unwrap();
        fs::write(&torn, &bytes[..bytes.len() - 9]).unwrap();
        // The one before: a single bit.
        let flipped = run.join("checkpoints/step_0000040/optimizer.safetensors");
        let mut bytes = fs::read(&flipped).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&flipped, bytes).unwrap();

        let output = finish(&config, &run, &["--resume", "latest"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            stderr.contains(file) && stderr.contains("optimizer.safetensors"),
            "{stderr}"
        );
        assert!(
            stderr.contains("resuming from") && stderr.contains("step_0000030"),
            "{stderr}"
        );
        assert_eq!(losses(&run), losses(&whole));
    }
}

#[test]
fn max_steps_and_resume_by_path_leave_the_schedule_alone() {
    let dir = tempfile::tempdir().unwrap();
    let config = write_config(dir.path());
    let schedule = ["--set", "schedule.kind=cosine"];
    let whole = dir.path().join("whole");
    finish(&config, &whole, &schedule);
    let run = dir.path().join("run");
    finish(
        &config,
        &run,
        &[&schedule[..], &["--max-steps", "47"]].concat(),
    );
    let latest = run.join("checkpoints/latest");
    let from = latest.to_str().unwrap();
    finish(
        &config,
        &run,
        &[&schedule[..], &["--resume", from]].concat(),
    );
    assert_eq!(losses(&run), losses(&whole));
}

#[test]
fn another_directory_forks_a_run_and_leaves_it_alone() {
    let dir = tempfile::tempdir().unwrap();
    let config = write_config(dir.path());
    let whole = dir.path().join("whole");
    finish(&config, &whole, &[]);
    let parent = dir.path().join("parent");
    finish(&config, &parent, &["--max-steps", "40"]);
    let before = files(&parent);
    let from = parent.join("checkpoints/step_0000020");
    let resume = ["--resume", from.to_str().unwrap()];

    let fork = dir.path().join("fork");
    finish(&config, &fork, &resume);
    assert_eq!(losses(&fork), losses(&whole)[20..]);
    assert!(files(&parent) == before, "the parent changed");
    // Killed and resumed as any other run.
    let half = dir.path().join("half");
    finish(
        &config,
        &half,
        &[&resume[..], &["--max-steps", "60"]].concat(),
    );
    finish(&config, &half, &["--resume", "latest"]);
    assert_eq!(losses(&half), losses(&fork));

    let output = train(&config, &parent, &resume).output().unwrap();
    assert_refused(&output, 2, &["step_0000040 would be lost", "another --out"]);
    let output = train(&config, &whole, &resume).output().unwrap();
    assert_refused(&output, 2, &["already holds a run"]);
    assert!(files(&parent) == before, "the parent changed");
}

/// What another version of the program wrote: a key less, and the checksum of that.
#[test]
fn a_state_with_fewer_keys_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let config = write_config(dir.path());
    let run = dir.path().join("run");
    finish(&config, &run, &["--max-steps", "10"]);
    let state = run.join("checkpoints/step_0000010/state.json");
    let text = fs::read_to_string(&state).unwrap();
    let lines = text
        .lines()
        .filter(|line| !line.contains("\"sample_prompt\""));
    let without: Vec<&str> = lines.collect();
    assert_eq!(without.len() + 1, text.lines().count());
    let place = without
        .iter()
        .position(|line| line.starts_with("  \"checksum\""));
    let with_checksum = |checksum: &str| {
        let mut lines: Vec<String> = without.iter().map(|line| line.to_string()).collect();
        lines[place.unwrap()] = format!("  \"checksum\": \"{checksum}\"");
        lines.join("\n")
    };
    let checksum = xxhash_rust::xxh3::xxh3_64(with_checksum("").as_bytes());
    fs::write(&state, with_checksum(&format!("{checksum:016x}"))).unwrap();
    finish(&config, &run, &["--resume", "latest", "--max-steps", "12"]);
}
