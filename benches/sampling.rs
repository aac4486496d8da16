//! The choice of a token from its logits, as `titanbit generate` makes it after every pass.
//!
//!     cargo bench --bench sampling

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use titanbit::inference::{Sampler, Sampling};

/// Of a normal distribution with deviation 3, about what a trained model has: sums of twelve
/// uniform numbers.
fn logits(vocab: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut normal = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
    (0..vocab).map(|_| 3.0 * normal()).collect()
}

fn next(criterion: &mut Criterion) {
    let all = Sampling::default();
    let ways = [
        (
            "greedy",
            Sampling {
                temperature: 0.0,
                ..all.clone()
            },
        ),
        ("all", all.clone()),
        (
            "generate's",
            Sampling {
                temperature: 0.8,
                top_p: 0.95,
                ..all.clone()
            },
        ),
        (
            "top-k 40",
            Sampling {
                top_k: 40,
                ..all.clone()
            },
        ),
        ("min-p 0.05", Sampling { min_p: 0.05, ..all }),
    ];
    let mut group = criterion.benchmark_group("next token");
    for vocab in [32_000, 128_256] {
        let logits = logits(vocab);
        for (name, sampling) in &ways {
            let mut sampler = Sampler::new(sampling.clone(), 1);
            group.bench_function(BenchmarkId::new(*name, vocab), |bencher| {
                let next = |logits: &mut Vec<f32>| sampler.next(logits, &[]);
                bencher.iter_batched_ref(|| logits.clone(), next, BatchSize::SmallInput);
            });
        }
    }
}

criterion_group!(benches, next);
criterion_main!(benches);
