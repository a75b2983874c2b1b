//! What ptxas reports of the code that it has made.

/// A function that may spill: a line `// May spill 8 bytes: NAME: reason` of the source.
struct Allowance<'a> {
    name: &'a str,
    bytes: u64,
}

const MARK: &str = "// May spill";

impl<'a> Allowance<'a> {
    fn parse(line: &'a str) -> Option<Allowance<'a>> {
        let (bytes, rest) = line.strip_prefix(MARK)?.split_once(" bytes: ")?;
        let (name, reason) = rest.split_once(": ")?;
        let is_name = !name.is_empty() && name.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric());
        let bytes = bytes.trim_start().parse().ok()?;
        (is_name && !reason.is_empty()).then_some(Allowance { name, bytes })
    }

    /// Whether a mangled name is that of the function. It has the length before it, and the arguments of a template or
    /// the end of the scope behind it.
    fn is_of(&self, mangled: &str) -> bool {
        let name = format!("{}{}", self.name.len(), self.name);
        ["I", "E"].iter().any(|next| mangled.contains(&format!("{name}{next}")))
    }
}

/// Checks the report of a source. It must not say that an instruction of Hopper has lost its point (products that wait
/// for each other, `setmaxnreg` without effect), nor that registers went to memory, unless the source allows the
/// function to store so many bytes of them. How often they are loaded again is not bounded.
pub(crate) fn check(source: &str, report: &str) -> Result<(), String> {
    let marks = source.lines().map(str::trim).filter(|line| line.starts_with(MARK));
    let allowances =
        marks.map(|line| Allowance::parse(line).ok_or_else(|| format!("cannot be read: {line}")));
    let allowances = allowances.collect::<Result<Vec<_>, _>>()?;
    let mut function = "";
    let mut known = vec![false; allowances.len()];
    for line in report.lines().map(str::trim) {
        if line.contains("Potential Performance Loss") {
            return Err(line.to_owned());
        }
        if let Some((_, name)) = line.split_once("Function properties for ") {
            function = name;
            for (allowance, known) in allowances.iter().zip(&mut known) {
                *known |= allowance.is_of(function);
            }
        }
        let Some(spilled) = spilled(line)? else { continue };
        let allowed = allowances.iter().filter(|allowance| allowance.is_of(function));
        if spilled > allowed.map(|allowance| allowance.bytes).max().unwrap_or(0) {
            return Err(format!("{function}: {line}"));
        }
    }
    match allowances.iter().zip(known).find(|(_, known)| !known) {
        Some((allowance, _)) => Err(format!("there is no function {} that could spill", allowance.name)),
        None => Ok(()),
    }
}

/// The bytes of registers that a function stores in memory, if a line says it.
fn spilled(line: &str) -> Result<Option<u64>, String> {
    let Some((before, _)) = line.split_once(" bytes spill stores") else { return Ok(None) };
    let bytes = before.rsplit([' ', ',']).next().unwrap_or_default();
    bytes.parse().map(Some).map_err(|_| format!("cannot be read: {line}"))
}
