//! The ternary product of each kernel that this machine can run, on all cores.
//!
//!     cargo bench --bench ternary_matmul
//!
//! With one token over several matrices in turn, more than a cache holds: bound by the memory.
//! With 128 tokens: bound by the arithmetic.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use titanbit::quant::PackedTernary;
use titanbit::quant::matmul::{Kernel, TernaryMatmul, Threads};

const BEYOND_CACHE: usize = 256 << 20;

fn packed(n: usize, k: usize) -> PackedTernary {
    let codes: Vec<i8> = (0..n * k).map(|i| (i % 3) as i8 - 1).collect();
    PackedTernary::pack(&codes, n, k).expect("ternary codes")
}

fn product(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ternary_matmul");
    group.sample_size(10);
    for (m, n, k) in [(1, 2560, 6912), (128, 2560, 6912), (128, 4096, 4096)] {
        let one = packed(n, k);
        let copies = if m == 1 {
            BEYOND_CACHE / one.bytes()
        } else {
            1
        };
        let weights = vec![one; copies];
        let x: Vec<i8> = (0..m * k).map(|i| i as i8).collect();
        let mut y = vec![0; m * n];
        group.throughput(if m == 1 {
            Throughput::BytesDecimal((copies * weights[0].bytes()) as u64)
        } else {
            Throughput::Elements((m * n * k) as u64)
        });
        for kernel in Kernel::available() {
            let matmul = TernaryMatmul {
                kernel,
                threads: Threads::All,
            };
            let id = BenchmarkId::new(kernel.name(), format!("{m} x {n} x {k}"));
            group.bench_function(id, |bencher| {
                bencher.iter(|| {
                    for w in &weights {
                        matmul.exact(&mut y, &x, w).expect("matching shapes");
                    }
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, product);
criterion_main!(benches);
