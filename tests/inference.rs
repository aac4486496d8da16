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

/// Every way to run the model: passes over slices, and candle operations on each device.
fn models(model: &BitNetTransformer) -> Vec<(String, Model)> {
    let config = model.config();
    let weights = PackedWeights::read(config, model).unwrap();
    let mut models = vec![(
        "slices".to_string(),
        Model::new(config, weights.clone(), &Device::Cpu).unwrap(),
    )];
    for device in devices() {
        let name = format!("candle on {device:?}");
        let model = Model::as_graph(config, &weights, &device).unwrap();
        models.push((name, model));
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
    if name.contains("Cuda") { 2e-2 } else { 2e-6 }
}

#[test]
fn logits_are_those_of_the_training_model_however_the_tokens_are_fed() {
    for (tie_embeddings, activation) in [(false, Activation::Silu), (true, Activation::Relu2)] {
        let config = BitNetConfig {
            tie_embeddings,
            activation,
            ..config()
        };
        let model = BitNetTransformer::new(&config, 7, &Device::Cpu).unwrap();
        let ids = ids(150);
        let expected = expected_logits(&model, &ids);
        for (name, packed) in models(&model) {
            // All at once, one by one, and in pieces of all sizes.
            for pieces in [vec![150], vec![1; 150], vec![7, 1, 1, 64, 70, 1, 2, 4]] {
                let mut session = packed.session();
                let mut logits = Vec::new();
                for piece in &pieces {
                    let ids = &ids[session.len()..session.len() + piece];
                    logits.extend(session.logits(ids).unwrap());
                }
                let error = error(&logits, &expected);
                println!("{name}, {} pieces: {error:.1e}", pieces.len());
                assert!(error < bound(&name), "{name}, {pieces:?}: {error:e}");
            }
        }
    }
}
