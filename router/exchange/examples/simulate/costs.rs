//! What things cost on the simulated server.

use std::time::Duration;

/// Times and sizes of a server.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    pub(crate) slots: u32,
    pub(crate) slot_bytes: u64,
    pub(crate) host_bytes: u64,
    pub(crate) disk_bytes: u64,
    pub(crate) seats: u32,
    /// Time after which a busy adapter leaves its slot to others.
    pub(crate) cycle_time: Duration,
    /// Seconds of a step without rows, and for each decode row and each prompt row.
    pub(crate) step: f64,
    pub(crate) row: f64,
    pub(crate) prompt_row: f64,
    /// Bytes a second from host memory to the device, from the disk to host memory, and from a source.
    pub(crate) copy_rate: f64,
    pub(crate) stage_rate: f64,
    pub(crate) fetch_rate: f64,
    /// Seconds of a lookup.
    pub(crate) lookup: f64,
}

impl Server {
    pub(crate) fn step_time(&self, decode_rows: usize, prompt_rows: usize) -> Duration {
        let rows = self.row * decode_rows as f64 + self.prompt_row * prompt_rows as f64;
        Duration::from_secs_f64(self.step + rows)
    }

    pub(crate) fn copy_time(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.copy_rate)
    }

    pub(crate) fn stage_time(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.stage_rate)
    }

    pub(crate) fn fetch_time(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(self.lookup + bytes as f64 / self.fetch_rate)
    }

    pub(crate) fn lookup_time(&self) -> Duration {
        Duration::from_secs_f64(self.lookup)
    }
}

/// Time after which a request fails whose adapter is not there.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
