//! Cross-entropy and embedding.

use half::bf16;
use titanbit::cuda::kernels::cross_entropy::{CrossEntropy, Logits};
use titanbit::cuda::kernels::embedding::Embedding;
use titanbit::cuda::kernels::gemm::Float;
use titanbit::cuda::{Gradient, TokenGroups};

use crate::check::{BF16, close, exact, f64s, near, only_these_are_nan};
use crate::gpu::{Buffer, Gpu, Value, gpu};
use crate::random::Random;

/// Logits in rows of `stride`, poison behind the vocabulary.
struct Case {
    rows: usize,
    vocab: usize,
    stride: usize,
    logits: Vec<bf16>,
    labels: Vec<u32>,
}

impl Case {
    fn random(random: &mut Random, rows: usize, vocab: usize) -> Self {
        let stride = vocab.next_multiple_of(8);
        let row = |_| {
            // Flat and steep distributions, some far from zero.
            let (scale, shift) = (5.0 * random.uniform(), 50.0 * random.normal());
            let mut row: Vec<bf16> = (0..vocab)
                .map(|_| bf16::from_f64(shift + scale * random.normal()))
                .collect();
            row.resize(stride, bf16::POISON);
            row
        };
        let logits = (0..rows).flat_map(row).collect();
        Self {
            rows,
            vocab,
            stride,
            logits,
            labels: (0..rows).map(|_| random.below(vocab) as u32).collect(),
        }
    }

    /// Losses and logits after the forward pass, and after the backward pass.
    fn run(&self, gpu: &Gpu, scale: Option<f32>) -> (Vec<f32>, Vec<bf16>) {
        let kernel = CrossEntropy::load(&gpu.device).unwrap();
        let (values, labels) = (gpu.upload(&self.logits), gpu.upload(&self.labels));
        let losses = gpu.poisoned(self.rows);
        let logits = Logits {
            values: values.ptr(),
            rows: self.rows,
            vocab: self.vocab,
            stride: self.stride,
        };
        match scale {
            Some(scale) => unsafe { kernel.backward(logits, labels.ptr(), losses.ptr(), scale) },
            None => unsafe { kernel.forward(logits, labels.ptr(), losses.ptr()) },
        }
        .unwrap();
        (losses.read(), values.read())
    }

    fn label(&self, at: usize) -> usize {
        self.labels[at / self.stride] as usize
    }
}

/// Vocabularies for one warp up to 1024 threads, which keep logits in registers or read them again.
const VOCABULARIES: [(usize, usize); 9] = [
    (3, 1),
    (1, 7),
    (33, 8),
    (77, 301),
    (5, 2048),
    (300, 4099),
    (9, 32000),
    (7, 50257),
    (5, 100_003),
];

#[test]
fn cross_entropy() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, vocab) in VOCABULARIES {
        let case = Case::random(&mut random, rows, vocab);
        let scale = (-(random.below(12) as f64)).exp2();
        let (mut losses, mut gradient) = (Vec::new(), Vec::new());
        let mut at_labels = Vec::new();
        for (row, label) in case.logits.chunks(case.stride).zip(&case.labels) {
            let row = f64s(&row[..vocab]);
            let max = row.iter().fold(f64::MIN, |max, x| max.max(*x));
            let log_sum = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
            losses.push(log_sum - row[*label as usize]);
            let mut p: Vec<f64> = row.iter().map(|x| scale * (x - log_sum).exp()).collect();
            at_labels.push(p[*label as usize] - scale);
            p.resize(case.stride, 0.0);
            p[*label as usize] = 0.0;
            gradient.extend(p);
        }
        let what = format!("cross_entropy {rows} x {vocab}");
        let (got, logits) = case.run(&gpu, None);
        near(&format!("{what}, loss"), &got, &losses, 1e-6);
        exact(&format!("{what}, logits kept"), &logits, &case.logits);

        let (again, got_gradient) = case.run(&gpu, Some(scale as f32));
        exact(&format!("{what}, loss again"), &again, &got);
        // Apart, so that the label's large entry does not hide the others.
        let label = |at: usize| at % case.stride == case.label(at);
        let others: Vec<bf16> = (got_gradient.iter().enumerate())
            .map(|(at, x)| if label(at) { bf16::ZERO } else { *x })
            .collect();
        let all = got_gradient.iter().enumerate();
        let labels: Vec<bf16> = all.filter(|(at, _)| label(*at)).map(|(_, x)| *x).collect();
        close(
            &format!("{what}, gradient"),
            &others,
            &gradient,
            case.stride,
            BF16,
        );
        // softmax - 1 keeps an f32's absolute error.
        let at_labels = at_labels.iter().map(|x| x / scale).collect::<Vec<f64>>();
        let labels: Vec<f64> = labels.iter().map(|x| x.to_f64() / scale).collect();
        near(&format!("{what}, at the labels"), &labels, &at_labels, BF16);
        let behind = (others.iter().enumerate()).filter(|(at, _)| at % case.stride >= vocab);
        assert!(behind.into_iter().all(|(_, x)| *x == bf16::ZERO), "{what}");
    }
}

#[test]
fn losses_are_summed() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for rows in [1, 3, 1023, 4100, 65537] {
        let losses: Vec<f32> = (0..rows).map(|_| 12.0 * random.uniform() as f32).collect();
        let (before, scale) = (random.normal(), random.uniform());
        let kernel = CrossEntropy::load(&gpu.device).unwrap();
        let run = |losses: &[f32]| {
            let (losses, total) = (gpu.upload(losses), gpu.upload(&[before]));
            unsafe { kernel.sum(losses.ptr(), total.ptr(), rows, scale) }.unwrap();
            total.read()
        };
        let want = before + scale * f64s(&losses).iter().sum::<f64>();
        close(&format!("sum of {rows}"), &run(&losses), &[want], 1, 1e-7);
        let mut with_nan = losses.clone();
        with_nan[random.below(rows)] = f32::NAN;
        assert!(run(&with_nan)[0].is_nan());
    }
}

/// Whatever is not a finite number makes the row's loss and gradient NaN.
#[test]
fn cross_entropy_passes_nan_on() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (vocab, bad) in [
        (301, f32::NAN),
        (301, f32::INFINITY),
        (301, f32::NEG_INFINITY),
        (32000, f32::NAN),
        (100_003, f32::NAN),
        (100_003, f32::NEG_INFINITY),
    ] {
        let mut case = Case::random(&mut random, 7, vocab);
        let (losses, gradient) = case.run(&gpu, Some(1.0));
        let row = random.below(7);
        // The label's own logit, and others.
        for column in [case.labels[row] as usize, random.below(vocab), vocab - 1] {
            let place = row * case.stride + column;
            let kept = std::mem::replace(&mut case.logits[place], bf16::from_f32(bad));
            let what = format!("{bad} at {column} of {vocab}");
            let (nan, _) = case.run(&gpu, None);
            only_these_are_nan(&format!("{what}, forward"), &nan, &losses, |r| r == row);
            let (nan, dlogits) = case.run(&gpu, Some(1.0));
            only_these_are_nan(&format!("{what}, backward"), &nan, &losses, |r| r == row);
            let in_row = |at| at / case.stride == row;
            only_these_are_nan(&format!("{what}, gradient"), &dlogits, &gradient, in_row);
            case.logits[place] = kept;
        }
    }
}

#[test]
fn embedding_looks_up_rows() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (tokens, vocab, hidden) in [(1, 1, 16), (77, 301, 272), (1001, 50, 1040), (9, 7, 2048)] {
        let table = random.f32s(vocab * hidden, 1.0);
        let ids: Vec<u32> = (0..tokens).map(|_| random.below(vocab) as u32).collect();
        let embedding = Embedding::load(&gpu.device, hidden).unwrap();
        let (ids_gpu, table_gpu) = (gpu.upload(&ids), gpu.upload(&table));
        let x = gpu.poisoned(tokens * hidden);
        unsafe { embedding.forward(ids_gpu.ptr(), table_gpu.ptr(), x.ptr(), tokens) }.unwrap();
        let row = |id: &u32| &table[*id as usize * hidden..][..hidden];
        let rows = ids.iter().flat_map(row);
        let want: Vec<bf16> = rows.map(|x| bf16::from_f32(*x)).collect();
        exact(&format!("embed {tokens} x {hidden}"), &x.read(), &want);
    }
}

/// Ids of which some come once, some in a piece, and some in up to several hundred pieces.
fn repeated_ids(random: &mut Random, tokens: usize, vocab: usize) -> Vec<u32> {
    (0..tokens)
        .map(|_| match random.below(4) {
            0 => 0,
            1 => random.below(4) as u32 % vocab as u32,
            _ => random.below(vocab) as u32,
        })
        .collect()
}

/// dx added to the rows `ids` of `table`, on the GPU.
fn scatter<T: Value>(gpu: &Gpu, dtype: Float, table: &[T], ids: &[u32], dx: &[bf16]) -> Vec<T> {
    let hidden = dx.len() / ids.len();
    let embedding = Embedding::load(&gpu.device, hidden).unwrap();
    let groups = TokenGroups::of(ids, table.len() / hidden);
    let on_gpu: TokenGroups<Buffer<u32>> = TokenGroups {
        order: gpu.upload(&groups.order),
        pieces: gpu.upload(&groups.pieces),
        split: gpu.upload(&groups.split),
        counts: gpu.upload(&groups.counts),
    };
    let partials = gpu.poisoned(TokenGroups::partial_rows(ids.len()) * hidden);
    let (dx, table) = (gpu.upload(dx), gpu.upload(table));
    let gradient = Gradient {
        address: table.address(),
        dtype,
    };
    let groups = TokenGroups {
        order: on_gpu.order.ptr(),
        pieces: on_gpu.pieces.ptr(),
        split: on_gpu.split.ptr(),
        counts: on_gpu.counts.ptr(),
    };
    unsafe { embedding.backward(dx.ptr(), &groups, gradient, partials.ptr()) }.unwrap();
    partials.read();
    table.read()
}

#[test]
fn embedding_gradients() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (tokens, vocab, hidden) in [
        (1, 5, 16),
        (33, 1, 48),
        (77, 301, 272),
        (1001, 50, 1040),
        // More pieces, and more ids in several of them, than go through the GPU at a time.
        (40_011, 30_000, 272),
        (20_011, 300, 272),
    ] {
        let ids = repeated_ids(&mut random, tokens, vocab);
        let dx = random.bf16s(tokens * hidden, 1.0);
        let table = random.f32s(vocab * hidden, 1.0);
        let rounded: Vec<bf16> = table.iter().map(|x| bf16::from_f32(*x)).collect();
        let add = |mut sums: Vec<f64>| {
            for (id, dx) in ids.iter().zip(dx.chunks(hidden)) {
                let row = &mut sums[*id as usize * hidden..][..hidden];
                row.iter_mut()
                    .zip(dx)
                    .for_each(|(sum, x)| *sum += x.to_f64());
            }
            sums
        };
        let what = format!("embedding {tokens} x {hidden}, vocab {vocab}");
        let got = scatter(&gpu, Float::F32, &table, &ids, &dx);
        close(
            &format!("{what}, f32"),
            &got,
            &add(f64s(&table)),
            hidden,
            1e-6,
        );
        let other = |id: &usize| !ids.contains(&(*id as u32));
        for id in (0..vocab).filter(other).take(100) {
            let row = id * hidden..(id + 1) * hidden;
            assert_eq!(
                got[row.clone()],
                table[row],
                "{what}: row {id} is no token's"
            );
        }
        let got = scatter(&gpu, Float::Bf16, &rounded, &ids, &dx);
        close(
            &format!("{what}, bf16"),
            &got,
            &add(f64s(&rounded)),
            hidden,
            BF16,
        );
    }
}

#[test]
fn embedding_gradients_pass_nan_on() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let (tokens, vocab, hidden) = (501, 40, 144);
    let ids = repeated_ids(&mut random, tokens, vocab);
    let mut dx = random.bf16s(tokens * hidden, 1.0);
    let table = vec![0f32; vocab * hidden];
    let before = scatter(&gpu, Float::F32, &table, &ids, &dx);
    // Of a frequent id, which is summed in pieces, and of any.
    let frequent = ids.iter().position(|id| *id == 0).unwrap();
    for token in [frequent, random.below(tokens)] {
        let column = random.below(hidden);
        let place = token * hidden + column;
        let kept = std::mem::replace(&mut dx[place], bf16::NAN);
        let nan = scatter(&gpu, Float::F32, &table, &ids, &dx);
        let bad = ids[token] as usize * hidden + column;
        only_these_are_nan("embedding", &nan, &before, |at| at == bad);
        dx[place] = kept;
    }
}
