//! Loss, perplexity and bits per byte: against the training model on the same windows, against the
//! definition of sliding windows, and on text whose bytes are known.

mod common;

use std::fs;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use common::{assert_close, titanbit, write_bin};
use indicatif::ProgressBar;
use tempfile::TempDir;
use titanbit::data::tokenize::vocabulary::{END_OF_TEXT, Vocabulary, parse};
use titanbit::data::{TokenDtype, TokenSet};
use titanbit::eval::{self, Block, Estimate, Windows, bytes_per_token, excerpts};
use titanbit::inference::{Model, PackedWeights};
use titanbit::model::{BitNetConfig, BitNetTransformer};
use tokenizers::Tokenizer;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;

fn model() -> (BitNetTransformer, Model) {
    let config = BitNetConfig {
        vocab_size: 60,
        hidden_size: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        intermediate_size: 48,
        max_seq_len: 24,
        init_std: 0.2,
        ..BitNetConfig::default()
    };
    let model = BitNetTransformer::new(&config, 11, &Device::Cpu).unwrap();
    let weights = PackedWeights::read(&config, &model).unwrap();
    let packed = Model::new(&config, weights, &Device::Cpu).unwrap();
    (model, packed)
}

fn tokens(count: usize) -> Vec<u16> {
    (0..count).map(|i| (i * i * 7 % 59) as u16).collect()
}

fn score(model: &Model, set: &TokenSet, limit: Option<u64>, windows: Windows) -> Vec<Block> {
    let limit = limit.and_then(NonZeroU64::new);
    let excerpts = excerpts(set, limit).unwrap();
    let progress = ProgressBar::hidden();
    let blocks = eval::perplexity(model, &excerpts, windows, &progress).unwrap();
    let targets: u64 = blocks.iter().map(|block| block.targets).sum();
    assert_eq!(progress.position(), targets);
    blocks
}

/// Two shards of which neither is a whole number of windows.
fn shards(dir: &Path) -> [Vec<u16>; 2] {
    let shards = [tokens(3 * 24 + 1 + 5), tokens(200)[100..141].to_vec()];
    for (i, shard) in shards.iter().enumerate() {
        write_bin(&dir.join(format!("val_{i:03}.bin")), shard);
    }
    shards
}

#[test]
fn disjoint_windows_have_the_loss_of_the_training_model() {
    let (trained, packed) = model();
    let dir = TempDir::new().unwrap();
    let shards = shards(dir.path());
    let set = TokenSet::open(&[dir.path().join("val.bin")], None).unwrap();
    let windows = Windows {
        seq_len: 24,
        stride: 24,
    };
    let blocks = score(&packed, &set, None, windows);
    let mut expected = Vec::new();
    for shard in &shards {
        for start in (0..shard.len() - 1).step_by(24) {
            let ids = &shard[start..shard.len().min(start + 25)];
            let ids: Vec<u32> = ids.iter().map(|id| u32::from(*id)).collect();
            let row = |ids: &[u32]| {
                let ids = Tensor::new(ids, &Device::Cpu).unwrap();
                ids.unsqueeze(0).unwrap()
            };
            let loss = trained.loss(&row(&ids[..ids.len() - 1]), &row(&ids[1..]));
            expected.push((loss.unwrap(), (ids.len() - 1) as u64));
        }
    }
    let targets: Vec<u64> = blocks.iter().map(|block| block.targets).collect();
    assert_eq!(targets, [24, 24, 24, 5, 24, 16]);
    assert_eq!(blocks.len(), expected.len());
    let mut differences = Vec::new();
    for (block, (loss, targets)) in blocks.iter().zip(&expected) {
        assert_eq!(block.targets, *targets);
        differences.push(block.nll / block.targets as f64 - loss);
    }
    assert_close(&differences, 1e-5, 5e-2);
    let sum: f64 = expected.iter().map(|(loss, n)| loss * *n as f64).sum();
    let loss = Block::loss(&blocks);
    assert!((loss.value - sum / 117.0).abs() < 1e-2);
    assert_eq!(loss.exp().value, loss.value.exp());
}

/// Negative log-likelihood of each target of a shard, one whole pass for each, as `Windows` defines
/// its context.
fn by_definition(model: &BitNetTransformer, ids: &[u16], windows: Windows) -> Vec<f64> {
    let nll = |target: usize| {
        let late = target.saturating_sub(windows.seq_len);
        let start = late.div_ceil(windows.stride) * windows.stride;
        let context: Vec<u32> = ids[start..target].iter().map(|id| u32::from(*id)).collect();
        assert!(context.len() <= windows.seq_len);
        assert!(start == 0 || context.len() > windows.seq_len - windows.stride);
        let context = Tensor::new(context, &Device::Cpu).unwrap();
        let logits = model.forward(&context.unsqueeze(0).unwrap(), None).unwrap();
        let likelihoods = candle_nn::ops::log_softmax(&logits.logits, 2).unwrap();
        let rows: Vec<Vec<f32>> = likelihoods.squeeze(0).unwrap().to_vec2().unwrap();
        -f64::from(rows.last().unwrap()[usize::from(ids[target])])
    };
    (1..ids.len()).map(nll).collect()
}

#[test]
fn sliding_windows_score_each_token_once_with_the_context_they_promise() {
    let (trained, packed) = model();
    let dir = TempDir::new().unwrap();
    let shards = shards(dir.path());
    let set = TokenSet::open(&[dir.path().join("val.bin")], None).unwrap();
    let mut differences = Vec::new();
    for (seq_len, stride, limit) in [
        (24, 24, None),
        (24, 7, None),
        (24, 1, None),
        (10, 9, None),
        (1, 1, None),
        (24, 5, Some(1)),
        (24, 5, Some(77)),
        (16, 4, Some(90)),
        (24, 12, Some(117)),
        (24, 12, Some(1000)),
    ] {
        let windows = Windows { seq_len, stride };
        let mut left = limit.unwrap_or(u64::MAX) as usize;
        let mut expected = Vec::new();
        for shard in &shards {
            let nll = by_definition(&trained, shard, windows);
            let nll = &nll[..left.min(nll.len())];
            left -= nll.len();
            let blocks = nll.chunks(seq_len);
            expected.extend(blocks.map(|b| (b.iter().sum::<f64>(), b.len() as u64)));
        }
        let blocks = score(&packed, &set, limit, windows);
        assert_eq!(blocks.len(), expected.len(), "{windows:?}");
        for (block, (nll, targets)) in blocks.iter().zip(&expected) {
            assert_eq!(block.targets, *targets, "{windows:?}");
            differences.push((block.nll - nll) / *targets as f64);
        }
    }
    assert_close(&differences, 1e-5, 5e-2);
}

#[test]
fn more_context_makes_a_difference() {
    let (_, packed) = model();
    let dir = TempDir::new().unwrap();
    shards(dir.path());
    let set = TokenSet::open(&[dir.path().join("val.bin")], None).unwrap();
    let loss = |stride| {
        let seq_len = 24;
        Block::loss(&score(&packed, &set, None, Windows { seq_len, stride })).value
    };
    assert!((loss(24) - loss(1)).abs() > 1e-3);
}

/// Uniform in [0, 1), by Knuth's MMIX constants.
fn uniforms(mut state: u64) -> impl FnMut() -> f64 {
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Data sets of 40 blocks, each block with a difficulty of its own that all its tokens share, drawn
/// 4000 times: the estimates must scatter as their standard errors say.
#[test]
fn standard_errors_are_the_scatter_of_the_estimates() {
    let mut uniform = uniforms(3);
    let mut draw = || {
        let mut block = || {
            let targets = if uniform() < 0.3 { 5 } else { 20 };
            let difficulty = 2.0 + uniform();
            [0.0, 0.3].map(|gain| Block {
                nll: (difficulty - gain + 0.2 * uniform()) * targets as f64,
                targets,
            })
        };
        (0..40)
            .map(|_| block().into())
            .unzip::<_, _, Vec<_>, Vec<_>>()
    };
    type Estimator = fn(&[Block], &[Block]) -> Estimate;
    let estimates: [Estimator; 4] = [
        |a, _| Block::loss(a),
        |a, _| Block::loss(a).exp(),
        Block::difference,
        Block::perplexity_difference,
    ];
    let mut found = vec![Vec::new(); 4];
    for _ in 0..4000 {
        let (a, b) = draw();
        for (all, estimate) in found.iter_mut().zip(estimates) {
            all.push(estimate(&a, &b));
        }
    }
    for (i, all) in found.iter().enumerate() {
        let n = all.len() as f64;
        let mean = all.iter().map(|e| e.value).sum::<f64>() / n;
        let scatter = all.iter().map(|e| (e.value - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let stated = all.iter().map(|e| e.stderr.unwrap().powi(2)).sum::<f64>() / n;
        assert!(
            (stated / scatter - 1.0).abs() < 0.1,
            "{i}: {stated} and {scatter}"
        );
    }
    // The pairs take away what the blocks have in common.
    let stderr = |i: usize| found[i][0].stderr.unwrap();
    assert!(stderr(2) < 0.5 * stderr(0));
    assert!(stderr(3) < 0.5 * stderr(1));
}

#[test]
fn standard_errors_of_few_samples() {
    let mean = Estimate::mean([1.0, 2.0, 6.0].into_iter());
    // Deviations -2, -1, 3.
    assert_eq!(mean.value, 3.0);
    assert!((mean.stderr.unwrap() - (14f64 / 2.0 / 3.0).sqrt()).abs() < 1e-12);
    assert_eq!(Estimate::mean([4.0].into_iter()).stderr, None);
    let halved = mean.scaled(-0.5);
    assert_eq!(halved.value, -1.5);
    assert_eq!(halved.stderr, Some(mean.stderr.unwrap() / 2.0));
}

const TEXTS: [&str; 4] = [
    "Ein Text mit Umlauten: äöü, und noch einer.",
    "a text of plain letters, and plain letters again",
    "中文字符 and 😀 emoji",
    "x",
];

/// Files of [`TEXTS`] by the binary: token file, sidecar and tokenizer.
fn tokenised(dir: &Path, tokens_a_shard: Option<&str>) -> PathBuf {
    let lines = TEXTS.map(|text| format!("{{\"text\": \"{text}\"}}\n"));
    fs::write(dir.join("docs.jsonl"), lines.concat()).unwrap();
    let mut command = titanbit();
    command.args(["tokenize", "--train-vocab", "280", "--input"]);
    command.arg(dir.join("docs.jsonl")).arg("--output");
    command.arg(dir.join("text.bin"));
    if let Some(tokens) = tokens_a_shard {
        command.args(["--max-shard-tokens", tokens]);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    dir.join("text.bin")
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

#[test]
fn bytes_of_the_text_by_its_sidecar_or_by_its_tokens() {
    for tokens_a_shard in [None, Some("20")] {
        let dir = TempDir::new().unwrap();
        let bin = tokenised(dir.path(), tokens_a_shard);
        let path = dir.path().join("tokenizer.json");
        let tokenizer = parse(&fs::read(&path).unwrap(), &path).unwrap();
        let documents = TEXTS.map(|text| ids(&tokenizer, text).len() + 1);
        let tokens = documents.iter().sum::<usize>();
        let bytes = TEXTS.concat().len();

        let set = TokenSet::open(&[&bin], None).unwrap();
        let all = excerpts(&set, None).unwrap();
        let found = bytes_per_token(&all, Some(&tokenizer)).unwrap();
        assert_eq!(found.from, "sidecar");
        assert_eq!(found.value, bytes as f64 / tokens as f64);
        assert_eq!(bytes_per_token(&all, None), Ok(found));
        // ln(2) nats are a bit.
        let bits =
            Estimate::mean([std::f64::consts::LN_2].into_iter()).scaled(found.bits_per_byte());
        assert!((bits.value - tokens as f64 / bytes as f64).abs() < 1e-12);

        // Of a part the sidecar does not know: 7 tokens after the first of the first document.
        let part = excerpts(&set, NonZeroU64::new(7)).unwrap();
        let found = bytes_per_token(&part, Some(&tokenizer)).unwrap();
        let first = ids(&tokenizer, TEXTS[0]);
        let decoded = tokenizer.decode(&first[1..8], true).unwrap().len();
        assert_eq!(
            (found.value, found.from),
            (decoded as f64 / 7.0, "tokenizer")
        );
        let error = bytes_per_token(&part, None).unwrap_err();
        assert!(
            error.contains("neither a tokenizer nor a sidecar"),
            "{error}"
        );
        if tokens_a_shard.is_some() {
            assert!(set.shards().len() > 2);
            continue;
        }

        // Without a sidecar: all bytes but those of the first token, which is not scored.
        fs::remove_file(bin.with_extension("json")).unwrap();
        let set = TokenSet::open(&[&bin], None).unwrap();
        let all = excerpts(&set, None).unwrap();
        let found = bytes_per_token(&all, Some(&tokenizer)).unwrap();
        let first = tokenizer.decode(&first[..1], true).unwrap().len();
        assert_eq!(found.value, (bytes - first) as f64 / (tokens - 1) as f64);
        let small = Vocabulary::train(257, ["a"].map(String::from).into_iter()).unwrap();
        let error = bytes_per_token(&all, Some(&small.tokenizer)).unwrap_err();
        assert!(error.contains("the tokenizer has no token"), "{error}");
    }
}

#[test]
fn special_tokens_are_no_text_and_other_added_ones_are() {
    let mut tokenizer = Vocabulary::train(257, ["a"].map(String::from).into_iter())
        .unwrap()
        .tokenizer;
    let pad = tokenizers::AddedToken::from("<|pad|>", true);
    let word = tokenizers::AddedToken::from("schön", false);
    tokenizer.add_tokens([pad, word]).unwrap();
    let tokens = ids(&tokenizer, "x<|pad|>schön<|endoftext|>é");
    assert_eq!(tokens.len(), 6, "é is two");
    let dir = TempDir::new().unwrap();
    let bin = dir.path().join("special.bin");
    let tokens: Vec<u16> = tokens.iter().map(|id| *id as u16).collect();
    write_bin(&bin, &tokens);
    let set = TokenSet::open(&[&bin], None).unwrap();
    let all = excerpts(&set, None).unwrap();
    let found = bytes_per_token(&all, Some(&tokenizer)).unwrap();
    assert_eq!(found.value, "schöné".len() as f64 / 5.0);
}

#[test]
fn tokens_without_bytes_of_their_own_are_decoded_together() {
    let words = ["the", "café", END_OF_TEXT, "sat"];
    let vocab = words
        .iter()
        .zip(0..)
        .map(|(word, id)| (word.to_string(), id));
    let model = WordLevel::builder().vocab(vocab.collect()).build().unwrap();
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(WhitespaceSplit));
    let special = tokenizers::AddedToken::from(END_OF_TEXT, true);
    tokenizer.add_special_tokens([special]).unwrap();
    let dir = TempDir::new().unwrap();
    let bin = dir.path().join("words.bin");
    // Without a header, as nanoGPT writes them.
    let tokens: Vec<u8> = [3u16, 0, 1, 3, 2]
        .iter()
        .flat_map(|id| id.to_le_bytes())
        .collect();
    fs::write(&bin, tokens).unwrap();
    let set = TokenSet::open(&[&bin], Some(TokenDtype::U16)).unwrap();
    let all = excerpts(&set, None).unwrap();
    let found = bytes_per_token(&all, Some(&tokenizer)).unwrap();
    assert_eq!(found.value, "the café sat".len() as f64 / 4.0);

    write_bin(&bin, &[2, 2, 2]);
    let set = TokenSet::open(&[&bin], None).unwrap();
    let nothing = excerpts(&set, None).unwrap();
    let error = bytes_per_token(&nothing, Some(&tokenizer)).unwrap_err();
    assert!(error.contains("no text"), "{error}");
}
