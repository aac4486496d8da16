//! Sessions over packed weights against the model that they were packed from.

mod common;

use candle_core::{Device, Tensor};
use common::devices;
use titanbit::inference::{Model, PackedWeights};
use titanbit::model::{Activation, BitNetConfig, BitNetTransformer};

fn config() -> BitNetConfig {
    BitNetConfig {
        vocab_size: 300,
        layers: 3,
        hidden_size: 96,
        heads: 6,
        kv_heads: 2,
        // No multiple of the 32 features that the GPU's kernels take at a time.
        intermediate_size: 272,
        max_seq_len: 160,
        init_std: 0.1,
        ..BitNetConfig::preset("125M").unwrap()
    }
}

/// Every way to run the model: passes over slices, candle operations on each device, and kernels of
/// our own on a GPU.
fn models(model: &BitNetTransformer) -> Vec<(String, Model)> {
    let config = model.config();
    let weights = PackedWeights::read(config, model).unwrap();
    let mut models = Vec::new();
    for device in devices() {
        let kind = if device.is_cpu() { "slices" } else { "kernels" };
        models.push((
            format!("{kind} on {device:?}"),
            Model::new(config, weights.clone(), &device).unwrap(),
        ));
        models.push((
            format!("candle on {device:?}"),
            Model::as_graph(config, &weights, &device).unwrap(),
        ));
    }
    models
}

fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i * i * 31 % 300).collect()
}

/// (ids.len(), vocab) by the training model.
fn expected_logits(model: &BitNetTransformer, ids: &[u32]) -> Vec<f32> {
    let ids = Tensor::new(ids, &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap();
    let logits = model.forward(&ids, None).unwrap().logits;
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// ||a - b|| / ||b||
fn error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    (difference / norm(&mut b.iter().copied())).sqrt()
}

/// A GPU's kernels multiply by the reciprocal of a scale: an activation near a tie may get the other
/// code, which moves everything behind it.
fn bound(name: &str) -> f64 {
    if name.contains("Cuda") {
        BY_A_CODE
    } else {
        2e-6
    }
}

/// Where one int8 code differs.
const BY_A_CODE: f64 = 2e-2;

/// Models for which a GPU has kernels of their own, and one for which it has none.
fn shapes() -> Vec<BitNetConfig> {
    let shape = |hidden_size, heads, kv_heads| BitNetConfig {
        hidden_size,
        heads,
        kv_heads,
        layers: 2,
        intermediate_size: 320,
        ..config()
    };
    vec![
        shape(256, 4, 1),
        BitNetConfig {
            activation: Activation::Relu2,
            ..shape(400, 4, 2)
        },
        BitNetConfig {
            tie_embeddings: true,
            ..shape(256, 2, 2)
        },
        // A gate of no whole tiles.
        BitNetConfig {
            intermediate_size: 136,
            ..shape(64, 2, 1)
        },
    ]
}

#[test]
fn logits_are_those_of_the_training_model_however_the_tokens_are_fed() {
    for (tie_embeddings, activation) in [(false, Activation::Silu), (true, Activation::Relu2)] {
        let config = BitNetConfig {
            tie_embeddings,
            activation,
            ..config()
        };
        check_logits(&config, bound);
    }
}

#[test]
fn logits_are_those_of_the_training_model_for_every_shape() {
    for config in shapes() {
        check_logits(&config, |_| BY_A_CODE);
    }
}

/// Feeds tokens all at once, one by one, and in pieces of all sizes.
fn check_logits(config: &BitNetConfig, bound: fn(&str) -> f64) {
    let model = BitNetTransformer::new(config, 7, &Device::Cpu).unwrap();
    let ids = ids(150);
    let expected = expected_logits(&model, &ids);
    let (heads, head_dim) = (config.heads, config.head_dim());
    for (name, packed) in models(&model) {
        for pieces in [vec![150], vec![1; 150], vec![7, 1, 1, 64, 70, 1, 2, 4]] {
            let mut session = packed.session();
            let mut logits = Vec::new();
            for piece in &pieces {
                let ids = &ids[session.len()..session.len() + piece];
                logits.extend(session.logits(ids).unwrap());
            }
            let error = error(&logits, &expected);
            let what = format!(
                "{name}, {heads} heads of {head_dim}, {} pieces",
                pieces.len()
            );
            println!("{what}: {error:.1e}");
            assert!(error < bound(&name), "{what}: {error:e}");
        }
    }
}

#[test]
fn log_likelihoods_are_those_of_the_logits() {
    for config in [config()].into_iter().chain(shapes()) {
        let model = BitNetTransformer::new(&config, 11, &Device::Cpu).unwrap();
        for (name, packed) in models(&model) {
            // Kernels of our own multiply 16 bits of a value.
            let by_kernels = name.contains("kernels");
            let bound = if by_kernels { 1e-4 } else { 2e-5 };
            for pieces in [vec![150], vec![1; 150], vec![7, 1, 1, 64, 70, 1, 2, 4]] {
                let error = log_likelihood_error(&packed, &pieces);
                let what = format!("{name}, {} pieces", pieces.len());
                println!("{what}: log-likelihoods off by {error:.1e}");
                assert!(error < bound, "{what}: {error:e}");
            }
        }
    }
}

/// The largest difference to f64 on the logits of a session fed alike, over all tokens.
fn log_likelihood_error(model: &Model, pieces: &[usize]) -> f64 {
    let ids = ids(pieces.iter().sum::<usize>() + 1);
    let (mut by_logits, mut by_targets) = (model.session(), model.session());
    let mut largest = 0f64;
    for piece in pieces {
        let (from, to) = (by_logits.len(), by_logits.len() + piece);
        let (ids, targets) = (&ids[from..to], &ids[from + 1..=to]);
        let logits = by_logits.logits(ids).unwrap();
        let got = by_targets.log_likelihoods(ids, targets).unwrap();
        assert_eq!(got.len(), *piece);
        let rows = logits.chunks(model.config().vocab_size).zip(targets);
        for ((row, target), got) in rows.zip(got) {
            let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
            let want = f64::from(row[*target as usize]) - sum.ln();
            let error = (f64::from(got) - want).abs();
            largest = if error > largest || error.is_nan() {
                error
            } else {
                largest
            };
        }
    }
    largest
}

#[test]
fn a_session_goes_back_and_on_as_if_nothing_had_been() {
    let model = BitNetTransformer::new(&config(), 9, &Device::Cpu).unwrap();
    let ids = ids(120);
    let expected = expected_logits(&model, &ids);
    let vocab = config().vocab_size;
    for (name, packed) in models(&model) {
        let check = |what: &str, logits: &[f32], first: usize| {
            let expected = &expected[first * vocab..][..logits.len()];
            let error = error(logits, expected);
            println!("{name}, {what}: {error:.1e}");
            assert!(error < bound(&name), "{name}, {what}: {error:e}");
        };
        let mut session = packed.session();
        session.next_logits(&ids[..100]).unwrap();
        for id in [5, 6, 7] {
            session.next_logits(&[id]).unwrap();
        }
        session.truncate(60);
        check("several", &session.logits(&ids[60..90]).unwrap(), 60);
        session.truncate(40);
        for at in 40..50 {
            check("one by one", &session.logits(&ids[at..at + 1]).unwrap(), at);
        }
        session.truncate(0);
        check("anew", &session.next_logits(&ids).unwrap(), ids.len() - 1);
    }
}
