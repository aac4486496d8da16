//! GPT-2's pre-tokenisation (Radford et al. 2019, `encoder.py`), by hand: the same splits as the
//! regular expression
//! `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
//! many times faster than a backtracking engine finds them.

use std::sync::LazyLock;

use tokenizers::utils::SysRegex;

/// The pre-tokens of `text`, in order; together they are `text`.
pub fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (word, after) = rest.split_at(first_len(rest));
        rest = after;
        (!word.is_empty()).then_some(word)
    })
}

/// A place near the end of `text` where cutting does not change how either side is split: before
/// a blank that follows a visible ASCII character, for no pre-token holds a blank after anything
/// but blanks.
pub fn last_safe_cut(text: &[u8]) -> Option<usize> {
    text.windows(2)
        .rposition(|pair| pair[0].is_ascii_graphic() && matches!(pair[1], b' ' | b'\n' | b'\t'))
        .map(|at| at + 1)
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Class {
    /// `[^\s\p{L}\p{N}]`
    Other,
    Letter,
    Number,
    Space,
}

/// Length of the first pre-token.
fn first_len(text: &str) -> usize {
    let Some((class, len)) = first_char(text) else {
        return 0;
    };
    match class {
        Class::Space => space_len(text, len),
        Class::Other if text.starts_with('\'') => {
            contraction_len(text).unwrap_or_else(|| run_len(text, Class::Other))
        }
        _ => run_len(text, class),
    }
}

/// `'s|'t|'re|'ve|'m|'ll|'d`
fn contraction_len(text: &str) -> Option<usize> {
    ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
        .iter()
        .find(|contraction| text.starts_with(**contraction))
        .map(|contraction| contraction.len())
}

/// A pre-token that starts with a blank: one space and the run after it, or blanks, of which the
/// last is left to what follows them.
fn space_len(text: &str, first: usize) -> usize {
    let blanks = run_len(text, Class::Space);
    let Some((next, _)) = first_char(&text[blanks..]) else {
        return blanks;
    };
    if blanks > first {
        let last = text[..blanks].chars().next_back().map_or(0, char::len_utf8);
        return blanks - last;
    }
    match text.starts_with(' ') {
        true => 1 + run_len(&text[1..], next),
        false => blanks,
    }
}

/// Length of the run of characters of a class that `text` starts with.
fn run_len(text: &str, class: Class) -> usize {
    let mut len = 0;
    while let Some((next, bytes)) = first_char(&text[len..]) {
        if next != class {
            break;
        }
        len += bytes;
    }
    len
}

/// Class and length of the first character.
fn first_char(text: &str) -> Option<(Class, usize)> {
    let first = *text.as_bytes().first()?;
    if first.is_ascii() {
        return Some((ASCII[usize::from(first)], 1));
    }
    let c = text.chars().next()?;
    Some((UNICODE[c as usize], c.len_utf8()))
}

static ASCII: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        classes[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Number,
            b' ' | 9..=13 => Class::Space,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
};

/// The class of each code point, asked of the regex engine that `tokenizers` uses, so that both
/// follow the same version of Unicode.
static UNICODE: LazyLock<Box<[Class]>> = LazyLock::new(|| {
    let every_char: String = (char::MIN..=char::MAX).collect();
    let mut classes = vec![Class::Other; char::MAX as usize + 1].into_boxed_slice();
    for (pattern, class) in [
        (r"\p{L}+", Class::Letter),
        (r"\p{N}+", Class::Number),
        (r"\s+", Class::Space),
    ] {
        let regex = SysRegex::new(pattern).expect("a constant pattern");
        for (start, end) in regex.find_iter(&every_char) {
            for c in every_char[start..end].chars() {
                classes[c as usize] = class;
            }
        }
    }
    classes
});

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    fn by_regex(text: &str) -> Vec<String> {
        let mut pretokenized: PreTokenizedString = text.into();
        let byte_level = ByteLevel::new(false, false, true);
        byte_level.pre_tokenize(&mut pretokenized).unwrap();
        pretokenized
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), _)| text[start..end].to_string())
            .collect()
    }

    #[test]
    fn ascii_classes_are_those_of_the_regex_engine() {
        for byte in 0..128 {
            assert!(ASCII[byte] == UNICODE[byte], "{byte}");
        }
    }

    #[test]
    fn every_character_is_split_like_the_regex_does() {
        let text: String = (char::MIN..=char::MAX)
            .flat_map(|c| ['a', c, ' '])
            .collect();
        assert_eq!(split(&text).collect::<Vec<_>>(), by_regex(&text));
    }

    proptest! {
        #[test]
        fn any_text_is_split_like_the_regex_does(
            text in "([a-cA-C'slrevtmd0-9!.\u{e9}\u{4e2d}\u{b2}\u{301}\u{3000}\u{a0}\u{1f600} \n\t\r]|\\PC){0,60}"
        ) {
            prop_assert_eq!(split(&text).collect::<Vec<_>>(), by_regex(&text));
        }

        #[test]
        fn a_safe_cut_changes_no_split(text in "[a-b' \n\t.0\u{3000}\u{4e2d}]{0,40}") {
            if let Some(at) = last_safe_cut(text.as_bytes()) {
                let (left, right) = text.split_at(at);
                let pieces: Vec<_> = split(left).chain(split(right)).collect();
                prop_assert_eq!(pieces, split(&text).collect::<Vec<_>>());
            }
        }
    }
}
