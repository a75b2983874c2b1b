//! A small model and two adapters of it, "one" and "two", ready to run.
#![allow(dead_code, reason = "each program of tests uses a part of it")]

use std::{
    fs,
    hash::{DefaultHasher, Hasher},
    path::Path,
    sync::Arc,
    time::Duration,
};

use kernels::{Backend, DType};
use lorax_shard::{
    adapters::{AdapterFile, AdapterPart, Adapters, Properties, StageAnswer, StageOrder, Stamp},
    engine::{Engine, Limits},
};
use model::{
    Model,
    adapter::{BaseModel, ContentHash},
    testing::{self, Files},
};

/// What reading an adapter may take.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// Writes the files into a folder and loads them.
pub(crate) fn engine<B: Backend>(ops: B, folder: &Path) -> (Engine<B>, Arc<Adapters<B>>) {
    engine_with_slots(ops, folder, 2)
}

/// As [`engine`], with so many slots for adapters.
pub(crate) fn engine_with_slots<B: Backend>(
    ops: B,
    folder: &Path,
    num_slots: usize,
) -> (Engine<B>, Arc<Adapters<B>>) {
    engine_of(&testing::model(), ops, folder, num_slots)
}

/// As [`engine_with_slots`], of a model like that of [`testing::model`].
pub(crate) fn engine_of<B: Backend>(
    files: &Files,
    ops: B,
    folder: &Path,
    num_slots: usize,
) -> (Engine<B>, Arc<Adapters<B>>) {
    files.write_model(&folder.join("model")).unwrap();
    for (name, seed) in [("one", 1), ("two", 2)] {
        write_adapter(&folder.join("adapters").join(name), seed);
    }
    engine_in(ops, folder, num_slots)
}

/// As [`engine_of`], of a folder `model`, and of adapters below a folder `adapters`.
pub(crate) fn engine_in<B: Backend>(
    ops: B,
    folder: &Path,
    num_slots: usize,
) -> (Engine<B>, Arc<Adapters<B>>) {
    let at = |name: &str| folder.join(name);
    let ops = Arc::new(ops);
    let model = Arc::new(Model::load(&*ops, &at("model"), &mut |_| {}).unwrap());
    let base = BaseModel {
        merged: None,
        decoder: model.decoder().clone(),
        path: at("model"),
        dtype: DType::F32,
        share: model.share(),
    };
    let adapters = Arc::new(Adapters::new(ops.clone(), base, model.sites().to_vec(), READ_TIMEOUT));
    let limits = Limits { num_slots, max_rows: 32, max_sequences: 4, max_logit_rows: 32 };
    let mut engine = Engine::new(ops, model, adapters.clone(), limits).unwrap();
    engine.warm_up().unwrap();
    engine.set_blocks(16).unwrap();
    (engine, adapters)
}

pub(crate) fn write_adapter(folder: &Path, seed: u64) {
    testing::adapter(&["q_proj", "down_proj"], 3, seed).write_adapter(folder).unwrap();
}

/// The files that an adapter's content is made of.
const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// Has an adapter staged as it is now, whose files are in a folder.
pub(crate) fn order(folder: &Path, session: u64) -> StageOrder {
    let file = |name: &&str| {
        let stamp = Stamp::of(&fs::metadata(folder.join(name)).unwrap());
        AdapterFile { name: name.into(), stamp: Some(stamp) }
    };
    let files = FILES.iter().map(file).collect();
    StageOrder {
        session,
        content: content_of(folder),
        name: folder.file_name().unwrap().to_string_lossy().into(),
        parts: vec![AdapterPart { name: String::new(), folder: folder.into(), files, weight: 1.0 }],
        merge: None,
        max_bytes: u64::MAX,
    }
}

/// A hash of an adapter's files.
pub(crate) fn content_of(folder: &Path) -> ContentHash {
    let mut hasher = DefaultHasher::new();
    FILES.iter().for_each(|name| hasher.write(&fs::read(folder.join(name)).unwrap()));
    let mut content = [0; 32];
    content[..8].copy_from_slice(&hasher.finish().to_le_bytes());
    ContentHash(content)
}

/// Stages the adapter in a folder.
pub(crate) async fn stage<B: Backend>(
    adapters: &Arc<Adapters<B>>,
    folder: &Path,
    session: u64,
) -> Arc<Properties> {
    match adapters.stage(order(folder, session)).await.unwrap() {
        StageAnswer::Staged(properties) => properties,
        answer => panic!("{answer:?}"),
    }
}
