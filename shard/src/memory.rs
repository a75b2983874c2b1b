//! How much memory there is for keys and values.

use std::fs;

/// Why KV memory could not be set aside.
#[derive(Debug, thiserror::Error)]
#[error("{given} bytes of KV memory hold no block of {block} bytes")]
pub struct TooSmall {
    given: u64,
    block: u64,
}

/// Blocks that fit into `given` bytes, or by default into a quarter of the memory that is available, but no more than
/// `most` (all sequences at their full length).
pub fn blocks(given: Option<u64>, block_bytes: usize, most: usize) -> Result<usize, TooSmall> {
    let block = block_bytes as u64;
    let budget = given.unwrap_or_else(|| available() / 4);
    match (budget / block) as usize {
        0 => Err(TooSmall { given: budget, block }),
        fit => Ok(fit.min(most)),
    }
}

/// Bytes that the system could give without swapping; 4 GiB where it does not say.
fn available() -> u64 {
    fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
            line.trim().trim_end_matches(" kB").parse::<u64>().ok()
        })
        .map_or(4 << 30, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fit_the_budget() {
        assert_eq!(blocks(Some(1000), 64, 100).unwrap(), 15);
        assert_eq!(blocks(Some(1000), 64, 4).unwrap(), 4);
        assert!(blocks(None, 64, 1_000_000).unwrap() > 1000);
        assert_eq!(
            blocks(Some(10), 64, 4).unwrap_err().to_string(),
            "10 bytes of KV memory hold no block of 64 bytes"
        );
    }
}
