//! How a device's memory is shared out.

use std::fs;

/// Why memory could not be shared out.
#[derive(Debug, thiserror::Error)]
pub enum TooSmall {
    /// Not one block fits.
    #[error("{given} bytes of KV memory hold no block of {block} bytes")]
    Block {
        /// What there is for keys and values.
        given: u64,
        /// A block of all layers.
        block: u64,
    },
    /// The weights have left too little.
    #[error(
        "out of memory: {free} of {total} bytes are free beside the weights and a step; {reserved} of them are \
         reserved (--cuda-memory-fraction) and recordings take {RECORDINGS}"
    )]
    Device {
        /// What is free.
        free: u64,
        /// What the device has.
        total: u64,
        /// What stays free.
        reserved: u64,
    },
}

/// Set aside for recorded steps and what the driver takes while adapters come and go.
const RECORDINGS: u64 = 1 << 30;

/// Memory for what grows and shrinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes of keys and values.
    pub kv_bytes: u64,
    /// Bytes of adapters in slots; 0 for no bound but the slots.
    pub adapter_bytes: u64,
}

impl Room {
    /// What was asked for, or by default a quarter of the memory that is available.
    pub fn on_host(kv: Option<u64>, adapters: Option<u64>) -> Room {
        Room { kv_bytes: kv.unwrap_or_else(|| available() / 4), adapter_bytes: adapters.unwrap_or(0) }
    }

    /// Shares out what is `free` of `total` bytes: `used` of the total may be in use, and of what that leaves the
    /// fraction `adapters` is theirs.
    pub fn on_device(
        (free, total): (u64, u64),
        (used, adapters): (f32, f32),
        kv: Option<u64>,
    ) -> Result<Room, TooSmall> {
        let reserved = (total as f64 * (1.0 - f64::from(used))) as u64;
        let left = free.saturating_sub(reserved).saturating_sub(RECORDINGS);
        let adapter_bytes = (left as f64 * f64::from(adapters)) as u64;
        if left == 0 {
            return Err(TooSmall::Device { free, total, reserved });
        }
        Ok(Room { kv_bytes: kv.unwrap_or(u64::MAX).min(left - adapter_bytes), adapter_bytes })
    }
}

/// Blocks that fit into `budget` bytes, but no more than `most` (all sequences at their full length).
pub fn blocks(budget: u64, block_bytes: usize, most: usize) -> Result<usize, TooSmall> {
    let block = block_bytes as u64;
    match (budget / block) as usize {
        0 => Err(TooSmall::Block { given: budget, block }),
        fit => Ok(fit.min(most)),
    }
}

/// Bytes that the system could give without swapping; 4 GiB where it does not say.
pub fn available() -> u64 {
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
        assert_eq!(blocks(1000, 64, 100).unwrap(), 15);
        assert_eq!(blocks(1000, 64, 4).unwrap(), 4);
        assert!(Room::on_host(None, None).kv_bytes > 1 << 20);
        let refused = blocks(10, 64, 4).unwrap_err().to_string();
        assert_eq!(refused, "10 bytes of KV memory hold no block of 64 bytes");
    }

    #[test]
    fn a_device_is_shared_out() {
        let gib = |n: u64| n << 30;
        let share = |kv| Room::on_device((gib(60), gib(80)), (0.75, 0.25), kv);
        // 20 GiB stay free, 1 is for recordings, and a quarter of 39 is for adapters.
        let adapter_bytes = gib(39) / 4;
        assert_eq!(share(None).unwrap(), Room { kv_bytes: gib(39) - adapter_bytes, adapter_bytes });
        assert_eq!(share(Some(gib(2))).unwrap().kv_bytes, gib(2));
        let full = Room::on_device((gib(9), gib(80)), (0.9, 0.1), None).unwrap_err().to_string();
        assert!(full.contains("out of memory: 9663676416 of 85899345920 bytes are free"), "{full}");
    }
}
