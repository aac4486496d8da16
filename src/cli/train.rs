//! `titanbit train`: a configuration to a trained model in a run directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;
use indicatif::{ProgressBar, ProgressStyle};

use super::{console, format, tokenize};
use crate::config::Config;
use crate::data::prepare::prepare;
use crate::model::MemoryEstimate;
use crate::train::{Observer, Resume, RunOptions, StepRecord, Summary, Trainer};
use crate::{Error, Result, device, train};

/// Train a model as a YAML file says.
///
/// Writes a run directory: config.yaml (as resolved), metrics.jsonl (an object a step),
/// tensorboard/ and checkpoints/. Ctrl-C finishes the step, saves and exits; `--resume latest`
/// goes on bit by bit as if nothing had happened.
#[derive(clap::Args)]
pub struct Args {
    /// The configuration; configs/default.yaml documents every key
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// The run directory [default: runs/NAME of the config, numbered when taken]
    #[arg(long, value_name = "RUN_DIR")]
    out: Option<PathBuf>,

    /// Go on from the newest whole checkpoint of the run directory, or from a checkpoint
    #[arg(long, value_name = "latest|PATH")]
    resume: Option<String>,

    /// Stop after this many steps in all, leaving the schedule as it is
    #[arg(long, value_name = "N")]
    max_steps: Option<u64>,

    /// auto, cpu, cuda or cuda:N; overrides hardware.device
    #[arg(long)]
    device: Option<String>,

    /// Override a key of the configuration, e.g. train.micro_batch=4; repeatable
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

pub fn run(args: Args) -> Result<()> {
    let mut config = Config::load(&args.config, &args.set)?;
    if let Some(device) = args.device {
        config.hardware.device = device;
    }
    if let Some(threads) = config.hardware.threads {
        // The pool can only be sized once per process; a second run in one process keeps it.
        let _ = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global();
    }
    let device = device::select(&config.hardware.device)?;
    let resume = args.resume.map(|from| match from.as_str() {
        "latest" => Resume::Latest,
        path => Resume::Path(path.into()),
    });
    let name = args.config.file_stem().unwrap_or_default();
    let out = match args.out {
        Some(out) => out,
        None => default_run_dir(&Path::new("runs").join(name), resume.as_ref()),
    };

    let options = RunOptions {
        out,
        resume,
        max_steps: args.max_steps,
    };
    options.check()?;

    let bar = console::show(tokenize::progress_bar()?);
    if let Some(summary) = prepare(&config.data, &bar)? {
        bar.finish_and_clear();
        console::answer(format!("{summary}\n"))?;
    }
    bar.finish_and_clear();

    let mut console = Console {
        bar: ProgressBar::hidden(),
        every: config.logging.every,
        out: options.out.clone(),
        start: 0,
        stop: stop_on_interrupt()?,
    };
    let summary = train::run(&config, &options, &device, &mut console)?;
    console.bar.finish_and_clear();
    console::answer(report(&summary, &config, &options.out))
}

/// `base`, or `base-2`, `base-3`, ...: the first that holds no run yet, or, to resume, the last
/// that does.
fn default_run_dir(base: &Path, resume: Option<&Resume>) -> PathBuf {
    if let Some(Resume::Path(path)) = resume {
        // runs/NAME/checkpoints/step_0000100 belongs to runs/NAME.
        if let Some(run_dir) = path.parent().and_then(Path::parent) {
            return run_dir.to_path_buf();
        }
    }
    let numbered = |n: usize| match n {
        1 => base.to_path_buf(),
        _ => PathBuf::from(format!("{}-{n}", base.display())),
    };
    let free = (1..)
        .find(|n| !numbered(*n).join("metrics.jsonl").exists())
        .unwrap_or(1);
    let saved = |n: &usize| numbered(*n).join("checkpoints/latest").exists();
    match resume {
        Some(_) => numbered((1..free).rev().find(saved).unwrap_or(1)),
        None => numbered(free),
    }
}

/// A flag that Ctrl-C sets, on Unix also SIGTERM and the terminal's hang-up; a second one ends the
/// process at once.
fn stop_on_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        tracing::warn!("stopping after this step; once more to quit without saving");
    })
    .map_err(|e| Error::training(format!("cannot watch for Ctrl-C: {e}")))?;
    #[cfg(unix)]
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        if !ignored(signal) {
            signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))
                .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
                .map_err(|e| Error::training(format!("cannot watch for signals: {e}")))?;
        }
    }
    Ok(stop)
}

/// Whether whoever started this process wants it to outlive `signal`, as `nohup` does.
#[cfg(unix)]
fn ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// The progress bar on a terminal, plain lines elsewhere.
struct Console {
    bar: ProgressBar,
    every: u64,
    out: PathBuf,
    /// Steps taken before this session.
    start: u64,
    stop: Arc<AtomicBool>,
}

impl Observer for Console {
    fn started(&mut self, trainer: &Trainer, device: &Device, end: u64) {
        let config = trainer.config();
        let parameters = config.model.parameter_count();
        console::line(&format!(
            "model   {} parameters, {} of them ternary\n\
             device  {}\n\
             run     {}: steps {} to {end} of {}, {} tokens each",
            format::count(parameters.total() as u64),
            format::count(parameters.ternary as u64),
            device::describe(device),
            self.out.display(),
            trainer.step_count() + 1,
            config.train.steps,
            config.tokens_per_step(),
        ));
        if !device.is_cpu() {
            let memory = MemoryEstimate::of_training(config);
            let total = format::bytes(memory.total());
            console::line(&format!("memory  {total}: {memory}"));
        }
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len}  {msg}");
        self.start = trainer.step_count();
        let bar = ProgressBar::new(end).with_position(self.start);
        self.bar = console::show(match style {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        });
        self.bar.reset_elapsed();
    }

    fn step(&mut self, record: &StepRecord) {
        let mfu = match record.mfu {
            Some(mfu) => format!("{:.1}%", mfu * 100.0),
            None => "n/a".into(),
        };
        let end = self.bar.length().unwrap_or_default();
        // By the steps of this session: indicatif would count those before it. A rollback may have
        // led to before its start.
        let done = record.step.saturating_sub(self.start).max(1) as f64;
        let left = self
            .bar
            .elapsed()
            .mul_f64((end - record.step) as f64 / done);
        let left = format::duration(left);
        // With the bar's own figures just within 80 columns.
        let figures = format!(
            "loss {:.3}  lr {:.2e}  norm {:.2}  {:.1}k tok/s  MFU {mfu}  ETA {left}",
            record.loss,
            record.lr,
            record.grad_norm,
            record.tokens_per_s / 1e3,
        );
        self.bar.set_position(record.step);
        if self.bar.is_hidden() && record.step.is_multiple_of(self.every) {
            console::line(&format!("step {}/{end}  {figures}", record.step));
        }
        self.bar.set_message(figures);
    }

    fn validated(&mut self, step: u64, loss: f64) {
        console::line(&format!("step {step}: validation loss {loss:.3}"));
    }

    fn sampled(&mut self, step: u64, text: &str) {
        console::line(&format!("step {step}: sample: {}", text.escape_debug()));
    }

    fn should_stop(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

/// What the run came to, and what to run next.
fn report(summary: &Summary, config: &Config, out: &Path) -> String {
    let mut text = String::new();
    if let Some(sample) = &summary.sample {
        text += &format!("\nsample\n{}\n\n", console::printable(sample));
    }
    let what = match summary.interrupted {
        true => "stopped at",
        false => "finished",
    };
    let tokens = format::count(summary.tokens);
    text += &format!("{what} step {}, {tokens} tokens\n", summary.step);
    if let Some(loss) = summary.val_loss {
        let perplexity = loss.exp();
        text += &format!("validation loss {loss:.3} (perplexity {perplexity:.1})\n");
    }
    let checkpoint = summary.checkpoint.display();
    text += &format!("checkpoint {checkpoint}\n\nnext\n");
    if summary.step < config.train.steps {
        // The run's own copy of the configuration has the overrides in it.
        let (config, out) = (out.join("config.yaml"), out.display());
        let config = config.display();
        text += &format!("  titanbit train --config {config} --out {out} --resume latest\n");
    }
    if let Some(tokenizer) = &config.data.tokenizer
        && tokenizer.is_file()
    {
        text += &format!(
            "  titanbit generate --checkpoint {checkpoint} --prompt {:?}\n",
            config.eval.sample_prompt
        );
    }
    if let Some(val) = &config.data.val {
        let val = val.display();
        text += &format!("  titanbit eval --checkpoint {checkpoint} --data {val}\n");
    }
    text += &format!(
        "  titanbit export --checkpoint {checkpoint} --format packed --output {}.safetensors\n",
        out.file_name().unwrap_or_default().display()
    );
    text += &format!("  titanbit info --checkpoint {checkpoint}\n");
    text + &format!(
        "  tensorboard --logdir {}",
        out.join("tensorboard").display()
    )
}
