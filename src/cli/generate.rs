//! `titanbit generate`: text from a model.

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokenizers::Tokenizer;

use super::{console, format};
use crate::data::tokenize::vocabulary::{self, end_of_text};
use crate::error::IoContext;
use crate::inference::{End, Generated, Loaded, Model, Request, Sampling, Session, generate, load};
use crate::{Error, Result, device};

/// Continue a text with a trained model.
///
/// The prompt comes from --prompt or from standard input, whose last line break is left out. Where
/// standard input is a terminal, without --prompt, each line typed is a prompt, and an empty line goes
/// on where the text before it stopped. Text goes to standard output, all else to standard error.
#[derive(clap::Args)]
pub struct Args {
    /// A checkpoint, a run directory (its latest checkpoint), or what `titanbit export` wrote
    #[arg(long, value_name = "PATH")]
    checkpoint: PathBuf,

    /// The tokenizer.json of the model [default: the one that came with it]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,

    /// The text to continue; an empty one begins a new document
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,

    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_tokens: usize,

    /// 0 takes the likeliest token each time; higher is more varied
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.8,
        allow_negative_numbers = true
    )]
    temperature: f64,

    /// Choose among the K likeliest tokens only; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,

    /// Choose among the likeliest tokens whose probabilities sum to P
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.95,
        allow_negative_numbers = true
    )]
    top_p: f64,

    /// Choose among tokens at least P times as probable as the likeliest
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    min_p: f64,

    /// Above 1, tokens that were there before become less likely
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    repetition_penalty: f64,

    /// The same seed repeats the text
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// A text that ends the result, without being part of it; repeatable
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Print text as it comes also where standard output is no terminal
    #[arg(long)]
    stream: bool,

    /// Print the prompt before its continuation
    #[arg(long)]
    echo: bool,

    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

/// Set by Ctrl-C while text is generated.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static GENERATING: AtomicBool = AtomicBool::new(false);

pub fn run(args: Args) -> Result<()> {
    let sampling = sampling(&args)?;
    let device = device::select(&args.device)?;
    let start = Instant::now();
    let Loaded {
        config,
        weights,
        tokenizer,
        kind,
    } = load(&args.checkpoint)?;
    let tokenizer = tokenizer_of(&args, tokenizer)?;
    let model = Model::new(&config, weights, &device)?;
    let parameters = config.parameter_count();
    console::complain(format!(
        "{kind}, {} parameters, on {} ({} to load)",
        format::count(parameters.total() as u64),
        device::describe(&device),
        seconds(start.elapsed()),
    ));
    let generator = Generator {
        model: &model,
        end_id: end_of_text(&tokenizer),
        tokenizer,
        sampling,
        args: &args,
    };
    match &args.prompt {
        Some(prompt) => generator.once(prompt),
        None if io::stdin().is_terminal() => generator.interactive(),
        None => {
            let mut prompt = String::new();
            let read = io::stdin().read_to_string(&mut prompt);
            read.at("read the prompt from", "standard input")?;
            generator.once(prompt.strip_suffix('\n').unwrap_or(&prompt))
        }
    }
}

fn sampling(args: &Args) -> Result<Sampling> {
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
    };
    sampling.validate()?;
    if args.stop.iter().any(String::is_empty) {
        return Err(Error::usage("--stop: an empty text would end every result"));
    }
    Ok(sampling)
}

fn tokenizer_of(args: &Args, own: Option<String>) -> Result<Tokenizer> {
    let (json, path) = match (&args.tokenizer, own) {
        (Some(path), _) => (std::fs::read_to_string(path).at("read", path)?, path),
        (None, Some(json)) => (json, &args.checkpoint),
        (None, None) => {
            return Err(Error::usage(format!(
                "{} has no tokenizer: give the tokenizer.json of its training data with --tokenizer",
                args.checkpoint.display()
            )));
        }
    };
    vocabulary::parse(json.as_bytes(), path)
}

struct Generator<'a> {
    model: &'a Model,
    tokenizer: Tokenizer,
    /// Ends a text, and stands before it.
    end_id: Option<u32>,
    sampling: Sampling,
    args: &'a Args,
}

impl Generator<'_> {
    fn once(&self, prompt: &str) -> Result<()> {
        let ids = self.encode(prompt)?;
        let stream = self.args.stream || io::stdout().is_terminal();
        let mut text = String::new();
        if self.args.echo {
            text += prompt;
        }
        if stream {
            print(&std::mem::take(&mut text))?;
        }
        let generated = self.generate(&mut self.model.session(), ids, 0, |piece| {
            text += piece;
            match stream {
                true => print(&std::mem::take(&mut text)),
                false => Ok(()),
            }
        })?;
        print(&(text + "\n"))?;
        console::complain(self.report(&generated.0, generated.1));
        Ok(())
    }

    fn interactive(&self) -> Result<()> {
        ctrlc::set_handler(|| match GENERATING.load(Ordering::SeqCst) {
            true => INTERRUPTED.store(true, Ordering::SeqCst),
            false => std::process::exit(130),
        })
        .map_err(|e| Error::training(format!("cannot watch for Ctrl-C: {e}")))?;
        console::complain(
            "a line is a prompt, an empty one goes on; Ctrl-C stops a text, Ctrl-D ends",
        );
        let mut session = self.model.session();
        let mut last = None;
        for round in 0.. {
            print("> ")?;
            let mut line = String::new();
            let read = io::stdin().lock().read_line(&mut line);
            if read.at("read the prompt from", "standard input")? == 0 {
                return print("\n");
            }
            let line = line.trim_end_matches(['\n', '\r']);
            let prompt = match last.filter(|_| line.is_empty()) {
                Some(last) => vec![last],
                None => {
                    session.truncate(0);
                    self.encode(line)?
                }
            };
            // What is wrong with one prompt does not end the others.
            match self.generate(&mut session, prompt, round, print) {
                Ok((generated, prompt)) => {
                    last = generated.ids.last().copied();
                    console::complain(format!("\n{}", self.report(&generated, prompt)));
                }
                Err(error @ Error::Usage(_)) => console::complain(format!("error: {error}")),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The prompt's tokens; those of an empty one are what stands before a document.
    fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(prompt, false).map_err(Error::usage)?;
        match (encoding.get_ids(), self.end_id) {
            ([], Some(end_id)) => Ok(vec![end_id]),
            ([], None) => Err(Error::usage(
                "an empty prompt, and the tokenizer has no end-of-text token to begin with: give \
                 --prompt some text",
            )),
            (ids, _) => Ok(ids.to_vec()),
        }
    }

    /// With the number of tokens in the prompt.
    fn generate(
        &self,
        session: &mut Session,
        prompt: Vec<u32>,
        round: u64,
        show: impl FnMut(&str) -> Result<()>,
    ) -> Result<(Generated, usize)> {
        if prompt.len() > session.room() {
            return Err(Error::usage(format!(
                "the prompt has {} tokens and the model's context has room for {}: shorten it",
                prompt.len(),
                session.room()
            )));
        }
        let tokens = prompt.len();
        let request = Request {
            prompt,
            max_tokens: self.args.max_tokens,
            sampling: self.sampling.clone(),
            seed: self.args.seed.wrapping_add(round),
            stops: self.args.stop.clone(),
            end_ids: self.end_id.into_iter().collect(),
        };
        INTERRUPTED.store(false, Ordering::SeqCst);
        GENERATING.store(true, Ordering::SeqCst);
        let interrupted = || INTERRUPTED.load(Ordering::SeqCst);
        let generated = generate(session, &self.tokenizer, &request, show, interrupted);
        GENERATING.store(false, Ordering::SeqCst);
        Ok((generated?, tokens))
    }

    fn report(&self, generated: &Generated, prompt: usize) -> String {
        let end = match generated.end {
            End::MaxTokens => "",
            End::EndOfText => "; end of text",
            End::StopText => "; stop text",
            End::ContextFull => "; the context is full",
            End::Interrupted => "; stopped",
        };
        // The first token comes with the prompt's pass.
        let decoded = generated.ids.len().saturating_sub(1);
        format!(
            "prompt {}, decode {}{end}",
            speed(prompt, generated.prefill),
            speed(decoded, generated.decode)
        )
    }
}

/// `12 tokens in 8.1 ms (1480 tokens/s)`
fn speed(tokens: usize, time: Duration) -> String {
    let rate = match tokens {
        0 => String::new(),
        _ => format!(" ({:.0} tokens/s)", tokens as f64 / time.as_secs_f64()),
    };
    format!("{tokens} tokens in {}{rate}", seconds(time))
}

/// `8.1 ms`, `1.52 s`
fn seconds(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds @ ..1.0 => format!("{:.1} ms", seconds * 1e3),
        seconds => format!("{seconds:.2} s"),
    }
}

/// A model may write any control character, which a terminal would obey.
fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let written = match stdout.is_terminal() {
        true => stdout.write_all(console::printable(text).as_bytes()),
        false => stdout.write_all(text.as_bytes()),
    };
    match written.and_then(|()| stdout.flush()) {
        // Nobody reads any more: there is nothing left to do.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.at("write to", "standard output"),
    }
}
