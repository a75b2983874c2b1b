//! Prometheus' text format, read and written.

use std::{collections::BTreeMap, fmt::Write};

/// A metric with its series.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Family {
    pub(super) name: String,
    pub(super) help: String,
    /// `counter`, `gauge` or `histogram`.
    pub(super) kind: String,
    pub(super) series: Vec<Series>,
}

/// A series of a metric.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Series {
    /// What follows the metric's name: nothing, or `_bucket`, `_sum` or `_count`.
    pub(super) suffix: &'static str,
    /// As they are written between braces.
    pub(super) labels: String,
    pub(super) value: f64,
}

/// Metrics by their names.
pub(super) type Families = BTreeMap<String, Family>;

impl Family {
    pub(super) fn new(name: &str, kind: &str, help: &str) -> Family {
        Family { name: name.into(), help: help.into(), kind: kind.into(), series: Vec::new() }
    }

    /// Adds a series.
    pub(super) fn add(&mut self, labels: String, value: f64) {
        self.series.push(Series { suffix: "", labels, value });
    }
}

/// Writes a label. What cannot stand in quotes is escaped.
pub(super) fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

/// Reads a page that this process has written, in which the lines of a metric follow those with its help and type.
pub(super) fn read(page: &str) -> Families {
    let (mut families, mut help) = (Families::new(), ("", ""));
    let mut current: Option<&mut Family> = None;
    for line in page.lines().filter(|line| !line.is_empty()) {
        if let Some(described) = line.strip_prefix("# HELP ") {
            help = described.split_once(' ').unwrap_or((described, ""));
        } else if let Some(typed) = line.strip_prefix("# TYPE ") {
            let (name, kind) = typed.split_once(' ').unwrap_or((typed, "untyped"));
            let help = if help.0 == name { help.1 } else { "" };
            current = Some(families.entry(name.into()).or_insert(Family::new(name, kind, help)));
        } else if let Some(family) = current.as_mut()
            && let Some(series) = read_series(&family.name, line)
        {
            family.series.push(series);
        }
    }
    families
}

fn read_series(name: &str, line: &str) -> Option<Series> {
    let (full, value) = line.rsplit_once(' ')?;
    let (named, labels) = full.split_once('{').unwrap_or((full, "}"));
    let suffix = named.strip_prefix(name)?;
    let suffix = ["", "_bucket", "_sum", "_count"].into_iter().find(|known| *known == suffix)?;
    let (labels, value) = (labels.strip_suffix('}')?.into(), value.parse().ok()?);
    Some(Series { suffix, labels, value })
}

/// Writes metrics, those without series left out.
pub(super) fn write<'a>(families: impl Iterator<Item = &'a Family>) -> String {
    let mut page = String::new();
    for Family { name, help, kind, series } in families.filter(|family| !family.series.is_empty()) {
        // A string takes whatever is written.
        let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for Series { suffix, labels, value } in series {
            let (open, close) = if labels.is_empty() { ("", "") } else { ("{", "}") };
            let _ = writeln!(page, "{name}{suffix}{open}{labels}{close} {value}");
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let mut gauge = Family::new("kv", "gauge", "Blocks.");
        gauge.add(label("state", "a \"b\\\n}"), 2.5);
        gauge.add(String::new(), f64::INFINITY);
        let mut histogram = Family::new("times", "histogram", "Seconds, of all.");
        for (suffix, labels) in
            [("_bucket", "le=\"0.5\""), ("_bucket", "le=\"+Inf\""), ("_sum", ""), ("_count", "")]
        {
            histogram.series.push(Series { suffix, labels: labels.into(), value: 3.0 });
        }
        let families = [gauge, histogram];
        let page = write(families.iter());
        assert!(page.contains("kv{state=\"a \\\"b\\\\\\n}\"} 2.5\n"), "{page}");
        assert_eq!(read(&page).into_values().collect::<Vec<_>>(), families);
    }
}
