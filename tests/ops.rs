//! Every operation of a layer in candle primitives: by hand and by finite differences; and the
//! explicit passes of the CPU against them, at odd and even sizes.

use candle_core::{Device, Result, Tensor, Var};
use titanbit::model::Activation;
use titanbit::model::cpu::attention::Attention;
use titanbit::model::cpu::normed_bit_linear::NormedBitLinear;
use titanbit::model::cpu::{Write, gated_activation, lm_loss, rms_norm};
use titanbit::model::ops::{self, Heads, Rope};

type Op<'a> = &'a dyn Fn(&[&Tensor]) -> Result<Tensor>;

/// Inputs and the gradient of the output to the output and the gradients of the inputs.
type Explicit<'a> = &'a dyn Fn(&[&[f32]], &[f32]) -> (Vec<f32>, Vec<Vec<f32>>);

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

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    floats(tensor).into_iter().map(f64::from).collect()
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let pairs = got.iter().zip(want).map(|(g, w)| (*g as f64, *w as f64));
    let difference: f64 = pairs.map(|(g, w)| square(g - w)).sum();
    let norm: f64 = want.iter().map(|w| square(*w as f64)).sum();
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

fn assert_same(what: &str, explicit: Explicit, op: Op, inputs: &[Var]) {
    let (want, want_gradients) = output_and_gradients(op, inputs);
    let slices: Vec<Vec<f32>> = inputs.iter().map(|v| floats(v)).collect();
    let slices: Vec<&[f32]> = slices.iter().map(Vec::as_slice).collect();
    let (got, got_gradients) = explicit(&slices, &floats(&random(99, want.dims())));
    let error = relative_error(&got, &floats(&want));
    assert!(error < 3e-6, "{what}: output differs by {error}");
    assert_eq!(got_gradients.len(), inputs.len());
    for (i, (got, want)) in got_gradients.iter().zip(&want_gradients).enumerate() {
        let error = relative_error(got, &floats(want));
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
    let y = floats(&ops::rms_norm(&x, &w, 0.0).unwrap());
    for y in [y, rms_norm::forward(&[3.0, 4.0], &[2.0, 10.0], 0.0)] {
        assert!((y[0] as f64 - 6.0 / 12.5f64.sqrt()).abs() < 1e-6);
        assert!((y[1] as f64 - 40.0 / 12.5f64.sqrt()).abs() < 1e-5);
    }
}

#[test]
fn rms_norm_gradients() {
    for (rows, features) in [(1, 5), (3, 64), (131, 33), (300, 48)] {
        let inputs = [random(1, &[rows, features]), random(2, &[features])];
        let explicit: Explicit = &|x, dy| {
            let y = rms_norm::forward(x[0], x[1], EPS as f32);
            let (dx, dw) = rms_norm::backward(&mut dy.to_vec(), x[0], x[1], EPS as f32);
            (y, vec![dx, dw])
        };
        let op: Op = &|x| ops::rms_norm(x[0], x[1], EPS);
        assert_same(&format!("{rows}x{features}"), explicit, op, &inputs);
        assert_finite_differences("rms_norm", op, &inputs);
    }
}

/// Ties round to even in both kinds of code: -63.5 -> -64 and -0.5 -> 0.
#[test]
fn bit_linear_by_hand() {
    let device = &Device::Cpu;
    // s = 127: codes 127, -64, 32, 0.
    let x = [1f32, -0.5, 0.25, 0.0];
    // b = mean|W| = 4 / 8: codes [1, 0, 0, 1], [-1, 1, 1, 0].
    let w = [0.75f32, -0.25, 0.125, 0.875, -1.0, 0.375, 0.5, 0.125];
    let dy = [1f32, 2.0];
    let y = [0.5, -159.0 * 0.5 / 127.0];
    // dX = dY . (wq b), dW = dY^T . (xq / s)
    let dx = [0.5 * (1.0 - 2.0), 0.5 * 2.0, 0.5 * 2.0, 0.5];
    let row = [1.0, -64.0 / 127.0, 32.0 / 127.0, 0.0];
    let dw: Vec<f32> = row.into_iter().chain(row.map(|x| 2.0 * x)).collect();
    let close = |got: &[f32], want: &[f32]| {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-7, "{got} against {want}");
        }
    };

    let x_var = Var::new(&[x], device).unwrap();
    let w_var = Var::from_slice(&w, (2, 4), device).unwrap();
    let output = ops::bit_linear(&x_var, &[&w_var]).unwrap();
    close(&floats(&output), &y);
    let loss = (output * Tensor::new(&[dy], device).unwrap()).unwrap();
    let store = loss.sum_all().unwrap().backward().unwrap();
    close(&floats(store.get(&x_var).unwrap()), &dx);
    close(&floats(store.get(&w_var).unwrap()), &dw);

    // Ones are their own norm: the weight of the norm is what is quantised.
    let linear = NormedBitLinear {
        norm: &x,
        weights: [&w],
        eps: 0.0,
    };
    let ones = [1f32; 4];
    let (output, saved) = linear.forward(&ones, Some(&[10.0, 20.0]));
    assert!((output[0] - 10.5).abs() < 1e-6 && (output[1] - 20.0 - y[1]).abs() < 2e-6);
    let gradients = linear.backward(saved, &ones, &dy, &mut [0.0; 4], Write::Replace);
    close(&gradients.norm, &dx);
    close(&gradients.weights[0], &dw);
}

#[test]
fn bit_linear_survives_zeros_and_shows_nan() {
    let device = &Device::Cpu;
    let zeros = Tensor::zeros((2, 8), candle_core::DType::F32, device).unwrap();
    let w = random(3, &[4, 8]);
    let y = ops::bit_linear(&zeros, &[&w]).unwrap();
    assert_eq!(values(&y), [0.0; 8]);
    let y = ops::bit_linear(random(4, &[1, 8]).as_tensor(), &[&zeros]).unwrap();
    assert_eq!(values(&y), [0.0; 2]);
    let poisoned = Tensor::new(&[[1f32, f32::NAN]], device).unwrap();
    let ones = Tensor::new(&[[1f32, 1.0]], device).unwrap();
    assert!(values(&ops::bit_linear(&poisoned, &[&ones]).unwrap())[0].is_nan());
    assert!(values(&ops::bit_linear(&ones, &[&poisoned]).unwrap())[0].is_nan());

    let forward = |x: &[f32], w: &[f32]| {
        let linear = NormedBitLinear {
            norm: &[1.0, 1.0],
            weights: [w],
            eps: EPS as f32,
        };
        linear.forward(x, None).0[0]
    };
    assert_eq!(forward(&[0.0, 0.0], &[1.0, -1.0]), 0.0);
    assert_eq!(forward(&[1.0, 2.0], &[0.0, 0.0]), 0.0);
    assert!(forward(&[1.0, f32::NAN], &[1.0, 1.0]).is_nan());
    assert!(forward(&[1.0, 1.0], &[1.0, f32::NAN]).is_nan());
}

/// Sums of codes are exact integers in f32, also where they are largest.
#[test]
fn bit_linear_sums_are_exact() {
    let k = 8640;
    let x = Tensor::ones((1, k), candle_core::DType::F32, &Device::Cpu).unwrap();
    let y = values(&ops::bit_linear(&x, &[&x]).unwrap());
    assert_eq!(y, [k as f64]);
    let ones = vec![1f32; k];
    let linear = NormedBitLinear {
        norm: &ones,
        weights: [&ones],
        eps: 0.0,
    };
    assert_eq!(linear.forward(&ones, None).0, [k as f32]);
}

#[test]
fn normed_bit_linear_equals_its_formula() {
    for (tokens, n, k) in [(1, 1, 1), (1, 7, 33), (130, 48, 64), (301, 65, 129)] {
        let inputs = [
            random(5, &[1, tokens, k]),
            random(6, &[k]),
            random(7, &[n, k]),
            random(8, &[n + 3, k]),
            random(9, &[1, tokens, 2 * n + 3]),
        ];
        let explicit: Explicit = &|x, dy| {
            let linear = NormedBitLinear {
                norm: x[1],
                weights: [x[2], x[3]],
                eps: EPS as f32,
            };
            let (y, saved) = linear.forward(x[0], Some(x[4]));
            // What is there already is added to: here 1 everywhere.
            let mut dx = vec![1f32; x[0].len()];
            let gradients = linear.backward(saved, x[0], dy, &mut dx, Write::Add);
            dx.iter_mut().for_each(|x| *x -= 1.0);
            let [first, second] = gradients.weights;
            (y, vec![dx, gradients.norm, first, second, dy.to_vec()])
        };
        let op: Op = &|x| ops::bit_linear(&ops::rms_norm(x[0], x[1], EPS)?, &x[2..4])? + x[4];
        assert_same(&format!("{tokens}x{n}x{k}"), explicit, op, &inputs);
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
        let (cos, sin) = rotary_tables(head_dim, seq + 3);
        let rope = Rope::new(head_dim, seq + 3, 10_000.0, &Device::Cpu).unwrap();
        let inputs = [random(8, &[batch, seq, heads.qkv_features()])];
        let explicit: Explicit = &|x, dy| {
            let attention = Attention {
                heads,
                seq,
                cos: &cos,
                sin: &sin,
            };
            let (out, log_sum_exp) = attention.forward(x[0]);
            let gradient = attention.backward(x[0], &out, dy, &log_sum_exp);
            (out, vec![gradient])
        };
        let op: Op = &|x| ops::attention(x[0], heads, &rope, None);
        assert_same(&format!("attention seq {seq}"), explicit, op, &inputs);
        assert_finite_differences("attention", op, &inputs);
    }
}

/// cos and sin of position * 10000^(-2i / head_dim).
fn rotary_tables(head_dim: usize, positions: usize) -> (Vec<f32>, Vec<f32>) {
    let half = head_dim / 2;
    (0..positions * half)
        .map(|index| {
            let (position, i) = (index / half, index % half);
            let angle = position as f64 * 1e4f64.powf(-2.0 * i as f64 / head_dim as f64);
            (angle.cos() as f32, angle.sin() as f32)
        })
        .unzip()
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
    let out = values(&ops::attention(&qkv, heads, &rope, None).unwrap());
    for (got, want) in out.into_iter().zip(expected) {
        assert!((got - want).abs() < 1e-5, "{got} against {want}");
    }
}

#[test]
fn gated_activation_gradients() {
    for activation in [Activation::Silu, Activation::Relu2] {
        for (rows, features) in [(1, 1), (3, 37), (260, 24)] {
            let inputs = [random(9, &[rows, 2 * features])];
            let explicit: Explicit = &|x, dy| {
                let y = gated_activation::forward(x[0], features, activation);
                let gradient = gated_activation::backward(x[0], dy, features, activation);
                (y, vec![gradient])
            };
            let op: Op = &|x| ops::gated_activation(x[0], activation);
            assert_same(&format!("{activation:?}"), explicit, op, &inputs);
            assert_finite_differences("activation", op, &inputs);
        }
    }
}

#[test]
fn lm_loss_gradients() {
    for (tokens, vocab, k) in [(1, 3, 4), (37, 131, 24), (90, 70_000, 6)] {
        let targets: Vec<u32> = (0..tokens as u32)
            .map(|i| i * 7919 % vocab as u32)
            .collect();
        let inputs = [random(10, &[tokens, k]), random(11, &[vocab, k])];
        let explicit: Explicit = &|x, dy| {
            let (loss, gradients) = lm_loss::loss_and_gradients(x[0], x[1], &targets, dy[0]);
            assert_eq!(loss, lm_loss::loss(x[0], x[1], &targets));
            (vec![loss as f32], vec![gradients.hidden, gradients.weight])
        };
        let op: Op = &|x| {
            let targets = Tensor::new(targets.as_slice(), &Device::Cpu)?;
            candle_nn::loss::cross_entropy(&x[0].matmul(&x[1].t()?)?, &targets)
        };
        assert_same(&format!("{tokens}x{vocab}"), explicit, op, &inputs);
    }
}

#[test]
fn lm_loss_by_hand() {
    let weight = [0f32, 0.0, 2.0, 1.0, -1.0, 0.0];
    let loss = lm_loss::loss(&[1.0, 0.0], &weight, &[1]);
    let expected = (1.0 + 2f64.exp() + (-1f64).exp()).ln() - 2.0;
    assert!((loss - expected).abs() < 1e-6);
}
