//! The forward pass of a small model.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use kernels::{Backend, Comm, DType, Solo, cpu::CpuBackend, testing::batch};
use model::{Model, Pass, testing};

/// The first of two ranks, of which the other has no share.
struct FirstOfTwo;

impl<B: Backend> Comm<B> for FirstOfTwo {
    fn ranks(&self) -> usize {
        2
    }

    fn rank(&self) -> usize {
        0
    }

    fn all_reduce(&self, _x: &mut B::Mat) -> kernels::Result<()> {
        Ok(())
    }
}

/// Logits of a step of two prompts.
fn logits(comm: &dyn Comm<CpuBackend>) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    testing::model().write_model(folder.path()).unwrap();
    let ops = CpuBackend::new(DType::F32, 2).unwrap();
    let model = Model::load(&ops, folder.path(), &mut |_| {}).unwrap();
    let host = batch(&[(5, 0), (3, 0)], &[]);
    let mut device = ops.batch(host.rows(), host.blocks.len()).unwrap();
    ops.upload(&host, &mut device).unwrap();
    let slots = ops.lora_slots(&model.sites(), 1).unwrap();
    let sampler = ops.sampler(1, model.config().vocab).unwrap();
    let mut scratch = model.scratch(&ops, host.rows(), 2).unwrap();
    let blocks = host.blocks.iter().max().unwrap() + 1;
    let mut kv = model.kv_cache(&ops, blocks as usize).unwrap();
    let pass = Pass { ops: &ops, batch: &device, slots: &slots, sampler: &sampler, comm };
    model.forward(&pass, &mut scratch, &mut kv).unwrap();
    ops.download(&scratch.logits).unwrap()
}

#[test]
fn a_rank_with_all_the_shares_computes_what_one_alone_does() {
    let alone = logits(&Solo);
    assert_eq!(alone.len(), 2 * 96);
    assert!(alone.iter().all(|x| x.is_finite()) && alone.iter().any(|x| x.abs() > 0.1));
    assert_eq!(logits(&FirstOfTwo), alone);
}
