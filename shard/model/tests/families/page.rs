//! The tables of `docs/models.md` that say what was tried of each fixture and of each kind of adapters, and how far it was
//! from transformers and PEFT.

use std::{
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

/// Set to write the table anew, with what was measured.
const WRITE: &str = "LORAX_WRITE_TABLES";
/// The line below a table.
const END: &str = "<!-- end -->";

/// A table of the page.
pub(crate) struct Table {
    /// The line above it.
    pub(crate) begin: &'static str,
    /// What its rows are, and what is said of each.
    pub(crate) heads: [&'static str; 2],
    /// The columns of what is measured.
    pub(crate) columns: &'static [&'static str],
}

/// The fixtures.
pub(crate) const FIXTURES: Table = Table {
    begin: "<!-- written by shard/model/tests/families.rs -->",
    heads: ["fixture", "what is odd about it"],
    columns: &["base", "LoRA on linear layers", "on table and head", "chunks and mixed batches", "GGUF"],
};

/// The kinds of adapters.
pub(crate) const KINDS: Table = Table {
    begin: "<!-- written by shard/model/tests/families/kinds.rs -->",
    heads: ["fixture", "bases"],
    columns: &["alone", "mixed batch"],
};

/// What was measured of a fixture: the largest difference of a log-probability in each manner, if it was tried.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) features: Vec<String>,
    pub(crate) measured: Vec<Option<f32>>,
}

fn page() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/models.md"))
}

/// What the order of sums in f32 moves a log-probability by.
const ROUNDING: f32 = 1e-4;

/// A difference, rounded up to a power of ten.
fn cell(measured: &Option<f32>) -> String {
    measured.map_or("–".into(), |measured| format!("1e{}", measured.log10().ceil() as i32))
}

impl Row {
    fn line(&self) -> String {
        let cells: Vec<String> = self.measured.iter().map(cell).collect();
        format!("| `{}` | {} | {} |", self.name, self.features.join(", "), cells.join(" | "))
    }

    /// Panics unless the page has this row. Beyond what f32 rounds, a difference may be up to twice as large, or fifty times smaller, than the
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
                (Some(said), Some(measured)) => {
                    *measured <= (2.0 * said).max(ROUNDING) && *measured > said / 50.0
                }
                (said, measured) => said.is_none() && measured.is_none(),
            };
            assert!(fits, "{hint}");
        }
    }
}

/// Compares the table with what was measured, or writes it.
pub(crate) fn check(table: &Table, rows: &[&Row]) {
    /// Tests that write run at the same time.
    static PAGE: Mutex<()> = Mutex::new(());
    let _page = PAGE.lock().unwrap_or_else(PoisonError::into_inner);
    let Table { begin, heads, columns } = table;
    let text = fs::read_to_string(page()).unwrap();
    let (before, rest) = text.split_once(begin).unwrap();
    let (table, after) = rest.split_once(END).unwrap();
    if std::env::var_os(WRITE).is_some() {
        let columns = [&heads[..], columns].concat();
        let head = format!("| {} |\n|{}", columns.join(" | "), "---|".repeat(columns.len()));
        let lines: Vec<String> = rows.iter().map(|row| row.line()).collect();
        let table = format!("{begin}\n\n{head}\n{}\n\n{END}", lines.join("\n"));
        return fs::write(page(), format!("{before}{table}{after}")).unwrap();
    }
    let lines: Vec<&str> = table.trim().lines().skip(2).collect();
    assert_eq!(
        lines.len(),
        rows.len(),
        "docs/models.md has a line for each row; set {WRITE}=1 to write them"
    );
    lines.iter().zip(rows).for_each(|(line, row)| row.check(line));
}
