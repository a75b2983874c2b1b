//! An adapter's tensors are matched with a model's modules by maps: the time grows with their number, not with its
//! square. One test to a process, whose time is measured.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, time::Duration};

use kernels::DType;
use model::{
    Decoder,
    adapter::{AdapterFolder, BaseModel},
    testing::{self, Tensor, Tensors},
};
use serde_json::{Value, json};

const NAMES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Time that this thread has run. Other threads and processes do not count, however busy they keep the machine.
fn time_run() -> Duration {
    let schedule = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(schedule.split_ascii_whitespace().next().unwrap().parse().unwrap())
}

/// Time to read an adapter on every projection of a model of so many layers, with 14 tensors in each. It
/// targets what is given, or else every module by its path.
fn time_to_read(layers: usize, targets: Option<Value>) -> Duration {
    let folder = tempfile::tempdir().unwrap();
    let (base, at) = (folder.path().join("model"), folder.path().join("adapter"));
    testing::model().write_model(&base).unwrap();
    let mut decoder = Decoder::from_folder(&base).unwrap();
    decoder.layers = vec![decoder.layers[0].clone(); layers];
    let model =
        BaseModel { merged: None, decoder, path: base, dtype: DType::F32, share: model::Share::WHOLE };
    let mut files = testing::adapter(&NAMES, 1, 1);
    let first: Tensors = files.tensors.into_iter().filter(|(name, _)| name.contains("layers.0.")).collect();
    let in_layer = |layer: usize| {
        let name = move |name: &String| name.replace("layers.0.", &format!("layers.{layer}."));
        first.iter().map(move |(module, tensor): (&String, &Tensor)| (name(module), tensor.clone()))
    };
    files.tensors = (0..layers).flat_map(in_layer).collect();
    let module = |name: &String| name.split(".lora_").next().unwrap().replace("base_model.model.", "");
    let paths: Vec<String> = files.tensors.keys().map(module).step_by(2).collect();
    files.config["target_modules"] = targets.unwrap_or(json!(paths));
    files.write_adapter(&at).unwrap();
    let once = || {
        let before = time_run();
        let opened = AdapterFolder::open(&at, &model).unwrap();
        assert_eq!(opened.shapes().len(), 7 * layers);
        assert_eq!(opened.read().unwrap().parts.len(), 7 * layers);
        time_run() - before
    };
    once().min(once())
}

#[test]
fn many_tensors_are_matched_in_a_moment() {
    // 18,004 tensors.
    let of_names = time_to_read(1286, Some(json!(NAMES)));
    assert!(of_names < Duration::from_secs(1), "{of_names:?}");
    for targets in [None, Some(json!("all-linear")), Some(json!(r".*_proj"))] {
        let taken = time_to_read(1286, targets);
        assert!(taken < Duration::from_secs(1), "{taken:?}");
    }
    // With eight times as many it takes eight times as long. To compare all with all takes some thirty times.
    let of_more_names = time_to_read(8 * 1286, Some(json!(NAMES)));
    assert!(of_more_names < 16 * of_names, "{of_names:?}, {of_more_names:?}");
    let (of_paths, of_more_paths) = (time_to_read(320, None), time_to_read(8 * 320, None));
    assert!(of_more_paths < 16 * of_paths, "{of_paths:?}, {of_more_paths:?}");
}
