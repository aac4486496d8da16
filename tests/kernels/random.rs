//! Inputs that differ from run to run.

use std::time::UNIX_EPOCH;

use half::bf16;

/// Marsaglia's xorshift64.
pub struct Random(u64);

impl Random {
    /// Seeded from the variable `SEED`, else from the clock.
    pub fn new() -> Self {
        let clock = || UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
        let seed = std::env::var("SEED").map_or_else(|_| clock(), |seed| seed.parse().unwrap());
        println!("seed {}", seed | 1);
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }

    /// In (0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() as f64 + 0.5) / (1u64 << 48) as f64
    }

    /// Box and Muller's.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Normal values times `scale`.
    pub fn f32s(&mut self, len: usize, scale: f64) -> Vec<f32> {
        (0..len).map(|_| (scale * self.normal()) as f32).collect()
    }

    pub fn bf16s(&mut self, len: usize, scale: f64) -> Vec<bf16> {
        (0..len)
            .map(|_| bf16::from_f64(scale * self.normal()))
            .collect()
    }

    pub fn codes(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| self.next() as i8).collect()
    }

    pub fn ternary(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| self.below(3) as i8 - 1).collect()
    }
}
