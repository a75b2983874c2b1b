//! Draws a run as SVG: tokens a second over time, and the distribution of times to first token and gaps.

use std::{path::Path, time::Duration};

use anyhow::{Result, anyhow};
use plotters::{coord::Shift, prelude::*};

use super::client::Outcome;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Writes the picture. Failed requests are not in it.
///
/// # Errors
/// When nothing was answered, or the file cannot be written.
pub fn plot(path: &Path, label: &str, outcomes: &[Outcome]) -> Result<()> {
    let good: Vec<&Outcome> = outcomes.iter().filter(|o| o.error.is_none()).collect();
    anyhow::ensure!(!good.is_empty(), "nothing to plot: no request was answered");
    let root = SVGBackend::new(path, (900, 760)).into_drawing_area();
    root.fill(&WHITE).map_err(error)?;
    let root = root.titled(label, ("sans-serif", 20)).map_err(error)?;
    let (top, bottom) = root.split_vertically(360);
    draw(&top, "output tokens/s", "seconds", &throughput(&good))?;
    let ttft = quantile_curve(good.iter().filter_map(|o| o.ttft()).collect());
    let gaps = quantile_curve(good.iter().flat_map(|o| o.events.windows(2).map(|w| w[1] - w[0])).collect());
    let (left, right) = bottom.split_horizontally(450);
    draw(&left, "time to first token, ms", "percentile", &ttft)?;
    draw(&right, "gap between events, ms", "percentile", &gaps)?;
    root.present().map_err(error)
}

fn error(e: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {e}")
}

/// Tokens a second in windows of a fiftieth of the run. An event may carry several tokens: each event of a request is
/// taken to carry the same number.
fn throughput(good: &[&Outcome]) -> Vec<(f64, f64)> {
    let end = good.iter().filter_map(|o| o.events.last()).max().copied().unwrap_or_default().as_secs_f64();
    let width = (end / 50.0).max(1e-3);
    let mut windows = vec![0.0; (end / width) as usize + 1];
    for outcome in good {
        let tokens_per_event = outcome.tokens as f64 / outcome.events.len() as f64;
        for event in &outcome.events {
            windows[(event.as_secs_f64() / width) as usize] += tokens_per_event / width;
        }
    }
    windows.into_iter().enumerate().map(|(i, rate)| (i as f64 * width, rate)).collect()
}

/// Points (percentile, milliseconds).
fn quantile_curve(mut values: Vec<Duration>) -> Vec<(f64, f64)> {
    values.sort_unstable();
    let last = values.len().saturating_sub(1).max(1) as f64;
    values.iter().enumerate().map(|(i, v)| (i as f64 / last * 100.0, v.as_secs_f64() * 1e3)).collect()
}

fn draw(area: &Area<'_>, title: &str, x_title: &str, points: &[(f64, f64)]) -> Result<()> {
    let max = |f: fn(&(f64, f64)) -> f64| points.iter().map(f).fold(1e-3, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..max(|p| p.0), 0.0..max(|p| p.1) * 1.05)
        .map_err(error)?;
    chart.configure_mesh().x_desc(x_title).light_line_style(WHITE).draw().map_err(error)?;
    let line = LineSeries::new(points.iter().copied(), RGBColor(30, 90, 160).stroke_width(2));
    chart.draw_series(line).map_err(error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(events: usize, tokens: usize, error: Option<&str>) -> Outcome {
        Outcome {
            adapter: None,
            asked: tokens,
            planned: Duration::ZERO,
            sent: Duration::ZERO,
            events: (1..=events as u64).map(|i| Duration::from_millis(i * 7)).collect(),
            tokens,
            error: error.map(str::to_owned),
        }
    }

    #[test]
    fn a_run_becomes_a_picture_and_one_without_answers_an_error() {
        let path = tempfile::NamedTempFile::new().unwrap();
        plot(path.path(), "run", &[outcome(99, 99, None)]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.contains("<polyline") && svg.contains("output tokens/s"));
        assert!(plot(path.path(), "run", &[]).is_err());
        assert!(plot(path.path(), "run", &[outcome(99, 99, Some("cut short"))]).is_err());
    }

    #[test]
    fn all_tokens_are_in_the_curve_however_many_an_event_carries() {
        let (one, several) = (outcome(100, 100, None), outcome(50, 200, None));
        let curve = throughput(&[&one, &several]);
        let width = curve[1].0;
        let tokens: f64 = curve.iter().map(|(_, rate)| rate * width).sum();
        assert!((tokens - 300.0).abs() < 1e-6, "{tokens}");
    }
}
