//! `titanbit bench train --profile`: the time of a step by kernels, beside what limits them.

use candle_core::Device;
use serde_json::{Value, json};

use crate::cuda::profile::{Group, Unit};
use crate::{Result, device};

/// A profiled step, and the limits of the device where they are known.
pub struct Profile {
    groups: Vec<Group>,
    /// Dense bf16 FLOPs a second; 8-bit ones are twice as many.
    peak: Option<f64>,
    /// Bytes a second of a copy.
    bandwidth: Option<f64>,
}

impl Profile {
    pub fn new(groups: Vec<Group>, device: &Device) -> Result<Self> {
        Ok(Self {
            groups,
            peak: device::peak_bf16_tflops(device).map(|tflops| tflops * 1e12),
            bandwidth: device::copy_bandwidth(device)?,
        })
    }

    fn seconds(&self) -> f64 {
        self.groups.iter().map(|group| group.seconds).sum()
    }

    fn share(&self, group: &Group) -> f64 {
        group.seconds / self.seconds()
    }

    /// How much of its limit a group reaches.
    fn of_limit(&self, group: &Group) -> Option<f64> {
        let limit = match group.unit {
            Unit::Bf16Flop => self.peak,
            Unit::EightBitFlop => self.peak.map(|peak| 2.0 * peak),
            Unit::Byte => self.bandwidth,
        };
        limit.map(|limit| rate(group) / limit)
    }

    /// `median` is the time of a step without time stamps, in seconds.
    pub fn table(&self, median: f64) -> String {
        let mut lines = vec![
            format!(
                "profile   {:.1} ms in a further step with time stamps, {:+.1}% on the median\n",
                1e3 * self.seconds(),
                100.0 * (self.seconds() / median - 1.0),
            ),
            format!(
                "{:<24} {:>9} {:>6} {:>6} {:>13} {:>14} {:>9}",
                "kernels", "ms", "share", "calls", "work", "rate", "of limit"
            ),
        ];
        lines.extend(self.groups.iter().map(|group| {
            let line = format!(
                "{:<24} {:>9.3} {:>5.1}% {:>6}",
                group.name,
                1e3 * group.seconds,
                100.0 * self.share(group),
                group.calls,
            );
            if group.work == 0 {
                return line;
            }
            let (work, work_unit, rate_unit) = match group.unit {
                Unit::Byte => (group.work as f64 / 1e9, "GB", "TB/s"),
                Unit::Bf16Flop | Unit::EightBitFlop => {
                    (group.work as f64 / 1e12, "TFLOP", "TFLOP/s")
                }
            };
            format!(
                "{line} {work:>7.1} {work_unit:<5} {:>6} {rate_unit:<7} {:>9}",
                three_digits(rate(group) / 1e12),
                percent(self.of_limit(group)),
            )
        }));
        let tera = |limit: Option<f64>| limit.map_or("n/a".into(), |x| three_digits(x / 1e12));
        lines.push(format!(
            "\nlimits    {} TFLOP/s in bf16, {} in int8; {} TB/s, as a copy on this device \
             (reading alone is faster)",
            tera(self.peak),
            tera(self.peak.map(|peak| 2.0 * peak)),
            tera(self.bandwidth),
        ));
        lines.join("\n")
    }

    pub fn json(&self) -> Value {
        let row = |group: &Group| {
            json!({
                "kernels": group.name,
                "ms": 1e3 * group.seconds,
                "share": self.share(group),
                "calls": group.calls,
                "unit": match group.unit {
                    Unit::Bf16Flop => "bf16 FLOP",
                    Unit::EightBitFlop => "8-bit FLOP",
                    Unit::Byte => "byte",
                },
                "work": group.work,
                "per_s": rate(group),
                "of_limit": self.of_limit(group),
            })
        };
        self.groups.iter().map(row).collect()
    }
}

/// Work a second.
fn rate(group: &Group) -> f64 {
    group.work as f64 / group.seconds
}

fn percent(share: Option<f64>) -> String {
    share.map_or("n/a".into(), |share| format!("{:.0}%", 100.0 * share))
}

/// `1187`, `612`, `3.71`.
fn three_digits(x: f64) -> String {
    match x {
        100.0.. => format!("{x:.0}"),
        10.0..100.0 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_how_near_its_limit_a_group_is() {
        let group = |name, seconds, unit, work| Group {
            name,
            seconds,
            calls: 2,
            unit,
            work,
        };
        let profile = Profile {
            groups: vec![
                group("products", 0.06, Unit::EightBitFlop, 60_000_000_000_000),
                group("norms", 0.03, Unit::Byte, 90_000_000_000),
                group("other", 0.01, Unit::Byte, 0),
            ],
            peak: None,
            bandwidth: Some(4e12),
        };
        let table = profile.table(0.08);
        assert!(table.starts_with("profile   100.0 ms "), "{table}");
        assert!(table.contains("+25.0% on the median"), "{table}");
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let rows: Vec<_> = table.lines().map(words).collect();
        assert_eq!(
            rows[3..6],
            [
                "products 60.000 60.0% 2 60.0 TFLOP 1000 TFLOP/s n/a",
                "norms 30.000 30.0% 2 90.0 GB 3.00 TB/s 75%",
                "other 10.000 10.0% 2",
            ]
        );
        let profile = Profile {
            peak: Some(1e15),
            ..profile
        };
        assert_eq!(profile.json()[0]["of_limit"], 0.5);
    }
}
