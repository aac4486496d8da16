//! `titanbit export`: a checkpoint in the formats that other programs run.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;

use super::{console, format};
use crate::Result;
use crate::export::{self, ExportOptions, Exported, Format};

const AFTER_HELP: &str = "\
Running it:
  titanbit generate --checkpoint PATH        hf, hf-packed or packed
  AutoModelForCausalLM.from_pretrained(PATH) hf or hf-packed, in Python: transformers asks for
                                             accelerate, and on a CPU for a C++ compiler (or
                                             TORCHDYNAMO_DISABLE=1)";

/// Write a checkpoint as transformers, llama.cpp or titanbit itself run it.
///
/// The ternary codes and their scales stay exactly those of the checkpoint, embedding and LM head
/// are rounded to 16 bits. The export is read back and compared with the checkpoint, codes and
/// logits, before it gets its name: what has the name is whole and the same model.
#[derive(clap::Args)]
#[command(after_long_help = AFTER_HELP)]
pub struct Args {
    /// A checkpoint directory, `latest` or `best` beside it, or the directory of a run
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,

    /// What to write
    #[arg(long, value_name = "FORMAT")]
    format: Format,

    /// The directory (hf, hf-packed) or file (gguf, packed) to write
    #[arg(long, value_name = "PATH")]
    output: PathBuf,

    /// Use this tokenizer.json instead of the checkpoint's own
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,

    /// Replace the export that has this name
    #[arg(long)]
    force: bool,
}

pub fn run(args: Args) -> Result<()> {
    let exported = export::run(&ExportOptions {
        checkpoint: args.checkpoint,
        format: args.format,
        output: args.output,
        tokenizer: args.tokenizer,
        force: args.force,
    })?;
    console::answer(Summary(&exported).to_string().trim_end())
}

struct Summary<'a>(&'a Exported);

impl Display for Summary<'_> {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let Exported {
            checkpoint,
            step,
            parameters,
            output,
            files,
            verified,
            notes,
        } = self.0;
        let total = files.iter().map(|(_, bytes)| bytes).sum();
        writeln!(
            f,
            "model    {} parameters, {} ternary: step {step}, {}",
            format::count(parameters.total() as u64),
            format::count(parameters.ternary as u64),
            checkpoint.display()
        )?;
        writeln!(f, "wrote    {}, {}", output.display(), format::bytes(total))?;
        if output.is_dir() {
            for (path, bytes) in files {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                writeln!(f, "           {name:<24} {:>10}", format::bytes(*bytes))?;
            }
        }
        writeln!(
            f,
            "checked  {} codes and {} scales: those of the checkpoint",
            format::count(verified.codes as u64),
            verified.scales
        )?;
        writeln!(
            f,
            "         logits of {} tokens: largest difference {:.1e}, {:.2}% of their norm in all",
            verified.tokens,
            verified.largest_difference,
            100.0 * verified.logits_error
        )?;
        notes
            .iter()
            .try_for_each(|note| writeln!(f, "note     {note}"))
    }
}
