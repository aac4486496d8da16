//! Runs tests/reference/check_gguf.py.

use std::ffi::OsStr;
use std::process::Command;

/// The Python named by TITANBIT_PYTHON, else `python3`, if it has `modules`; says so if it has not.
pub fn with(modules: &[&str]) -> Option<String> {
    let python = std::env::var("TITANBIT_PYTHON").unwrap_or("python3".into());
    let imports = format!("import {}", modules.join(", "));
    let found = Command::new(&python).args(["-c", &imports]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    println!(
        "skipped: {python} has not all of {} (set TITANBIT_PYTHON to one that has)",
        modules.join(", ")
    );
    None
}

/// Runs the script, which must find nothing wrong, and prints what it says.
pub fn check(python: &str, args: &[impl AsRef<OsStr>]) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reference/check_gguf.py");
    let output = Command::new(python).arg(script).args(args).output();
    let output = output.unwrap_or_else(|e| panic!("cannot run {python}: {e}"));
    print!("{}", String::from_utf8_lossy(&output.stdout));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
}
