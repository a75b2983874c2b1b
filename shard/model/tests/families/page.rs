//! The table of `docs/models.md` that says what was tried of each fixture, and how far it was from transformers.

use std::{fs, path::PathBuf};

/// Set to write the table anew, with what was measured.
const WRITE: &str = "LORAX_WRITE_TABLES";
/// The lines around the table.
const BEGIN: &str = "<!-- written by shard/model/tests/families.rs -->";
const END: &str = "<!-- end -->";

/// What was measured of a fixture: the largest difference of a log-probability in each manner, if it was tried.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) features: Vec<String>,
    pub(crate) measured: Vec<Option<f32>>,
}

/// The columns of what is measured.
pub(crate) const COLUMNS: [&str; 5] =
    ["base", "LoRA on linear layers", "on table and head", "chunks and mixed batches", "GGUF"];

fn page() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/models.md"))
}

/// A difference, rounded up to a power of ten.
fn cell(measured: &Option<f32>) -> String {
    measured.map_or("–".into(), |measured| format!("1e{}", measured.log10().ceil() as i32))
}

impl Row {
    fn line(&self) -> String {
        let cells: Vec<String> = self.measured.iter().map(cell).collect();
        format!("| `{}` | {} | {} |", self.name, self.features.join(", "), cells.join(" | "))
    }

    /// Panics unless the page has this row. A difference may be up to twice as large, or fifty times smaller, than the
    /// page says: it depends on the machine's vector unit.
    fn check(&self, line: &str) {
        let own = self.line();
        let [theirs, ours] =
            [line, &own].map(|line| line.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>());
        let hint = format!("docs/models.md has\n{line}\nmeasured was\n{own}\nset {WRITE}=1 to write it");
        assert!(theirs.len() == ours.len() && theirs[..2] == ours[..2], "{hint}");
        for (cell, measured) in theirs[2..].iter().zip(&self.measured) {
            let said: Option<f32> = cell.parse().ok();
            let fits = match (said, measured) {
                (Some(said), Some(measured)) => *measured <= 2.0 * said && *measured > said / 50.0,
                (said, measured) => said.is_none() && measured.is_none(),
            };
            assert!(fits, "{hint}");
        }
    }
}

/// Compares the table with what was measured, or writes it.
pub(crate) fn check(rows: &[&Row]) {
    let text = fs::read_to_string(page()).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (table, after) = rest.split_once(END).unwrap();
    if std::env::var_os(WRITE).is_some() {
        let head =
            format!("| fixture | what is odd about it | {} |\n|{}", COLUMNS.join(" | "), "---|".repeat(7));
        let lines: Vec<String> = rows.iter().map(|row| row.line()).collect();
        let table = format!("{BEGIN}\n\n{head}\n{}\n\n{END}", lines.join("\n"));
        return fs::write(page(), format!("{before}{table}{after}")).unwrap();
    }
    let lines: Vec<&str> = table.trim().lines().skip(2).collect();
    assert_eq!(
        lines.len(),
        rows.len(),
        "docs/models.md has a line for each fixture; set {WRITE}=1 to write them"
    );
    lines.iter().zip(rows).for_each(|(line, row)| row.check(line));
}
