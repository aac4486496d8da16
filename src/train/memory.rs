//! Refuses a run that its device cannot hold, and says what would fit.

use candle_core::Device;

use crate::config::{Config, GradientDtype, Recompute, StateDtype};
use crate::model::MemoryEstimate;
use crate::{Error, Result, device};

/// What a run on a GPU takes beside the estimate: tables, loaded kernels, cuBLAS's workspace.
const BESIDE: u64 = 256 << 20;

/// Refuses what the device cannot hold, before the operating system has to.
///
/// # Errors
/// `Usage` when the memory free is less than a run takes: what takes it, and the nearest setting
/// that fits.
pub fn check_memory(config: &Config, device: &Device) -> Result<()> {
    let Some(free) = device::free_memory(device) else {
        return Ok(());
    };
    let needed = needed(config, device);
    if needed <= free {
        return Ok(());
    }
    let parts = match device.is_cpu() {
        true => String::new(),
        false => format!(" ({})", MemoryEstimate::of_training(config)),
    };
    let fits = |config: &Config| self::needed(config, device) <= free;
    let advice = match nearest(config, device.is_cpu(), fits) {
        Some(settings) => format!("{settings} fits"),
        None => "choose a smaller model or train.seq_len".into(),
    };
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    Err(Error::usage(format!(
        "training needs about {:.1} GiB of memory{parts} and {:.1} GiB are free: {advice}",
        gib(needed),
        gib(free)
    )))
}

/// An error of `run` as it is, but for memory that ran out on a GPU: that with what takes it.
pub fn explain(error: Error, config: &Config) -> Error {
    let text = error.to_string();
    match text.contains("OUT_OF_MEMORY") {
        true => Error::training(format!(
            "GPU memory ran out: training takes {}; another process may hold some (`nvidia-smi`); \
             lower train.micro_batch or set train.recompute=selective",
            MemoryEstimate::of_training(config)
        )),
        false => error,
    }
}

fn needed(config: &Config, device: &Device) -> u64 {
    let train = &config.train;
    match device.is_cpu() {
        true => MemoryEstimate::cpu_training(&config.model, train.micro_batch, train.seq_len),
        false => MemoryEstimate::of_training(config).total() + BESIDE,
    }
}

/// A setting, as `--set` takes it, and what it does.
type Change = (&'static str, fn(&mut Config));

/// The settings, as `--set` takes them, that change least among those that fit: a smaller
/// micro-batch, then more computed anew, then smaller numbers.
fn nearest(config: &Config, is_cpu: bool, fits: impl Fn(&Config) -> bool) -> Option<String> {
    let largest = |config: &Config| {
        let with = |micro_batch| {
            let mut config = config.clone();
            config.train.micro_batch = micro_batch;
            config
        };
        let (mut low, mut high) = (0, config.train.micro_batch + 1);
        while high - low > 1 {
            let middle = (low + high) / 2;
            match fits(&with(middle)) {
                true => low = middle,
                false => high = middle,
            }
        }
        low
    };
    let mut config = config.clone();
    let mut settings = String::new();
    let changes: [Change; 5] = [
        ("", |_| {}),
        ("train.recompute_layers=null ", |c| {
            c.train.recompute_layers = None;
        }),
        ("train.recompute=full ", |c| {
            c.train.recompute = Recompute::Full;
        }),
        ("precision.gradients=bf16 ", |c| {
            c.precision.gradients = GradientDtype::Bf16;
        }),
        ("precision.optimizer_state=int8 ", |c| {
            c.precision.optimizer_state = StateDtype::Int8;
        }),
    ];
    for (setting, change) in &changes[..if is_cpu { 1 } else { changes.len() }] {
        let before = config.clone();
        change(&mut config);
        if config != before {
            settings += setting;
        }
        let micro_batch = largest(&config);
        if micro_batch > 0 {
            return Some(format!("{settings}train.micro_batch={micro_batch}"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_change_that_fits_is_named() {
        let mut config = Config::default();
        config.train.micro_batch = 8;
        let total = |config: &Config| MemoryEstimate::of_training(config).total();
        let within = |bytes: u64| nearest(&config, false, |c| total(c) <= bytes);
        let with = |micro_batch, recompute| {
            let mut config = config.clone();
            config.train.micro_batch = micro_batch;
            config.train.recompute = recompute;
            total(&config)
        };
        assert_eq!(
            within(with(3, Recompute::None)).as_deref(),
            Some("train.micro_batch=3")
        );
        let free = with(1, Recompute::None) - 1;
        let recomputed = within(free).unwrap();
        let rows = recomputed.strip_prefix("train.recompute=full train.micro_batch=");
        let rows: usize = rows.unwrap().parse().unwrap();
        assert!(with(rows, Recompute::Full) <= free && free < with(rows + 1, Recompute::Full));
        let smaller = within(with(1, Recompute::Full) - 1).unwrap();
        assert!(smaller.starts_with("train.recompute=full precision.gradients=bf16 train.micro"));
        assert_eq!(within(1 << 30), None);

        // What is so already is not named, and a limit on it is lifted.
        let full = with(1, Recompute::Full);
        config.train.recompute = Recompute::Full;
        config.train.recompute_layers = Some(2);
        let lifted = nearest(&config, false, |c| total(c) <= full).unwrap();
        assert_eq!(lifted, "train.recompute_layers=null train.micro_batch=1");
    }
}
