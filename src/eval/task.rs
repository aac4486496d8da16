//! Files of multiple-choice questions: our own form, and HellaSwag, ARC and PIQA as their authors
//! publish them. These are put into words as EleutherAI's lm-evaluation-harness does (0.4.13: tasks
//! `hellaswag`, `arc_easy`, `arc_challenge` and `piqa`, without examples before the question).

use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::wording::{capitalize, question_answer, without_brackets};
use crate::error::{IoContext, in_words};
use crate::{Error, Result};

/// Or what is wrong with a line.
type Parsed<T> = std::result::Result<T, String>;

/// One question, as the model reads it: the query, a space, a choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Where it is in the file, from 1.
    pub line: usize,
    pub query: String,
    pub choices: Vec<String>,
    /// The right choice, from 0.
    pub gold: usize,
}

/// What a line of a task file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Form {
    /// `{"query": TEXT, "choices": [TEXT, ...], "gold": INDEX}`.
    #[serde(rename = "query")]
    Query,
    /// Zellers et al., arXiv 1905.07830: `hellaswag_val.jsonl`.
    HellaSwag,
    /// Clark et al., arXiv 1803.05457: `ARC-Challenge-Test.jsonl`.
    #[serde(rename = "ARC")]
    Arc,
    /// Bisk et al., arXiv 1911.11641: `valid.jsonl`, with the labels in `valid-labels.lst`.
    #[serde(rename = "PIQA")]
    Piqa,
}

/// A file of questions.
#[derive(Clone, Debug)]
pub struct Task {
    pub path: PathBuf,
    pub form: Form,
    pub questions: Vec<Question>,
}

#[derive(Deserialize)]
struct Query {
    query: String,
    choices: Vec<String>,
    gold: usize,
}

#[derive(Deserialize)]
struct HellaSwag {
    activity_label: String,
    ctx_a: String,
    ctx_b: String,
    endings: Vec<String>,
    label: usize,
}

#[derive(Deserialize)]
struct Arc {
    question: ArcQuestion,
    #[serde(rename = "answerKey")]
    answer_key: String,
}

#[derive(Deserialize)]
struct ArcQuestion {
    stem: String,
    choices: Vec<ArcChoice>,
}

#[derive(Deserialize)]
struct ArcChoice {
    text: String,
    label: String,
}

#[derive(Deserialize)]
struct Piqa {
    goal: String,
    sol1: String,
    sol2: String,
}

impl Task {
    /// Reads a file of JSON lines; the first says which form all have.
    ///
    /// # Errors
    /// `Io` when it cannot be read; `Format`, with the line and what is wrong there.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).at("open", path)?;
        let lines = json_lines(&text);
        let Some((line, first)) = lines.first() else {
            return Err(Error::format(path, "there are no questions in it"));
        };
        let form = parse(first)
            .and_then(|first| Form::of(&first))
            .map_err(|what| at_line(path, *line, what))?;
        let labels = match form {
            Form::Piqa => piqa_labels(path, lines.len())?,
            _ => Vec::new(),
        };
        let question = |(i, (line, text)): (usize, &(usize, &[u8]))| {
            let question = form.question(text, labels.get(i).copied());
            let question = question.and_then(|(query, choices, gold)| {
                check(&choices, gold)?;
                Ok(Question {
                    line: *line,
                    query,
                    choices,
                    gold,
                })
            });
            question.map_err(|what| at_line(path, *line, what))
        };
        Ok(Self {
            path: path.to_path_buf(),
            form,
            questions: lines
                .iter()
                .enumerate()
                .map(question)
                .collect::<Result<_>>()?,
        })
    }
}

impl Form {
    fn of(first: &Value) -> Parsed<Self> {
        let has = |field| first.get(field).is_some();
        if has("query") {
            Ok(Self::Query)
        } else if has("endings") || has("ctx_a") {
            Ok(Self::HellaSwag)
        } else if has("question") {
            Ok(Self::Arc)
        } else if has("goal") {
            Ok(Self::Piqa)
        } else {
            Err(
                "missing field `query`: a question is {\"query\": TEXT, \"choices\": [TEXT, ...], \
                 \"gold\": INDEX}, or one of HellaSwag, ARC or PIQA as published"
                    .into(),
            )
        }
    }

    /// Query, choices and the right one of a line. PIQA's has its label elsewhere.
    fn question(self, line: &[u8], label: Option<usize>) -> Parsed<(String, Vec<String>, usize)> {
        Ok(match self {
            Self::Query => {
                let raw: Query = parse(line)?;
                // The published sets may have them, after the clean-up at least.
                if let Some(i) = raw.choices.iter().position(String::is_empty) {
                    return Err(format!("choices[{i}] is empty"));
                }
                (raw.query, raw.choices, raw.gold)
            }
            Self::HellaSwag => {
                let raw: HellaSwag = parse(line)?;
                let context = format!("{} {}", raw.ctx_a, capitalize(&raw.ctx_b));
                let query = without_brackets(&format!("{}: {context}", raw.activity_label));
                let endings = raw.endings.iter().map(|ending| without_brackets(ending));
                (query, endings.collect(), raw.label)
            }
            Self::Arc => {
                let Arc {
                    question,
                    answer_key,
                } = parse(line)?;
                let mut choices = question.choices.iter();
                let gold = choices.position(|choice| choice.label == answer_key);
                let gold =
                    gold.ok_or_else(|| format!("answerKey `{answer_key}` is no choice's label"))?;
                let choices = question.choices.into_iter().map(|choice| choice.text);
                (question_answer(&question.stem), choices.collect(), gold)
            }
            Self::Piqa => {
                let Piqa { goal, sol1, sol2 } = parse(line)?;
                let gold = label.ok_or("there is no label for it")?;
                (question_answer(&goal), vec![sol1, sol2], gold)
            }
        })
    }
}

fn check(choices: &[String], gold: usize) -> Parsed<()> {
    let count = choices.len();
    if count < 2 {
        return Err(format!("`choices` has {count}: there must be at least 2"));
    }
    if gold >= count {
        return Err(format!(
            "the right choice is number {gold}, but there are {count}, counted from 0"
        ));
    }
    Ok(())
}

/// The labels of PIQA's `NAME.jsonl` are the lines of `NAME-labels.lst` beside it.
fn piqa_labels(path: &Path, questions: usize) -> Result<Vec<usize>> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let labels = path.with_file_name(format!("{stem}-labels.lst"));
    if !labels.is_file() {
        return Err(Error::format(
            path,
            format!(
                "these are PIQA's questions; their labels must lie beside them, in {}",
                labels.display()
            ),
        ));
    }
    let text = fs::read_to_string(&labels).at("read", &labels)?;
    let label = |(line, text): (usize, &str)| match text.trim() {
        "0" => Ok(0),
        "1" => Ok(1),
        other => Err(at_line(
            &labels,
            line + 1,
            format!("a label is 0 or 1, not `{other}`"),
        )),
    };
    let all: Vec<usize> = text
        .lines()
        .enumerate()
        .filter(|(_, text)| !text.trim().is_empty())
        .map(label)
        .collect::<Result<_>>()?;
    if all.len() != questions {
        return Err(Error::format(
            &labels,
            format!(
                "{} labels, but {} has {questions} questions",
                all.len(),
                path.display()
            ),
        ));
    }
    Ok(all)
}

/// Lines with their numbers, without those that are blank.
fn json_lines(text: &[u8]) -> Vec<(usize, &[u8])> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let lines = (1..).zip(text.split(|byte| *byte == b'\n'));
    lines
        .filter(|(_, line)| !line.trim_ascii().is_empty())
        .collect()
}

fn at_line(path: &Path, line: usize, what: String) -> Error {
    Error::format(path, format!("line {line}: {what}"))
}

/// A JSON object, or what is wrong with it: `question.choices[1]: missing field label`.
fn parse<T: DeserializeOwned>(line: &[u8]) -> Parsed<T> {
    // serde would take a list for a struct's fields in order.
    if !line.trim_ascii_start().starts_with(b"{") {
        return Err("not a JSON object".into());
    }
    let mut json = serde_json::Deserializer::from_slice(line);
    let object = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let what = in_words(&describe(error.inner()));
        match error.path().to_string().as_str() {
            "." | "?" => what,
            path => format!("{path}: {what}"),
        }
    })?;
    json.end().map_err(|error| describe(&error))?;
    Ok(object)
}

/// Without the line, which serde_json counts from where this one begins.
fn describe(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at line ") {
        Some((what, _)) if error.is_data() => what.to_string(),
        Some((what, _)) => format!("not JSON: {what} at column {}", error.column()),
        None => text,
    }
}
