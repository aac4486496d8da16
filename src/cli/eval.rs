//! `titanbit eval`: how good a model is, or two beside each other.

mod report;
mod subject;

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};

use super::{console, info};
use crate::data::TokenSet;
use crate::eval::{self, Block, Excerpt, Task, Windows};
use crate::{Error, Result, device};
use report::{Data, Report, Scores};
use subject::Subject;

/// Tell how good a model is: loss, perplexity and bits per byte on token files, accuracy on
/// multiple-choice tasks.
///
/// Every token but the first of a file is scored once, end-of-text tokens too; these stand for no
/// bytes. "±" is a standard error: of losses by how blocks of a window's length differ from each
/// other (text that hangs together for longer makes it too small), of accuracies by questions, of
/// differences by pairs of the same block or question. Tasks are scored as EleutherAI's
/// lm-evaluation-harness does without examples: acc takes the likeliest choice, acc_norm the one of
/// the largest log-likelihood per character.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("models").required(true))]
#[command(group = clap::ArgGroup::new("texts").required(true).multiple(true))]
pub struct Args {
    /// A checkpoint directory, `latest` or `best` beside it, a run, or a packed file
    #[arg(long, value_name = "DIR|FILE", group = "models")]
    checkpoint: Option<PathBuf>,

    /// Two models, and the difference of the second from the first
    #[arg(long, value_names = ["A", "B"], num_args = 2, group = "models")]
    compare: Vec<PathBuf>,

    /// The tokenizer.json of the model, if it came without or with another
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,

    /// A token file, the name that shards share, or a directory of them
    #[arg(long, value_name = "NAME.bin", group = "texts")]
    data: Option<PathBuf>,

    /// Token width, u16 or u32, of a file without a header (nanoGPT's are u16)
    #[arg(long, value_name = "TYPE", requires = "data")]
    dtype: Option<String>,

    /// Tokens of a window [default: the model's context]
    #[arg(long, value_name = "N", requires = "data")]
    seq_len: Option<usize>,

    /// Tokens from one window to the next: fewer than a window's give each token more context, and
    /// take longer [default: a window's]
    #[arg(long, value_name = "N", requires = "data")]
    stride: Option<usize>,

    /// Score only the first tokens
    #[arg(long, value_name = "N", requires = "data")]
    max_tokens: Option<NonZeroU64>,

    /// Multiple-choice questions: {"query", "choices", "gold"} a line, or HellaSwag, ARC or PIQA as
    /// published (with PIQA's labels beside it); repeatable
    #[arg(long, value_name = "FILE.jsonl", group = "texts")]
    tasks: Vec<PathBuf>,

    /// Ask only the first questions of each task
    #[arg(long, value_name = "N", requires = "tasks")]
    limit: Option<NonZeroUsize>,

    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let device = device::select(&args.device)?;
    let tasks = tasks(&args)?;
    let set = data(&args)?;
    let excerpts = match &set {
        Some(set) => eval::excerpts(set, args.max_tokens)?,
        None => Vec::new(),
    };
    let paths = args.checkpoint.iter().chain(&args.compare);
    let subjects = paths
        .map(|path| Subject::load(path, args.tokenizer.as_deref(), &device))
        .collect::<Result<Vec<_>>>()?;
    let windows = windows(&args, &subjects)?;
    if let Some(set) = &set {
        check_data(set, &subjects)?;
    }
    let prompts = subjects
        .iter()
        .map(|subject| tasks.iter().map(|task| subject.encode(task)).collect())
        .collect::<Result<Vec<Vec<_>>>>()?;

    let mut scores = Vec::new();
    for (subject, prompts) in subjects.iter().zip(&prompts) {
        let blocks = score(subject, &excerpts, windows)?;
        let answers = tasks.iter().zip(prompts);
        let answers = answers
            .map(|(task, prompts)| {
                let bar = progress(task.questions.len() as u64, "questions")?;
                let answers = subject.answer(task, prompts, &bar);
                bar.finish_and_clear();
                answers
            })
            .collect::<Result<_>>()?;
        scores.push(Scores { blocks, answers });
    }

    let data = args.data.map(|path| {
        let tokenizer = subjects.iter().find_map(Subject::tokenizer);
        Data::new(path, windows, &excerpts, tokenizer)
    });
    let report = Report::new(&device, data, &tasks, &subjects, &scores);
    match args.json {
        true => console::answer(serde_json::to_string_pretty(&report).map_err(Error::training)?),
        false => console::answer(report.to_string().trim_end()),
    }
}

fn tasks(args: &Args) -> Result<Vec<Task>> {
    let limit = args.limit.map_or(usize::MAX, NonZeroUsize::get);
    let read = |path: &PathBuf| {
        let mut task = Task::read(path)?;
        task.questions.truncate(limit);
        Ok(task)
    };
    args.tasks.iter().map(read).collect()
}

fn data(args: &Args) -> Result<Option<TokenSet>> {
    let dtype = args.dtype.as_deref().map(info::token_dtype).transpose()?;
    let open = |path: &PathBuf| TokenSet::open(&[path], dtype);
    args.data.as_ref().map(open).transpose()
}

/// The same for all models, which makes their blocks comparable.
fn windows(args: &Args, subjects: &[Subject]) -> Result<Windows> {
    let contexts = subjects.iter().map(|s| s.model.config().max_seq_len);
    let context = contexts.min().unwrap_or_default();
    let seq_len = args.seq_len.unwrap_or(context);
    let windows = Windows {
        seq_len,
        stride: args.stride.unwrap_or(seq_len),
    };
    windows.check(context)?;
    Ok(windows)
}

/// Refuses token files of another vocabulary than a model's, as far as that is known.
fn check_data(set: &TokenSet, subjects: &[Subject]) -> Result<()> {
    for subject in subjects {
        if let Some(hash) = &subject.tokenizer_hash
            && let Some(shard) = set.made_with_another(hash)
        {
            return Err(Error::usage(format!(
                "{} was made with another tokenizer than the one for {}: tokenise the text with the \
                 model's, or name the right one with --tokenizer",
                shard.path().display(),
                subject.path.display()
            )));
        }
        set.check_vocab(subject.model.config().vocab_size as u32)?;
    }
    if let [a, b] = subjects
        && let (Some(of_a), Some(of_b)) = (&a.tokenizer_hash, &b.tokenizer_hash)
        && of_a != of_b
    {
        return Err(Error::usage(format!(
            "{} and {} have different tokenizers: no token file is for both, compare them on \
             --tasks",
            a.path.display(),
            b.path.display()
        )));
    }
    Ok(())
}

fn score(subject: &Subject, excerpts: &[Excerpt], windows: Windows) -> Result<Vec<Block>> {
    let tokens = excerpts.iter().map(Excerpt::targets).sum();
    let bar = progress(tokens, "tokens")?;
    let blocks = eval::perplexity(&subject.model, excerpts, windows, &bar);
    bar.finish_and_clear();
    blocks
}

/// A bar with the time left; it hides itself when standard error is not a terminal.
fn progress(len: u64, unit: &str) -> Result<ProgressBar> {
    let template = format!("{{wide_bar}} {{human_pos}}/{{human_len}} {unit} ETA {{eta}}");
    let style = ProgressStyle::with_template(&template)
        .map_err(|error| Error::usage(format!("progress bar: {error}")))?;
    Ok(console::show(ProgressBar::new(len).with_style(style)))
}
