//! Adapters that are merged into the weights of a model: it computes without an adapter what PEFT's `merge_and_unload`
//! makes of each kind, and what the adapter makes of the model beside its weights.

use std::{collections::BTreeMap, fs, path::Path};

use kernels::{DType, cpu::CpuBackend};
use model::Model;
use serde::Deserialize;

use crate::{
    driver::Driver,
    goldens,
    kinds::{BAR, Base, kind},
    ranks,
};

/// See `integration-tests/fixtures/families/merged.py`.
#[derive(Deserialize)]
struct Merged {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    adapter: String,
    #[serde(default)]
    logprobs: Vec<f32>,
    /// Why PEFT does not merge it.
    error: Option<String>,
    /// How far PEFT's merge is from the adapter beside the weights.
    #[serde(default)]
    apart: f32,
}

fn merged(name: &str) -> BTreeMap<String, Case> {
    let file = fs::read(goldens::folder(name).join("merged.json")).unwrap();
    let Merged { cases } = serde_json::from_slice(&file).unwrap();
    cases.into_iter().map(|case| (case.adapter.clone(), case)).collect()
}

fn load(ops: &CpuBackend, base: &Path, adapter: &Path) -> Result<Model<CpuBackend>, String> {
    let model = Model::load_for(ops, base, Some(adapter), usize::MAX, &mut |_| {});
    model.map_err(|error| error.to_string())
}

fn every_kind(name: &str) {
    let (base, peft) = (Base::new(name), merged(name));
    let mut compared = 0;
    for case in base.kinds() {
        let kind = kind(case);
        let folder = base.write(&format!("kinds/{kind}.json"), &kind);
        let ops = CpuBackend::new(DType::F32, 1).unwrap();
        let model = load(&ops, &base.model(), &folder);
        if kind.starts_with("resized") {
            assert!(model.err().unwrap().contains("other tokens than the model"), "{name} {kind}");
            continue;
        }
        let peft = &peft[&kind];
        if peft.error.is_some() {
            assert!(model.err().unwrap().contains("has none there"), "{name} {kind}: {:?}", peft.error);
            continue;
        }
        let mut sequences = [base.sequence(case, None)];
        Driver::of(ops, model.unwrap(), &base.model(), &[]).alone(&mut sequences);
        base.compare("merged", case, &sequences[0]);
        // Of tied tables PEFT changes both, where beside the weights only one changes: that one is served.
        if peft.apart <= BAR {
            let got = case.positions.iter().map(|position| sequences[0].scores[position].logprob);
            let apart = got.zip(&peft.logprobs).map(|(got, peft)| (got - peft).abs()).fold(0.0, f32::max);
            assert!(apart <= BAR, "{name} {kind}: off by {apart} from merge_and_unload");
            compared += 1;
        }
    }
    assert!(compared >= 1, "{name}");
}

macro_rules! merged {
    ($($test:ident: $name:literal;)*) => {$(
        #[test]
        fn $test() {
            every_kind($name);
        }
    )*};
}

merged! {
    llama: "llama";
    gemma2: "gemma2";
    phi3: "phi3";
    gpt2: "gpt2";
    gpt_neox: "gpt-neox";
}

/// Each rank merges its share alone: rows and columns of deltas, norms of whole rows.
#[test]
fn shares_are_those_of_the_merged_model() {
    for (name, count, kinds) in [
        ("llama", 2, &["rslora", "dora", "dora-lm-head", "save-both", "lm-head", "olora"][..]),
        ("gemma2", 2, &["dora", "embedding", "lm-head", "save-tied"]),
        ("gpt2", 4, &["dora", "bias-all", "lora-bias"]),
        ("gpt-neox", 2, &["dora", "lora-bias"]),
    ] {
        let base = Base::new(name);
        for case in base.kinds().into_iter().filter(|case| kinds.contains(&&*kind(case))) {
            let folder = base.write(&format!("kinds/{}.json", kind(case)), &kind(case));
            let computed = ranks::on_ranks(count, |ops| {
                let model = load(&ops, &base.model(), &folder).unwrap();
                let mut sequences = [base.sequence(case, None)];
                Driver::of(ops, model, &base.model(), &[]).alone(&mut sequences);
                base.compare("merged, divided", case, &sequences[0]);
                ranks::bits(&sequences)
            });
            ranks::assert_same(name, &computed);
        }
    }
}

/// An adapter that is loaded later is added to the merged weights, and what it has of the model's tables and biases is
/// compared with the merged ones.
#[test]
fn other_adapters_are_added_to_the_merged_model() {
    let base = Base::new("llama");
    let cases = base.kinds();
    let case = |name: &str| *cases.iter().find(|case| kind(case) == name).unwrap();
    for (first, second) in [
        ("save-both", "save-both"),
        ("save-embed-tokens", "save-embed-tokens"),
        ("save-lm-head", "save-lm-head"),
    ] {
        // What replaces rows is the same twice; what is added to projections is not, so that both are taken apart.
        let [merged, beside] = [first, second].map(|name| base.write(&format!("kinds/{name}.json"), name));
        let ops = CpuBackend::new(DType::F32, 1).unwrap();
        let model = load(&ops, &base.model(), &merged).unwrap();
        let decoder = model.decoder().clone();
        let at = |merged| model::adapter::BaseModel {
            decoder: decoder.clone(),
            path: base.model(),
            merged,
            dtype: DType::F32,
            share: model::Share::WHOLE,
        };
        let rows = |merged| {
            let read = model::adapter::read(&beside, &at(merged)).unwrap();
            read.parts.iter().map(|part| part.shape().rows).sum::<usize>()
        };
        assert!(rows(None) > 0, "{second} has rows of its own");
        assert_eq!(rows(Some(merged.clone())), 0, "{second}: its rows are those of the merged model");
        assert!(case(first).moves.unwrap() > 0.0);
    }
}

/// What cannot be merged is refused when the model is opened, by the name of what is in the way.
#[test]
fn what_is_no_adapter_of_the_model_is_refused() {
    let base = Base::new("llama");
    // PEFT merges one that changes nothing, and so do we: the model is the same.
    for refused in base.goldens.refused.iter().filter(|refused| !refused.adapter.starts_with("zero")) {
        let folder = base.write(&format!("kinds/{}.json", refused.adapter), &refused.adapter);
        let ops = CpuBackend::new(DType::F32, 1).unwrap();
        let refusal = load(&ops, &base.model(), &folder).err();
        let refusal = refusal.unwrap_or_else(|| panic!("{} is merged", refused.adapter));
        assert!(refusal.starts_with("the adapter that is to be merged into the model: "), "{refusal}");
        assert!(refusal.contains(&refused.reason), "{}: {refusal}", refused.adapter);
    }
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    let nothing = tempfile::tempdir().unwrap();
    let refusal = load(&ops, &base.model(), nothing.path()).err().unwrap();
    assert!(refusal.contains("adapter_config.json is missing"), "{refusal}");
}
