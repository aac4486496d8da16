//! Every CUDA kernel through its launcher, against the formula in f64 on the CPU. Without a GPU
//! each test prints that it is skipped.
//!
//! Inputs differ from run to run: each test prints its seed, which the variable `SEED` repeats.
//! Memory that a kernel is to write starts poisoned, and guards stand around every buffer; launches
//! are safe because each test makes its buffers as large as the launcher says.
#![cfg(feature = "cuda")]

mod attention;
mod check;
mod fp8;
mod gate;
mod gpu;
mod inference;
mod loss;
mod norms;
mod optimizer;
mod products;
mod random;
mod rope;
mod rows;
mod ternary;
mod weights;
