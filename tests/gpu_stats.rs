//! NVML readings: the list, the monitor and `nvidia-smi` must agree, on a machine with a GPU or without.

use std::process::Command;

use titanbit::train::gpu_stats::{GpuMonitor, list_gpus};

#[test]
fn a_gpu_that_is_not_there_is_none() {
    assert!(GpuMonitor::new("00000000:EE:1F.7").is_none());
}

#[test]
fn the_list_agrees_with_nvidia_smi() {
    let listed: Vec<_> = list_gpus()
        .into_iter()
        .map(|gpu| {
            let (major, minor) = gpu.compute_capability;
            format!("{}, {}, {major}.{minor}", gpu.name, gpu.driver)
        })
        .collect();
    assert_eq!(listed, nvidia_smi("name,driver_version,compute_cap"));
}

#[test]
fn every_listed_gpu_can_be_monitored() {
    if list_gpus().is_empty() {
        return println!("skipped: no GPU here");
    }
    for gpu in list_gpus() {
        let monitor = GpuMonitor::new(&gpu.pci_bus_id).expect("a listed GPU has a monitor");
        let stats = monitor.stats().expect("its state");
        assert_eq!(stats.memory_total, gpu.total_memory);
        assert!(stats.memory_used <= stats.memory_total, "{stats:?}");
        assert!(
            stats.utilization.is_none_or(|percent| percent <= 100),
            "{stats:?}"
        );
        assert!(
            stats
                .power_w
                .is_none_or(|watts| (1.0..2000.0).contains(&watts)),
            "{stats:?}"
        );
        assert!(
            stats.temperature_c.is_none_or(|c| (1..120).contains(&c)),
            "{stats:?}"
        );
    }
}

/// One line a GPU; none where the tool is missing or finds no driver.
fn nvidia_smi(query: &str) -> Vec<String> {
    let out = Command::new("nvidia-smi")
        .args([&format!("--query-gpu={query}"), "--format=csv,noheader"])
        .output();
    match out {
        Ok(out) if out.status.success() => String::from_utf8_lossy(&out.stdout)
            .lines()
            .map(str::to_string)
            .collect(),
        _ => Vec::new(),
    }
}
