//! What was measured, as a table and as JSON.

use serde_json::{Value, json};

use super::machine::Machine;
use super::problem::Agreement;
use super::shapes::Shape;
use super::timing::Percentiles;

/// One way to compute a product, timed and checked.
pub struct Path {
    pub name: String,
    /// With the weights in memory, and in the last cache as far as they fit.
    pub cold: Percentiles,
    pub warm: Percentiles,
    /// That must move at least: both operands read once, the result written once.
    pub bytes: usize,
    pub agreement: Agreement,
}

/// One product by all paths.
pub struct Row {
    pub shape: Shape,
    pub m: usize,
    pub ternary: Path,
    /// In f32 on a CPU, in bf16 by cuBLAS on a GPU.
    pub dense: Path,
    /// In int8 by cuBLASLt, where it takes the shape.
    pub int8: Option<Path>,
}

pub struct Report {
    pub machine: Machine,
    pub rows: Vec<Row>,
}

impl Row {
    pub fn operations(&self) -> f64 {
        2.0 * self.m as f64 * self.shape.n as f64 * self.shape.k as f64
    }

    /// How many times as fast as `other` the ternary path is, both cold.
    pub fn speedup(&self, other: &Path) -> f64 {
        other.cold.p50 / self.ternary.cold.p50
    }
}

impl Report {
    fn bytes_per_s(&self, row: &Row) -> f64 {
        row.ternary.bytes as f64 / row.ternary.cold.p50
    }

    fn operations_per_s(&self, row: &Row) -> f64 {
        row.operations() / row.ternary.cold.p50
    }

    /// Share of the measured bandwidth.
    fn of_bandwidth(&self, row: &Row) -> f64 {
        self.bytes_per_s(row) / self.machine.bandwidth
    }

    /// Share of the int8 peak.
    fn of_peak(&self, row: &Row) -> Option<f64> {
        let peak = self.machine.int8_peak?;
        Some(self.operations_per_s(row) / peak)
    }

    /// Share of what limits the product more: moving its bytes, or its arithmetic (of which only
    /// the bytes are known on a CPU).
    pub fn of_limit(&self, row: &Row) -> f64 {
        self.of_bandwidth(row)
            .max(self.of_peak(row).unwrap_or_default())
    }

    pub fn is_exact(&self) -> bool {
        self.rows.iter().all(|row| row.ternary.agreement.exact())
    }

    pub fn table(&self) -> String {
        let dense = self.rows.first().map_or("", |row| &row.dense.name);
        let int8 = self.rows.iter().find_map(|row| row.int8.as_ref());
        let mut columns = vec![
            Column::left("projection", |row, _| row.shape.name.clone()),
            Column::right("M", |row, _| row.m.to_string()),
            Column::right("N", |row, _| row.shape.n.to_string()),
            Column::right("K", |row, _| row.shape.k.to_string()),
            Column::left("kernel", |row, _| row.ternary.name.clone()),
            Column::right("p20 us", |row, _| microseconds(row.ternary.cold.p20)),
            Column::right("p50 us", |row, _| microseconds(row.ternary.cold.p50)),
            Column::right("p80 us", |row, _| microseconds(row.ternary.cold.p80)),
            Column::right("warm us", |row, _| microseconds(row.ternary.warm.p50)),
            Column::right("GB/s", |row, report| {
                format!("{:.1}", report.bytes_per_s(row) / 1e9)
            }),
            Column::right("of bw", |row, report| percent(report.of_bandwidth(row))),
            Column::right("TOP/s", |row, report| {
                digits(report.operations_per_s(row) / 1e12)
            }),
        ];
        if self.machine.int8_peak.is_some() {
            columns.push(Column::right("of peak", |row, report| {
                percent(report.of_peak(row).unwrap_or_default())
            }));
        }
        let versus = |name: &str| format!("vs {}", name.split(' ').next().unwrap_or_default());
        columns.push(Column::right(&versus(dense), |row, _| {
            format!("{:.2}x", row.speedup(&row.dense))
        }));
        if let Some(int8) = int8 {
            columns.push(Column::right(&versus(&int8.name), |row, _| {
                let speedup = |path| format!("{:.2}x", row.speedup(path));
                row.int8.as_ref().map_or("-".into(), speedup)
            }));
        }
        columns.push(Column::left("result", |row, _| {
            result(&row.ternary.agreement)
        }));
        let named = self.rows.iter().any(|row| !row.shape.name.is_empty());
        let columns = &columns[usize::from(!named)..];

        let mut lines = vec![
            self.machine.header(),
            self.legend(dense, int8),
            String::new(),
        ];
        let cells: Vec<Vec<String>> = columns
            .iter()
            .map(|column| {
                let cells = self.rows.iter().map(|row| (column.cell)(row, self));
                std::iter::once(column.title.clone()).chain(cells).collect()
            })
            .collect();
        lines.extend((0..=self.rows.len()).map(|line| {
            let cells = columns.iter().zip(&cells).map(|(column, cells)| {
                let width = cells.iter().map(String::len).max().unwrap_or_default();
                match column.left {
                    true => format!("{:<width$}", cells[line]),
                    false => format!("{:>width$}", cells[line]),
                }
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        }));
        lines.join("\n")
    }

    fn legend(&self, dense: &str, int8: Option<&Path>) -> String {
        let int8 = int8.map_or(String::new(), |path| format!(" and {}", path.name));
        format!(
            "y (M, N) = x (M, K) . w (N, K)^T: int8 x, packed ternary w; weights cold, beside {dense}{int8}"
        )
    }

    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let baselines = std::iter::once(&row.dense).chain(&row.int8);
            json!({
                "projection": row.shape.name,
                "m": row.m,
                "n": row.shape.n,
                "k": row.shape.k,
                "ternary": path(&row.ternary),
                "gb_per_s": self.bytes_per_s(row) / 1e9,
                "bandwidth_share": self.of_bandwidth(row),
                "tops": self.operations_per_s(row) / 1e12,
                "peak_share": self.of_peak(row),
                "baselines": baselines
                    .map(|baseline| {
                        let mut value = path(baseline);
                        value["speedup"] = row.speedup(baseline).into();
                        value
                    })
                    .collect::<Vec<_>>(),
            })
        });
        json!({"machine": self.machine, "rows": rows.collect::<Vec<_>>()})
    }
}

struct Column {
    title: String,
    left: bool,
    cell: fn(&Row, &Report) -> String,
}

impl Column {
    fn left(title: &str, cell: fn(&Row, &Report) -> String) -> Self {
        Self {
            title: title.to_owned(),
            left: true,
            cell,
        }
    }

    fn right(title: &str, cell: fn(&Row, &Report) -> String) -> Self {
        Self {
            left: false,
            ..Self::left(title, cell)
        }
    }
}

fn path(path: &Path) -> Value {
    let times = |times: &Percentiles| {
        json!({
            "p20_us": 1e6 * times.p20,
            "p50_us": 1e6 * times.p50,
            "p80_us": 1e6 * times.p80,
            "samples": times.samples,
        })
    };
    json!({
        "name": path.name,
        "cold": times(&path.cold),
        "warm": times(&path.warm),
        "bytes": path.bytes,
        "exact": path.agreement.exact(),
        "max_error": path.agreement.max_error,
    })
}

fn result(agreement: &Agreement) -> String {
    match agreement.exact() {
        true => "exact".to_owned(),
        false => format!(
            "{} rows wrong, by up to {}",
            agreement.wrong_rows, agreement.max_error
        ),
    }
}

fn microseconds(seconds: f64) -> String {
    format!("{:.2}", 1e6 * seconds)
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

/// Three significant digits or more.
fn digits(value: f64) -> String {
    let decimals = match value {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}
