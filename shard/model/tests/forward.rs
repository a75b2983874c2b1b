//! The forward pass of a small model.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{
    Mutex,
    mpsc::{Receiver, SyncSender, sync_channel},
};

use kernels::{Backend, Comm, DType, Matrix, Solo, cpu::CpuBackend, testing::batch};
use model::{Model, Pass, testing};

/// One of two ranks that have the whole model each, so that the share of either is a whole projection.
struct OfTwo {
    rank: usize,
    ops: CpuBackend,
    /// The stream after the projection before.
    before: Mutex<Vec<f32>>,
    to: SyncSender<Vec<f32>>,
    from: Mutex<Receiver<Vec<f32>>>,
}

impl OfTwo {
    fn pair() -> [OfTwo; 2] {
        let ((to_second, from_first), (to_first, from_second)) = (sync_channel(1), sync_channel(1));
        [(0, to_second, from_second), (1, to_first, from_first)].map(|(rank, to, from)| OfTwo {
            rank,
            ops: CpuBackend::new(DType::F32, 1).unwrap(),
            before: Mutex::default(),
            to,
            from: Mutex::new(from),
        })
    }
}

impl Comm<CpuBackend> for OfTwo {
    fn ranks(&self) -> usize {
        2
    }

    fn rank(&self) -> usize {
        self.rank
    }

    /// The first rank has added the projection to the stream, the second has it alone: a sum would count it twice. What
    /// one rank alone computes is the first's, which must have gained what the second has.
    fn all_reduce(&self, x: &mut <CpuBackend as Backend>::Mat) -> kernels::Result<()> {
        let own = self.ops.download(x)?;
        self.to.send(own.clone()).unwrap();
        let other = self.from.lock().unwrap().recv().unwrap();
        assert_eq!(own.len(), x.rows() * x.cols());
        let (stream, share) = if self.rank == 0 { (own, other) } else { (other, own) };
        let mut before = self.before.lock().unwrap();
        if !before.is_empty() {
            let gains = stream.iter().zip(before.iter()).zip(&share);
            assert!(gains.into_iter().all(|((after, before), share)| (after - before - share).abs() < 1e-4));
        }
        before.clone_from(&stream);
        self.ops.fill(x, &stream)
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
fn one_rank_adds_to_the_stream_and_the_others_bring_their_shares() {
    let alone = logits(&Solo);
    assert_eq!(alone.len(), 2 * 96);
    assert!(alone.iter().all(|x| x.is_finite()) && alone.iter().any(|x| x.abs() > 0.1));
    let pair = OfTwo::pair();
    let both = std::thread::scope(|scope| {
        pair.each_ref().map(|rank| scope.spawn(|| logits(rank))).map(|rank| rank.join().unwrap())
    });
    assert_eq!(both, [alone.clone(), alone]);
}
