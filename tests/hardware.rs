//! Names as the driver prints them, against the dense figures of the data sheets.

use titanbit::hardware::{peak_bf16_tflops, peak_int8_tops};

#[test]
fn names_that_contain_one_another_are_told_apart() {
    for (name, tflops) in [
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L20", 119.5),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("A100-SXM4-80GB", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H800", 989.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA GH200 144G HBM3e", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
    ] {
        assert_eq!(peak_bf16_tflops(name), Some(tflops), "{name}");
    }
}

#[test]
fn int8_is_twice_as_fast_as_bf16_or_four_times_on_geforce() {
    for (name, tops) in [
        ("NVIDIA A100-SXM4-40GB", 624.0),
        ("NVIDIA L20", 239.0),
        ("NVIDIA H200", 1979.0),
        ("NVIDIA GeForce RTX 4090", 660.6),
    ] {
        assert_eq!(peak_int8_tops(name), Some(tops), "{name}");
    }
    assert_eq!(peak_int8_tops("NVIDIA A10G"), None);
}

#[test]
fn a_device_that_only_resembles_a_known_one_is_unknown() {
    for name in [
        "",
        "cpu",
        "AMD EPYC 7B13",
        "NVIDIA",
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Quadro RTX 6000",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "Tesla V100-SXM2-16GB",
    ] {
        assert_eq!(peak_bf16_tflops(name), None, "{name}");
    }
}
