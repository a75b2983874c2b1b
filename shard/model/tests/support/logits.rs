//! Logits of a loaded model, computed on the CPU in f32.

use kernels::{cpu::CpuBackend, prelude::*, testing::batch};
use model::{Model, Pass};

/// The logits that follow a prompt of so many tokens, which are those of [`batch`].
pub(crate) fn logits_of(ops: &CpuBackend, model: &Model<CpuBackend>, prompt: usize) -> Vec<f32> {
    let host = batch(&[(prompt, 0)], &[]);
    let mut device = ops.batch(host.rows(), host.blocks.len(), &model.spans()).unwrap();
    ops.upload(&host, &mut device).unwrap();
    let slots = ops.lora_slots(model.sites(), 1).unwrap();
    let sampler = ops.sampler(1, model.decoder().logit_columns()).unwrap();
    let mut scratch = model.scratch(ops, host.rows(), 1).unwrap();
    let mut kv = model.kv_cache(ops, 1 + *host.blocks.iter().max().unwrap() as usize).unwrap();
    let pass = Pass { ops, batch: &device, slots: &slots, sampler: &sampler };
    model.forward(&pass, &mut scratch, &mut kv).unwrap();
    let mut logits = ops.download(&scratch.logits).unwrap();
    let beyond = logits.split_off(model.decoder().vocab);
    assert!(beyond.iter().all(|logit| *logit == f32::NEG_INFINITY), "tokens that only adapters have");
    logits
}
