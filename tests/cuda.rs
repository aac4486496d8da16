//! The CUDA kernels against references on the CPU. Without a GPU each test prints that it is skipped.
#![cfg(feature = "cuda")]

mod common;

use candle_core::{CudaDevice, Device};
use common::exact_product;
use titanbit::cuda::kernels::{CudaPackedTernary, TernaryMatmul};
use titanbit::quant::PackedTernary;

fn gpu() -> Option<CudaDevice> {
    match titanbit::device::select("cuda") {
        Ok(Device::Cuda(device)) => Some(device),
        Ok(_) => unreachable!("`cuda` selects a GPU or fails"),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Marsaglia's xorshift64, seeded from the clock: inputs differ from run to run, and the seed is
/// printed so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let clock = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
        println!("seed {}", clock | 1);
        Self(clock | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }

    fn int8(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| self.next() as i8).collect()
    }

    fn ternary(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| (self.next() % 3) as i8 - 1).collect()
    }
}

/// Runs the kernel with `x` starting `offset` values into its buffer, and checks every value of the
/// output and that nothing around it was touched.
fn check(device: &CudaDevice, x: &[i8], offset: usize, (w, n, k): (&[i8], usize, usize)) {
    // No product of int8 codes with K < 2^24 comes near this value.
    const POISON: i32 = i32::MIN;
    const GUARD: usize = 1024;
    let m = x.len() / k;
    let kernel = TernaryMatmul::load(device).unwrap();
    let x_buffer = device.clone_htod(&[&vec![99; offset], x].concat()).unwrap();
    let packed = PackedTernary::pack(w, n, k).unwrap();
    let packed = CudaPackedTernary::upload(device, &packed).unwrap();
    let mut y = device.clone_htod(&vec![POISON; m * n + 2 * GUARD]).unwrap();
    kernel
        .launch(
            &x_buffer.slice(offset..),
            m,
            &packed,
            &mut y.slice_mut(GUARD..GUARD + m * n),
        )
        .unwrap();
    let y = device.clone_dtoh(&y).unwrap();
    let (before, rest) = y.split_at(GUARD);
    let (y, after) = rest.split_at(m * n);
    let shape = format!("m {m}, k {k}, n {n}, offset {offset}");
    for (at, (&y, expected)) in y.iter().zip(exact_product(x, w, k)).enumerate() {
        assert_eq!(
            i64::from(y),
            expected,
            "{shape}: row {}, column {}",
            at / n,
            at % n
        );
    }
    assert!(
        before.iter().chain(after).all(|&y| y == POISON),
        "{shape}: wrote outside y"
    );
}

#[test]
fn the_ternary_product_is_exact_at_any_shape() {
    let Some(device) = gpu() else { return };
    let mut random = Random::new();
    for (m, k, n) in [
        (1, 1, 1),
        (1, 2048, 768),
        (1, 15, 300),
        (2, 16, 2),
        (3, 17, 5),
        (7, 64, 129),
        (33, 47, 29),
        (127, 63, 127),
        (128, 64, 128),
        (129, 65, 257),
        (200, 1002, 100),
        (256, 768, 384),
        (500, 3200, 333),
        (1000, 1, 1000),
    ] {
        let (x, w) = (random.int8(m * k), random.ternary(n * k));
        check(&device, &x, 0, (&w, n, k));
    }
}

#[test]
fn activations_may_start_at_any_address() {
    let Some(device) = gpu() else { return };
    let mut random = Random::new();
    let (m, n) = (131, 70);
    for (k, offset) in [(64, 1), (64, 2), (64, 3), (64, 4), (61, 3)] {
        let (x, w) = (random.int8(m * k), random.ternary(n * k));
        check(&device, &x, offset, (&w, n, k));
    }
}

#[test]
fn extreme_values_are_exact() {
    let Some(device) = gpu() else { return };
    let (m, k, n) = (3, 100_003, 5);
    for (x, w) in [(-128, -1), (-128, 1), (127, -1), (127, 1), (-128, 0)] {
        check(&device, &vec![x; m * k], 0, (&vec![w; n * k], n, k));
    }
}

#[test]
fn lengths_that_do_not_fit_together_are_errors() {
    let Some(device) = gpu() else { return };
    let kernel = TernaryMatmul::load(&device).unwrap();
    let w = PackedTernary::pack(&[1; 6], 2, 3).unwrap();
    let w = CudaPackedTernary::upload(&device, &w).unwrap();
    for (m, x_len, y_len, message) in [
        (2, 5, 4, "3 columns"),
        (0, 0, 1, "3 columns"),
        (2, 6, 5, "cannot hold"),
    ] {
        let x = device.clone_htod(&vec![1i8; x_len.max(1)]).unwrap();
        let mut y = device.clone_htod(&vec![0i32; y_len]).unwrap();
        let x = x.slice(..x_len);
        let error = kernel.launch(&x, m, &w, &mut y.as_view_mut()).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
    }
}
