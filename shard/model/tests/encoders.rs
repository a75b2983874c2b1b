//! Encoders against transformers and PEFT: seeded models, alone and in ragged batches with and without adapters.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use kernels::{BLOCK_SIZE, Batch, DType, Segment, SequenceRows, cpu::CpuBackend, prelude::*};
use model::{
    Model, Pass,
    adapter::{AdapterFolder, BaseModel},
    decoder::{Classes, Task},
    testing::seeded::Manifest,
};
use serde::Deserialize;
use serde_json::Value;

/// Most that an element may differ from transformers' in f32. Elements are of the size of 1.
const BAR: f32 = 1e-4;
/// The same of weights that are rounded to bf16.
const BAR_OF_BF16: f32 = 0.15;

#[derive(Deserialize)]
struct Goldens {
    inputs: Vec<Vec<u32>>,
    cases: Vec<Case>,
    moves: f32,
    sensitivity: Vec<Sensitivity>,
}

/// What transformers computes of an input: hidden states of all tokens, their classes, or those of the text.
#[derive(Deserialize)]
struct Case {
    base: Vec<Vec<f32>>,
    linear: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Sensitivity {
    feature: String,
    change: Value,
    most: f32,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/encoders").join(name)
}

fn goldens(name: &str) -> Goldens {
    serde_json::from_slice(&fs::read(folder(name).join("goldens.json")).unwrap()).unwrap()
}

/// A loaded encoder with its adapter in slot 0.
struct Encoder {
    ops: CpuBackend,
    model: Model<CpuBackend>,
    slots: <CpuBackend as Adapters>::LoraSlots,
    _folder: tempfile::TempDir,
}

impl Encoder {
    fn new(name: &str, dtype: DType) -> Encoder {
        let made = tempfile::tempdir().unwrap();
        let write = |manifest: &str, to: &str| {
            let to = made.path().join(to);
            Manifest::read(&folder(name).join(manifest)).unwrap().write(&to, DType::F32).unwrap();
            to
        };
        let (path, adapter) = (write("model.json", "model"), write("linear.json", "linear"));
        let ops = CpuBackend::new(dtype, 2).unwrap();
        let model = Model::load(&ops, &path, &mut |_| {}).unwrap();
        let base =
            BaseModel { merged: None, decoder: model.decoder().clone(), path, dtype, share: model.share() };
        let mut slots = ops.lora_slots(model.sites(), 1).unwrap();
        let opened = AdapterFolder::open(&adapter, &base).unwrap();
        let (staged, _) = opened.stage(&ops, model.sites(), 1, &|| false).unwrap();
        ops.load(&mut slots, 0, &Arc::new(staged), &model.site_weights()).unwrap();
        assert_eq!(ops.loaded(&mut slots).unwrap(), [0]);
        Encoder { ops, model, slots, _folder: made }
    }

    /// Runs inputs in one step, each with the adapter or without.
    fn run(&self, inputs: &[(&[u32], bool)]) -> Vec<Vec<Vec<f32>>> {
        let task = &self.model.decoder().task;
        let classes = task.classifier().map(|classifier| classifier.classes);
        let mut host = Batch::default();
        for (tokens, adapted) in inputs {
            let (start, first_block) = (host.rows() as u32, host.blocks.len() as u32);
            let rows = tokens.len() as u32;
            let first_logit = host.logit_rows.len() as u32;
            host.tokens.extend(tokens.iter().map(|token| *token as i32));
            host.positions.extend(0..rows);
            host.store_at.extend(first_block * BLOCK_SIZE as u32..first_block * BLOCK_SIZE as u32 + rows);
            host.blocks.extend(first_block..first_block + rows.div_ceil(BLOCK_SIZE as u32));
            host.sequences.push(SequenceRows { start, rows, kv_len: rows, first_block });
            match classes {
                None => {}
                Some(Classes::OfTokens) => host.logit_rows.extend(start..start + rows),
                Some(Classes::OfSequences) => host.logit_rows.push(start),
            }
            if *adapted {
                host.segments.push(Segment::new(start, start + rows, 0));
                let end = host.logit_rows.len() as u32;
                host.logit_segments.push(Segment::new(first_logit, end, 0));
            }
        }
        let (rows, blocks) = (host.rows(), host.blocks.len());
        let mut kv = self.model.kv_cache(&self.ops, blocks).unwrap();
        let mut scratch = self.model.scratch(&self.ops, rows, rows).unwrap();
        let mut batch = self.ops.batch(rows, blocks, &self.model.spans()).unwrap();
        self.ops.upload(&host, &mut batch).unwrap();
        let sampler = self.ops.sampler(1, 1).unwrap();
        let pass = Pass { ops: &self.ops, batch: &batch, slots: &self.slots, sampler: &sampler };
        self.model.forward(&pass, &mut scratch, &mut kv).unwrap();
        let (mat, width) = match task {
            Task::Classify(classifier) => (&scratch.logits, classifier.labels.len()),
            _ => (&scratch.hidden, self.model.decoder().hidden),
        };
        let values = self.ops.download(mat).unwrap();
        let mut rows = values.chunks_exact(width).map(<[f32]>::to_vec);
        let count = |tokens: &[u32]| if classes == Some(Classes::OfSequences) { 1 } else { tokens.len() };
        inputs.iter().map(|(tokens, _)| rows.by_ref().take(count(tokens)).collect()).collect()
    }
}

fn check(what: &str, got: &[Vec<f32>], expected: &[Vec<f32>], bar: f32) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (row, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.len(), expected.len(), "{what}");
        for (x, y) in got.iter().zip(expected) {
            assert!((x - y).abs() <= bar, "{what}, row {row}: {x}, transformers has {y}");
        }
    }
}

fn measure(name: &str) {
    let Goldens { inputs, cases, .. } = goldens(name);
    let encoder = Encoder::new(name, DType::F32);
    let mut mixed = Vec::new();
    for (tokens, case) in inputs.iter().zip(&cases) {
        for (adapted, expected) in [(false, &case.base), (true, &case.linear)] {
            let what = format!("{name}, {} tokens, adapted: {adapted}", tokens.len());
            let alone = encoder.run(&[(tokens, adapted)]).remove(0);
            check(&what, &alone, expected, BAR);
            mixed.push(((&tokens[..], adapted), alone));
        }
    }
    // A row's result is the same bit for bit, whatever other sequences are in its step.
    mixed.rotate_left(3);
    let batch: Vec<_> = mixed.iter().map(|(input, _)| *input).collect();
    for (got, (_, alone)) in encoder.run(&batch).iter().zip(&mixed) {
        assert!(got == alone, "{name}: a neighbour has a say");
    }
    let rounded = Encoder::new(name, DType::Bf16);
    for (tokens, case) in inputs.iter().zip(&cases) {
        check(&format!("{name} in bf16"), &rounded.run(&[(tokens, false)])[0], &case.base, BAR_OF_BF16);
    }
}

/// What every fixture must be sensitive to: a model too flat to tell a feature from its absence would prove nothing.
#[test]
fn every_feature_shows() {
    for name in NAMES {
        let Goldens { sensitivity, moves, .. } = goldens(name);
        assert!(moves >= 0.05, "{name}: the adapter moves outputs by {moves} only");
        for Sensitivity { feature, change, most } in sensitivity {
            assert!(most >= 0.05, "{name}: without {feature} ({change}), outputs move by {most} only");
        }
    }
}

macro_rules! encoders {
    ($($test:ident: $name:literal;)*) => {
        $(
            #[test]
            fn $test() {
                measure($name);
            }
        )*

        const NAMES: &[&str] = &[$($name),*];
    };
}

encoders! {
    bert: "bert";
    bert_tokens: "bert-tokens";
    bert_texts: "bert-texts";
    distilbert: "distilbert";
    distilbert_tokens: "distilbert-tokens";
    distilbert_texts: "distilbert-texts";
    xlm_roberta: "xlm-roberta";
    xlm_roberta_tokens: "xlm-roberta-tokens";
    xlm_roberta_texts: "xlm-roberta-texts";
    roberta: "roberta";
}
