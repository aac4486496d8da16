//! Tokenisation on the text that a build always leaves behind: sources in the cargo registry.
//!
//!     cargo bench --bench tokenize
//!
//! `encode`: one thread, text to ids, our encoder beside the crate's own `encode_fast`.
//! `run`: `titanbit tokenize` as a whole, files to token file, on every core.

use std::fs;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use indicatif::ProgressBar;
use titanbit::data::tokenize::encoder::Encoder;
use titanbit::data::tokenize::vocabulary::Vocabulary;
use titanbit::data::tokenize::{self, TokenizeOptions, VocabularySource, sources};

const INPUT: &str = "${CARGO_HOME:-~/.cargo}/registry/src/*";
const VOCAB: usize = 4096;
const ENCODE_BYTES: u64 = 4_000_000;
const RUN_BYTES: u64 = 24_000_000;

fn encode(criterion: &mut Criterion) {
    let extensions = ["rs".to_string(), "md".to_string()];
    let found = sources::find(&[INPUT.into()], Some(&extensions)).expect("a cargo registry");
    let texts: Vec<String> = sources::sample(found, ENCODE_BYTES)
        .iter()
        .filter_map(|source| fs::read_to_string(&source.path).ok())
        .collect();
    let vocabulary = Vocabulary::train(VOCAB, texts.iter().cloned()).expect("a vocabulary");
    let tokenizer = &vocabulary.tokenizer;

    let mut group = criterion.benchmark_group("encode");
    group.sample_size(10);
    let bytes = texts.iter().map(String::len).sum::<usize>();
    group.throughput(Throughput::BytesDecimal(bytes as u64));
    group.bench_function("titanbit", |bencher| {
        bencher.iter(|| {
            // A new encoder each time: its table of known words starts empty.
            let mut encoder = Encoder::new(tokenizer);
            let mut ids = Vec::new();
            for text in &texts {
                encoder.encode(text, &mut ids).expect("ids");
            }
            black_box(ids)
        });
    });
    group.bench_function("tokenizers encode_fast", |bencher| {
        bencher.iter(|| {
            let mut ids = Vec::new();
            for text in &texts {
                let encoding = tokenizer.encode_fast(text.as_str(), false).expect("ids");
                ids.extend_from_slice(encoding.get_ids());
            }
            black_box(ids)
        });
    });
    group.finish();
}

fn run(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut options = TokenizeOptions {
        inputs: vec![INPUT.into()],
        output: directory.path().join("train.bin"),
        vocabulary: VocabularySource::Train(VOCAB),
        eos_token: None,
        validation: None,
        text_field: "text".into(),
        extensions: Some(vec!["rs".into(), "md".into()]),
        threads: None,
        max_shard_tokens: None,
        sample_bytes: Some(RUN_BYTES),
        strict: false,
        command: "bench".into(),
    };
    let hidden = ProgressBar::hidden();
    let summary = tokenize::run(&options, &hidden).expect("a token file");

    let mut group = criterion.benchmark_group("run");
    group.sample_size(10);
    group.throughput(Throughput::BytesDecimal(summary.train.source_bytes));
    group.bench_function("train the vocabulary and tokenise", |bencher| {
        bencher.iter(|| tokenize::run(&options, &hidden).expect("a token file"));
    });
    options.vocabulary = VocabularySource::File(summary.tokenizer);
    group.bench_function("tokenise", |bencher| {
        bencher.iter(|| tokenize::run(&options, &hidden).expect("a token file"));
    });
    group.finish();
}

criterion_group!(benches, encode, run);
criterion_main!(benches);
