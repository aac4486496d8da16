//! Numbers as people read them.

use std::time::Duration;

/// `1.25 GiB`, `512 B`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = "B";
    for larger in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    match unit {
        "B" => format!("{bytes} B"),
        _ => format!("{value:.2} {unit}"),
    }
}

/// `124.67 M`, `32.00 k`, `812`.
pub fn count(count: u64) -> String {
    let (divisor, prefix) = match count {
        0..10_000 => return count.to_string(),
        10_000..1_000_000 => (1e3, "k"),
        1_000_000..1_000_000_000 => (1e6, "M"),
        _ => (1e9, "G"),
    };
    format!("{:.2} {prefix}", count as f64 / divisor)
}

/// `8.55 GFLOP`.
pub fn flops(flops: f64) -> String {
    if flops >= 1e9 {
        format!("{:.2} GFLOP", flops / 1e9)
    } else {
        format!("{:.2} MFLOP", flops / 1e6)
    }
}

/// The two largest units: `3 d 4 h`, `12 min 5 s`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
    if days > 0 {
        format!("{days} d {hours} h")
    } else if hours > 0 {
        format!("{hours} h {minutes} min")
    } else if minutes > 0 {
        format!("{minutes} min {rest} s")
    } else {
        format!("{rest} s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_change_where_they_should() {
        for (value, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (3 << 29, "1.50 GiB"),
            (u64::MAX, "16384.00 PiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
        for (value, text) in [
            (9_999, "9999"),
            (32_000, "32.00 k"),
            (124_668_672, "124.67 M"),
            (3_027_000_000, "3.03 G"),
        ] {
            assert_eq!(count(value), text);
        }
        assert_eq!(flops(8.55e9), "8.55 GFLOP");
        assert_eq!(flops(2.5e7), "25.00 MFLOP");
        for (seconds, text) in [
            (59, "59 s"),
            (725, "12 min 5 s"),
            (3600, "1 h 0 min"),
            (90_000, "1 d 1 h"),
        ] {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }
}
