//! The command line: one file a subcommand, each with its `Args` and its `run`.

mod bench;
mod console;
mod format;
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
    Info(info::Args),
    Bench(bench::Args),
}

/// Parses the arguments, runs the subcommand, prints its error as one line; exit code 2 for
/// usage, 1 for failures at run time.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    console::init_tracing();
    let outcome = match cli.command {
        Command::Train(args) => train::run(args),
        Command::Tokenize(args) => tokenize::run(args),
        Command::Info(args) => info::run(args),
        Command::Bench(args) => bench::run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
