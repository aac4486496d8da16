//! What a person sees while a command runs: warnings and messages that do not tear the progress
//! bar apart.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use indicatif::{MultiProgress, ProgressBar};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::Result;
use crate::error::IoContext;

/// All bars of the process; drawn on standard error, hidden when that is no terminal.
fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(MultiProgress::new)
}

/// Shows `bar`, below whatever is printed meanwhile.
pub fn show(bar: ProgressBar) -> ProgressBar {
    bars().add(bar)
}

/// Prints what a command was asked for on standard output. A reader that has gone (`| head`) is
/// no error.
pub fn answer(text: impl Display) -> Result<()> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.at("write to", "standard output"),
    }
}

/// Prints one line on standard error. Where that cannot be written, the exit code must do.
pub fn complain(line: impl Display) {
    _ = writeln!(io::stderr(), "{line}");
}

/// Prints news of a running command on standard output, above the bars. It goes on if nobody
/// can read them.
pub fn line(text: &str) {
    bars().suspend(|| _ = writeln!(io::stdout(), "{text}"));
}

/// Without the control characters that a model may write, and a terminal would obey.
pub fn printable(text: &str) -> String {
    let harmless = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    text.chars().filter(|c| harmless(*c)).collect()
}

/// Sends `tracing` events to standard error; `RUST_LOG` chooses, by default `info` and above.
pub fn init_tracing() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A second call (in tests) keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .without_time()
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(StderrAboveBars)
        .try_init();
}

struct StderrAboveBars;

impl<'a> MakeWriter<'a> for StderrAboveBars {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        Self
    }
}

impl Write for StderrAboveBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bars().suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
