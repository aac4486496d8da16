//! How good a model is.
//!
//! [`perplexity`] has the loss on a data set, in blocks; [`bytes_per_token`] turns it into bits per
//! byte. [`Task`] is a file of multiple-choice questions, [`answer`] answers them by log-likelihood.
//! [`Estimate`] is a mean of either with its standard error, also of the difference between two
//! models.

mod bytes;
mod estimate;
mod multiple_choice;
mod perplexity;
mod task;
mod wording;

pub use bytes::{BytesPerToken, bytes_per_token};
pub use estimate::Estimate;
pub use multiple_choice::{Answer, Prompt, accuracy, accuracy_difference, answer, encode};
pub use perplexity::{Block, Excerpt, Windows, excerpts, perplexity};
pub use task::{Form, Question, Task};
