//! What the products run on: the header of the report, and the limits they are measured against.

use candle_core::Device;
use serde::Serialize;

use crate::bandwidth::read_bandwidth;
use crate::train::gpu_stats::{Clocks, GpuMonitor, list_gpus};
use crate::{Result, device};

#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub device: String,
    /// CPU threads that take part.
    pub threads: usize,
    pub driver: Option<String>,
    /// Of a GPU that has just been at work.
    pub clocks: Option<Clocks>,
    /// Bytes a second, measured in this run: of a copy on a GPU, of reading on a CPU.
    pub bandwidth: f64,
    /// Dense int8 operations a second, by the data sheet of a known GPU.
    pub int8_peak: Option<f64>,
    /// Bytes that the last cache before memory holds.
    pub cache_bytes: usize,
}

impl Machine {
    /// # Errors
    /// `Tensor` if there is no memory to measure the bandwidth with.
    pub fn measure(device: &Device) -> Result<Self> {
        let cache_bytes = device::last_cache_bytes(device);
        let bandwidth = match device::copy_bandwidth(device)? {
            Some(bandwidth) => bandwidth,
            None => read_bandwidth(8 * cache_bytes),
        };
        let bus_id = device::pci_bus_id(device);
        let gpu = |bus_id: &String| {
            list_gpus()
                .into_iter()
                .find(|gpu| gpu.pci_bus_id == *bus_id)
        };
        Ok(Self {
            device: device::describe(device),
            threads: rayon::current_num_threads(),
            driver: bus_id.as_ref().and_then(gpu).map(|gpu| gpu.driver),
            clocks: bus_id.and_then(|bus_id| GpuMonitor::new(&bus_id)?.clocks()),
            bandwidth,
            int8_peak: device::peak_int8_tops(device).map(|tops| tops * 1e12),
            cache_bytes,
        })
    }

    /// The lines above the table.
    pub fn header(&self) -> String {
        let mut lines = vec![match &self.driver {
            Some(driver) => format!("{}, driver {driver}", self.device),
            None => format!("{}, {} threads", self.device, self.threads),
        }];
        if let Some(clocks) = self.clocks {
            lines.push(format!(
                "clocks {} MHz of at most {} MHz, memory {} MHz",
                clocks.sm_mhz, clocks.sm_max_mhz, clocks.memory_mhz
            ));
        }
        let peak = match self.int8_peak {
            Some(peak) => format!("int8 peak {:.0} TOP/s by the data sheet", peak / 1e12),
            None => "int8 peak not known".into(),
        };
        let access = if self.driver.is_some() {
            "copying"
        } else {
            "reading"
        };
        lines.push(format!(
            "memory bandwidth {:.1} GB/s measured {access}, {peak}",
            self.bandwidth / 1e9
        ));
        lines.join("\n")
    }
}
