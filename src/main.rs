use std::process::ExitCode;

fn main() -> ExitCode {
    titanbit::cli::main()
}
