//! The report as a picture: speed-up and share of the limit over the number of tokens.

use std::path::Path;

use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::*;

use super::report::{Report, Row};
use crate::files::replace_file;
use crate::{Error, Result};

const SIZE: (u32, u32) = (1280, 560);
/// With more weights than this, those of one model share a colour.
const COLOURS: usize = 8;
/// Okabe and Ito's colours, which the colour-blind can tell apart (2008), black last.
const PALETTE: [RGBColor; COLOURS] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(240, 228, 66),
    BLACK,
];

/// The rows of one weight, by tokens.
struct Series<'a> {
    label: String,
    rows: Vec<&'a Row>,
}

/// Writes the plot as SVG.
///
/// # Errors
/// `Io` if it cannot be written.
pub fn write(report: &Report, path: &Path) -> Result<()> {
    let mut text = String::new();
    draw(report, &mut text).map_err(|error| Error::format(path, error))?;
    replace_file(path, text.as_bytes())
}

fn draw(report: &Report, text: &mut String) -> std::result::Result<(), String> {
    let fail = |error: &dyn std::fmt::Display| format!("cannot draw the plot ({error})");
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|e| fail(&e))?;
    let (title, charts) = area.split_vertically(36);
    let style = ("sans-serif", 18).into_font().into_text_style(&title);
    title
        .draw_text(&report.machine.device, &style, (16, 10))
        .map_err(|e| fail(&e))?;
    let (left, right) = charts.split_horizontally(SIZE.0 / 2);
    let series = series(report);
    let dense = &report.rows[0].dense.name;
    let speedup = |row: &Row| row.speedup(&row.dense);
    let limit = match report.machine.int8_peak {
        Some(_) => "share of the limit: bandwidth or int8 peak",
        None => "share of the read bandwidth",
    };
    let share = |row: &Row| 100.0 * report.of_limit(row);
    chart(
        &left,
        &format!("speed-up over {dense}"),
        "x",
        &series,
        &speedup,
    )?;
    chart(&right, limit, "%", &series, &share)?;
    area.present().map_err(|e| fail(&e))
}

fn series(report: &Report) -> Vec<Series<'_>> {
    let mut series: Vec<Series> = Vec::new();
    for row in &report.rows {
        let size = format!("{} x {}", row.shape.n, row.shape.k);
        let label = match row.shape.name.as_str() {
            "" => size,
            name => format!("{name} ({size})"),
        };
        match series.iter_mut().find(|series| series.label == label) {
            Some(series) => series.rows.push(row),
            None => series.push(Series {
                label,
                rows: vec![row],
            }),
        }
    }
    if series.len() > COLOURS {
        for series in &mut series {
            let name = series.rows[0].shape.name.split(' ').next();
            series.label = name.unwrap_or_default().to_owned();
        }
    }
    series
}

fn chart(
    area: &DrawingArea<SVGBackend, plotters::coord::Shift>,
    title: &str,
    unit: &str,
    series: &[Series],
    value: &dyn Fn(&Row) -> f64,
) -> std::result::Result<(), String> {
    let fail = |error: &dyn std::fmt::Display| format!("cannot draw the plot ({error})");
    let rows = || series.iter().flat_map(|series| &series.rows);
    let tokens = rows().map(|row| row.m as f64).fold(1.0, f64::max);
    let largest = rows().map(|row| value(row)).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(
            (0.9..tokens.max(2.0) * 1.1).log_scale(),
            // Room for the legend.
            0.0..largest * 1.35,
        )
        .map_err(|e| fail(&e))?;
    chart
        .configure_mesh()
        .x_desc("tokens M")
        .x_label_formatter(&|m| format!("{m:.0}"))
        .y_label_formatter(&|y| format!("{y}{unit}"))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(|e| fail(&e))?;
    let mut labels: Vec<&str> = Vec::new();
    for series in series {
        let known = labels.iter().position(|label| *label == series.label);
        let colour = PALETTE[known.unwrap_or(labels.len()) % COLOURS];
        let points = || series.rows.iter().map(|row| (row.m as f64, value(row)));
        let line = LineSeries::new(points(), colour.stroke_width(2)).point_size(3);
        let drawn = chart.draw_series(line).map_err(|e| fail(&e))?;
        if known.is_none() {
            labels.push(&series.label);
            drawn.label(&series.label).legend(move |(x, y)| {
                PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
            });
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 13))
        .draw()
        .map_err(|e| fail(&e))
}
