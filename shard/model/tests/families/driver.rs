//! Runs sequences through a model on the CPU, in whatever steps a test asks for.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use kernels::{BLOCK_SIZE, Batch, DType, Sampled, Segment, SequenceRows, cpu::CpuBackend, prelude::*};
use model::{
    KvCache, Model, Pass, Scratch, Share,
    adapter::{AdapterFolder, BaseModel},
};

/// Tokens that are generated after each prompt.
pub(crate) const GENERATED: usize = 64;
/// How many of the likeliest tokens are reported.
const TOP: u32 = 8;

/// A prompt, and what was generated after it.
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt: usize,
    /// The slot of its adapter.
    pub(crate) slot: Option<u32>,
    /// Positions that are scored, besides the last of the prompt and those behind it.
    pub(crate) scored: BTreeSet<usize>,
    /// What was computed at these positions.
    pub(crate) scores: BTreeMap<usize, Sampled>,
    blocks: Range<u32>,
    /// Rows that have run.
    pub(crate) done: usize,
    /// The least number of tokens that the rotary scaling of its rows goes by.
    length: usize,
}

impl Sequence {
    pub(crate) fn new(prompt: &[u32], slot: Option<u32>, scored: BTreeSet<usize>) -> Sequence {
        Sequence {
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            slot,
            scored,
            scores: BTreeMap::new(),
            blocks: 0..0,
            done: 0,
            length: prompt.len(),
        }
    }

    fn is_scored(&self, position: usize) -> bool {
        position + 1 >= self.prompt || self.scored.contains(&position)
    }

    fn is_finished(&self) -> bool {
        self.tokens.len() == self.prompt + GENERATED
    }

    /// Begins anew with all tokens that it has by now, as if they had been its prompt.
    pub(crate) fn restart(&mut self) {
        (self.done, self.length) = (0, self.tokens.len());
    }
}

/// A loaded model with adapters in its slots, and memory for sequences.
pub(crate) struct Driver {
    ops: CpuBackend,
    model: Model<CpuBackend>,
    slots: <CpuBackend as Adapters>::LoraSlots,
    sampler: <CpuBackend as Sampling>::Sampler,
    memory: Option<Steps>,
}

/// Memory for steps of some size.
struct Steps {
    kv: KvCache<CpuBackend>,
    scratch: Scratch<CpuBackend>,
    batch: <CpuBackend as Memory>::Batch,
}

impl Driver {
    /// Loads a model, and adapters into slots by their order.
    pub(crate) fn new(dtype: DType, path: &Path, adapters: &[PathBuf]) -> Driver {
        let ops = CpuBackend::new(dtype, 1).unwrap();
        let model = Model::load(&ops, path, &mut |_| {}).unwrap();
        Driver::of(ops, model, path, adapters)
    }

    /// Drives a model that was loaded from `path`, with adapters in slots by their order.
    pub(crate) fn of(ops: CpuBackend, model: Model<CpuBackend>, path: &Path, adapters: &[PathBuf]) -> Driver {
        let share = model.share();
        Driver::with_share(ops, (model, share), path, adapters)
    }

    /// As [`Self::of`], where adapters are cut for another share than that of the model.
    pub(crate) fn with_share(
        ops: CpuBackend,
        (model, share): (Model<CpuBackend>, Share),
        path: &Path,
        adapters: &[PathBuf],
    ) -> Driver {
        let (decoder, dtype) = (model.decoder().clone(), ops.dtype());
        let base = BaseModel { merged: None, decoder, path: path.into(), dtype, share };
        let mut slots = ops.lora_slots(model.sites(), adapters.len()).unwrap();
        for (slot, folder) in adapters.iter().enumerate() {
            let opened = AdapterFolder::open(folder, &base).unwrap();
            let (staged, _) = opened.stage(&ops, model.sites(), slot as u64 + 1, &|| false).unwrap();
            let staged = Arc::new(staged);
            ops.load(&mut slots, slot as u32, &staged, &model.site_weights()).unwrap();
        }
        let mut loaded = 0;
        while loaded < adapters.len() {
            loaded += ops.loaded(&mut slots).unwrap().len();
            std::thread::yield_now();
        }
        let sampler = ops.sampler(1, model.decoder().logit_columns()).unwrap();
        Driver { ops, model, slots, sampler, memory: None }
    }

    /// Gives every sequence blocks of its own, and takes memory for steps of up to `rows` rows.
    fn reserve(&mut self, sequences: &mut [Sequence], rows: usize) {
        let mut next = 0;
        for sequence in sequences {
            let blocks = (sequence.prompt + GENERATED).div_ceil(BLOCK_SIZE) as u32;
            sequence.blocks = next..next + blocks;
            next += blocks;
        }
        self.memory = Some(Steps {
            kv: self.model.kv_cache(&self.ops, next as usize).unwrap(),
            scratch: self.model.scratch(&self.ops, rows, rows).unwrap(),
            batch: self.ops.batch(rows, next as usize, &self.model.spans()).unwrap(),
        });
    }

    /// Every sequence by itself: the prompt in one step, then one token a step.
    pub(crate) fn alone(&mut self, sequences: &mut [Sequence]) {
        let longest = sequences.iter().map(|sequence| sequence.prompt).max().unwrap();
        self.reserve(sequences, longest + GENERATED);
        for i in 0..sequences.len() {
            while !sequences[i].is_finished() {
                let rows = sequences[i].tokens.len() - sequences[i].done;
                self.step(sequences, &[(i, rows)]);
            }
        }
    }

    /// All sequences together, in steps of up to `budget` rows: those that generate have one row each, the rest goes to
    /// chunks of prompts.
    pub(crate) fn mixed(&mut self, sequences: &mut [Sequence], chunk: usize, budget: usize) {
        self.reserve(sequences, budget);
        while sequences.iter().any(|sequence| !sequence.is_finished()) {
            let (mut work, mut left) = (Vec::new(), budget);
            for (i, sequence) in sequences.iter().enumerate().filter(|(_, sequence)| !sequence.is_finished())
            {
                let rows = (sequence.tokens.len() - sequence.done).min(chunk).min(left);
                work.extend((rows > 0).then_some((i, rows)));
                left -= rows;
            }
            self.step(sequences, &work);
        }
    }

    /// As [`Self::alone`] for one sequence, which begins anew when it becomes longer than `original`.
    pub(crate) fn crossing(&mut self, sequence: Sequence, original: usize) -> Sequence {
        let rows = sequence.prompt + GENERATED;
        let mut sequences = [sequence];
        self.reserve(&mut sequences, rows);
        while !sequences[0].is_finished() {
            if sequences[0].tokens.len() == original + 1 {
                sequences[0].restart();
            }
            let rows = sequences[0].tokens.len() - sequences[0].done;
            self.step(&mut sequences, &[(0, rows)]);
        }
        let [sequence] = sequences;
        sequence
    }

    /// Runs the next rows of some sequences, and appends the likeliest token to those whose tokens have all run.
    fn step(&mut self, sequences: &mut [Sequence], work: &[(usize, usize)]) {
        let (mut host, mut targets, mut places) = (Batch::default(), Vec::new(), Vec::new());
        for &(i, rows) in work {
            let sequence = &sequences[i];
            let start = host.rows() as u32;
            let first_logit = host.logit_rows.len() as u32;
            for position in sequence.done..sequence.done + rows {
                if sequence.is_scored(position) {
                    let next = sequence.tokens.get(position + 1).copied();
                    targets.push((host.logit_rows.len() as u32, next.unwrap_or(0)));
                    places.push((i, position));
                    host.logit_rows.push(host.rows() as u32);
                }
                let block = sequence.blocks.start as usize + position / BLOCK_SIZE;
                host.tokens.push(sequence.tokens[position] as i32);
                host.positions.push(position as u32);
                host.lengths.push(sequence.length.max(position + 1) as u32);
                host.store_at.push((block * BLOCK_SIZE + position % BLOCK_SIZE) as u32);
            }
            host.sequences.push(SequenceRows {
                start,
                rows: rows as u32,
                kv_len: (sequence.done + rows) as u32,
                first_block: host.blocks.len() as u32,
            });
            host.blocks.extend(sequence.blocks.clone());
            if let Some(slot) = sequence.slot {
                host.segments.push(Segment::new(start, host.rows() as u32, slot));
                let end = host.logit_rows.len() as u32;
                host.logit_segments.push(Segment::new(first_logit, end, slot));
            }
            sequences[i].done += rows;
        }
        for ((i, position), score) in places.into_iter().zip(self.run(&host, &targets)) {
            let sequence = &mut sequences[i];
            if position + 1 == sequence.tokens.len() {
                sequence.tokens.push(score.top[0].0);
            }
            // Of a sequence that began anew, the first choice counts.
            sequence.scores.entry(position).or_insert(score);
        }
    }

    /// Runs one step, and scores the token after every row that wants logits.
    fn run(&mut self, host: &Batch, targets: &[(u32, u32)]) -> Vec<Sampled> {
        let Steps { kv, scratch, batch } = self.memory.as_mut().unwrap();
        self.ops.upload(host, batch).unwrap();
        let pass = Pass { ops: &self.ops, batch, slots: &self.slots, sampler: &self.sampler };
        self.model.forward(&pass, scratch, kv).unwrap();
        let mut scores = Vec::new();
        let pending = self.ops.score(&scratch.logits, targets, TOP).unwrap();
        self.ops.collect(pending, &mut scores).unwrap();
        scores
    }
}
