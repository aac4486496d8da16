//! `titanbit bench`: the ternary product over packed 2-bit weights against a dense one, and with
//! `train` whole training steps.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod problem;
mod profile;
mod timing;
mod train;

use candle_core::Device;
use serde_json::{Value, json};

use super::console;
use crate::quant::matmul::MAX_K;
use crate::{Error, Result, device};
use problem::{Agreement, Problem};
use timing::Timing;

/// Compare the ternary matrix product over packed 2-bit weights with a dense one.
///
/// Multiplies random int8 activations (M, K) by random ternary weights (N, K): on the CPU against
/// an f32 GEMM, on a GPU against bf16 cuBLAS. Every result is checked against the exact integers.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Rows of the activations (tokens)
    #[arg(long, default_value_t = 2048)]
    m: usize,
    /// Inner dimension (features in)
    #[arg(long, default_value_t = 2048)]
    k: usize,
    /// Rows of the weights (features out)
    #[arg(long, default_value_t = 2048)]
    n: usize,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(clap::Subcommand)]
enum Command {
    Train(train::Args),
}

/// One path, timed and checked.
struct Measured {
    name: &'static str,
    timing: Timing,
    /// Bytes that must move at least: both operands read once, the result written once.
    bytes: usize,
    agreement: Agreement,
}

pub fn run(args: Args) -> Result<()> {
    if let Some(Command::Train(args)) = &args.command {
        return train::run(args);
    }
    check_shape(&args)?;
    let device = device::select(&args.device)?;
    check_memory(&args, &device)?;
    let problem = Problem::random(args.m, args.k, args.n)?;
    let paths = match &device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => [
            cuda::gemm(&problem, device)?,
            cuda::ternary(&problem, device)?,
        ],
        _ => [cpu::gemm(&problem)?, cpu::ternary(&problem)?],
    };
    if args.json {
        console::answer(json_report(&problem, &device, &paths))?;
    } else {
        console::answer(table(&problem, &device, &paths))?;
    }
    let [_, ternary] = &paths;
    if ternary.agreement.exact() {
        Ok(())
    } else {
        Err(candle_core::Error::msg(format!(
            "the ternary product is wrong in {} of {} rows",
            ternary.agreement.wrong_rows, problem.m
        ))
        .into())
    }
}

fn check_shape(args: &Args) -> Result<()> {
    for (flag, size) in [("--m", args.m), ("--k", args.k), ("--n", args.n)] {
        if size == 0 {
            return Err(Error::usage(format!(
                "{flag} 0: every dimension must be at least 1"
            )));
        }
    }
    if args.k > MAX_K {
        return Err(Error::usage(format!(
            "--k {}: at most {MAX_K}, beyond which the int32 sums can overflow",
            args.k
        )));
    }
    Ok(())
}

/// Refuses what the host or the GPU cannot hold, before the operating system has to.
fn check_memory(args: &Args, device: &Device) -> Result<()> {
    let [m, k, n] = [args.m, args.k, args.n].map(|size| size as f64);
    // Codes and packed weights stay; a path adds 4 bytes for each operand value and two or three
    // int32 or float results.
    let host = 5.0 * (m * k + n * k) + n * k / 4.0 + 12.0 * m * n;
    let available = device::host_memory("MemAvailable");
    fits(args, "memory", host, available.map(|bytes| bytes as f64))?;
    if device.is_cpu() {
        return Ok(());
    }
    let gpu = 2.0 * (m * k + n * k) + 4.0 * m * n;
    let free = device::free_memory(device);
    fits(args, "GPU memory", gpu, free.map(|bytes| bytes as f64))
}

fn fits(args: &Args, memory: &str, needed: f64, available: Option<f64>) -> Result<()> {
    // Where the system does not say what it has, its address space is the only limit known.
    let available = available.unwrap_or(isize::MAX as f64);
    if needed <= available {
        return Ok(());
    }
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    Err(Error::usage(format!(
        "--m {} --k {} --n {} needs about {:.1} GiB of {memory} and {:.1} GiB are free: \
         choose smaller sizes",
        args.m,
        args.k,
        args.n,
        gib(needed),
        gib(available)
    )))
}

impl Measured {
    fn tera_operations(&self, problem: &Problem) -> f64 {
        problem.operations() / self.timing.median / 1e12
    }

    fn gigabytes(&self) -> f64 {
        self.bytes as f64 / self.timing.median / 1e9
    }
}

/// How many times as fast as the dense path the ternary one is.
fn speedup([dense, ternary]: &[Measured; 2]) -> f64 {
    dense.timing.median / ternary.timing.median
}

fn table(problem: &Problem, device: &Device, paths: &[Measured; 2]) -> String {
    let &Problem { m, k, n, .. } = problem;
    let mut lines = vec![
        format!(
            "{}, {} threads",
            device::describe(device),
            rayon::current_num_threads()
        ),
        format!("y = x . w^T: int8 x ({m} x {k}), ternary w ({n} x {k}), y ({m} x {n})\n"),
        format!(
            "{:<22} {:>12} {:>7} {:>9} {:>9} {:>9}  result",
            "path", "median", "calls", "TFLOP/s", "GB/s", "speed-up"
        ),
    ];
    lines.extend(paths.iter().map(|path| {
        format!(
            "{:<22} {:>9.3} ms {:>7} {:>9.3} {:>9.2} {:>8.2}x  {}",
            path.name,
            1e3 * path.timing.median,
            path.timing.calls,
            path.tera_operations(problem),
            path.gigabytes(),
            paths[0].timing.median / path.timing.median,
            result(&path.agreement),
        )
    }));
    lines.join("\n")
}

fn result(agreement: &Agreement) -> String {
    if agreement.exact() {
        "exact".to_owned()
    } else {
        format!("max |error| {}", agreement.max_error)
    }
}

fn json_report(problem: &Problem, device: &Device, paths: &[Measured; 2]) -> Value {
    let &Problem { m, k, n, .. } = problem;
    json!({
        "device": device::describe(device),
        "threads": rayon::current_num_threads(),
        "m": m,
        "k": k,
        "n": n,
        "speedup": speedup(paths),
        "paths": paths.each_ref().map(|path| json!({
            "name": path.name,
            "median_ms": 1e3 * path.timing.median,
            "calls": path.timing.calls,
            "tflops": path.tera_operations(problem),
            "bytes": path.bytes,
            "gb_per_s": path.gigabytes(),
            "exact": path.agreement.exact(),
            "max_error": path.agreement.max_error,
        })),
    })
}
