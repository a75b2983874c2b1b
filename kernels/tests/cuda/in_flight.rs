//! What happens beside steps that the GPU has not finished.

use kernels::cuda::CudaAdapter;

use super::*;

/// Columns and outputs of the products that keep the GPU busy.
const WIDE: usize = 4096;
const ROWS: usize = 8192;

/// Work that keeps the GPU busy: products whose rows use the adapter in slot 0, each into a matrix of its own.
struct Work {
    ops: CudaBackend,
    sites: Vec<LoraSite>,
    slots: CudaSlots,
    device: CudaBatch,
    weight: CudaWeight,
    x: CudaMat,
}

/// An adapter of one rank: every element of A is 1, every element of B is `value`.
fn constant(value: f32) -> Vec<LoraPart> {
    vec![LoraPart::delta((0, 0), 1, 1.0, &[1.0; WIDE], &[value; WIDE])]
}

impl Work {
    /// Rows whose first element alone is 1, with a weight of zeros: a product is the value of the adapter.
    fn new() -> Work {
        let ops = backend();
        // To unlock host memory waits for the GPU: what these adapters lock stays locked.
        ops.expect_adapters(64 << 20, 0);
        let sites = vec![LoraSite::linear(WIDE, &[WIDE])];
        let slots = resident(&ops, &sites, &[constant(3.0), constant(5.0)]);
        let device = device_batch(&ops, &batch(&[(ROWS, 0)], &[Some(0)]));
        let weight = ops.weight(&[tensor(&Table { cols: WIDE, data: vec![0.0; WIDE * WIDE] })]).unwrap();
        let mut x = Table { cols: WIDE, data: vec![0.0; ROWS * WIDE] };
        x.data.chunks_exact_mut(WIDE).for_each(|row| row[0] = 1.0);
        let x = mat(&ops, &x);
        Work { ops, sites, slots, device, weight, x }
    }

    fn launch(&self, y: &mut CudaMat, count: usize) {
        for _ in 0..count {
            let lora = LinearLora { slots: &self.slots, site: 0, batch: &self.device, rows: RowSet::All };
            let by = Projection::new(&self.weight, Some(lora));
            self.ops.linear(&self.x, by, Output::Store(y)).unwrap();
        }
    }

    fn output(&self) -> CudaMat {
        self.ops.mat(ROWS, WIDE).unwrap()
    }

    fn assert_all(&self, y: &CudaMat, value: f32) {
        assert!(self.ops.download(y).unwrap().iter().all(|x| *x == value), "{value}");
    }

    fn stage(&self, value: f32) -> Arc<CudaAdapter> {
        Arc::new(self.ops.stage(&self.sites, &constant(value)).unwrap())
    }

    /// Loads an adapter that only the copy to the GPU keeps.
    fn load(&mut self, slot: u32, adapter: Arc<CudaAdapter>) {
        self.ops.load(&mut self.slots, slot, &adapter, &[]).unwrap();
        drop(adapter);
        while self.ops.loaded(&mut self.slots).unwrap().is_empty() {}
    }
}

/// Launches that keep the GPU busy for much longer than a load takes.
const MANY: usize = 400;

#[test]
fn an_adapter_is_loaded_and_replaced_while_steps_run() {
    let mut work = Work::new();
    // What is launched first loads kernels and chooses algorithms.
    let mut warm = work.output();
    work.launch(&mut warm, 2);
    let mut overlapped = 0;
    for round in 0..10 {
        let value = 7.0 + round as f32;
        let before = if round == 0 { 3.0 } else { value - 1.0 };
        let (mut first, mut last) = (work.output(), work.output());
        let (other, own) = (work.stage(value + 100.0), work.stage(value));
        // Memory that steps in flight have used is free for a load when they have ended. Here none have used it.
        work.ops.unload(&mut work.slots, 1).unwrap();
        work.ops.synchronize().unwrap();
        work.launch(&mut first, MANY);
        let end = work.ops.mark().unwrap();
        work.load(1, other);
        overlapped += usize::from(!work.ops.reached(&end));
        // The adapter that those steps use is emptied and replaced behind them.
        work.ops.unload(&mut work.slots, 0).unwrap();
        work.load(0, own);
        work.launch(&mut last, 1);
        work.assert_all(&first, before);
        work.assert_all(&last, value);
    }
    // Tests that run beside this one hold up the whole GPU now and then.
    assert!(overlapped > 0, "no load ended while the steps ran");
}

#[test]
fn loads_that_are_given_up_in_flight_leave_nothing_behind() {
    let mut work = Work::new();
    let adapter = work.stage(9.0);
    for _ in 0..100 {
        work.ops.load(&mut work.slots, 1, &adapter, &[]).unwrap();
        work.ops.unload(&mut work.slots, 1).unwrap();
        work.ops.load(&mut work.slots, 1, &adapter, &[]).unwrap();
        work.ops.load(&mut work.slots, 1, &adapter, &[]).unwrap();
        work.ops.unload(&mut work.slots, 1).unwrap();
    }
    work.ops.load(&mut work.slots, 1, &adapter, &[]).unwrap();
    let mut loaded = Vec::new();
    while loaded.is_empty() {
        loaded = work.ops.loaded(&mut work.slots).unwrap();
    }
    assert_eq!(loaded, [1], "told once, of the last");
}

/// A session that ends has its choices dropped while the GPU computes them, and begins anew with the same seats.
#[test]
fn choices_are_dropped_in_flight() {
    let work = Work::new();
    let (ops, vocab) = (&work.ops, 2000);
    let mut sampler = ops.sampler(4, vocab).unwrap();
    let mut y = work.output();
    for round in 0..50 {
        let best = |row: usize| (round * 31 + row * 7) % vocab;
        let mut logits = Table { cols: vocab, data: vec![0.0; 4 * vocab] };
        (0..4).for_each(|row| logits.data[row * vocab + best(row)] = 5.0);
        let x = wide_mat(ops, &logits);
        let places: Vec<_> = (0..4).map(|row| SampleRow { row, seat: row }).collect();
        let params = SamplingParams { frequency_penalty: 0.5, num_top: 3, ..SamplingParams::default() };
        (0..4).for_each(|seat| ops.seat(&mut sampler, seat, &params, &[1], &[2]).unwrap());
        work.launch(&mut y, 20);
        let end = ops.mark().unwrap();
        // Neither is waited for, and their memory is given back when the copies have ended.
        drop(ops.sample(&x, &places, &mut sampler).unwrap());
        drop(ops.score(&x, &[(0, 1), (1, 2)], 2).unwrap());
        assert!(ops.reached(&end), "a drop waits for the copy that goes to its memory");
        (0..4).for_each(|seat| ops.seat(&mut sampler, seat, &params, &[1], &[2]).unwrap());
        let mut sampled = Vec::new();
        ops.collect(ops.sample(&x, &places, &mut sampler).unwrap(), &mut sampled).unwrap();
        let tokens: Vec<usize> = sampled.iter().map(|sampled| sampled.token as usize).collect();
        assert_eq!(tokens, (0..4).map(best).collect::<Vec<_>>());
    }
}

#[test]
fn a_mark_is_reached_when_the_work_before_it_is_done() {
    let work = Work::new();
    let mut y = work.output();
    work.launch(&mut y, 2);
    work.ops.synchronize().unwrap();
    let mut ahead = 0;
    for _ in 0..10 {
        let begin = work.ops.mark().unwrap();
        work.launch(&mut y, MANY);
        let end = work.ops.mark().unwrap();
        ahead += usize::from(!work.ops.reached(&end));
        let seconds = work.ops.seconds_between(&begin, &end).unwrap();
        assert!(work.ops.reached(&begin) && work.ops.reached(&end));
        // At twice what a GPU can do: 2 · rows · inputs · outputs at two petaflops a second.
        let least = MANY as f64 * 2.0 * (ROWS * WIDE * WIDE) as f64 / 2e15;
        assert!(seconds > least, "{seconds} s for what takes {least} s at least");
    }
    // Tests that run beside this one hold up the launches now and then.
    assert!(ahead > 0, "every mark was reached as soon as it was made");
}

/// Host memory is taken in whole pieces of 2 MiB.
#[test]
fn host_memory_is_told_in_pieces() {
    let (ops, piece) = (backend(), 2 << 20);
    let sites = [LoraSite::linear(WIDE, &[WIDE, 64])];
    for (lora_rank, pieces) in [(1, 1), (16, 1), (128, 1), (129, 2), (512, 4)] {
        let zeros = vec![0.0; WIDE * lora_rank];
        let part = LoraPart::delta((0, 0), lora_rank, 1.0, &zeros, &zeros);
        assert_eq!(ops.host_bytes(&sites, &[part.shape()]).unwrap(), pieces * piece, "rank {lora_rank}");
        let staged = ops.stage(&sites, &[part]).unwrap();
        assert!(ops.adapter_bytes(&staged) <= pieces * piece);
        assert_eq!(ops.adapter_bytes(&staged), 2 * 2 * WIDE * lora_rank);
    }
}
