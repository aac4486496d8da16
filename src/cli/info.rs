//! `titanbit info`: what a model, a checkpoint, a token file or this machine is.

mod checkpoint;
mod machine;
mod model;
mod tokens;

use std::fmt::Display;
use std::path::PathBuf;

use serde::Serialize;

use super::console;
use crate::data::TokenDtype;
use crate::{Error, Result};

/// Tell what a model, a checkpoint or a token file holds; without arguments, what this machine has.
///
/// For a model: shapes, parameters, sizes, FLOPs, and the GPU memory that training takes.
#[derive(clap::Args)]
pub struct Args {
    /// A published size: 125M, 350M, 700M, 1.3B or 3B
    #[arg(long, value_name = "SIZE", group = "subject", group = "a_model")]
    model_size: Option<String>,

    /// The model of a configuration
    #[arg(long, value_name = "FILE", group = "subject", group = "a_model")]
    config: Option<PathBuf>,

    /// A checkpoint directory, or `latest` or `best` beside it
    #[arg(long, value_name = "DIR", group = "subject")]
    checkpoint: Option<PathBuf>,

    /// A token file
    #[arg(long, value_name = "FILE.bin", group = "subject")]
    data: Option<PathBuf>,

    /// Override a key of the configuration, e.g. model.layers=12; repeatable
    #[arg(long, value_name = "SECTION.KEY=VALUE", requires = "config")]
    #[arg(conflicts_with_all = ["model_size", "checkpoint", "data"])]
    set: Vec<String>,

    /// Rows of a micro-batch, for the memory estimate [default: the configuration's]
    #[arg(long, value_name = "N", requires = "a_model")]
    micro_batch: Option<usize>,

    /// Tokens of a row, for the memory estimate [default: the configuration's]
    #[arg(long, value_name = "N", requires = "a_model")]
    seq_len: Option<usize>,

    /// Token width, u16 or u32, of a file without a header (nanoGPT's are u16)
    #[arg(long, value_name = "TYPE", requires = "data")]
    #[arg(conflicts_with_all = ["a_model", "checkpoint"])]
    dtype: Option<String>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    if let Some(checkpoint) = &args.checkpoint {
        return print(args.json, &checkpoint::Report::of(checkpoint)?);
    }
    if let Some(data) = &args.data {
        let dtype = args.dtype.as_deref().map(token_dtype).transpose()?;
        return print(args.json, &tokens::Report::of(data, dtype)?);
    }
    if args.model_size.is_some() || args.config.is_some() {
        return print(args.json, &model::Report::of(&args)?);
    }
    print(args.json, &machine::Report::of_this())
}

fn print<R: Serialize + Display>(json: bool, report: &R) -> Result<()> {
    if json {
        console::answer(serde_json::to_string_pretty(report).map_err(Error::training)?)
    } else {
        console::answer(report.to_string().trim_end())
    }
}

pub(super) fn token_dtype(name: &str) -> Result<TokenDtype> {
    match name {
        "u16" => Ok(TokenDtype::U16),
        "u32" => Ok(TokenDtype::U32),
        _ => Err(Error::usage(format!(
            "unknown --dtype '{name}': use u16 or u32"
        ))),
    }
}
