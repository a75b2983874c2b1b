//! Models and adapters in files of torch are those that the same tensors make in safetensors.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/logits.rs"]
mod logits;

use std::{fs, path::Path};

use kernels::{DType, cpu::CpuBackend};
use logits::logits_of;
use model::{
    Decoder, Model,
    adapter::{self, AdapterError, BaseModel},
    testing::{self, Files, Pickle, Tensors, write_archive, write_torch},
};
use serde_json::json;

fn logits(folder: &Path) -> Result<Vec<f32>, String> {
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    let mut last = None;
    let model = Model::load(&ops, folder, &mut |progress| last = Some(progress))
        .map_err(|error| error.to_string())?;
    let last = last.unwrap();
    assert_eq!(last.done_bytes, last.total_bytes);
    Ok(logits_of(&ops, &model, 6))
}

/// A model of other weights than [`testing::model`].
fn other() -> Files {
    let mut files = testing::model();
    files.tensors.values_mut().for_each(|tensor| tensor.data.iter_mut().for_each(|x| *x = -*x));
    files
}

/// A kind of file that a folder may have.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Safetensors,
    SafetensorsIndex,
    Torch,
    TorchIndex,
}
use Kind::*;

/// Writes a model as one or two files of a kind.
fn write(folder: &Path, files: &Files, kind: Kind) {
    let part = |tensors: Tensors, name: &str| {
        if name.ends_with(".bin") {
            write_torch(&folder.join(name), &tensors).unwrap();
        } else {
            let at = folder.join("part");
            Files { tensors, ..files.clone() }.write_model(&at).unwrap();
            fs::rename(at.join("model.safetensors"), folder.join(name)).unwrap();
        }
    };
    fs::write(folder.join("config.json"), files.config.to_string()).unwrap();
    let (whole, parts) = match kind {
        Safetensors | SafetensorsIndex => {
            ("model.safetensors", ["model-1.safetensors", "model-2.safetensors"])
        }
        Torch | TorchIndex => ("pytorch_model.bin", ["pytorch_model-1.bin", "pytorch_model-2.bin"]),
    };
    if matches!(kind, Safetensors | Torch) {
        return part(files.tensors.clone(), whole);
    }
    let (first, second): (Tensors, Tensors) =
        files.tensors.clone().into_iter().partition(|(name, _)| name.contains("layers.0"));
    let mut map = serde_json::Map::new();
    for (tensors, name) in [(first, parts[0]), (second, parts[1])] {
        map.extend(tensors.keys().map(|tensor| (tensor.clone(), name.into())));
        part(tensors, name);
    }
    fs::write(folder.join(format!("{whole}.index.json")), json!({"weight_map": map}).to_string()).unwrap();
}

fn of_kinds(kinds: &[(Kind, Files)]) -> Result<Vec<f32>, String> {
    let folder = tempfile::tempdir().unwrap();
    kinds.iter().for_each(|(kind, files)| write(folder.path(), files, *kind));
    logits(folder.path())
}

#[test]
fn files_are_taken_in_the_order_of_transformers() {
    let plain = of_kinds(&[(Safetensors, testing::model())]).unwrap();
    let kinds = [Safetensors, SafetensorsIndex, Torch, TorchIndex];
    for (i, kind) in kinds.into_iter().enumerate() {
        assert_eq!(of_kinds(&[(kind, testing::model())]).unwrap(), plain, "{kind:?}");
        for worse in &kinds[i + 1..] {
            let logits = of_kinds(&[(kind, testing::model()), (*worse, other())]).unwrap();
            assert_eq!(logits, plain, "{kind:?} before {worse:?}");
            let logits = of_kinds(&[(kind, other()), (*worse, testing::model())]).unwrap();
            assert_ne!(logits, plain, "{kind:?} before {worse:?}");
        }
    }
}

#[test]
fn files_that_are_missing_or_would_run_something_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &testing::model(), TorchIndex);
    fs::remove_file(folder.path().join("pytorch_model-2.bin")).unwrap();
    let refused = logits(folder.path()).unwrap_err();
    assert!(refused.contains("pytorch_model-2.bin: No such file"), "{refused}");
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &testing::model(), Torch);
    let pickle = Pickle::default().global("os", "system").text("touch /tmp/x").op(b"\x85R.");
    write_archive(&folder.path().join("pytorch_model.bin"), &[("data.pkl", &pickle.0)]).unwrap();
    let refused = logits(folder.path()).unwrap_err();
    assert!(
        refused.contains("pytorch_model.bin: a pickle names os.system, which is not allowed"),
        "{refused}"
    );
    let mut files = testing::model();
    files.tensors.remove("model.norm.weight");
    assert_eq!(of_kinds(&[(Torch, files)]).unwrap_err(), "tensor model.norm.weight is missing");
}

/// An adapter's folder, and a model that it is read for.
struct Adapters(tempfile::TempDir);

impl Adapters {
    fn new() -> Adapters {
        let folder = tempfile::tempdir().unwrap();
        testing::model().write_model(&folder.path().join("model")).unwrap();
        Adapters(folder)
    }

    /// Writes an adapter to a file of torch, and its configuration.
    fn write_torch(&self, files: &Files) {
        fs::create_dir_all(self.0.path().join("adapter")).unwrap();
        fs::write(self.0.path().join("adapter/adapter_config.json"), files.config.to_string()).unwrap();
        write_torch(&self.0.path().join("adapter/adapter_model.bin"), &files.tensors).unwrap();
    }

    fn read(&self) -> Result<String, AdapterError> {
        let path = self.0.path().join("model");
        let model = BaseModel {
            merged: None,
            decoder: Decoder::from_folder(&path).unwrap(),
            path,
            dtype: DType::F32,
            share: model::Share::WHOLE,
        };
        adapter::read(&self.0.path().join("adapter"), &model).map(|adapter| testing::identity(&adapter))
    }
}

#[test]
fn an_adapter_in_a_file_of_torch_is_the_same() {
    for (names, lora_rank, seed) in [
        (&["q_proj"][..], 1, 1),
        (&["q_proj", "v_proj"], 4, 2),
        (&["gate_proj", "up_proj", "down_proj"], 3, 3),
        (&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 8, 4),
    ] {
        let (torch, safetensors) = (Adapters::new(), Adapters::new());
        let files = testing::adapter(names, lora_rank, seed);
        torch.write_torch(&files);
        files.write_adapter(&safetensors.0.path().join("adapter")).unwrap();
        let hash = safetensors.read().unwrap();
        assert_eq!(torch.read().unwrap(), hash, "{names:?}");
        // PEFT takes safetensors if there are both.
        safetensors.write_torch(&testing::adapter(names, lora_rank, 9));
        assert_eq!(safetensors.read().unwrap(), hash, "{names:?}");
    }
}

#[test]
fn faults_of_an_adapter_in_a_file_of_torch_are_named() {
    type Spoil = fn(&mut Tensors);
    let cases: [(Spoil, &str); 4] = [
        (|tensors| drop(tensors.pop_first()), "is missing"),
        (
            |tensors| {
                let (name, tensor) = tensors.pop_first().unwrap();
                tensors.insert(name.replace("layers.0", "layers.7"), tensor);
            },
            "belongs to no targeted module",
        ),
        (
            |tensors| tensors.values_mut().next().unwrap().shape.reverse(),
            "has the shape [32, 4], expected [4, 32]",
        ),
        (|tensors| tensors.values_mut().next().unwrap().data[0] = f32::NAN, "has NaN or infinite values"),
    ];
    for (spoil, cause) in cases {
        let adapters = Adapters::new();
        let mut files = testing::adapter(&["q_proj"], 4, 1);
        spoil(&mut files.tensors);
        adapters.write_torch(&files);
        let refused = adapters.read().unwrap_err().to_string();
        assert!(refused.contains(cause), "{refused}");
    }
    let adapters = Adapters::new();
    adapters.write_torch(&testing::adapter(&["q_proj"], 4, 1));
    let file = adapters.0.path().join("adapter/adapter_model.bin");
    fs::write(&file, "version https://git-lfs.github.com/spec/v1").unwrap();
    let refused = adapters.read().unwrap_err().to_string();
    assert_eq!(refused, "adapter_model.bin: neither an archive nor a pickle of torch.save");
    fs::remove_file(&file).unwrap();
    assert_eq!(adapters.read().unwrap_err().to_string(), "adapter_model.safetensors is missing");
}
