//! BitLinear layers over packed weights, on every device.

mod common;

use candle_core::{DType, Device, Tensor};
use common::devices;
use titanbit::model::ops::bit_linear;
use titanbit::quant::{Backend, PackedTernary};

/// ||a - b|| / ||b|| over all values.
fn error(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |x: &Tensor| {
        x.sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            .sqrt()
    };
    f64::from(norm(&(a - b).unwrap()) / norm(b))
}

/// Before a next layer rounds what comes out, nothing but the last bits may differ.
#[test]
fn a_packed_layer_is_the_layer_it_was_packed_from() {
    for device in devices() {
        let random = |shape: (usize, usize)| Tensor::randn(0f32, 1.0, shape, &device).unwrap();
        let (gate, up) = (random((48, 272)), random((80, 272)));
        let packed = Backend::new(&device).unwrap();
        let packed = packed.quantize(&[&gate, &up]).unwrap();
        for tokens in [1, 7, 40, 130] {
            let x = random((tokens, 272));
            let error = error(
                &packed.forward(&x).unwrap(),
                &bit_linear(&x, &[&gate, &up]).unwrap(),
            );
            println!("{device:?} {tokens} tokens: {error:.1e}");
            assert!(error < 1e-6, "{device:?} {tokens} tokens: {error:e}");
        }
        let error = packed.forward(&gate.narrow(1, 1, 3).unwrap()).unwrap_err();
        assert!(error.to_string().contains("do not end in 272 features"));
    }
}

#[test]
fn activations_with_gaps_are_refused_by_the_bare_operation() {
    for device in devices() {
        let packed = PackedTernary::pack(&[1; 6], 2, 3).unwrap();
        let linear = Backend::new(&device).unwrap();
        let linear = linear.load(packed, vec![1.0; 2]).unwrap();
        let x = Tensor::arange(0f32, 12.0, &device).unwrap();
        let x = x.reshape((3, 4)).unwrap().t().unwrap();
        linear.forward(&x).unwrap();
        let error = x.apply_op1_no_bwd(&linear).unwrap_err().to_string();
        assert!(error.contains("not contiguous"), "{error}");
    }
}

/// Weights of one row each, of which the codes and the result are plain to see.
#[test]
fn a_bit_linear_scales_each_row_and_each_token() {
    for device in devices() {
        let packed = PackedTernary::pack(&[1, 1, 0, -1, 0, 1], 2, 3).unwrap();
        let linear = Backend::new(&device)
            .unwrap()
            .load(packed, vec![0.5, 2.0])
            .unwrap();
        // Codes 127, -64 (-63.5 to even), 32 (31.75) and 127, 0, 127.
        let x = Tensor::new(&[[[2f32, -1.0, 0.5]], [[-8.0, 0.0, -8.0]]], &device).unwrap();
        let y = linear.forward(&x).unwrap();
        assert_eq!(y.dims(), [2, 1, 2]);
        let y: Vec<f32> = y.flatten_all().unwrap().to_vec1().unwrap();
        let s = 2.0 / 127.0;
        let expected = [63.0 * 0.5 * s, (32.0 - 127.0) * 2.0 * s, -4.0, 0.0];
        for (y, expected) in y.iter().zip(expected) {
            assert!((y - expected).abs() < 1e-5, "{y}, not {expected}");
        }
    }
}

#[test]
fn activations_that_do_not_fit_are_refused() {
    let linear = |device: &Device| {
        let packed = PackedTernary::pack(&[1; 6], 2, 3).unwrap();
        Backend::new(device)
            .unwrap()
            .load(packed, vec![1.0; 2])
            .unwrap()
    };
    for device in devices() {
        let narrow = Tensor::zeros((4, 2), DType::F32, &device).unwrap();
        let message = linear(&device).forward(&narrow).unwrap_err().to_string();
        assert!(message.contains("do not end in 3 features"), "{message}");
        let integers = Tensor::zeros((4, 3), DType::U32, &device).unwrap();
        linear(&device).forward(&integers).unwrap_err();
    }
    let packed = PackedTernary::pack(&[1; 6], 2, 3).unwrap();
    let error = Backend::Cpu.load(packed, vec![1.0]).err().unwrap();
    assert!(
        error
            .to_string()
            .contains("1 weight scales do not fit 2 weight rows")
    );
}
