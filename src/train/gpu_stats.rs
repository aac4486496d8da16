//! What NVIDIA's management library (NVML) says about the GPUs. It ships with the driver and is loaded at run time; without
//! it there are simply no GPUs here, so nothing in this file fails. A GPU is named by its PCI bus id, as CUDA's numbers
//! are others than NVML's once `CUDA_VISIBLE_DEVICES` is set.

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::error::NvmlError;

/// One GPU as the driver describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuInfo {
    /// Product name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Driver version, such as `570.86.16`.
    pub driver: String,
    /// Compute capability, major and minor: `(8, 9)` is `sm_89`.
    pub compute_capability: (i32, i32),
    /// Device memory, in bytes.
    pub total_memory: u64,
    /// `domain:bus:device.function`, such as `00000000:1B:00.0`.
    pub pci_bus_id: String,
}

/// A reading at one moment. `None`: this GPU does not report it (a MIG slice has no utilisation, for example).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct GpuStats {
    /// Memory in use by all processes, in bytes.
    pub memory_used: u64,
    /// Device memory, in bytes.
    pub memory_total: u64,
    /// Share of the last sample period in which a kernel ran, in percent.
    pub utilization: Option<u32>,
    /// Power draw, in watts.
    pub power_w: Option<f64>,
    /// Temperature of the chip, in degrees Celsius.
    pub temperature_c: Option<u32>,
}

/// Clock rates at one moment, in MHz.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Clocks {
    /// Of the multiprocessors.
    pub sm_mhz: u32,
    /// The most that the driver allows them.
    pub sm_max_mhz: u32,
    pub memory_mhz: u32,
}

/// Reads one GPU's state as training goes on.
pub struct GpuMonitor {
    nvml: Nvml,
    pci_bus_id: String,
}

impl GpuMonitor {
    /// `None` where there is no NVIDIA driver or no GPU at this place.
    pub fn new(pci_bus_id: &str) -> Option<Self> {
        let monitor = Self {
            nvml: Nvml::init().ok()?,
            pci_bus_id: pci_bus_id.to_owned(),
        };
        monitor.stats().is_some().then_some(monitor)
    }

    /// The state now; takes well under a millisecond. `None` if the driver has lost the GPU.
    pub fn stats(&self) -> Option<GpuStats> {
        let device = self
            .nvml
            .device_by_pci_bus_id(self.pci_bus_id.as_str())
            .ok()?;
        let memory = device.memory_info().ok()?;
        Some(GpuStats {
            memory_used: memory.used,
            memory_total: memory.total,
            utilization: device.utilization_rates().ok().map(|rates| rates.gpu),
            power_w: device.power_usage().ok().map(|mw| f64::from(mw) / 1000.0),
            temperature_c: device.temperature(TemperatureSensor::Gpu).ok(),
        })
    }

    /// The clocks now. `None` if the driver does not tell.
    pub fn clocks(&self) -> Option<Clocks> {
        let device = self
            .nvml
            .device_by_pci_bus_id(self.pci_bus_id.as_str())
            .ok()?;
        Some(Clocks {
            sm_mhz: device.clock_info(Clock::SM).ok()?,
            sm_max_mhz: device.max_clock_info(Clock::SM).ok()?,
            memory_mhz: device.clock_info(Clock::Memory).ok()?,
        })
    }
}

/// Every GPU that the driver shows, in NVML's order; empty without a driver.
pub fn list_gpus() -> Vec<GpuInfo> {
    let Ok(nvml) = Nvml::init() else {
        return Vec::new();
    };
    let count = nvml.device_count().unwrap_or(0);
    (0..count)
        .filter_map(|index| describe(&nvml, index).ok())
        .collect()
}

fn describe(nvml: &Nvml, index: u32) -> Result<GpuInfo, NvmlError> {
    let device = nvml.device_by_index(index)?;
    let capability = device.cuda_compute_capability()?;
    Ok(GpuInfo {
        name: device.name()?,
        driver: nvml.sys_driver_version()?,
        compute_capability: (capability.major, capability.minor),
        total_memory: device.memory_info()?.total,
        pci_bus_id: device.pci_info()?.bus_id,
    })
}
