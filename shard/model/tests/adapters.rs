//! Which adapters are served, and which are refused with which words.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

use kernels::{DType, cpu::CpuBackend};
use model::{
    Decoder,
    adapter::{self, Adapter, AdapterError, AdapterFolder, BaseModel},
    testing::{self, Files, Tensor},
};
use serde_json::{Value, json};

const SEVEN: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Writes a model into a folder.
fn model(folder: &Path, files: &Files, dtype: DType) -> BaseModel {
    files.write_model(folder).unwrap();
    BaseModel {
        merged: None,
        decoder: Decoder::from_folder(folder).unwrap(),
        path: folder.into(),
        dtype,
        share: model::Share::WHOLE,
    }
}

fn read(files: &Files) -> Result<Adapter, String> {
    read_for(files, &testing::model(), DType::F32)
}

fn read_for(files: &Files, base: &Files, dtype: DType) -> Result<Adapter, String> {
    let folder = tempfile::tempdir().unwrap();
    let base = model(&folder.path().join("model"), base, dtype);
    let adapter = folder.path().join("adapter");
    files.write_adapter(&adapter).unwrap();
    adapter::read(&adapter, &base).map_err(|error| error.to_string())
}

fn with(field: &str, value: Value) -> Files {
    let mut files = testing::adapter(&SEVEN, 4, 1);
    files.config[field] = value;
    files
}

#[test]
fn an_adapter_begins_at_an_invocation_only_where_peft_confines_it() {
    assert_eq!(read(&with("alora_invocation_tokens", json!([7, 8]))).unwrap().invocation, [7, 8]);
    assert_eq!(read(&with("alora_invocation_tokens", json!([]))).unwrap().invocation, [0; 0]);
    let beside = |field: &str, value: Value| {
        let mut files = with("alora_invocation_tokens", json!([7]));
        files.config[field] = value;
        files
    };
    for (field, value) in [
        ("use_dora", json!(true)),
        ("bias", json!("all")),
        ("bias", json!("lora_only")),
        ("init_lora_weights", json!("olora")),
        ("init_lora_weights", json!("mica")),
        ("modules_to_save", json!(["lm_head"])),
        ("trainable_token_indices", json!([3])),
        ("ensure_weight_tying", json!(true)),
    ] {
        let error = read(&beside(field, value)).unwrap_err();
        assert!(error.contains(field) && error.contains("alora_invocation_tokens"), "{error}");
    }
    let error = read(&beside("target_modules", json!(["q_proj", "embed_tokens"]))).unwrap_err();
    assert!(error.contains("alora_invocation_tokens") && error.contains("embedding"), "{error}");
    // A copied table is in no field of the configuration.
    let base = testing::model();
    let mut files = with("alora_invocation_tokens", json!([7]));
    let mut table = base.tensors["lm_head.weight"].clone();
    files.tensors.insert("base_model.model.lm_head.weight".into(), table.clone());
    assert_eq!(read(&files).unwrap().invocation, [7], "the model's own rows change nothing");
    table.data[5] += 1.0;
    files.tensors.insert("base_model.model.lm_head.weight".into(), table);
    let error = read(&files).unwrap_err();
    assert!(error.contains("alora_invocation_tokens") && error.contains("rows of its own"), "{error}");
}

#[test]
fn all_projections_are_read_and_scaled() {
    let files = testing::adapter(&SEVEN, 4, 1);
    let plain = read(&files).unwrap();
    assert_eq!((plain.parts.len(), plain.max_lora_rank), (14, 4));
    assert_eq!(plain.sites, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]);
    let scale = plain.parts[0].low_rank.as_ref().unwrap().scale;
    assert_eq!(scale, 2.0, "alpha / r");
    let rslora = read(&with("use_rslora", json!(true))).unwrap();
    assert_eq!(rslora.parts[0].low_rank.as_ref().unwrap().scale, 4.0, "alpha / √r");
}

#[test]
fn reading_ends_before_the_next_tensor_when_it_is_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    let base = model(&folder.path().join("model"), &testing::model(), DType::F32);
    let at = folder.path().join("adapter");
    testing::adapter(&SEVEN, 4, 1).write_adapter(&at).unwrap();
    let opened = AdapterFolder::open(&at, &base).unwrap();
    let (ops, sites) = (CpuBackend::new(DType::F32, 1).unwrap(), base.decoder.sites());
    // Two layers of seven projections, each with an A and a B.
    for allowed in 0..28 {
        let asked = AtomicUsize::new(0);
        let is_cancelled = || asked.fetch_add(1, Ordering::Relaxed) == allowed;
        let cancelled = opened.stage(&ops, &sites, 7, &is_cancelled);
        assert!(matches!(cancelled, Err(AdapterError::Cancelled)));
        assert_eq!(asked.into_inner(), allowed + 1);
    }
    let (_, properties) = opened.stage(&ops, &sites, 7, &|| false).unwrap();
    assert_eq!((properties.max_lora_rank, properties.sites.len()), (4, 7));
}

#[test]
fn identity_is_what_is_computed() {
    let files = testing::adapter(&SEVEN, 4, 1);
    let hash = testing::identity(&read(&files).unwrap());
    let renamed = with("base_model_name_or_path", json!("elsewhere"));
    assert_eq!(testing::identity(&read(&renamed).unwrap()), hash, "names do not count");
    assert_ne!(testing::identity(&read(&with("lora_alpha", json!(9))).unwrap()), hash, "scales do");
    assert_ne!(testing::identity(&read(&testing::adapter(&SEVEN, 4, 2)).unwrap()), hash, "weights do");
}

#[test]
fn ways_to_initialize_that_keep_the_base_change_nothing() {
    let hash = testing::identity(&read(&testing::adapter(&SEVEN, 4, 1)).unwrap());
    let ways = ["eva", "gaussian", "Gaussian", "mica", "orthogonal"].map(Value::from);
    for way in ways.into_iter().chain([Value::Null, json!(true), json!(false)]) {
        assert_eq!(testing::identity(&read(&with("init_lora_weights", way)).unwrap()), hash);
    }
}

#[test]
fn ranks_and_scales_follow_their_patterns() {
    let mut files = testing::adapter(&["q_proj", "up_proj"], 4, 1);
    files.config["rank_pattern"] = json!({"layers.1.mlp.up_proj": 6});
    files.config["alpha_pattern"] = json!({"q_proj": 12});
    for (matrix, shape) in [("A", [6, 32]), ("B", [48, 6])] {
        let name = format!("base_model.model.model.layers.1.mlp.up_proj.lora_{matrix}.weight");
        files.tensors.insert(name, Tensor { shape: shape.into(), data: vec![0.5; shape[0] * shape[1]] });
    }
    let adapter = read(&files).unwrap();
    let ranks: Vec<usize> = adapter.parts.iter().map(|part| part.shape().lora_rank).collect();
    assert_eq!(ranks, [4, 4, 4, 6]);
    assert_eq!(adapter.parts[0].low_rank.as_ref().unwrap().scale, 3.0);
}

#[test]
fn what_cannot_be_served_exactly_is_refused_by_name() {
    let nan =
        |value: f32| move |files: &mut Files| files.tensors.values_mut().next().unwrap().data[3] = value;
    type Spoil = Box<dyn Fn(&mut Files)>;
    let set = |field: &'static str, value: Value| -> Spoil {
        Box::new(move |files: &mut Files| files.config[field] = value.clone())
    };
    let first = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight";
    let cases: Vec<(Spoil, &str)> = vec![
        (set("bias", json!("every")), "bias = every is not supported"),
        (
            set("layers_pattern", json!("layers")),
            "layers_to_transform is missing or not given, as layers_pattern is",
        ),
        (set("init_lora_weights", json!("pissa_niter_4")), "init_lora_weights = pissa_niter_4"),
        (set("init_lora_weights", json!("new_way")), "init_lora_weights = new_way is not supported"),
        (set("init_lora_weights", json!(["eva"])), "init_lora_weights = [\"eva\"] is not supported"),
        (set("r", json!(0)), "r is missing or not a positive integer"),
        (set("r", json!(-4)), "invalid value"),
        (set("r", json!(8)), "has the shape [4, 32], expected [8, 32]"),
        (set("target_modules", Value::Null), "down_proj.lora_A.weight belongs to no targeted module"),
        (set("target_modules", json!(["q_proj", "norm"])), "\"model.norm\" is no projection of this model"),
        (set("target_modules", json!("(")), "target_modules: Parsing error"),
        (set("target_modules", json!(".*nothing")), "no module of this model is targeted"),
        (set("target_modules", json!(["q_proj"])), "belongs to no targeted module"),
        (
            set("layers_to_transform", json!([0])),
            "layers.1.mlp.down_proj.lora_A.weight belongs to no targeted",
        ),
        (Box::new(nan(f32::NAN)), "has NaN or infinite values"),
        (Box::new(nan(f32::NEG_INFINITY)), "has NaN or infinite values"),
        (
            Box::new(move |files| drop(files.tensors.remove(first))),
            "layers.0.mlp.down_proj.lora_A.weight is missing",
        ),
        (
            Box::new(|files| {
                let dora = "base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector";
                files.tensors.insert(dora.into(), Tensor { shape: vec![32], data: vec![1.0; 32] });
            }),
            "lora_magnitude_vector belongs to no targeted module",
        ),
        (
            Box::new(move |files| {
                let other = Tensor { shape: vec![4, 2048], data: vec![0.0; 4 * 2048] };
                files.tensors.insert(first.into(), other);
            }),
            "has the shape [4, 2048], expected [4, 48]",
        ),
    ];
    for (spoil, cause) in cases {
        let mut files = testing::adapter(&SEVEN, 4, 1);
        spoil(&mut files);
        let refusal = read(&files).err().unwrap_or_else(|| panic!("served in spite of: {cause}"));
        assert!(refusal.contains(cause), "{refusal}");
        assert!(!refusal.contains('/'), "clients are not told where files are: {refusal}");
    }
}

#[test]
fn values_beyond_the_type_computed_with_are_refused() {
    let types = [DType::F32, DType::Bf16, DType::F16];
    for (matrix, value, alpha, fits) in [
        ("A", 60_000.0, 4.0, [true, true, true]),
        ("A", 70_000.0, 4.0, [true, true, false]),
        ("B", 60_000.0, 8.0, [true, true, true]),
        ("B", -60_000.0, 8.0, [true, true, true]),
        ("B", 70_000.0, 2.0, [true, true, false]),
        ("B", f32::MAX, 4.0, [true, false, false]),
        ("B", 1e38, 64.0, [true, true, false]),
        ("B", 1.0, 1e300, [false, false, false]),
        ("B", 1.0, -1e300, [false, false, false]),
    ] {
        let mut files = with("lora_alpha", json!(alpha));
        let name = format!("base_model.model.model.layers.1.mlp.up_proj.lora_{matrix}.weight");
        files.tensors.get_mut(&name).unwrap().data[5] = value;
        for (dtype, fits) in types.into_iter().zip(fits) {
            let read = read_for(&files, &testing::model(), dtype);
            assert_eq!(read.is_ok(), fits, "{matrix} {value} {alpha} {dtype:?}");
            assert!(read.err().is_none_or(|refusal| refusal.contains("too large for")));
        }
    }
}

fn replace_by_folder(file: &Path) {
    fs::remove_file(file).unwrap();
    fs::create_dir(file).unwrap();
}

fn replace_by_pipe(file: &Path) {
    fs::remove_file(file).unwrap();
    assert!(Command::new("mkfifo").arg(file).status().unwrap().success());
}

fn replace_by_device(file: &Path) {
    fs::remove_file(file).unwrap();
    symlink("/dev/zero", file).unwrap();
}

/// Spoils an adapter's folder, and sees it refused.
fn assert_refused(spoil: impl Fn(&Path), cause: &str) {
    let folder = tempfile::tempdir().unwrap();
    let base = model(&folder.path().join("model"), &testing::model(), DType::F32);
    testing::adapter(&SEVEN, 4, 1).write_adapter(folder.path()).unwrap();
    spoil(folder.path());
    let refusal = adapter::read(folder.path(), &base).err().unwrap().to_string();
    assert!(refusal.contains(cause), "{refusal}");
}

#[test]
fn damaged_folders_are_refused() {
    type Spoil = fn(&Path);
    let cases: [(Spoil, &str); 5] = [
        (
            |folder| fs::remove_file(folder.join(adapter::CONFIG_FILE)).unwrap(),
            "adapter_config.json is missing",
        ),
        (
            |folder| fs::remove_file(folder.join(adapter::WEIGHTS_FILES[0])).unwrap(),
            "adapter_model.safetensors is missing",
        ),
        (
            |folder| fs::write(folder.join(adapter::CONFIG_FILE), "not json").unwrap(),
            "adapter_config.json: expected ident",
        ),
        (|folder| fs::write(folder.join(adapter::CONFIG_FILE), [0xff, 0xfe]).unwrap(), "adapter_config.json"),
        (
            |folder| {
                let file = folder.join(adapter::WEIGHTS_FILES[0]);
                let all = fs::read(&file).unwrap();
                fs::write(&file, &all[..all.len() / 2]).unwrap();
            },
            "adapter_model.safetensors: truncated",
        ),
    ];
    for (spoil, cause) in cases {
        assert_refused(spoil, cause);
    }
}

#[test]
fn files_without_an_end_are_refused() {
    for replace in [replace_by_folder, replace_by_pipe, replace_by_device] {
        for file in [adapter::CONFIG_FILE, adapter::WEIGHTS_FILES[0]] {
            assert_refused(|folder| replace(&folder.join(file)), &format!("{file}: not a regular file"));
        }
    }
    let lengthen = |folder: &Path| {
        let config = fs::OpenOptions::new().append(true).open(folder.join(adapter::CONFIG_FILE));
        config.unwrap().set_len(1 << 40).unwrap();
    };
    assert_refused(lengthen, "adapter_config.json: longer than 1048576 bytes");
}

/// An adapter on the head, with the copies of the model's own tensors that PEFT writes beside it.
fn with_copies(base: &Files, copies: &[(&str, &str)]) -> Files {
    let mut files = testing::adapter(&["q_proj"], 4, 1);
    files.config["target_modules"] = json!(["q_proj", "lm_head"]);
    for (matrix, shape) in [("A", [4, 32]), ("B", [96, 4])] {
        let tensor = Tensor { shape: shape.into(), data: vec![0.25; shape[0] * shape[1]] };
        files.tensors.insert(format!("base_model.model.lm_head.lora_{matrix}.weight"), tensor);
    }
    for (name, module) in copies {
        let tensor = base.tensors[&format!("{module}.weight")].clone();
        files.tensors.insert(format!("base_model.model.{name}.weight"), tensor);
    }
    files
}

/// Adds a tensor to a file, all of it a hole.
fn add_hole(file: &Path, name: &str, shape: [u64; 2]) {
    let all = fs::read(file).unwrap();
    let (len, rest) = all.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    let begin = data.len() as u64;
    let end = begin + 4 * shape[0] * shape[1];
    header[name] = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]});
    let header = header.to_string();
    let len = header.len() as u64;
    fs::write(file, [&len.to_le_bytes(), header.as_bytes(), data].concat()).unwrap();
    fs::OpenOptions::new().append(true).open(file).unwrap().set_len(8 + len + end).unwrap();
}

#[test]
fn tensors_of_another_shape_are_refused_unread() {
    for name in ["model.layers.0.self_attn.q_proj.lora_A", "lm_head.base_layer"] {
        let folder = tempfile::tempdir().unwrap();
        let base = model(&folder.path().join("model"), &testing::model(), DType::F32);
        let mut files = with_copies(&testing::model(), &[]);
        let name = format!("base_model.model.{name}.weight");
        files.tensors.remove(&name);
        files.write_adapter(folder.path()).unwrap();
        add_hole(&folder.path().join(adapter::WEIGHTS_FILES[0]), &name, [4, 1 << 36]);
        let refusal = adapter::read(folder.path(), &base).err().unwrap().to_string();
        assert!(refusal.contains(&format!("{name} has the shape [4, 68719476736]")), "{refusal}");
    }
}

#[test]
fn copies_of_the_models_own_tensors_change_nothing() {
    let base = testing::model();
    let plain = read(&with_copies(&base, &[])).unwrap();
    let copies = [("lm_head.base_layer", "lm_head"), ("model.embed_tokens", "model.embed_tokens")];
    assert_eq!(testing::identity(&read(&with_copies(&base, &copies)).unwrap()), testing::identity(&plain));
    let mut tied = base.clone();
    tied.config["tie_word_embeddings"] = json!(true);
    tied.tensors.remove("lm_head.weight");
    let copies = with_copies(&tied, &[("lm_head.base_layer", "model.embed_tokens")]);
    assert_eq!(testing::identity(&read_for(&copies, &tied, DType::F32).unwrap()), testing::identity(&plain));
}

/// What belongs to the kinds of adapters that bring more than A and B.
#[test]
fn tensors_that_a_field_promises_must_be_there() {
    for (field, value, cause) in [
        ("modules_to_save", json!(["lm_head"]), "base_model.model.lm_head.weight is missing"),
        ("modules_to_save", json!(["embed_tokens"]), "model.embed_tokens.weight is missing"),
        ("modules_to_save", json!(["norm"]), "modules_to_save = [\"norm\"] is not supported"),
        ("modules_to_save", json!(["q_proj"]), "modules_to_save = [\"q_proj\"] is not supported"),
        ("target_modules", json!(["embed_tokens"]), "embed_tokens.lora_embedding_A is missing"),
        ("use_dora", json!(true), "layers.0.self_attn.q_proj.lora_magnitude_vector is missing"),
        ("lora_bias", json!(true), "layers.0.self_attn.q_proj.lora_B.bias is missing"),
        ("trainable_token_indices", json!([1]), "trainable_tokens_delta is missing"),
        ("trainable_token_indices", json!([]), "trainable_token_indices is missing or not distinct tokens"),
        ("trainable_token_indices", json!([-1]), "trainable_token_indices is missing or not distinct tokens"),
        (
            "trainable_token_indices",
            json!([3, 3]),
            "trainable_token_indices is missing or not distinct tokens",
        ),
        ("trainable_token_indices", json!({"norm": [3]}), "trainable_token_indices = {\"norm\":[3]}"),
        ("trainable_token_indices", json!("all"), "trainable_token_indices is missing or not distinct"),
    ] {
        let refusal = read(&with(field, value.clone())).err().unwrap_or_else(|| panic!("{field} = {value}"));
        assert!(refusal.contains(cause), "{refusal}");
    }
}

/// PEFT has an index error for them, unless the model was given more rows before.
#[test]
fn tokens_beyond_the_models_rows_are_refused_by_number() {
    for (value, number) in [
        (json!([96]), 96),
        (json!([95, 96]), 96),
        (json!([3, 200, 97]), 200),
        (json!([1000, 96]), 1000),
        (json!([4_294_967_295_u32]), u32::MAX),
        (json!({"embed_tokens": [96]}), 96),
        (json!({"lm_head": [97]}), 97),
        (json!({"model.embed_tokens": [0, 128]}), 128),
        (json!({"embed_tokens": [1], "lm_head": [4000]}), 4000),
        (json!({"embed_tokens": [98], "lm_head": [1]}), 98),
    ] {
        let refusal = read(&with("trainable_token_indices", value.clone())).unwrap_err();
        let expected =
            format!("trainable_token_indices = {number}, beyond the 96 rows of the model's table, is not");
        assert!(refusal.contains(&expected), "{value}: {refusal}");
    }
}

/// What is trained so cannot be served as it is, and can be converted.
#[test]
fn initializations_that_change_the_model_are_refused_with_the_way_to_convert_them() {
    for way in [
        "pissa",
        "pissa_niter_0",
        "pissa_niter_1",
        "pissa_niter_4",
        "pissa_niter_16",
        "pissa_niter_64",
        "pissa_new",
        "corda",
        "corda_kpm",
        "corda_ipm",
    ] {
        let refusal = read(&with("init_lora_weights", json!(way))).unwrap_err();
        let expected =
            format!("init_lora_weights = {way} is not supported: it changed the weights of the model");
        assert!(refusal.contains(&expected), "{refusal}");
        assert!(
            refusal.contains("save the adapter with `path_initial_model_for_weight_conversion`"),
            "{refusal}"
        );
    }
}

/// The paths of the modules that an adapter changes.
fn paths(files: &Files) -> std::collections::BTreeSet<String> {
    let path =
        |name: &String| Some(name.strip_prefix("base_model.model.")?.split_once(".lora_")?.0.to_owned());
    files.tensors.keys().filter_map(path).collect()
}

#[test]
fn layers_are_asked_for_by_endings_of_paths_alone() {
    let all = testing::adapter(&SEVEN, 4, 1);
    let paths = paths(&all);
    for (targets, layers, changed) in [
        (json!(SEVEN), json!([0]), 7),
        (json!(SEVEN), json!(0), 7),
        (json!(SEVEN), json!([]), 14),
        (json!(paths), json!([0]), 14),
        (json!(["q_proj", "model.layers.1.mlp.up_proj"]), json!([0]), 2),
    ] {
        let mut files = all.clone();
        files.config["target_modules"] = targets.clone();
        files.config["layers_to_transform"] = layers.clone();
        files.tensors.retain(|name, _| match changed {
            14 => true,
            7 => name.contains("layers.0."),
            _ => name.contains("layers.0.self_attn.q_proj") || name.contains("layers.1.mlp.up_proj"),
        });
        assert_eq!(read(&files).unwrap().parts.len(), changed, "{targets} {layers}");
    }
    let mut files = with_copies(&testing::model(), &[]);
    files.config["layers_to_transform"] = json!([1]);
    files.tensors.retain(|name, _| !name.contains("layers.0."));
    assert_eq!(read(&files).unwrap().sites, ["lm_head", "q_proj"]);
}

#[test]
fn a_model_that_is_gone_is_not_said_to_be_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    let base = model(&folder.path().join("model"), &testing::model(), DType::F32);
    let copies = [("lm_head.base_layer", "lm_head")];
    with_copies(&testing::model(), &copies).write_adapter(folder.path()).unwrap();
    fs::remove_file(folder.path().join("model/model.safetensors")).unwrap();
    let refusal = adapter::read(folder.path(), &base).err().unwrap().to_string();
    assert!(refusal.starts_with("model.safetensors: ") && !refusal.contains('/'), "{refusal}");
}

#[test]
fn copies_are_compared_as_they_are_computed_with() {
    let base = testing::model();
    let name = "base_model.model.lm_head.base_layer.weight";
    let mut close = with_copies(&base, &[("lm_head.base_layer", "lm_head")]);
    for x in &mut close.tensors.get_mut(name).unwrap().data {
        // Beyond what bf16 can tell apart, for numbers that it has.
        *x *= 1.0 + 1.0 / 1024.0;
    }
    let has_rows = |dtype| {
        let adapter = read_for(&close, &base, dtype).unwrap();
        adapter.parts.iter().any(|part| part.rows.is_some())
    };
    assert!(!has_rows(DType::Bf16));
    assert!(has_rows(DType::F32));
}

#[test]
fn other_tables_than_the_models_are_replaced_rows() {
    let base = testing::model();
    let plain = read(&with_copies(&base, &[])).unwrap();
    let copies = with_copies(&base, &[("model.embed_tokens", "model.embed_tokens")]);
    let name = "base_model.model.model.embed_tokens.weight";
    let changed = |changes: &[usize]| {
        let mut files = copies.clone();
        changes.iter().for_each(|i| files.tensors.get_mut(name).unwrap().data[*i] += 0.5);
        files
    };
    for (changes, ids) in
        [(&[7][..], vec![0]), (&[95 * 32 + 31], vec![95]), (&[40 * 32, 41 * 32, 3 * 32], vec![3, 40, 41])]
    {
        let adapter = read(&changed(changes)).unwrap();
        assert_ne!(testing::identity(&adapter), testing::identity(&plain));
        let rows = adapter.parts.iter().find_map(|part| part.rows.as_ref()).unwrap();
        assert_eq!(rows.ids.as_ref(), Some(&ids));
        let table = &changed(changes).tensors[name].data;
        let expected: Vec<f32> =
            ids.iter().flat_map(|id| table[*id as usize * 32..][..32].to_vec()).collect();
        assert_eq!(rows.values.to_f32(), expected);
    }
}

#[test]
fn other_tensors_of_a_model_are_refused_by_name() {
    let base = testing::model();
    let name = "base_model.model.lm_head.base_layer.weight";
    let copies = with_copies(&base, &[("lm_head.base_layer", "lm_head")]);
    for (change, cause) in [
        (|tensor: &mut Tensor| tensor.data[7] = f32::NAN, "has NaN or infinite values"),
        (|tensor: &mut Tensor| tensor.shape = vec![32, 96], "has the shape [32, 96], expected [96, 32]"),
        (|tensor: &mut Tensor| tensor.shape = vec![96 * 32], "has the shape [3072], expected [96, 32]"),
    ] as [(fn(&mut Tensor), &str); 3]
    {
        let mut files = copies.clone();
        change(files.tensors.get_mut(name).unwrap());
        let refusal = read(&files).err().unwrap();
        assert!(refusal.contains(name) && refusal.contains(cause), "{refusal}");
    }
    let norm = with_copies(&base, &[("model.norm", "model.norm")]);
    assert!(read(&norm).err().unwrap().contains("model.norm.weight belongs to no targeted module"));
}
