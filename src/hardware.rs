//! What a device can do at most: the denominator of model FLOPs utilisation (MFU), and the int8 rate.

/// Peak dense tensor-core rates at boost clock: bf16 with fp32 accumulation in TFLOP/s, int8 in TOP/s. The sources are NVIDIA's: those
/// marked * print only the rate with 2:4 sparsity, which is twice the dense one given here. GeForce cards accumulate in
/// fp32 at half the rate of the headline figure.
const PEAKS: &[(&str, f64, f64)] = &[
    // Ampere: A100, A30, A40, A10 data sheets; GA102 architecture white paper. A800 is an A100 with a slower NVLink.
    ("A100", 312.0, 624.0),
    ("A100 PCIE", 312.0, 624.0),
    ("A800", 312.0, 624.0),
    ("A800 PCIE", 312.0, 624.0),
    ("A40", 149.7, 299.3),
    ("A30", 165.0, 330.0),
    ("A10", 125.0, 250.0),
    ("RTX A6000", 154.8, 309.7),
    ("RTX 3090", 71.0, 284.0),
    // Ada: L40S, L40, L20 and L4* data sheets; Ada architecture white papers (GeForce, professional).
    ("L40S", 362.0, 733.0),
    ("L40", 181.0, 362.0),
    ("L20", 119.5, 239.0),
    ("L4", 121.0, 242.5),
    ("RTX 6000 ADA GENERATION", 364.2, 728.5),
    ("RTX 4090", 165.2, 660.6),
    // Hopper: H100*, H200*, GH200*, H20 data sheets. H800 is an H100 with a slower NVLink and less fp64.
    ("H100", 989.0, 1979.0),
    ("H100 PCIE", 756.0, 1513.0),
    ("H100 NVL", 835.0, 1670.5),
    ("H800", 989.0, 1979.0),
    ("H800 PCIE", 756.0, 1513.0),
    ("H200", 989.0, 1979.0),
    ("H200 NVL", 835.0, 1670.5),
    ("GH200", 989.0, 1979.0),
    ("H20", 148.0, 296.0),
    // Blackwell: architecture technical brief (HGX B200 at 1000 W, one GPU of a GB200); RTX Blackwell white paper.
    ("B200", 2250.0, 4500.0),
    ("GB200", 2500.0, 5000.0),
    ("RTX 5090", 209.5, 838.0),
];

/// Peak dense bf16 rate, in TFLOP/s, of a whole GPU that the driver calls `device_name`, such as `NVIDIA L20` or
/// `NVIDIA H100 80GB HBM3`. `None` for a name it does not know for certain (a laptop variant, a MIG slice, a CPU): an MFU
/// over a guessed peak would mislead.
pub fn peak_bf16_tflops(device_name: &str) -> Option<f64> {
    peaks(device_name).map(|(_, bf16, _)| *bf16)
}

/// Peak dense int8 rate, in TOP/s; otherwise as [`peak_bf16_tflops`].
pub fn peak_int8_tops(device_name: &str) -> Option<f64> {
    peaks(device_name).map(|(_, _, int8)| *int8)
}

fn peaks(device_name: &str) -> Option<&'static (&'static str, f64, f64)> {
    let upper = device_name.to_uppercase();
    let model = upper
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty() && !says_nothing_of_the_rate(word))
        .collect::<Vec<_>>()
        .join(" ");
    PEAKS.iter().find(|(name, ..)| *name == model)
}

/// Brand, memory and socket. Not `PCIE` and `NVL`: those boards run at other clocks.
fn says_nothing_of_the_rate(word: &str) -> bool {
    let memory_size = word.trim_end_matches('B').strip_suffix('G');
    matches!(word, "NVIDIA" | "TESLA" | "GEFORCE" | "HBM3" | "HBM3E")
        || matches!(word, "SXM" | "SXM4" | "SXM5")
        || memory_size.is_some_and(|size| size.parse::<u32>().is_ok())
}
