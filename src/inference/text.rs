//! Tokens to text as they come.

use tokenizers::{
    DecodeStream, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper, Tokenizer,
};

use crate::{Error, Result};

/// Text of the tokens so far, as far as it is certain: neither half a character, nor what may turn
/// out to begin a stop text.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    stream: Decode<'a>,
    /// Tokens that are part of an unfinished character.
    unfinished: Vec<u32>,
    stops: &'a [String],
    /// Text that may begin a stop text.
    withheld: String,
}

type Decode<'a> = DecodeStream<
    'a,
    ModelWrapper,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// What a token adds.
#[derive(Debug, PartialEq)]
pub struct Piece {
    pub text: String,
    /// A stop text followed, which is not part of it.
    pub stopped: bool,
}

impl<'a> TextStream<'a> {
    /// Special tokens, such as the end of text, are left out.
    pub fn new(tokenizer: &'a Tokenizer, stops: &'a [String]) -> Self {
        Self {
            tokenizer,
            stream: tokenizer.decode_stream(true),
            unfinished: Vec::new(),
            stops,
            withheld: String::new(),
        }
    }

    /// # Errors
    /// `Usage` where the tokenizer cannot decode what follows what.
    pub fn push(&mut self, id: u32) -> Result<Piece> {
        self.unfinished.push(id);
        let Some(text) = self.stream.step(id).map_err(Error::usage)? else {
            return Ok(Piece {
                text: String::new(),
                stopped: false,
            });
        };
        self.unfinished.clear();
        Ok(self.until_stop(&text))
    }

    /// What is left, an unfinished character as U+FFFD.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn finish(mut self) -> Result<Piece> {
        let unfinished = std::mem::take(&mut self.unfinished);
        let rest = self.tokenizer.decode(&unfinished, true);
        let mut piece = self.until_stop(&rest.map_err(Error::usage)?);
        if !piece.stopped {
            piece.text += &self.withheld;
        }
        Ok(piece)
    }

    fn until_stop(&mut self, text: &str) -> Piece {
        self.withheld += text;
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.withheld.find(stop));
        if let Some(at) = found.min() {
            self.withheld.truncate(at);
            return Piece {
                text: std::mem::take(&mut self.withheld),
                stopped: true,
            };
        }
        let certain = self.withheld.len() - self.begun_stop();
        let rest = self.withheld.split_off(certain);
        Piece {
            text: std::mem::replace(&mut self.withheld, rest),
            stopped: false,
        }
    }

    /// Length of the longest end of the text that begins a stop text.
    fn begun_stop(&self) -> usize {
        let begun = |stop: &String| {
            let lengths = (1..stop.len())
                .rev()
                .filter(|len| stop.is_char_boundary(*len));
            lengths
                .into_iter()
                .find(|len| self.withheld.ends_with(&stop[..*len]))
        };
        self.stops.iter().filter_map(begun).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenize::vocabulary::Vocabulary;

    fn bytes_only() -> Tokenizer {
        // So few words that every token is one byte.
        let texts = std::iter::once("a".to_string());
        Vocabulary::train(257, texts).unwrap().tokenizer
    }

    fn pieces(tokenizer: &Tokenizer, text: &str, stops: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
        let mut stream = TextStream::new(tokenizer, &stops);
        let mut texts = Vec::new();
        for id in tokenizer.encode(text, false).unwrap().get_ids() {
            let piece = stream.push(*id).unwrap();
            texts.push(piece.text);
            if piece.stopped {
                return (texts, true);
            }
        }
        let last = stream.finish().unwrap();
        texts.push(last.text);
        (texts, last.stopped)
    }

    #[test]
    fn characters_come_whole() {
        let tokenizer = bytes_only();
        let (texts, _) = pieces(&tokenizer, "aé€😀b", &[]);
        let expected = ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""];
        assert_eq!(texts, expected);
    }

    #[test]
    fn half_a_character_at_the_end_is_shown_as_such() {
        let tokenizer = bytes_only();
        let ids = tokenizer.encode("ab€", false).unwrap().get_ids().to_vec();
        let mut stream = TextStream::new(&tokenizer, &[]);
        let mut text = String::new();
        for id in &ids[..4] {
            text += &stream.push(*id).unwrap().text;
        }
        text += &stream.finish().unwrap().text;
        assert_eq!(text, "ab\u{fffd}");
    }

    #[test]
    fn stop_texts_end_it_and_their_beginnings_wait() {
        let tokenizer = bytes_only();
        let (texts, stopped) = pieces(&tokenizer, "one\n\ntwo", &["\n\n", "tw!"]);
        assert!(stopped);
        assert_eq!(texts, ["o", "n", "e", "", ""]);
        // A beginning that leads nowhere is given later, at the end at the latest.
        let (texts, stopped) = pieces(&tokenizer, "a\nbtw", &["\n\n", "tw!"]);
        assert!(!stopped);
        assert_eq!(texts, ["a", "", "\nb", "", "", "tw"]);
    }
}
