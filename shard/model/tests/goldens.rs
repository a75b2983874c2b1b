//! Against transformers and PEFT: the committed goldens, teacher-forced, all cases of a file decoding in one batch.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use kernels::{BLOCK_SIZE, Batch, DType, Group, Sampled, Segment, SequenceRows, cpu::CpuBackend, prelude::*};
use model::{
    KvCache, Model, Pass, Scratch,
    adapter::{
        AdapterFiles, AdapterFolder, BaseModel, ContentHash, Elementwise, MajoritySign, Merge, MergePart,
        Recipe, Strategy,
    },
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Goldens {
    prompts: Vec<Prompt>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Prompt {
    ids: Vec<u32>,
}

/// One prompt under one adapter; see `integration-tests/fixtures/README.md`.
#[derive(Deserialize)]
struct Case {
    adapter: Option<String>,
    merged: Option<Merged>,
    prompt: usize,
    prompt_logprobs: Vec<f32>,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    margins: Vec<f32>,
}

/// A merge, as a request names it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Merged {
    ids: Vec<String>,
    weights: Vec<f64>,
    merge_strategy: Option<String>,
    density: Option<f64>,
    majority_sign_method: Option<String>,
    svd_rank: Option<usize>,
    #[serde(default)]
    seed: u64,
}

impl Merged {
    fn recipe(&self) -> Recipe {
        let strategy = match self.merge_strategy.as_deref() {
            None => Strategy::Elementwise(Elementwise::Linear),
            Some("ties") => Strategy::Elementwise(Elementwise::Ties),
            Some("dare_linear") => Strategy::Elementwise(Elementwise::DareLinear),
            Some("dare_ties") => Strategy::Elementwise(Elementwise::DareTies),
            Some("magnitude_prune") => Strategy::Elementwise(Elementwise::MagnitudePrune),
            Some("cat") => Strategy::Cat,
            Some("svd") => Strategy::Svd,
            Some(other) => panic!("{other}"),
        };
        let majority_sign = match self.majority_sign_method.as_deref() {
            Some("frequency") => MajoritySign::Frequency,
            _ => MajoritySign::Total,
        };
        let Merged { density, svd_rank, seed, .. } = *self;
        Recipe { strategy, density, majority_sign, svd_rank, seed }
    }
}

/// What a case runs with.
#[derive(Debug, Clone, PartialEq)]
enum Named {
    Adapter(String),
    Merge(Merged),
}

impl Case {
    fn named(&self) -> Option<Named> {
        let merge = self.merged.clone().map(Named::Merge);
        merge.or_else(|| self.adapter.clone().map(Named::Adapter))
    }
}

/// A case that runs: all its tokens are known, and its blocks are its own.
struct Running<'a> {
    case: &'a Case,
    tokens: Vec<u32>,
    slot: Option<u32>,
    blocks: std::ops::Range<u32>,
}

struct Runner {
    ops: CpuBackend,
    model: Model<CpuBackend>,
    slots: <CpuBackend as Adapters>::LoraSlots,
    sampler: <CpuBackend as Sampling>::Sampler,
    kv: KvCache<CpuBackend>,
    scratch: Scratch<CpuBackend>,
    batch: <CpuBackend as Memory>::Batch,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures")
}

fn demo_model() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"));
    cache.join("lorax/models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

impl Runner {
    /// Loads a model, and the named adapters of a folder into slots by their order.
    fn new(ops: CpuBackend, model: &Path, (adapters, names): (&Path, &[Named]), blocks: u32) -> Runner {
        let (path, dtype) = (model.to_owned(), ops.dtype());
        let model = Model::load(&ops, model, &mut |_| {}).unwrap();
        let base =
            BaseModel { merged: None, decoder: model.decoder().clone(), path, dtype, share: model.share() };
        let mut slots = ops.lora_slots(model.sites(), names.len()).unwrap();
        for (slot, named) in names.iter().enumerate() {
            let staged = Arc::new(match named {
                Named::Adapter(name) => {
                    let opened = AdapterFolder::open(&adapters.join(name), &base).unwrap();
                    opened.stage(&ops, model.sites(), slot as u64 + 1, &|| false).unwrap().0
                }
                Named::Merge(merged) => {
                    let parts = merged.ids.iter().zip(&merged.weights).map(|(name, weight)| {
                        let files = AdapterFiles::open(&adapters.join(name)).unwrap();
                        MergePart { name: name.clone(), files, weight: *weight }
                    });
                    let merge = Merge::open(parts.collect(), &merged.recipe(), &base).unwrap();
                    let read = merge.read_as(ContentHash([slot as u8; 32]), &|| false).unwrap();
                    ops.stage(model.sites(), &read.parts).unwrap()
                }
            });
            ops.load(&mut slots, slot as u32, &staged, &model.site_weights()).unwrap();
        }
        assert_eq!(ops.loaded(&mut slots).unwrap().len(), names.len());
        Runner {
            sampler: ops.sampler(1, model.decoder().logit_columns()).unwrap(),
            kv: model.kv_cache(&ops, blocks as usize).unwrap(),
            scratch: model.scratch(&ops, 256, 256).unwrap(),
            batch: ops.batch(256, blocks as usize, &model.spans()).unwrap(),
            ops,
            model,
            slots,
        }
    }

    /// Runs rows of several cases, each a range of positions, and scores the token after every row.
    fn step(&mut self, rows: &[(&Running<'_>, std::ops::Range<usize>)]) -> Vec<Sampled> {
        let mut host = Batch::default();
        let mut targets = Vec::new();
        for (running, range) in rows {
            let (start, first_block) = (host.rows() as u32, host.blocks.len() as u32);
            host.blocks.extend(running.blocks.clone());
            for position in range.clone() {
                let block = running.blocks.start as usize + position / BLOCK_SIZE;
                targets.push((host.rows() as u32, running.tokens[position + 1]));
                host.logit_rows.push(host.rows() as u32);
                host.tokens.push(running.tokens[position] as i32);
                host.positions.push(position as u32);
                host.store_at.push((block * BLOCK_SIZE + position % BLOCK_SIZE) as u32);
            }
            let end = host.rows() as u32;
            host.sequences.push(SequenceRows {
                start,
                rows: end - start,
                kv_len: range.end as u32,
                first_block,
            });
            host.segments.extend(running.slot.map(|slot| Segment::new(start, end, slot)));
        }
        host.logit_segments = host.segments.clone();
        self.ops.upload(&host, &mut self.batch).unwrap();
        let pass = Pass { ops: &self.ops, batch: &self.batch, slots: &self.slots, sampler: &self.sampler };
        self.model.forward(&pass, &mut self.scratch, &mut self.kv).unwrap();
        let pending = self.ops.score(&self.scratch.logits, &targets, 1).unwrap();
        let mut scores = Vec::new();
        self.ops.collect(pending, &mut scores).unwrap();
        scores
    }
}

/// Largest difference of a log-probability seen so far, and where.
#[derive(Default)]
struct Worst {
    difference: f32,
    place: String,
}

impl Worst {
    fn see(&mut self, got: f32, expected: f32, place: impl FnOnce() -> String) {
        let difference = (got - expected).abs();
        if difference > self.difference {
            *self = Worst { difference, place: place() };
        }
    }
}

/// Compares all cases of a file; the bars are the largest difference of a log-probability allowed, of generated and of
/// prompt tokens. Tokens must agree where the gap between the two largest logits is more than both could move.
fn compare(file: &str, ops: CpuBackend, model: &Path, adapters: &Path, (bar, prompt_bar): (f32, f32)) {
    let dtype = ops.dtype();
    let text = std::fs::read(fixtures().join("goldens").join(file)).unwrap();
    let goldens: Goldens = serde_json::from_slice(&text).unwrap();
    let mut names: Vec<Named> = goldens.cases.iter().filter_map(Case::named).collect();
    names.dedup();
    let (mut running, mut next) = (Vec::new(), 0);
    for case in &goldens.cases {
        let tokens = [&goldens.prompts[case.prompt].ids[..], &case.tokens].concat();
        let blocks = next..next + tokens.len().div_ceil(BLOCK_SIZE) as u32;
        next = blocks.end;
        let slot = case.named().map(|named| names.iter().position(|name| *name == named).unwrap() as u32);
        running.push(Running { case, tokens, slot, blocks });
    }
    let mut runner = Runner::new(ops, model, (adapters, &names), next);
    let mut worst = Worst::default();
    let mut check = |running: &Running<'_>, i: usize, got: &Sampled| {
        let case = running.case;
        let place = || format!("{file}, {:?}, prompt {}, token {i}", case.named(), case.prompt);
        worst.see(got.logprob, case.logprobs[i], place);
        if case.margins[i] > 2.0 * bar {
            assert_eq!(got.top[0].0, case.tokens[i], "{}", place());
        }
    };
    let mut prompt_worst = Worst::default();
    for running in &running {
        let case = running.case;
        let prompt = running.tokens.len() - case.tokens.len();
        let scores = runner.step(&[(running, 0..prompt)]);
        for (i, (got, expected)) in scores.iter().zip(&case.prompt_logprobs).enumerate() {
            let place = || format!("{file}, {:?}, prompt {}, position {}", case.named(), case.prompt, i + 1);
            prompt_worst.see(got.logprob, *expected, place);
        }
        check(running, 0, &scores[prompt - 1]);
    }
    for i in 1..goldens.cases[0].tokens.len() {
        let position = |running: &Running<'_>| running.tokens.len() - running.case.tokens.len() + i - 1;
        let rows: Vec<_> = running.iter().map(|r| (r, position(r)..position(r) + 1)).collect();
        for (running, got) in running.iter().zip(runner.step(&rows)) {
            check(running, i, &got);
        }
    }
    for (worst, bar) in [(worst, bar), (prompt_worst, prompt_bar)] {
        assert!(worst.difference > 0.0, "something was compared");
        assert!(worst.difference <= bar, "{} at {}", worst.difference, worst.place);
        eprintln!("{file} in {dtype:?}: at most {:.5} at {}", worst.difference, worst.place);
    }
}

fn alone(dtype: DType) -> CpuBackend {
    CpuBackend::new(dtype, 2).unwrap()
}

/// Calls `f` with the backend of each rank, on a thread of its own.
fn on_ranks(ranks: usize, dtype: DType, f: impl Fn(CpuBackend) + Sync) {
    const PATIENCE: Duration = Duration::from_secs(60);
    let folder = tempfile::tempdir().unwrap();
    thread::scope(|scope| {
        for rank in 0..ranks {
            let (f, folder) = (&f, folder.path());
            scope.spawn(move || {
                let group = Group::join(folder, rank, ranks, PATIENCE).unwrap();
                f(CpuBackend::new(dtype, 1).unwrap().with_group(Arc::new(group)).unwrap());
            });
        }
    });
}

#[test]
fn the_tiny_model_is_peft_in_f32() {
    let tiny = fixtures().join("tiny");
    let compare = |ops| compare("tiny.json", ops, &tiny.join("model"), &tiny.join("adapters"), (2e-3, 2e-3));
    compare(alone(DType::F32));
    for ranks in [2, 4] {
        on_ranks(ranks, DType::F32, compare);
    }
}

/// Merges of adapters of several ranks, also cut for ranks.
#[test]
fn merged_adapters_are_pefts_in_f32() {
    let tiny = fixtures().join("tiny");
    let compare =
        |ops| compare("merged.json", ops, &tiny.join("model"), &tiny.join("adapters"), (2e-3, 2e-3));
    compare(alone(DType::F32));
    on_ranks(2, DType::F32, compare);
}

#[test]
fn the_demo_model_is_peft_in_f32() {
    let adapters = fixtures().join("adapters");
    compare("smollm2-f32.json", alone(DType::F32), &demo_model(), &adapters, (2e-3, 2e-3));
}

/// Also on three ranks, among which its nine heads are divided.
#[test]
fn the_demo_model_is_peft_in_bf16() {
    let compare =
        |ops| compare("smollm2-bf16.json", ops, &demo_model(), &fixtures().join("adapters"), (0.05, 0.05));
    compare(alone(DType::Bf16));
    on_ranks(3, DType::Bf16, compare);
}
