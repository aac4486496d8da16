//! The command line: one file a subcommand, each with its `Args` and its `run`.

mod bench;
mod console;
mod eval;
mod export;
mod format;
mod generate;
mod info;
mod tokenize;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Pretrain BitNet b1.58 language models (ternary weights, int8 activations) on one machine.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant)] // there is one, and it is parsed once
enum Command {
    Train(train::Args),
    Tokenize(tokenize::Args),
    Generate(generate::Args),
    Eval(eval::Args),
    Export(export::Args),
    Info(info::Args),
    Bench(bench::Args),
}

/// Parses the arguments, runs the subcommand, prints its error as one line; exit code 2 for
/// usage, 1 for failures at run time.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse_arguments(&error),
    };
    console::init_tracing();
    let outcome = match cli.command {
        Command::Train(args) => train::run(args),
        Command::Tokenize(args) => tokenize::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Export(args) => export::run(args),
        Command::Info(args) => info::run(args),
        Command::Bench(args) => bench::run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console::complain(format!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Prints help in full, and a wrong argument as one line: clap's message, hints included, without
/// the usage that `--help` shows.
fn refuse_arguments(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    let kind = error.kind();
    if !error.use_stderr() || kind == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        error.exit();
    }
    let text = error.to_string();
    let message: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .filter(|line| !line.is_empty())
        .collect();
    let message = message.join(" ");
    console::complain(format!("{message}; `--help` lists the arguments"));
    ExitCode::from(2)
}
