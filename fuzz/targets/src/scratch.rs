//! The small model and the adapter whose files an input takes the place of.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use kernels::{DType, cpu::CpuBackend};
use model::{Decoder, Share, adapter::BaseModel};
use tempfile::TempDir;

use crate::must;

/// The model's folder, and beside it the folder of its adapters.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../integration-tests/fixtures/tiny/model");
const ADAPTER: &str = "../adapters/r8";

/// A model and an adapter of it.
pub(crate) struct Scratch {
    pub(crate) base: BaseModel,
    pub(crate) backend: CpuBackend,
}

/// The only one of a process.
pub(crate) fn scratch() -> &'static Scratch {
    static SCRATCH: OnceLock<Scratch> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let path = PathBuf::from(MODEL);
        let decoder = must(Decoder::from_folder(&path));
        let base = BaseModel { decoder, path, merged: None, dtype: DType::F32, share: Share::WHOLE };
        Scratch { base, backend: must(CpuBackend::new(DType::F32, 1)) }
    })
}

/// A new folder with a link to the model's file of that name.
pub(crate) fn model_with(file: &str) -> TempDir {
    with_link(&Path::new(MODEL).join(file))
}

/// A new folder with a link to the adapter's file of that name.
pub(crate) fn adapter_with(file: &str) -> TempDir {
    with_link(&Path::new(MODEL).join(ADAPTER).join(file))
}

fn with_link(file: &Path) -> TempDir {
    let folder = must(tempfile::tempdir());
    must(symlink(file, folder.path().join(file.file_name().unwrap_or_default())));
    folder
}
