use std::process::ExitCode;

/// Training allocates and frees the same large tensors every step: an allocator that keeps the
/// pages saves the system from zeroing them anew.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    titanbit::cli::main()
}
