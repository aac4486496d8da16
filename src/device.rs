//! Which device a command runs on: the `--device` flag, the name shown to the user, and the memory
//! of the host.

use std::fs;

use candle_core::Device;

use crate::{Error, Result};

/// The device that `spec` names: `cpu`, `cuda` (the first GPU), `cuda:N`, or `auto`: the first GPU
/// if this binary has CUDA support and one answers, else the CPU (with a warning in the first case).
///
/// # Errors
/// `Usage` on any other name, and when a GPU is asked for by name and there is none.
pub fn select(spec: &str) -> Result<Device> {
    match spec {
        "auto" => Ok(auto()),
        "cpu" => Ok(Device::Cpu),
        "cuda" => cuda(0),
        _ => match spec.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(ordinal)) => cuda(ordinal),
            _ => Err(Error::usage(format!(
                "unknown device '{spec}': use auto, cpu, cuda or cuda:N (N counts GPUs from 0)"
            ))),
        },
    }
}

#[cfg(not(feature = "cuda"))]
fn auto() -> Device {
    Device::Cpu
}

#[cfg(feature = "cuda")]
fn auto() -> Device {
    cuda(0).unwrap_or_else(|error| {
        tracing::warn!("{error}; running on the CPU");
        Device::Cpu
    })
}

#[cfg(not(feature = "cuda"))]
fn cuda(_ordinal: usize) -> Result<Device> {
    Err(Error::usage(
        "this binary was built without CUDA support; \
         rebuild with `cargo build --release --features cuda` or use --device cpu",
    ))
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> Result<Device> {
    let device = candle_core::CudaDevice::new_with_stream(ordinal).map_err(|error| {
        // candle appends a backtrace on further lines when RUST_BACKTRACE is set.
        let text = error.to_string();
        let reason = match text.lines().next().unwrap_or_default() {
            // What `cuda/driver.c` answers.
            line if line.contains("CUDA_ERROR_STUB_LIBRARY") => "no driver: libcuda.so.1 not found",
            line => line,
        };
        Error::usage(format!(
            "no usable NVIDIA GPU as cuda:{ordinal} ({reason}); \
             look at `nvidia-smi`, or use --device cpu"
        ))
    })?;
    // SAFETY: the events order work between streams, and everything of ours runs on the one
    // stream of this device; without them each launch saves several driver calls.
    unsafe { device.disable_event_tracking() };
    Ok(Device::Cuda(device))
}

/// One line for people, e.g. `CPU (AMD EPYC 9654)` or `cuda:0 (NVIDIA H200, sm_90, 140 GiB)`.
pub fn describe(device: &Device) -> String {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => describe_cuda(device),
        _ => format!("CPU ({})", cpu_model()),
    }
}

#[cfg(feature = "cuda")]
fn describe_cuda(device: &candle_core::CudaDevice) -> String {
    let stream = device.cuda_stream();
    let context = stream.context();
    let name = context.name().unwrap_or_else(|_| "unknown GPU".into());
    let capability = context
        .compute_capability()
        .map(|(major, minor)| format!(", sm_{major}{minor}"))
        .unwrap_or_default();
    let memory = context
        .total_mem()
        .map(|bytes| format!(", {:.0} GiB", bytes as f64 / f64::from(1 << 30)))
        .unwrap_or_default();
    format!("cuda:{} ({name}{capability}{memory})", context.ordinal())
}

/// Dense bf16 peak of a GPU in the table of [`crate::hardware`]; `None` for others and the CPU.
pub fn peak_bf16_tflops(device: &Device) -> Option<f64> {
    crate::hardware::peak_bf16_tflops(&gpu_name(device)?)
}

/// Dense int8 peak in TOP/s, where that is known as for [`peak_bf16_tflops`].
pub fn peak_int8_tops(device: &Device) -> Option<f64> {
    crate::hardware::peak_int8_tops(&gpu_name(device)?)
}

/// As the driver calls a GPU; `None` for the CPU.
fn gpu_name(device: &Device) -> Option<String> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => device.cuda_stream().context().name().ok(),
        _ => None,
    }
}

/// Bytes a second that a large copy within a GPU's memory reads and writes together; `None` for the
/// CPU.
///
/// # Errors
/// `Tensor` if there is no memory for it.
pub fn copy_bandwidth(device: &Device) -> Result<Option<f64>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => copy_bandwidth_cuda(device).map(Some),
        _ => Ok(None),
    }
}

/// The fastest of some copies, far larger than any L2.
#[cfg(feature = "cuda")]
fn copy_bandwidth_cuda(device: &candle_core::CudaDevice) -> Result<f64> {
    use candle_core::cuda_backend::{WrapErr, cudarc::driver::sys::CUevent_flags};
    const BYTES: usize = 1 << 30;
    const COPIES: usize = 10;
    let stream = device.cuda_stream();
    // SAFETY: bytes of any value.
    let (from, mut to) = unsafe { (stream.alloc::<u8>(BYTES).w()?, stream.alloc(BYTES).w()?) };
    let now = || {
        stream
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
            .w()
    };
    let mut shortest = f32::INFINITY;
    for _ in 0..COPIES {
        let start = now()?;
        stream.memcpy_dtod(&from, &mut to).w()?;
        shortest = shortest.min(start.elapsed_ms(&now()?).w()?);
    }
    Ok(2.0 * BYTES as f64 / (f64::from(shortest) / 1e3))
}

/// Bytes that the last cache before the device's memory holds: a GPU's L2, a CPU's largest. 32 MiB
/// where the system does not say.
pub fn last_cache_bytes(device: &Device) -> usize {
    let known = match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as Attribute;
            let l2 = Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
            let bytes = device.cuda_stream().context().attribute(l2).ok();
            bytes.map(|bytes| bytes as usize)
        }
        _ => cpu_cache_bytes(),
    };
    known.unwrap_or(32 << 20)
}

/// The largest cache that Linux lists for the first CPU.
fn cpu_cache_bytes() -> Option<usize> {
    let caches = fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    let sizes = caches.filter_map(|cache| {
        let size = fs::read_to_string(cache.ok()?.path().join("size")).ok()?;
        let kib: usize = size.trim().strip_suffix('K')?.parse().ok()?;
        Some(kib * 1024)
    });
    sizes.max()
}

/// Bytes free on the device, where the system says.
pub fn free_memory(device: &Device) -> Option<u64> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let (free, _) = device.cuda_stream().context().mem_get_info().ok()?;
            Some(free as u64)
        }
        _ => host_memory("MemAvailable"),
    }
}

/// `domain:bus:device.function` of a GPU, as NVML knows it; `None` for the CPU.
pub fn pci_bus_id(device: &Device) -> Option<String> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as Attribute;
            let stream = device.cuda_stream();
            let attribute = |which| stream.context().attribute(which).ok();
            Some(format!(
                "{:08X}:{:02X}:{:02X}.0",
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
            ))
        }
        _ => None,
    }
}

/// The processor's name as Linux gives it, elsewhere its architecture.
pub fn cpu_model() -> String {
    fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|info| {
            let line = info.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// Bytes that a field of Linux's /proc/meminfo states, such as `MemTotal`; `None` elsewhere.
pub fn host_memory(field: &str) -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let value = info
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}
