//! Merges adapters into one that is staged as any other.

use kernels::Backend;
use model::adapter::{Merge, MergePart, Recipe};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, SemaphorePermit},
};
use tokio_util::sync::CancellationToken;

use super::{Adapters, StageError, StageOrder, files::OpenPart, stage::Read};

/// Bytes that all merges may take at the same time, beside the host copies that come of them. One that takes more runs
/// alone.
const BYTES: usize = 2 << 30;
/// The number of permits that these bytes are divided into.
const PERMITS: usize = 1 << 10;

/// Memory for merging. Merges that have to wait for it wait in turn.
pub(super) struct Memory(Semaphore);

impl Default for Memory {
    fn default() -> Memory {
        Memory(Semaphore::new(PERMITS))
    }
}

impl Memory {
    /// Waits on this thread of the runtime until there is memory. `None`: nobody waits for the merge any more.
    fn take(&self, bytes: usize, cancelled: &CancellationToken) -> Option<SemaphorePermit<'_>> {
        let permits = bytes.div_ceil(BYTES / PERMITS).min(PERMITS) as u32;
        let taken = cancelled.run_until_cancelled(self.0.acquire_many(permits));
        Handle::current().block_on(taken)?.ok()
    }
}

impl<B: Backend> Adapters<B> {
    /// Reads the parts of a merge and merges them.
    pub(super) fn read_merge(
        &self,
        order: &StageOrder,
        recipe: &Recipe,
        opened: &[OpenPart],
        cancelled: &CancellationToken,
    ) -> Result<Read<B::HostAdapter>, StageError> {
        let name = || order.name.clone();
        let merge_error = |source| StageError::Merge { name: name(), source };
        let mut parts = Vec::new();
        for (part, opened) in order.parts.iter().zip(opened) {
            let files =
                opened.files().map_err(|source| StageError::Io { name: part.name.clone(), source })?;
            parts.push(MergePart { name: part.name.clone(), files, weight: part.weight });
        }
        let merge = Merge::open(parts, recipe, &self.model).map_err(merge_error)?;
        let host_bytes = self.ops.host_bytes(&self.sites, &merge.shapes());
        let host_bytes = host_bytes.map_err(|source| StageError::Backend { name: name(), source })?;
        if host_bytes as u64 > order.max_bytes {
            return Ok(Read::NeedsRoom(host_bytes as u64));
        }
        let memory = self.merges.take(merge.read_bytes(), cancelled);
        let _memory = memory.ok_or_else(|| StageError::Interrupted { name: name() })?;
        let read = merge.read_as(order.content, &|| cancelled.is_cancelled()).map_err(merge_error)?;
        let (parts, properties) = read.into_parts();
        let adapter = self.ops.stage(&self.sites, &parts);
        let adapter = adapter.map_err(|source| StageError::Backend { name: name(), source })?;
        Ok(self.host_copy(order, adapter, properties, host_bytes))
    }
}
