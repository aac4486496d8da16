//! The encoder's ids against `tokenizers`' own, on real and on hostile text.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use titanbit::data::tokenize::encoder::Encoder;
use titanbit::data::tokenize::vocabulary::Vocabulary;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::{AddedToken, Tokenizer};

/// Text in many scripts, with every kind of blank, mark and digit.
const UNICODE: &str = "It's we'll they've I'M 'tis ''s don't\n\n\t\tfn main() {\r\n    x  = y;\n}   \n \
    Straße naïve café e\u{301}a Größe\u{a0}non-breaking\u{2003}em\u{3000}ideographic \
    中文字符，日本語テキスト、한국어 텍스트 हिन्दी पाठ ไทย עברית العربية १२३ ٣٤٥ ½ ² Ⅷ \
    🙂👨\u{200d}👩\u{200d}👧 \u{0}\u{1b}\u{7f}\u{85}\u{2028} x\u{feff} 1234567890 a1b2 ____ ==== \
    \u{1d54f}\u{10ffff} ﬁne ǅ ʰ ー";

/// This repository's own source.
fn sources() -> Vec<String> {
    fn collect(directory: &Path, texts: &mut Vec<String>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, texts);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                texts.push(fs::read_to_string(path).unwrap());
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts = vec![fs::read_to_string(root.join("Cargo.lock")).unwrap()];
    collect(&root.join("src"), &mut texts);
    collect(&root.join("tests"), &mut texts);
    texts
}

fn vocabulary() -> Vocabulary {
    Vocabulary::train(700, sources().into_iter()).unwrap()
}

fn encode(encoder: &mut Encoder, text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    encoder.encode(text, &mut ids).unwrap();
    ids
}

fn reference(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

#[test]
fn ids_are_those_of_the_tokenizer_and_decode_to_the_text() {
    let vocabulary = vocabulary();
    let mut encoder = Encoder::new(&vocabulary.tokenizer);
    let mut texts = sources();
    texts.extend([
        UNICODE.to_string(),
        UNICODE.repeat(3),
        " ".into(),
        "\n".into(),
    ]);
    texts.push("text with <|endoftext|> in it, and <|endoftext".into());
    texts.push("x".repeat(10_000));
    // Twice: the second time every word is known.
    for text in texts.iter().chain(&texts) {
        let ids = encode(&mut encoder, text);
        assert_eq!(ids, reference(&vocabulary.tokenizer, text));
        assert_eq!(&vocabulary.tokenizer.decode(&ids, false).unwrap(), text);
    }
}

#[test]
fn more_words_than_the_table_holds() {
    let vocabulary = vocabulary();
    let mut encoder = Encoder::new(&vocabulary.tokenizer);
    let text: String = (0..80_000).map(|i| format!("w {i}")).collect();
    let expected = reference(&vocabulary.tokenizer, &text);
    assert!(encode(&mut encoder, &text) == expected);
    assert!(
        encode(&mut encoder, &text) == expected,
        "after the table started anew"
    );
}

#[test]
fn other_kinds_of_tokenizer_are_left_to_themselves() {
    let mut spaced = vocabulary().tokenizer;
    spaced.with_pre_tokenizer(Some(ByteLevel::new(true, true, true)));
    let mut words = vocabulary().tokenizer;
    words.with_pre_tokenizer(Some(WhitespaceSplit));
    let mut lower = vocabulary().tokenizer;
    lower
        .with_normalizer(Some(tokenizers::normalizers::utils::Lowercase))
        .unwrap();
    let mut added = vocabulary().tokenizer;
    added
        .add_tokens([AddedToken::from("fn main", false)])
        .unwrap();
    let plain = vocabulary().tokenizer;
    for tokenizer in [spaced, words, lower, added] {
        let mut encoder = Encoder::new(&tokenizer);
        let ids = encode(&mut encoder, UNICODE);
        assert_eq!(ids, reference(&tokenizer, UNICODE));
        assert_ne!(
            ids,
            reference(&plain, UNICODE),
            "the change makes a difference"
        );
    }
}

#[test]
fn a_vocabulary_depends_on_the_texts_only() {
    let forwards = vocabulary();
    let mut texts = sources();
    texts.reverse();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    let backwards = pool.install(|| Vocabulary::train(700, texts.into_iter()).unwrap());
    assert_eq!(forwards.hash, backwards.hash);
    assert_eq!(forwards.size, 700);
    assert_eq!(
        forwards.tokenizer.token_to_id("<|endoftext|>"),
        Some(forwards.eos_id)
    );
    assert!(Vocabulary::train(256, std::iter::empty()).is_err());
}

proptest! {
    #[test]
    fn any_text_gets_the_ids_of_the_tokenizer(texts in prop::collection::vec("(?s).{0,40}", 1..8)) {
        thread_local! {
            static VOCABULARY: &'static Vocabulary = Box::leak(Box::new(vocabulary()));
        }
        let tokenizer = &VOCABULARY.with(|it| *it).tokenizer;
        let mut encoder = Encoder::new(tokenizer);
        for text in &texts {
            prop_assert_eq!(encode(&mut encoder, text), reference(tokenizer, text));
        }
    }
}
