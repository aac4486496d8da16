//! `titanbit bench`: the product over packed 2-bit weights beside dense ones, with `train` whole
//! training steps, and with `decode` text generation.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod decode;
mod machine;
mod plot;
mod problem;
mod profile;
mod report;
mod shapes;
mod timing;
mod train;

use std::path::{Path, PathBuf};

use candle_core::Device;
use indicatif::{ProgressBar, ProgressStyle};

use super::console;
use crate::config::Kernels;
use crate::files::{directory_of, replace_file};
use crate::quant::matmul::MAX_K;
use crate::{Error, Result, device};
use machine::Machine;
use problem::{Problem, Weights};
use report::{Report, Row};
use shapes::{Shape, Suite};

/// Time the matrix product over packed ternary weights beside dense ones, and check that it is exact.
///
/// Multiplies random int8 activations (M, K) by random ternary weights (N, K): on a CPU beside an
/// f32 GEMM, on a GPU beside cuBLASLt in bf16 and in int8. Times are medians, and 20th and 80th
/// percentiles, of a call with the weights in memory (cold); "warm" is the median with one weight
/// that stays in cache. Speed-ups compare cold with cold.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Rows of the activations (tokens), one number or several: 1,16,128 [default: by the device]
    #[arg(long, value_delimiter = ',')]
    m: Vec<usize>,
    /// Rows of the weights (features out), with --k [default: the projections of the 1.3B model]
    #[arg(long, requires = "k")]
    n: Option<usize>,
    /// Inner dimension (features in), with --n
    #[arg(long, requires = "n")]
    k: Option<usize>,
    /// A collection of shapes
    #[arg(long, conflicts_with_all = ["n", "k"])]
    suite: Option<Suite>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// auto: the fastest kernels for the device; portable: those for every GPU, or every CPU
    #[arg(long, value_name = "WHICH", default_value = "auto", value_parser = train::word::<Kernels>)]
    kernels: Kernels,
    /// On a GPU, start each product when the one before has ended. Else its weights are brought while
    /// the one before still runs (from sm_90 on), as in a model
    #[arg(long)]
    in_turn: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Write the table, or the JSON object, to this file instead of printing it
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Draw speed-up and share of the limit over M to this SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Command {
    Train(train::Args),
    Decode(decode::Args),
}

pub fn run(args: Args) -> Result<()> {
    match &args.command {
        Some(Command::Train(args)) => return train::run(args),
        Some(Command::Decode(args)) => return decode::run(args),
        None => {}
    }
    let shapes = shapes(&args)?;
    let device = device::select(&args.device)?;
    let tokens = match args.m.as_slice() {
        [] => shapes::tokens(&device),
        tokens => tokens.to_vec(),
    };
    check_sizes(&shapes, &tokens)?;
    for path in [&args.output, &args.plot].into_iter().flatten() {
        check_place(path)?;
    }
    let largest = tokens.iter().copied().max().unwrap_or(1);
    for shape in &shapes {
        check_memory(largest, shape, &device)?;
    }
    let machine = Machine::measure(&device)?;
    let rows = measure(&args, &shapes, &tokens, &device, &machine)?;
    let report = Report { machine, rows };

    let text = match args.json {
        true => format!("{:#}", report.json()),
        false => report.table(),
    };
    match &args.output {
        Some(path) => replace_file(path, (text + "\n").as_bytes())?,
        None => console::answer(text)?,
    }
    if let Some(path) = &args.plot {
        plot::write(&report, path)?;
    }
    if report.is_exact() {
        return Ok(());
    }
    Err(
        candle_core::Error::msg("the product over packed weights is wrong, see the last column")
            .into(),
    )
}

/// What is asked for: one shape, a suite, or the projections of the default model.
fn shapes(args: &Args) -> Result<Vec<Shape>> {
    match (args.n.zip(args.k), args.suite) {
        (Some((n, k)), _) => Ok(vec![Shape {
            name: String::new(),
            n,
            k,
        }]),
        (None, Some(suite)) => suite.shapes(),
        (None, None) => shapes::projections("1.3B"),
    }
}

/// Times a product on the device at hand.
type TimeRow<'a> = Box<dyn Fn(&Shape, &Problem) -> Result<Row> + 'a>;

fn measure(
    args: &Args,
    shapes: &[Shape],
    tokens: &[usize],
    device: &Device,
    machine: &Machine,
) -> Result<Vec<Row>> {
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").expect("a valid template");
    let bar =
        console::show(ProgressBar::new((shapes.len() * tokens.len()) as u64).with_style(style));
    let row: TimeRow = match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let bench = cuda::Bench::new(args, device, machine)?;
            Box::new(move |shape, problem| bench.row(shape, problem))
        }
        _ => Box::new(|shape, problem| cpu::row(shape, problem, machine, args.kernels)),
    };
    let mut rows = Vec::new();
    for shape in shapes {
        let weights = Weights::random(shape.n, shape.k)?;
        for &m in tokens {
            bar.set_message(format!("{m} x {} x {}", shape.n, shape.k));
            let problem = Problem::random(m, &weights);
            rows.push(row(shape, &problem)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

fn check_sizes(shapes: &[Shape], tokens: &[usize]) -> Result<()> {
    let tokens = tokens.iter().map(|m| ("--m", *m));
    let features = shapes
        .iter()
        .flat_map(|shape| [("--n", shape.n), ("--k", shape.k)]);
    for (flag, size) in tokens.chain(features) {
        if size == 0 {
            return Err(Error::usage(format!(
                "{flag} 0: every dimension must be at least 1"
            )));
        }
        if flag == "--k" && size > MAX_K {
            return Err(Error::usage(format!(
                "--k {size}: at most {MAX_K}, beyond which the int32 sums can overflow"
            )));
        }
    }
    Ok(())
}

/// Refuses what the host or the GPU cannot hold, before the operating system has to.
fn check_memory(largest_m: usize, shape: &Shape, device: &Device) -> Result<()> {
    let [m, n, k] = [largest_m, shape.n, shape.k].map(|size| size as f64);
    let cold = 6.0 * device::last_cache_bytes(device) as f64;
    // Codes and packed weights stay; a path adds 4 bytes for each operand value, as much again for
    // weights beyond the cache, and two or three int32 or float results.
    let host = 5.0 * m * k + 10.0 * n * k + 12.0 * m * n + cold;
    let available = device::host_memory("MemAvailable");
    fits(
        m,
        shape,
        "memory",
        host,
        available.map(|bytes| bytes as f64),
    )?;
    if device.is_cpu() {
        return Ok(());
    }
    let gpu = 2.0 * m * k + 4.0 * n * k + 6.0 * m * n + cold;
    let free = device::free_memory(device);
    fits(m, shape, "GPU memory", gpu, free.map(|bytes| bytes as f64))
}

fn fits(m: f64, shape: &Shape, memory: &str, needed: f64, available: Option<f64>) -> Result<()> {
    // Where the system does not say what it has, its address space is the only limit known.
    let available = available.unwrap_or(isize::MAX as f64);
    if needed <= available {
        return Ok(());
    }
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    Err(Error::usage(format!(
        "--m {m} --n {} --k {} needs about {:.1} GiB of {memory} and {:.1} GiB are free: choose \
         smaller sizes",
        shape.n,
        shape.k,
        gib(needed),
        gib(available)
    )))
}

/// Refuses, before anything is measured, a file that cannot be.
fn check_place(path: &Path) -> Result<()> {
    let directory = directory_of(path);
    let problem = if path.is_dir() {
        "that is a directory".to_owned()
    } else if !directory.is_dir() {
        format!("there is no directory {}", directory.display())
    } else {
        return Ok(());
    };
    Err(Error::usage(format!(
        "cannot write {}: {problem}",
        path.display()
    )))
}
