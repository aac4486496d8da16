//! `titanbit bench decode`: a model of random weights, a prompt, its log-likelihood, and tokens after it.

use std::time::Instant;

use half::f16;
use rayon::prelude::*;
use serde_json::json;

use super::machine::Machine;
use crate::cli::{console, format};
use crate::inference::weights::TableValues;
use crate::inference::{Model, PackedWeights, Projections, Session, Table, WeightSource};
use crate::model::{BitNetConfig, Projection};
use crate::quant::PackedTernary;
use crate::quant::packing::VALUES_PER_WORD;
use crate::random::SplitMix64;
use crate::{Error, Result, device};

/// Time a prompt, its log-likelihood and the tokens after it, with random weights of a published size.
///
/// Packed projections, embedding and LM head in 16 bits, as `titanbit export --format packed` has
/// them. A token reads all weights but the embedding once: the share of the memory's bandwidth is what
/// it reaches of the best possible.
#[derive(clap::Args)]
pub struct Args {
    /// A published size: 125M, 350M, 700M, 1.3B or 3B
    #[arg(long, value_name = "SIZE", default_value = "125M")]
    model_size: String,

    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    prompt: usize,

    /// Tokens to decode
    #[arg(long, value_name = "N", default_value_t = 64)]
    tokens: usize,

    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,

    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let config = BitNetConfig::preset(&args.model_size)?;
    for (flag, tokens) in [("--prompt", args.prompt), ("--tokens", args.tokens)] {
        if tokens == 0 {
            return Err(Error::usage(format!(
                "{flag} 0: at least 1 is needed to time"
            )));
        }
    }
    if args.prompt.saturating_add(args.tokens) > config.max_seq_len {
        return Err(Error::usage(format!(
            "--prompt {} and --tokens {} exceed the context of {}",
            args.prompt, args.tokens, config.max_seq_len
        )));
    }
    let device = device::select(&args.device)?;
    let weights = PackedWeights::read(&config, &RandomWeights)?;
    let bytes = weights.bytes_per_token();
    let model = Model::new(&config, weights, &device)?;
    let before = Machine::measure(&device)?;
    let Times {
        prefill,
        score,
        tokens,
    } = time(&model, args)?;
    let after = Machine::measure(&device)?;
    let bandwidth = (before.bandwidth + after.bandwidth) / 2.0;

    let percentile = |p: usize| tokens[(tokens.len() - 1) * p / 100];
    let (p20, p50, p80) = (percentile(20), percentile(50), percentile(80));
    let reached = bytes as f64 / p50;
    if args.json {
        return console::answer(json!({
            "device": device::describe(&device),
            "threads": before.threads,
            "model_size": args.model_size,
            "bytes_per_token": bytes,
            "bandwidth": [before.bandwidth, after.bandwidth],
            "prompt_tokens": args.prompt,
            "prefill_tokens_per_s": args.prompt as f64 / prefill,
            "scored_tokens_per_s": args.prompt as f64 / score,
            "decoded_tokens": args.tokens,
            "token_ms": { "p20": p20 * 1e3, "p50": p50 * 1e3, "p80": p80 * 1e3 },
            "tokens_per_s": 1.0 / p50,
            "bytes_per_s": reached,
            "share_of_bandwidth": reached / bandwidth,
        }));
    }
    let access = if device.is_cpu() {
        "reading"
    } else {
        "copying"
    };
    console::answer(format!(
        "{}, {} threads\n{}: {} read for a token; memory bandwidth {:.1} and {:.1} GB/s measured \
         {access}, before and after\n\n\
         prompt  {} tokens  {:.1} ms  {:.0} tokens/s\n\
         score   {} tokens  {:.1} ms  {:.0} tokens/s\n\
         decode  {} tokens  {:.2} ms each (median; {:.2} to {:.2})  {:.1} tokens/s  {:.1} GB/s, \
         {:.0}% of the bandwidth",
        device::describe(&device),
        before.threads,
        args.model_size,
        format::bytes(bytes as u64),
        before.bandwidth / 1e9,
        after.bandwidth / 1e9,
        args.prompt,
        prefill * 1e3,
        args.prompt as f64 / prefill,
        args.prompt,
        score * 1e3,
        args.prompt as f64 / score,
        args.tokens,
        p50 * 1e3,
        p20 * 1e3,
        p80 * 1e3,
        1.0 / p50,
        reached / 1e9,
        100.0 * reached / bandwidth,
    ))
}

/// In seconds.
struct Times {
    prefill: f64,
    /// Log-likelihoods of the prompt's tokens.
    score: f64,
    /// Of each token after the prompt, in order of length.
    tokens: Vec<f64>,
}

fn time(model: &Model, args: &Args) -> Result<Times> {
    let vocab = model.config().vocab_size as u64;
    let mut random = SplitMix64(1);
    let mut prompt = || {
        (0..args.prompt)
            .map(|_| random.below(vocab) as u32)
            .collect::<Vec<_>>()
    };
    let mut session = model.session();
    let score = after_warming_up(&mut session, |session| {
        session.log_likelihoods(&prompt(), &prompt())?;
        Ok(())
    })?;
    let prefill = after_warming_up(&mut session, |session| {
        session.next_logits(&prompt())?;
        Ok(())
    })?;
    let mut tokens = Vec::with_capacity(args.tokens);
    for _ in 0..args.tokens {
        let id = random.below(vocab) as u32;
        let start = Instant::now();
        session.next_logits(&[id])?;
        tokens.push(start.elapsed().as_secs_f64());
    }
    tokens.sort_by(f64::total_cmp);
    Ok(Times {
        prefill,
        score,
        tokens,
    })
}

/// Runs `pass` on an empty session twice -> seconds of the second time.
fn after_warming_up(
    session: &mut Session,
    mut pass: impl FnMut(&mut Session) -> Result<()>,
) -> Result<f64> {
    session.truncate(0);
    pass(session)?;
    session.truncate(0);
    let start = Instant::now();
    pass(session)?;
    Ok(start.elapsed().as_secs_f64())
}

/// The same random weights each time.
struct RandomWeights;

impl WeightSource for RandomWeights {
    fn norm(&self, _name: &str, features: usize) -> Result<Vec<f32>> {
        Ok(vec![1.0; features])
    }

    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Table> {
        let mut values = vec![f16::ZERO; rows * cols];
        let rows_of = values.par_chunks_exact_mut(cols).enumerate();
        rows_of.for_each(|(row, values)| {
            let mut random = SplitMix64((row + name.len()) as u64);
            values.fill_with(|| f16::from_f64(0.04 * (random.unit() - 0.5)));
        });
        Ok(Table::new(rows, cols, TableValues::F16(values.into())))
    }

    fn projections(&self, layer: usize, name: &str, parts: &[Projection]) -> Result<Projections> {
        let (rows, cols) = (parts.iter().map(|p| p.rows).sum(), parts[0].cols);
        if !cols.is_multiple_of(VALUES_PER_WORD) {
            return Err(Error::usage(format!("{cols} features are no whole words")));
        }
        let row_words = cols / VALUES_PER_WORD;
        let mut words = vec![0u32; rows * row_words];
        let rows_of = words.par_chunks_exact_mut(row_words).enumerate();
        rows_of.for_each(|(row, words)| {
            let mut random = SplitMix64((layer << 32 | name.len() << 24 | row) as u64);
            words.fill_with(|| {
                let bits = random.next() as u32;
                // There is no code of bits 11.
                bits ^ (bits & bits >> 1 & 0x5555_5555)
            });
        });
        Ok(Projections {
            packed: PackedTernary::from_words(words, rows, cols),
            scales: vec![0.02; rows],
        })
    }
}
