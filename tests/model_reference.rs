//! The whole model against stored outputs of `tests/reference/bitnet_reference.py`, a PyTorch
//! script that shares no code with it: logits, loss and the gradient of every weight, on the CPU and
//! on a GPU if this build and machine have one.

mod common;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{devices, reference_config};
use titanbit::model::{BitNetConfig, BitNetTransformer, Parameters};

struct Reference {
    config: BitNetConfig,
    tensors: HashMap<String, Tensor>,
    device: Device,
}

impl Reference {
    fn load(name: &str, device: &Device) -> Self {
        let path = Path::new("tests/reference").join(format!("{name}.safetensors"));
        Self {
            config: reference_config(&path),
            tensors: candle_core::safetensors::load(&path, device).unwrap(),
            device: device.clone(),
        }
    }

    fn ids(&self, name: &str) -> Tensor {
        self.tensors[name].to_dtype(DType::U32).unwrap()
    }

    fn model(&self) -> BitNetTransformer {
        let weights: HashMap<String, Tensor> = self
            .tensors
            .iter()
            .filter_map(|(name, t)| Some((name.strip_prefix("param.")?.to_string(), t.clone())))
            .collect();
        let parameters = Parameters::from_tensors(&self.config, &weights, &self.device).unwrap();
        assert_eq!(
            parameters.iter().len(),
            weights.len(),
            "a weight was left over"
        );
        BitNetTransformer::with_parameters(&self.config, parameters).unwrap()
    }
}

/// Largest difference, relative to the largest value of the reference.
fn error(got: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(got.dims(), want.dims());
    let largest = |t: &Tensor| {
        let max = t.abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        max.to_scalar::<f32>().unwrap()
    };
    largest(&(got - want).unwrap()) / largest(want)
}

fn check(name: &str) {
    for device in devices() {
        check_on(&device, name);
    }
}

fn check_on(device: &Device, name: &str) {
    let reference = Reference::load(name, device);
    let model = reference.model();
    let (ids, labels) = (reference.ids("ids"), reference.ids("labels"));
    let output = model.forward(&ids, Some(&labels)).unwrap();
    for logits in [&output.logits, &model.logits(&ids).unwrap()] {
        let difference = error(logits, &reference.tensors["logits"]);
        assert!(difference < 1e-5, "{name}: logits differ by {difference}");
    }

    let graph_loss = output.loss.unwrap();
    let store = graph_loss.backward().unwrap();
    let by_graph = model
        .parameters()
        .iter()
        .map(|p| store.get(&p.var).unwrap());
    let by_graph: Vec<Tensor> = by_graph.cloned().collect();
    let (loss, by_hand) = model.loss_and_gradients(&ids, &labels, 1.0).unwrap();

    let want = &reference.tensors["loss"];
    let loss_only = model.loss(&ids, &labels).unwrap();
    assert_eq!(loss, loss_only);
    for loss in [graph_loss, Tensor::new(loss as f32, device).unwrap()] {
        let difference = error(&loss, want);
        assert!(difference < 1e-6, "{name}: loss differs by {difference}");
    }
    for (what, gradients) in [("candle", by_graph), ("explicit", by_hand)] {
        assert_eq!(gradients.len(), model.parameters().iter().len());
        for (parameter, got) in model.parameters().iter().zip(&gradients) {
            let want = &reference.tensors[&format!("grad.{}", parameter.name)];
            let difference = error(got, want);
            assert!(
                difference < 2e-5,
                "{name}: {what} gradient of {} differs by {difference}",
                parameter.name
            );
        }
    }
}

#[test]
fn two_layers_with_grouped_queries() {
    check("bitnet_reference");
}

#[test]
fn relu2_activation() {
    check("bitnet_reference_relu2");
}

#[test]
fn tied_embeddings() {
    check("bitnet_reference_tied");
}

/// Gradients scale with the loss's factor; what is wrong is said before anything is computed.
#[test]
fn scaled_gradients_and_wrong_arguments() {
    let reference = Reference::load("bitnet_reference", &Device::Cpu);
    let model = reference.model();
    let (ids, labels) = (reference.ids("ids"), reference.ids("labels"));
    let (loss, full) = model.loss_and_gradients(&ids, &labels, 1.0).unwrap();
    let (same_loss, quarter) = model.loss_and_gradients(&ids, &labels, 0.25).unwrap();
    assert_eq!(loss, same_loss);
    for (full, quarter) in full.iter().zip(&quarter) {
        assert!(error(&(quarter * 4.0).unwrap(), full) < 1e-6);
    }
    let vocab = model.config().vocab_size;
    let outside = Tensor::full(vocab as u32, ids.shape(), &Device::Cpu).unwrap();
    for (ids, labels) in [(&ids, &outside), (&outside, &labels)] {
        let message = model.loss(ids, labels).unwrap_err().to_string();
        assert!(message.contains(&format!("id {vocab} is outside the vocabulary of {vocab}")));
    }
    assert!(!model.logits(&ids).unwrap().track_op());

    let (batch, seq) = ids.dims2().unwrap();
    let zeros = |shape| Tensor::zeros(shape, DType::U32, &Device::Cpu).unwrap();
    for (ids, labels, says) in [
        (ids.clone(), zeros((batch, seq - 1)), "do not match"),
        (zeros((batch, 0)), zeros((batch, 0)), "no tokens"),
        (
            zeros((1, seq + 1)),
            zeros((1, seq + 1)),
            "model.max_seq_len",
        ),
    ] {
        let messages = [
            model.forward(&ids, Some(&labels)).unwrap_err().to_string(),
            model.loss(&ids, &labels).unwrap_err().to_string(),
            model
                .loss_and_gradients(&ids, &labels, 1.0)
                .unwrap_err()
                .to_string(),
        ];
        assert!(messages.iter().all(|m| m.contains(says)), "{messages:?}");
    }
}
