//! The `titanbit` binary: the allocator, and a call of [`titanbit::cli::main`].

use std::process::ExitCode;

/// Training allocates and frees the same large tensors every step: an allocator that keeps their
/// pages saves the system from zeroing them anew, a sixth of a step on a CPU.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc.h, which the bindings do not name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

fn main() -> ExitCode {
    // SAFETY: sets a number inside the allocator before a second thread exists; -1 keeps pages
    // mapped until the process ends.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    titanbit::cli::main()
}
