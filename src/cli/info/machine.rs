//! The devices of this machine.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use crate::cli::format;
use crate::device;
use crate::hardware::peak_bf16_tflops;
use crate::train::gpu_stats::{GpuInfo, list_gpus};

#[derive(Serialize)]
pub struct Report {
    version: &'static str,
    /// This binary can run on a GPU.
    cuda_support: bool,
    cpu: Cpu,
    gpus: Vec<Gpu>,
}

#[derive(Serialize)]
struct Cpu {
    name: String,
    threads: usize,
    memory_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Gpu {
    name: String,
    driver: String,
    compute_capability: String,
    memory_bytes: u64,
    /// Dense bf16 peak that MFU is measured against; none for an unknown device.
    peak_bf16_tflops: Option<f64>,
}

impl Report {
    pub fn of_this() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            cuda_support: cfg!(feature = "cuda"),
            cpu: Cpu {
                name: device::cpu_model(),
                threads: std::thread::available_parallelism().map_or(1, usize::from),
                memory_bytes: device::host_memory("MemTotal"),
            },
            gpus: list_gpus().into_iter().map(Gpu::from).collect(),
        }
    }
}

impl From<GpuInfo> for Gpu {
    fn from(gpu: GpuInfo) -> Self {
        let (major, minor) = gpu.compute_capability;
        Self {
            peak_bf16_tflops: peak_bf16_tflops(&gpu.name),
            name: gpu.name,
            driver: gpu.driver,
            compute_capability: format!("{major}.{minor}"),
            memory_bytes: gpu.total_memory,
        }
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let cuda = match self.cuda_support {
            true => "yes",
            false => "no (cargo build --release --features cuda)",
        };
        let memory = match self.cpu.memory_bytes {
            Some(bytes) => format!(", {}", format::bytes(bytes)),
            None => String::new(),
        };
        writeln!(f, "titanbit      {}", self.version)?;
        writeln!(f, "CUDA support  {cuda}")?;
        writeln!(
            f,
            "CPU           {}, {} threads{memory}",
            self.cpu.name, self.cpu.threads
        )?;
        if self.gpus.is_empty() {
            writeln!(f, "GPU           none found (no NVIDIA driver answers)")?;
        }
        for (i, gpu) in self.gpus.iter().enumerate() {
            let peak = match gpu.peak_bf16_tflops {
                Some(peak) => format!("{peak} TFLOP/s bf16 (for MFU)"),
                None => "n/a: unknown device, set hardware.peak_tflops for MFU".into(),
            };
            writeln!(
                f,
                "GPU {i:<9} {}, {}, compute capability {}",
                gpu.name,
                format::bytes(gpu.memory_bytes),
                gpu.compute_capability
            )?;
            writeln!(f, "  driver      {}", gpu.driver)?;
            writeln!(f, "  peak        {peak}")?;
        }
        Ok(())
    }
}
