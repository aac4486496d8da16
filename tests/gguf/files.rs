//! What was written is read back; what cannot be written or read is refused.

use std::fs;
use std::path::Path;

use candle_core::Device;
use titanbit::export::gguf::{self, TernaryType};
use titanbit::inference::PackedWeights;
use titanbit::model::{Activation, BitNetConfig, BitNetTransformer};

const TYPES: [TernaryType; 2] = [TernaryType::Tq2_0, TernaryType::Tq1_0];

/// Rows of 256 and of 512 weights.
pub fn config() -> BitNetConfig {
    BitNetConfig {
        vocab_size: 300,
        layers: 2,
        hidden_size: 256,
        heads: 4,
        kv_heads: 2,
        intermediate_size: 512,
        max_seq_len: 64,
        tie_embeddings: true,
        ..BitNetConfig::default()
    }
}

/// A model whose norms and scales are not all the same.
pub fn random_model(config: &BitNetConfig) -> BitNetTransformer {
    let model = BitNetTransformer::new(config, 5, &Device::Cpu).unwrap();
    for (i, parameter) in model.parameters().iter().enumerate() {
        let values = match parameter.var.rank() {
            1 => (parameter.var.rand_like(0.5, 2.0)).unwrap(),
            _ => (parameter.var.as_tensor() * (1.0 + 0.1 * i as f64)).unwrap(),
        };
        parameter.var.set(&values).unwrap();
    }
    model
}

fn written(dir: &Path, model: &BitNetTransformer, ternary: TernaryType) -> std::path::PathBuf {
    let path = dir.join("model.gguf");
    gguf::write(&path, model, None, ternary, "a model").unwrap();
    path
}

fn assert_equal(read: &PackedWeights, expected: &PackedWeights) {
    let table = |weights: &PackedWeights| {
        let mut values = vec![0.0; weights.embed_tokens.rows() * weights.embed_tokens.cols()];
        weights.embed_tokens.to_f16().read_rows(0, &mut values);
        values
    };
    assert_eq!(table(read), table(expected));
    assert!(read.lm_head.is_none());
    assert_eq!(read.norm, expected.norm);
    assert_eq!(read.layers.len(), expected.layers.len());
    for (read, expected) in read.layers.iter().zip(&expected.layers) {
        assert_eq!(read.input_layernorm, expected.input_layernorm);
        assert_eq!(read.attn_sub_norm, expected.attn_sub_norm);
        assert_eq!(
            read.post_attention_layernorm,
            expected.post_attention_layernorm
        );
        assert_eq!(read.ffn_sub_norm, expected.ffn_sub_norm);
        for (read, expected) in [
            (&read.qkv, &expected.qkv),
            (&read.o, &expected.o),
            (&read.gate_up, &expected.gate_up),
            (&read.down, &expected.down),
        ] {
            assert_eq!(read.packed, expected.packed);
            assert_eq!(read.scales, expected.scales);
        }
    }
}

#[test]
fn codes_and_scales_are_read_back_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    // The second has rows that only blocks of 32 fit.
    let odd = BitNetConfig {
        hidden_size: 96,
        rope_theta: 500_000.0,
        rms_norm_eps: 1e-6,
        ..config()
    };
    for config in [config(), odd] {
        let model = random_model(&config);
        let expected = PackedWeights::read(&config, &model).unwrap();
        for ternary in TYPES {
            let path = written(dir.path(), &model, ternary);
            assert!(gguf::is_gguf(&path).unwrap());
            let (read, weights) = gguf::read(&path).unwrap();
            assert_eq!(read, config);
            assert_equal(&weights, &expected);
        }
    }
}

#[test]
fn sizes_are_those_of_the_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model(&config());
    let ternary = config().parameter_count().ternary as u64;
    let bytes = TYPES.map(|ternary| {
        let path = written(dir.path(), &model, ternary);
        fs::metadata(path).unwrap().len()
    });
    // 66 and 54 bytes for 256 weights; every tensor begins at a multiple of 32.
    let difference = (bytes[0] - bytes[1]) as i64 - (ternary / 256 * (66 - 54)) as i64;
    assert!(difference.abs() < 14 * 32, "{bytes:?}");
}

#[test]
fn rows_that_no_block_of_256_fits_are_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let config = BitNetConfig {
        hidden_size: 96,
        ..config()
    };
    let notes = gguf::write(&path, &random_model(&config), None, TernaryType::Tq1_0, "").unwrap();
    assert_eq!(
        notes,
        [
            "6 of a layer's 7 projections are Q4_0, with the same codes in 4.5 bits a weight: \
             their rows of 96 weights are no multiple of 256, the block of TQ1_0"
        ]
    );
}

#[test]
fn models_that_llama_cpp_cannot_run_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let base = config();
    for (config, says) in [
        (
            BitNetConfig {
                tie_embeddings: false,
                ..base.clone()
            },
            "takes the embedding as LM head",
        ),
        (
            BitNetConfig {
                activation: Activation::Relu2,
                ..base.clone()
            },
            "was trained with relu2",
        ),
        (
            BitNetConfig {
                hidden_size: 80,
                ..base.clone()
            },
            "the rows of self_attn.q_proj have 80 weights",
        ),
        (
            BitNetConfig {
                intermediate_size: 300,
                ..base
            },
            "the rows of mlp.down_proj have 300 weights",
        ),
    ] {
        let model = BitNetTransformer::new(&config, 1, &Device::Cpu).unwrap();
        let error = gguf::write(&path, &model, None, TernaryType::Tq2_0, "").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        assert!(
            error.starts_with("GGUF cannot hold this model: "),
            "{error}"
        );
        assert!(
            error.contains(says) && error.lines().count() == 1,
            "{error}"
        );
        assert!(!path.exists());
    }
}

#[test]
fn an_embedding_beyond_16_bits_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let model = random_model(&config());
    let table = &model.parameters().iter().next().unwrap().var;
    table.set(&(table.as_tensor() * 1e9).unwrap()).unwrap();
    let error = gguf::write(&path, &model, None, TernaryType::Tq2_0, "").unwrap_err();
    assert!(error.to_string().contains("beyond 65504"), "{error}");
    assert!(!path.exists());
}

#[test]
fn broken_and_foreign_files_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model(&BitNetConfig {
        layers: 1,
        ..config()
    });
    let path = written(dir.path(), &model, TernaryType::Tq2_0);
    let whole = fs::read(&path).unwrap();
    let error = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = gguf::read(&path).unwrap_err().to_string();
        assert!(error.contains("model.gguf: "), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        error
    };
    // Through the header byte by byte, then in larger steps.
    for len in (4..2000).chain((2000..whole.len()).step_by(1013)) {
        let error = error(&whole[..len]);
        assert!(error.contains("cut short"), "{len} bytes: {error}");
    }
    assert!(error(b"something else").contains("not a GGUF file"));
    assert!(!gguf::is_gguf(&path).unwrap());

    let replaced = |from: &[u8], to: &[u8]| {
        let at = whole.windows(from.len()).position(|w| w == from).unwrap();
        [&whole[..at], to, &whole[at + from.len()..]].concat()
    };
    for (from, to, says) in [
        (&b"GGUF\x03"[..], &b"GGUF\x02"[..], "version 2"),
        (b"\0bitnet", b"\0bitnot", "its architecture is not bitnet"),
        (
            b"bitnet.block_count",
            b"bitnet.block_cound",
            "bitnet.block_count",
        ),
        (
            b"bitnet.block_count\x04",
            b"bitnet.block_count\x0a",
            "key `bitnet.block_count` is of GGUF's type 10",
        ),
        (
            b"bitnet.attention.head_count\x04\0\0\0\x04",
            b"bitnet.attention.head_count\x04\0\0\0\x05",
            "model.hidden_size is 256: must be a multiple of model.heads (5)",
        ),
        (
            b"blk.0.attn_k.w",
            b"blk.0.attn_j.w",
            "tensor `blk.0.attn_k.weight` is missing",
        ),
        // The dimensions of a norm, and its type: Q8_0.
        (
            b"blk.0.attn_norm.weight\x01\0\0\0\x00\x01",
            b"blk.0.attn_norm.weight\x01\0\0\0\x01\x01",
            "dimensions [257]",
        ),
        (
            b"blk.0.attn_norm.weight\x01\0\0\0\x00\x01\0\0\0\0\0\0\0\0",
            b"blk.0.attn_norm.weight\x01\0\0\0\x00\x01\0\0\0\0\0\0\x08\0",
            "of ggml's type 8",
        ),
    ] {
        let error = error(&replaced(from, to));
        assert!(error.contains(says), "{error}");
    }
    // The end of the last projection's blocks: its scale, then a value of 2.
    let at = whole
        .windows(4)
        .rposition(|w| w == [0, 0x3c, 0, 0] || w[1..3] == [0, 0x3c]);
    let at = at.unwrap() + 1;
    let mut damaged = whole.clone();
    damaged[at] = 1;
    assert!(error(&damaged).contains("blocks with a scale other than 1"));
    damaged[at] = 0;
    damaged[at - 1] = 0xff;
    assert!(error(&damaged).contains("values other than -1, 0 and 1"));
}
