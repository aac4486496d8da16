//! Every operation of a layer: by hand, by finite differences, and the fused form against the
//! composed formulas, at odd and even sizes.

use candle_core::{Device, Result, Tensor, Var};
use titanbit::model::Activation;
use titanbit::model::ops::{Heads, Rope, composed, fused};

type Op<'a> = &'a dyn Fn(&[&Tensor]) -> Result<Tensor>;

fn random(seed: u64, shape: &[usize]) -> Var {
    let count: usize = shape.iter().product();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let values: Vec<f32> = (0..count)
        .map(|_| {
            // Sum of four uniforms: bell-shaped, like activations and weights.
            let mut sum = 0.0;
            for _ in 0..4 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                sum += (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            }
            sum * 1.7
        })
        .collect();
    Var::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    flat.into_iter().map(f64::from).collect()
}

fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (values(got), values(want));
    let square = |x: f64| x * x;
    let difference: f64 = got.iter().zip(&want).map(|(g, w)| square(g - w)).sum();
    let norm: f64 = want.iter().map(|w| square(*w)).sum();
    assert!(norm > 0.0, "a reference of zeros proves nothing");
    (difference / norm).sqrt()
}

/// Output of `op` and the gradients of sum(output * weights) for random weights.
fn output_and_gradients(op: Op, inputs: &[Var]) -> (Tensor, Vec<Tensor>) {
    let tensors: Vec<&Tensor> = inputs.iter().map(|v| v.as_tensor()).collect();
    let output = op(&tensors).unwrap();
    let weights = random(99, output.dims());
    let loss = (&output * weights.as_tensor()).unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    let gradients = inputs
        .iter()
        .map(|v| gradients.get(v).expect("a gradient").clone())
        .collect();
    (output, gradients)
}

fn assert_same(what: &str, fused: Op, composed: Op, inputs: &[Var]) {
    let (got, got_gradients) = output_and_gradients(fused, inputs);
    let (want, want_gradients) = output_and_gradients(composed, inputs);
    let error = relative_error(&got, &want);
    assert!(error < 3e-6, "{what}: output differs by {error}");
    for (i, (got, want)) in got_gradients.iter().zip(&want_gradients).enumerate() {
        let error = relative_error(got, want);
        assert!(error < 1e-5, "{what}: gradient {i} differs by {error}");
    }
}

/// The derivative along a random direction against central differences.
fn assert_finite_differences(what: &str, op: Op, inputs: &[Var]) {
    let (output, gradients) = output_and_gradients(op, inputs);
    let weights = values(&random(99, output.dims()));
    let step = 2e-3;
    for (i, gradient) in gradients.iter().enumerate() {
        let direction = random(7 + i as u64, inputs[i].dims());
        let objective = |sign: f64| {
            let moved = (direction.as_tensor() * (sign * step)).unwrap();
            let mut tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_detached_tensor()).collect();
            tensors[i] = (&tensors[i] + moved).unwrap();
            let output = op(&tensors.iter().collect::<Vec<_>>()).unwrap();
            let products = values(&output).into_iter().zip(&weights);
            products.map(|(y, w)| y * w).sum::<f64>()
        };
        let difference = (objective(1.0) - objective(-1.0)) / (2.0 * step);
        let pairs = values(gradient).into_iter().zip(values(&direction));
        let (mut analytic, mut norm) = (0.0, 0.0);
        for (g, d) in pairs {
            analytic += g * d;
            norm += (g * d).powi(2);
        }
        // Relative to the size a sum of so many random terms has.
        let error = (difference - analytic).abs() / norm.sqrt();
        assert!(
            error < 5e-3,
            "{what}, input {i}: {difference} against {analytic}"
        );
    }
}

const EPS: f64 = 1e-5;

#[test]
fn rms_norm_by_hand() {
    // mean(x^2) = (9 + 16) / 2 = 12.5
    let x = Tensor::new(&[[3f32, 4.0]], &Device::Cpu).unwrap();
    let w = Tensor::new(&[2f32, 10.0], &Device::Cpu).unwrap();
    for norm in [fused::rms_norm, composed::rms_norm] {
        let y = values(&norm(&x, &w, 0.0).unwrap());
        assert!((y[0] - 6.0 / 12.5f64.sqrt()).abs() < 1e-6);
        assert!((y[1] - 40.0 / 12.5f64.sqrt()).abs() < 1e-5);
    }
}

#[test]
fn rms_norm_gradients() {
    for (rows, features) in [(1, 5), (3, 64), (131, 33), (300, 48)] {
        let inputs = [random(1, &[rows, features]), random(2, &[features])];
        let fused: Op = &|x| fused::rms_norm(x[0], x[1], EPS);
        let composed: Op = &|x| composed::rms_norm(x[0], x[1], EPS);
        assert_same(
            &format!("rms_norm {rows}x{features}"),
            fused,
            composed,
            &inputs,
        );
        assert_finite_differences("fused rms_norm", fused, &inputs);
        assert_finite_differences("composed rms_norm", composed, &inputs);
    }
}

/// Ties round to even in both kinds of code: -63.5 -> -64 and -0.5 -> 0.
#[test]
fn bit_linear_by_hand() {
    let device = &Device::Cpu;
    // s = 127: codes 127, -64, 32.
    let x = Var::new(&[[1f32, -0.5, 0.25]], device).unwrap();
    // b = mean|W| = 3 / 6: codes [1, 0, 0], [-1, 1, 1].
    let w = Var::new(&[[0.75f32, -0.25, 0.125], [-1.0, 0.375, 0.5]], device).unwrap();
    let dy = Tensor::new(&[[1f32, 2.0]], device).unwrap();
    for bit_linear in [fused::bit_linear, composed::bit_linear] {
        let y = bit_linear(&x, &[&w]).unwrap();
        let expected = [0.5, -159.0 * 0.5 / 127.0];
        for (got, want) in values(&y).into_iter().zip(expected) {
            assert!((got - want).abs() < 1e-7, "{got} against {want}");
        }
        let gradients = (y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
        // dX = dY . (wq b), dW = dY^T . (xq / s)
        let dx = values(gradients.get(&x).unwrap());
        assert_eq!(dx, [0.5 * (1.0 - 2.0), 0.5 * 2.0, 0.5 * 2.0]);
        let row = [1.0, -64.0 / 127.0, 32.0 / 127.0];
        let expected = row.into_iter().chain(row.map(|x| 2.0 * x));
        for (got, want) in values(gradients.get(&w).unwrap()).into_iter().zip(expected) {
            assert!((got - want).abs() < 1e-7, "{got} against {want}");
        }
    }
}

#[test]
fn bit_linear_survives_zeros_and_shows_nan() {
    let device = &Device::Cpu;
    let zeros = Tensor::zeros((2, 8), candle_core::DType::F32, device).unwrap();
    let w = random(3, &[4, 8]);
    for bit_linear in [fused::bit_linear, composed::bit_linear] {
        let y = bit_linear(&zeros, &[&w]).unwrap();
        assert_eq!(values(&y), [0.0; 8]);
        let zero_weight = zeros.narrow(0, 0, 2).unwrap();
        let y = bit_linear(random(4, &[1, 8]).as_tensor(), &[&zero_weight]).unwrap();
        assert_eq!(values(&y), [0.0; 2]);
        let poisoned = Tensor::new(&[[1f32, f32::NAN]], device).unwrap();
        let ones = Tensor::new(&[[1f32, 1.0]], device).unwrap();
        assert!(values(&bit_linear(&poisoned, &[&ones]).unwrap())[0].is_nan());
        assert!(values(&bit_linear(&ones, &[&poisoned]).unwrap())[0].is_nan());
    }
}

/// Sums of codes are exact integers in f32, also where they are largest.
#[test]
fn bit_linear_sums_are_exact() {
    let k = 8640;
    let x = Tensor::ones((1, k), candle_core::DType::F32, &Device::Cpu).unwrap();
    for bit_linear in [fused::bit_linear, composed::bit_linear] {
        let y = values(&bit_linear(&x, &[&x]).unwrap());
        assert_eq!(y, [k as f64]);
    }
}

#[test]
fn bit_linear_fused_equals_composed() {
    for (tokens, n, k) in [(1, 1, 1), (1, 7, 33), (130, 48, 64), (301, 65, 129)] {
        let inputs = [
            random(5, &[1, tokens, k]),
            random(6, &[n, k]),
            random(7, &[n + 3, k]),
        ];
        assert_same(
            &format!("bit_linear {tokens}x{n}x{k}"),
            &|x| fused::bit_linear(x[0], &x[1..]),
            &|x| composed::bit_linear(x[0], &x[1..]),
            &inputs,
        );
    }
}

#[test]
fn attention_gradients() {
    for (batch, seq, heads, kv_heads, head_dim) in [
        (1, 1, 1, 1, 2),
        (2, 9, 4, 2, 6),
        (1, 65, 3, 1, 16),
        (2, 130, 2, 2, 10),
    ] {
        let heads = Heads {
            heads,
            kv_heads,
            head_dim,
        };
        let rope = Rope::new(head_dim, seq + 3, 10_000.0, &Device::Cpu).unwrap();
        let inputs = [random(8, &[batch, seq, heads.qkv_features()])];
        let fused: Op = &|x| fused::attention(x[0], heads, &rope);
        let composed: Op = &|x| composed::attention(x[0], heads, &rope);
        assert_same(&format!("attention seq {seq}"), fused, composed, &inputs);
        assert_finite_differences("fused attention", fused, &inputs);
        assert_finite_differences("composed attention", composed, &inputs);
    }
}

/// One head of two features, two positions: the second query turns by one radian.
#[test]
fn attention_by_hand() {
    let heads = Heads {
        heads: 1,
        kv_heads: 1,
        head_dim: 2,
    };
    let rope = Rope::new(2, 2, 10_000.0, &Device::Cpu).unwrap();
    let qkv = [[
        [1f32, 0.0, 1.0, 0.0, 5.0, 7.0],
        [1.0, 0.0, 1.0, 0.0, 1.0, 3.0],
    ]];
    let qkv = Tensor::new(&qkv, &Device::Cpu).unwrap();
    // Query 1 meets key 0 at angle 1 and key 1 at angle 0.
    let scores = [1f64.cos(), 1.0].map(|s| (s / 2f64.sqrt()).exp());
    let share = scores[0] / (scores[0] + scores[1]);
    let expected = [5.0, 7.0, 1.0 + 4.0 * share, 3.0 + 4.0 * share];
    for attention in [fused::attention, composed::attention] {
        let out = values(&attention(&qkv, heads, &rope).unwrap());
        for (got, want) in out.into_iter().zip(expected) {
            assert!((got - want).abs() < 1e-5, "{got} against {want}");
        }
    }
}

#[test]
fn gated_activation_gradients() {
    for activation in [Activation::Silu, Activation::Relu2] {
        for (rows, features) in [(1, 1), (3, 37), (260, 24)] {
            let inputs = [random(9, &[rows, 2 * features])];
            let fused: Op = &|x| fused::gated_activation(x[0], activation);
            let composed: Op = &|x| composed::gated_activation(x[0], activation);
            assert_same(&format!("{activation:?}"), fused, composed, &inputs);
            assert_finite_differences("fused activation", fused, &inputs);
            assert_finite_differences("composed activation", composed, &inputs);
        }
    }
}

#[test]
fn lm_loss_gradients() {
    for (tokens, vocab, k) in [(1, 3, 4), (37, 131, 24), (90, 70_000, 6)] {
        let targets: Vec<u32> = (0..tokens as u32)
            .map(|i| i * 7919 % vocab as u32)
            .collect();
        let targets = Tensor::new(targets, &Device::Cpu).unwrap();
        let inputs = [random(10, &[tokens, k]), random(11, &[vocab, k])];
        let fused: Op = &|x| fused::lm_loss(x[0], x[1], &targets);
        let composed: Op = &|x| composed::lm_loss(x[0], x[1], &targets);
        assert_same(
            &format!("lm_loss {tokens}x{vocab}"),
            fused,
            composed,
            &inputs,
        );
    }
}

#[test]
fn lm_loss_by_hand_and_out_of_range() {
    let hidden = Var::new(&[[1f32, 0.0]], &Device::Cpu).unwrap();
    let weight = Var::new(&[[0f32, 0.0], [2.0, 1.0], [-1.0, 0.0]], &Device::Cpu).unwrap();
    let target = Tensor::new(&[1u32], &Device::Cpu).unwrap();
    let loss = fused::lm_loss(&hidden, &weight, &target).unwrap();
    let expected = (1.0 + 2f64.exp() + (-1f64).exp()).ln() - 2.0;
    assert!((values(&loss)[0] - expected).abs() < 1e-6);
    let outside = Tensor::new(&[3u32], &Device::Cpu).unwrap();
    let error = fused::lm_loss(&hidden, &weight, &outside).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("id 3 is outside the vocabulary of 3")
    );
}
