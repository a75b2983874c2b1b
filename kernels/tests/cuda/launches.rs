//! How often a step goes to the GPU.

use kernels::{LogitShape, LowRank, ReplacedRows};

use super::*;

const HIDDEN: usize = 512;
const INNER: usize = 1024;
const ADAPTERS: usize = 32;

/// A layer's projections, whose deltas are all that its adapters have, or DoRA's with magnitudes.
fn sites() -> [LoraSite; 4] {
    [
        LoraSite::linear(HIDDEN, &[HIDDEN, 128, 128]),
        LoraSite::linear(HIDDEN, &[HIDDEN]),
        LoraSite::linear(HIDDEN, &[INNER, INNER]),
        LoraSite::linear(INNER, &[HIDDEN]),
    ]
}

/// Deltas of all slices of all sites.
fn adapter(sites: &[LoraSite], numbers: &mut Numbers, is_dora: bool) -> Vec<LoraPart> {
    let slices = sites.iter().enumerate().flat_map(|(site, s)| (0..s.outputs.len()).map(move |i| (site, i)));
    let mut part = |at: (usize, usize)| {
        let mut part = numbers.part(at, &sites[at.0], 16);
        part.low_rank.iter_mut().for_each(|low_rank: &mut LowRank| low_rank.scale = 0.01);
        part.magnitude = is_dora.then(|| vec![1.0; sites[at.0].outputs[at.1]]);
        part
    };
    slices.map(&mut part).collect()
}

/// A batch of 32 rows, each of an adapter of its own, of which the first few have magnitudes: the kernels that it takes
/// through one layer's projections, and whether the stream is finite behind them.
fn launches(rows: usize, dora: usize) -> (u64, bool) {
    let (ops, sites, mut numbers) = (backend(), sites(), Numbers(61));
    ops.capture_steps(false);
    let weights: Vec<_> = sites
        .iter()
        .map(|s| ops.weight(&[tensor(&numbers.table(s.outputs.iter().sum(), s.inputs))]).unwrap())
        .collect();
    let adapters: Vec<_> = (0..ADAPTERS).map(|slot| adapter(&sites, &mut numbers, slot < dora)).collect();
    let slots = resident_on(&ops, &sites, &adapters, &weights.iter().collect::<Vec<_>>());
    let of: Vec<_> = (0..ADAPTERS as u32).map(Some).collect();
    let host = batch(&vec![(rows / ADAPTERS, 3); ADAPTERS], &of);
    let device = device_batch(&ops, &host);
    let norm = ops.vector(&[1.0; HIDDEN]).unwrap();
    let mut x = mat(&ops, &numbers.table(rows, HIDDEN));
    let mut stream = wide_mat(&ops, &numbers.table(rows, HIDDEN));
    let mut products = ops.wide_mat(rows, HIDDEN).unwrap();
    let [mut qkv, mut gate_up, mut act] =
        [HIDDEN + 256, 2 * INNER, INNER].map(|cols| ops.mat(rows, cols).unwrap());
    let before = ops.launches();
    let by = |site: usize| {
        let lora = LinearLora { slots: &slots, site, batch: &device, rows: RowSet::All };
        Projection::new(&weights[site], Some(lora))
    };
    let mut onto = |input: &CudaMat, site: usize, stream: &mut CudaMat, y: &mut CudaMat| {
        let next = Some((rms(&norm), y));
        let to =
            Residual { stream, products: &mut products, post: None, scale: 1.0, branch: Branch::Only, next };
        ops.linear(input, by(site), Output::Residual(to)).unwrap();
    };
    ops.linear(&x, by(0), Output::Store(&mut qkv)).unwrap();
    let mut y = ops.mat(rows, HIDDEN).unwrap();
    onto(&x, 1, &mut stream, &mut y);
    let out = Output::Gate { activation: Activation::Silu, products: &mut gate_up, y: &mut act };
    ops.linear(&y, by(2), out).unwrap();
    onto(&act, 3, &mut stream, &mut x);
    let launches = ops.launches() - before;
    (launches, ops.download(&stream).unwrap().iter().all(|x| x.is_finite()))
}

/// Magnitudes are applied by kernels that are launched anyway, in small steps, in larger ones, and in prompts.
#[test]
fn adapters_with_magnitudes_take_no_more_launches() {
    for rows in [ADAPTERS, 3 * ADAPTERS, 20 * ADAPTERS] {
        let plain = launches(rows, 0);
        assert!(plain.0 > 0 && plain.1, "{rows} rows: {plain:?}");
        for dora in [1, 7, ADAPTERS] {
            assert_eq!(launches(rows, dora), plain, "{rows} rows, {dora} adapters with magnitudes");
        }
    }
}

/// Adapters of every kind for a projection and an output projection, the first with low-rank deltas only.
fn of_every_kind(sites: &[LoraSite], numbers: &mut Numbers) -> Vec<Vec<LoraPart>> {
    let mut plain = || scaled(numbers.part((0, 0), &sites[0], 16), 0.01);
    let [a, b, c, d] = [plain(), plain(), plain(), plain()];
    let head = scaled(numbers.part((1, 0), &sites[1], 8), 0.1);
    let mut bias = || Some(numbers.table(1, HIDDEN).data);
    let [first, second] = [bias(), bias()];
    let mut rows = |ids: Option<Vec<u32>>, count| {
        let rows = Some(ReplacedRows { ids, values: tensor(&numbers.table(count, HIDDEN)) });
        LoraPart { low_rank: None, magnitude: None, bias: None, rows, site: 1, slice: 0, content: 0 }
    };
    vec![
        vec![a.clone()],
        vec![LoraPart { magnitude: Some(vec![9.0; HIDDEN]), ..a.clone() }],
        vec![LoraPart { bias: first, ..b }],
        vec![LoraPart { low_rank: None, bias: second, ..a }],
        vec![rows(None, VOCAB)],
        vec![rows(None, VOCAB - 100)],
        vec![c, rows(Some(vec![0, 7, VOCAB as u32 - 1]), 3)],
        vec![d, head],
    ]
}

const VOCAB: usize = 1000;
const ROWS: usize = 8;

/// A decode step through a projection onto the stream and an output projection.
struct Decode {
    ops: CudaBackend,
    weights: [CudaWeight; 2],
    norm: CudaVector,
    slots: CudaSlots,
    device: CudaBatch,
    input: Table,
    x: CudaMat,
    stream: CudaMat,
    products: CudaMat,
    y: CudaMat,
    last: CudaMat,
    logits: CudaMat,
}

impl Decode {
    fn new() -> Decode {
        let (ops, mut numbers) = (backend(), Numbers(62));
        let head = LoraSite::head(HIDDEN, VOCAB);
        let sites = [LoraSite::linear(HIDDEN, &[HIDDEN]), head];
        let mut weight = |rows| ops.weight(&[tensor(&numbers.table(rows, HIDDEN))]).unwrap();
        let weights = [weight(HIDDEN), weight(VOCAB)];
        let adapters = of_every_kind(&sites, &mut numbers);
        let [half, wide] = [HIDDEN, VOCAB].map(|cols| ops.wide_mat(ROWS, cols).unwrap());
        let mat = || ops.mat(ROWS, HIDDEN).unwrap();
        Decode {
            slots: resident_on(&ops, &sites, &adapters, &weights.iter().collect::<Vec<_>>()),
            norm: ops.vector(&[1.0; HIDDEN]).unwrap(),
            device: ops.batch(ROWS, 64, &[Span::Causal]).unwrap(),
            input: numbers.table(ROWS, HIDDEN),
            x: mat(),
            y: mat(),
            last: mat(),
            products: ops.wide_mat(ROWS, HIDDEN).unwrap(),
            stream: half,
            logits: wide,
            weights,
            ops,
        }
    }

    /// The logits of rows with adapters in these slots, of a captured step or of one that is launched kernel by kernel.
    fn run(&mut self, of: &[Option<u32>; ROWS], capture: bool) -> Vec<f32> {
        let Decode { ops, weights, norm, slots, device, input, x, stream, products, y, last, logits } = self;
        ops.capture_steps(capture);
        ops.upload(&batch(&[(1, 3); ROWS], of), device).unwrap();
        ops.fill(x, &input.data).unwrap();
        ops.fill(stream, &input.data).unwrap();
        let by = |site: usize, rows| {
            let lora = LinearLora { slots: &*slots, site, batch: &*device, rows };
            Projection::new(&weights[site], Some(lora))
        };
        ops.step(device, Some(&*slots), || {
            let next = Some((rms(norm), &mut *y));
            let to = Residual { stream, products, post: None, scale: 1.0, branch: Branch::Only, next };
            ops.linear(x, by(0, RowSet::All), Output::Residual(to))?;
            ops.gather_logit_rows(y, device, last)?;
            let out = Output::Logits { y: &mut *logits, shape: LogitShape::PLAIN };
            ops.linear(last, by(1, RowSet::Logits), out)
        })
        .unwrap();
        ops.download(logits).unwrap()
    }
}

/// Two graphs, one captured with low-rank deltas alone and one with magnitudes, serve steps with every mix of deltas, gains,
/// biases and replaced rows.
#[test]
fn two_graphs_serve_adapters_of_every_kind() {
    let mut decode = Decode::new();
    let all = |slot: u32| [Some(slot); ROWS];
    let mut mixes: Vec<_> = (0..8).map(all).collect();
    let rotated = |by: usize| std::array::from_fn(|i| Some(((i + by) % 8) as u32));
    mixes.extend((0..8).map(rotated));
    mixes.extend([1, 4, 6].map(|slot| std::array::from_fn(|i| Some(if i == 3 { slot } else { 0 }))));
    // As the warm-up does.
    for slot in [0, 1] {
        for _ in 0..2 {
            decode.run(&all(slot), true);
        }
    }
    let launches = decode.ops.launches();
    let replayed: Vec<_> = mixes.iter().map(|of| decode.run(of, true)).collect();
    assert_eq!(decode.ops.launches(), launches, "every step is a replay");
    for (of, replayed) in mixes.iter().zip(&replayed) {
        assert!(*replayed == decode.run(of, false), "{of:?}");
    }
    for (slot, other) in (0..8).flat_map(|slot| (0..slot).map(move |other| (slot, other))) {
        assert!(replayed[slot] != replayed[other], "adapters {slot} and {other} differ");
    }
}
