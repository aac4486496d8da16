//! What came out, as a table and as JSON.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;

use candle_core::Device;
use serde::Serialize;
use tokenizers::Tokenizer;

use super::Subject;
use crate::cli::format;
use crate::device;
use crate::eval::{
    Answer, Block, BytesPerToken, Estimate, Excerpt, Form, Task, Windows, accuracy,
    accuracy_difference, bytes_per_token,
};

/// What a model was measured to do: nothing without --data, and as many tasks as were asked for.
pub struct Scores {
    pub blocks: Vec<Block>,
    pub answers: Vec<Vec<Answer>>,
}

#[derive(Serialize)]
pub struct Report {
    device: String,
    data: Option<Data>,
    tasks: Vec<TaskFile>,
    /// One, or the two that are compared.
    models: Vec<ModelResults>,
    /// The second model's minus the first's.
    difference: Option<Results>,
}

/// What a loss was measured on.
#[derive(Serialize)]
pub struct Data {
    path: PathBuf,
    seq_len: usize,
    stride: usize,
    /// Tokens scored.
    tokens: u64,
    /// Samples that the standard errors are of.
    blocks: u64,
    bytes_per_token: Option<BytesPerToken>,
    /// Why that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_unknown: Option<String>,
}

#[derive(Serialize)]
struct TaskFile {
    path: PathBuf,
    form: Form,
    questions: usize,
}

#[derive(Serialize)]
struct ModelResults {
    path: PathBuf,
    kind: String,
    #[serde(flatten)]
    results: Results,
    /// Questions of each task whose beginning did not fit the context.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    truncated: Vec<usize>,
}

#[derive(Serialize)]
struct Results {
    data: Option<DataResults>,
    tasks: Vec<TaskResults>,
}

#[derive(Serialize)]
struct DataResults {
    /// Nats per token.
    loss: Estimate,
    perplexity: Estimate,
    bits_per_byte: Option<Estimate>,
}

#[derive(Serialize)]
struct TaskResults {
    acc: Estimate,
    acc_norm: Estimate,
}

impl Data {
    pub fn new(
        path: PathBuf,
        windows: Windows,
        excerpts: &[Excerpt],
        tokenizer: Option<&Tokenizer>,
    ) -> Self {
        let (bytes_per_token, bytes_unknown) = match bytes_per_token(excerpts, tokenizer) {
            Ok(bytes) => (Some(bytes), None),
            Err(reason) => (None, Some(reason)),
        };
        Self {
            path,
            seq_len: windows.seq_len,
            stride: windows.stride,
            tokens: excerpts.iter().map(Excerpt::targets).sum(),
            blocks: excerpts.iter().map(|e| e.blocks(windows)).sum(),
            bytes_per_token,
            bytes_unknown,
        }
    }

    fn results(&self, loss: Estimate, perplexity: Estimate) -> DataResults {
        let bits = |bytes: BytesPerToken| loss.scaled(bytes.bits_per_byte());
        DataResults {
            loss,
            perplexity,
            bits_per_byte: self.bytes_per_token.map(bits),
        }
    }
}

impl Report {
    pub fn new(
        device: &Device,
        data: Option<Data>,
        tasks: &[Task],
        subjects: &[Subject],
        scores: &[Scores],
    ) -> Self {
        let truncated = |answers: &Vec<Answer>| answers.iter().filter(|a| a.truncated).count();
        let model = |(subject, scores): (&Subject, &Scores)| ModelResults {
            path: subject.path.clone(),
            kind: subject.kind.clone(),
            results: scores.results(data.as_ref()),
            truncated: scores.answers.iter().map(truncated).collect(),
        };
        let task = |task: &Task| TaskFile {
            path: task.path.clone(),
            form: task.form,
            questions: task.questions.len(),
        };
        Self {
            device: device::describe(device),
            models: subjects.iter().zip(scores).map(model).collect(),
            difference: match scores {
                [a, b] => Some(b.minus(a, data.as_ref())),
                _ => None,
            },
            tasks: tasks.iter().map(task).collect(),
            data,
        }
    }
}

impl Scores {
    fn results(&self, data: Option<&Data>) -> Results {
        let loss = |data: &Data| {
            let loss = Block::loss(&self.blocks);
            data.results(loss, loss.exp())
        };
        let task = |answers: &Vec<Answer>| TaskResults {
            acc: accuracy(answers, |answer| answer.correct),
            acc_norm: accuracy(answers, |answer| answer.correct_normalised),
        };
        Results {
            data: data.map(loss),
            tasks: self.answers.iter().map(task).collect(),
        }
    }

    fn minus(&self, other: &Self, data: Option<&Data>) -> Results {
        let loss = |data: &Data| {
            data.results(
                Block::difference(&other.blocks, &self.blocks),
                Block::perplexity_difference(&other.blocks, &self.blocks),
            )
        };
        let task = |(a, b): (&Vec<Answer>, &Vec<Answer>)| TaskResults {
            acc: accuracy_difference(a, b, |answer| answer.correct),
            acc_norm: accuracy_difference(a, b, |answer| answer.correct_normalised),
        };
        let pairs = other.answers.iter().zip(&self.answers);
        Results {
            data: data.map(loss),
            tasks: pairs.map(task).collect(),
        }
    }
}

/// Width of the labels.
const LABEL: usize = 15;

impl Display for Report {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let names: &[&str] = match self.difference {
            Some(_) => &["A", "B"],
            None => &["model"],
        };
        for (name, model) in names.iter().zip(&self.models) {
            let path = model.path.display();
            writeln!(f, "{name:LABEL$}{path}, {}", model.kind)?;
        }
        writeln!(f, "{:LABEL$}{}", "device", self.device)?;
        if let Some(data) = &self.data {
            let path = data.path.display();
            writeln!(f, "{:LABEL$}{path}, {data}", "data")?;
        }
        writeln!(f)?;
        if self.difference.is_some() {
            self.row(
                f,
                "",
                ["A", "B", "B - A"].iter().map(|name| name.to_string()),
            )?;
        }
        self.data_rows(f)?;
        for i in 0..self.tasks.len() {
            self.task_rows(f, i)?;
        }
        Ok(())
    }
}

impl Report {
    /// Those of the models and their difference.
    fn results(&self) -> impl Iterator<Item = &Results> {
        let models = self.models.iter().map(|model| &model.results);
        models.chain(&self.difference)
    }

    fn data_rows(&self, f: &mut Formatter) -> fmt::Result {
        let Some(data) = &self.data else {
            return Ok(());
        };
        let results = || self.results().filter_map(|results| results.data.as_ref());
        self.row(f, "loss", results().map(|r| in_words(r.loss, 4)))?;
        self.row(
            f,
            "perplexity",
            results().map(|r| in_words(r.perplexity, 3)),
        )?;
        match &data.bytes_unknown {
            None => {
                let bits = results().filter_map(|r| r.bits_per_byte);
                self.row(f, "bits per byte", bits.map(|bits| in_words(bits, 4)))
            }
            Some(reason) => writeln!(f, "{:LABEL$}n/a: {reason}", "bits per byte"),
        }
    }

    fn task_rows(&self, f: &mut Formatter, i: usize) -> fmt::Result {
        let task = &self.tasks[i];
        let results = || self.results().map(|results| &results.tasks[i]);
        writeln!(f, "\n{task}")?;
        self.row(f, "acc", results().map(|r| in_words(r.acc, 4)))?;
        self.row(f, "acc_norm", results().map(|r| in_words(r.acc_norm, 4)))?;
        let truncated = || self.models.iter().map(|model| model.truncated[i]);
        match truncated().all(|count| count == 0) {
            true => Ok(()),
            false => self.row(f, "truncated", truncated().map(|count| count.to_string())),
        }
    }

    /// Columns line up where there are several.
    fn row(
        &self,
        f: &mut Formatter,
        label: &str,
        values: impl Iterator<Item = String>,
    ) -> fmt::Result {
        let width = if self.difference.is_some() { 22 } else { 0 };
        let values: String = values.map(|value| format!("{value:width$}")).collect();
        writeln!(f, "{label:LABEL$}{}", values.trim_end())
    }
}

impl Display for Data {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let (tokens, seq_len) = (format::count(self.tokens), self.seq_len);
        write!(f, "{tokens} tokens in windows of {seq_len}")?;
        if self.stride != seq_len {
            write!(f, ", {} from one to the next", self.stride)?;
        }
        match self.bytes_per_token {
            Some(bytes) => write!(f, ", {:.2} bytes a token", bytes.value),
            None => Ok(()),
        }
    }
}

impl Display for TaskFile {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        write!(f, "{}, {} questions", self.path.display(), self.questions)?;
        match self.form {
            Form::Query => Ok(()),
            Form::HellaSwag => write!(f, " of HellaSwag"),
            Form::Arc => write!(f, " of ARC"),
            Form::Piqa => write!(f, " of PIQA"),
        }
    }
}

fn in_words(estimate: Estimate, digits: usize) -> String {
    let value = format!("{:.digits$}", estimate.value);
    match estimate.stderr {
        Some(stderr) => format!("{value} ± {stderr:.digits$}"),
        None => format!("{value} ± n/a"),
    }
}
