//! The check that every export goes through notices whatever is not the same.

use std::path::Path;

use candle_core::Device;
use titanbit::export::{LOGITS_TOLERANCE, Tolerance, Verified, verify};
use titanbit::inference::weights::TableValues;
use titanbit::inference::{PackedWeights, Table};
use titanbit::model::{BitNetConfig, BitNetTransformer};
use titanbit::quant::PackedTernary;

const TOLERANCE: Tolerance = Tolerance {
    tables: 1.0 / 256.0,
    logits: LOGITS_TOLERANCE,
};

fn config() -> BitNetConfig {
    BitNetConfig {
        vocab_size: 50,
        hidden_size: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        intermediate_size: 48,
        max_seq_len: 24,
        ..BitNetConfig::default()
    }
}

fn weights() -> PackedWeights {
    let model = BitNetTransformer::new(&config(), 5, &Device::Cpu).unwrap();
    PackedWeights::read(&config(), &model).unwrap()
}

fn check(change: impl Fn(&mut BitNetConfig, &mut PackedWeights)) -> titanbit::Result<Verified> {
    let (mut read_config, mut read) = (config(), weights());
    change(&mut read_config, &mut read);
    let original = (&config(), weights());
    verify(
        Path::new("export"),
        original,
        (read_config, read),
        TOLERANCE,
    )
}

#[track_caller]
fn refused(says: &str, change: impl Fn(&mut BitNetConfig, &mut PackedWeights)) {
    let message = check(change).unwrap_err().to_string();
    assert!(message.starts_with("export: the check failed"), "{message}");
    assert!(message.contains(says), "`{says}` in: {message}");
}

/// A table with one value replaced by what `change` makes of it.
fn changed(table: &Table, at: usize, change: impl Fn(f32) -> f32) -> Table {
    let mut values = vec![0f32; table.rows() * table.cols()];
    table.read_rows(0, &mut values);
    values[at] = change(values[at]);
    Table::new(table.rows(), table.cols(), TableValues::F32(values.into()))
}

#[test]
fn the_same_model_is_the_same() {
    let verified = check(|_, _| ()).unwrap();
    let config = config();
    assert_eq!(verified.codes, config.parameter_count().ternary);
    assert_eq!((verified.scales, verified.tokens), (14, 24));
    assert_eq!(
        (verified.logits_error, verified.largest_difference),
        (0.0, 0.0)
    );
}

/// Rounding as formats do it passes, and shows in the logits.
#[test]
fn rounded_embeddings_and_scales_pass() {
    let verified = check(|config, read| {
        config.rms_norm_eps = f64::from(config.rms_norm_eps as f32);
        config.init_std = 0.5;
        read.embed_tokens = read.embed_tokens.to_f16();
        read.lm_head = read.lm_head.as_ref().map(Table::to_f16);
        for b in &mut read.layers[1].o.scales {
            *b = b.next_up();
        }
    });
    let verified = verified.unwrap();
    assert!(verified.logits_error > 0.0 && verified.largest_difference > 0.0);
}

#[test]
fn one_weight_that_differs_is_named() {
    refused("1 codes of model.layers.1.mlp.gate_up_proj", |_, read| {
        let packed = &mut read.layers[1].gate_up.packed;
        let mut codes = packed.unpack();
        codes[700] = if codes[700] == 1 { 0 } else { 1 };
        *packed = PackedTernary::pack(&codes, packed.rows(), packed.cols()).unwrap();
    });
    refused("of model.layers.0.self_attn.qkv_proj", |_, read| {
        let scales = &mut read.layers[0].qkv.scales;
        scales[33] *= 1.0 + 1e-6;
    });
    refused("model.layers.1.mlp.ffn_sub_norm.weight", |_, read| {
        read.layers[1].ffn_sub_norm[47] = 1.0f32.next_up();
    });
    refused("model.norm.weight", |_, read| read.norm[0] = 0.5);
    refused("the embedding differs", |_, read| {
        read.embed_tokens = changed(&read.embed_tokens, 1599, |x| -x - 0.02);
    });
    refused("the LM head differs", |_, read| {
        let head = read.lm_head.as_ref().unwrap();
        read.lm_head = Some(changed(head, 3, |_| f32::NAN));
    });
    refused("one of the two", |_, read| read.lm_head = None);
}

#[test]
fn another_configuration_is_noticed() {
    for change in [
        |config: &mut BitNetConfig| config.rope_theta *= 1.00001,
        |config: &mut BitNetConfig| config.rms_norm_eps *= 2.0,
        |config: &mut BitNetConfig| config.max_seq_len = 25,
        |config: &mut BitNetConfig| config.heads = 2,
    ] {
        refused("another shape", |config, _| change(config));
    }
}

/// Logits that differ although every weight is near enough: here, because everything is near enough.
#[test]
fn logits_of_another_model_are_refused() {
    let other = BitNetTransformer::new(&config(), 6, &Device::Cpu).unwrap();
    let mut read = weights();
    let embedding = PackedWeights::read(&config(), &other).unwrap().embed_tokens;
    read.embed_tokens = embedding;
    let loose = Tolerance {
        tables: 10.0,
        logits: LOGITS_TOLERANCE,
    };
    let outcome = verify(
        Path::new("export"),
        (&config(), weights()),
        (config(), read),
        loose,
    );
    let message = outcome.unwrap_err().to_string();
    assert!(message.contains("logits differ by"), "{message}");
}
