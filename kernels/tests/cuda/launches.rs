//! How often a step goes to the GPU.

use kernels::LowRank;

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
    ops.record_steps(false);
    let weights: Vec<_> = sites
        .iter()
        .map(|s| ops.weight(&[tensor(&numbers.table(s.outputs.iter().sum(), s.inputs))]).unwrap())
        .collect();
    let mut slots = ops.lora_slots(&sites, ADAPTERS).unwrap();
    for slot in 0..ADAPTERS {
        let adapter = ops.stage(&sites, &adapter(&sites, &mut numbers, slot < dora)).unwrap();
        let weights: Vec<_> = weights.iter().collect();
        ops.load(&mut slots, slot as u32, &Arc::new(adapter), &weights).unwrap();
    }
    let mut loaded = 0;
    while loaded < ADAPTERS {
        loaded += ops.loaded(&mut slots).unwrap().len();
    }
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
        let to = Residual { stream, products: &mut products, post: None, scale: 1.0, more: false, next };
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
