//! What only the CUDA backend does: captured steps, f32 activations, kernels for aligned and long shapes. Needs a GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "cuda/in_flight.rs"]
mod in_flight;
#[path = "cuda/launches.rs"]
mod launches;
#[path = "cuda/long_contexts.rs"]
mod long_contexts;

use std::sync::Arc;

use kernels::{
    Activation, AttentionShape, Batch, Branch, DType, Embedding, Heads, HostTensor, LinearLora, LoraPart,
    LoraSite, Matrix, Norm, NormKind, Output, Pairs, Projection, Qkv, Residual, Result, RopeSpec, Rotation,
    RowSet, SampleRow, SamplingParams, Span, Stretch,
    cuda::{CudaBackend, CudaBatch, CudaKv, CudaMat, CudaRope, CudaSlots, CudaVector, CudaWeight},
    prelude::*,
    reference::{self, KvMemory, Table},
    testing::{Numbers, assert_close, batch},
};

fn backend() -> CudaBackend {
    CudaBackend::new(DType::Bf16, 0).unwrap()
}

fn filled(ops: &CudaBackend, mut x: CudaMat, table: &Table) -> CudaMat {
    ops.fill(&mut x, &table.data).unwrap();
    x
}

fn mat(ops: &CudaBackend, table: &Table) -> CudaMat {
    filled(ops, ops.mat(table.rows(), table.cols).unwrap(), table)
}

fn wide_mat(ops: &CudaBackend, table: &Table) -> CudaMat {
    filled(ops, ops.wide_mat(table.rows(), table.cols).unwrap(), table)
}

fn tensor(table: &Table) -> HostTensor<'static> {
    let data = table.data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    HostTensor { dtype: DType::F32, rows: table.rows(), cols: table.cols, data: data.into() }
}

fn device_batch(ops: &CudaBackend, host: &Batch) -> CudaBatch {
    device_batch_for(ops, host, &[Span::Causal])
}

fn device_batch_for(ops: &CudaBackend, host: &Batch, spans: &[Span]) -> CudaBatch {
    let mut batch = ops.batch(host.rows(), host.blocks.len(), spans).unwrap();
    ops.upload(host, &mut batch).unwrap();
    batch
}

/// A table's rows as they are.
fn rows_of(table: &CudaWeight) -> Embedding<'_, CudaBackend> {
    Embedding { table, scale: 1.0, positions: None, lora: None }
}

/// An RMS norm without a bias.
fn rms(weight: &CudaVector) -> Norm<'_, CudaBackend> {
    Norm { kind: NormKind::Rms, weight, bias: None, eps: 1e-5 }
}

/// Some frequencies, which no length stretches.
fn spec(inv_freq: &[f32], positions: usize) -> RopeSpec {
    RopeSpec { inv_freq: inv_freq.to_vec(), scale: 1.0, positions, stretch: Stretch::None }
}

/// Whole heads are rotated by a table, and nothing else is done to them.
fn whole(heads: Heads, table: &CudaRope) -> Qkv<'_, CudaBackend> {
    Qkv { heads, clamp: None, norms: None, rope: Some(Rotation { table, pairs: Pairs::Halves }) }
}

/// Adds products to a stream.
fn add_products(
    ops: &CudaBackend,
    x: &CudaMat,
    by: Projection<'_, CudaBackend>,
    stream: &mut CudaMat,
) -> Result<()> {
    let products = &mut ops.wide_mat(x.rows().max(1), stream.cols())?;
    let to = Residual { stream, products, post: None, scale: 1.0, branch: Branch::Only, next: None };
    ops.linear(x, by, Output::Residual(to))
}

fn resident(ops: &CudaBackend, sites: &[LoraSite], adapters: &[Vec<LoraPart>]) -> CudaSlots {
    resident_on(ops, sites, adapters, &[])
}

/// As [`resident`], for adapters that depend on the base weights of the sites.
fn resident_on(
    ops: &CudaBackend,
    sites: &[LoraSite],
    adapters: &[Vec<LoraPart>],
    weights: &[&CudaWeight],
) -> CudaSlots {
    let mut slots = ops.lora_slots(sites, adapters.len()).unwrap();
    for (slot, parts) in adapters.iter().enumerate() {
        let adapter = Arc::new(ops.stage(sites, parts).unwrap());
        ops.load(&mut slots, slot as u32, &adapter, weights).unwrap();
    }
    let mut count = 0;
    while count < adapters.len() {
        count += ops.loaded(&mut slots).unwrap().len();
    }
    slots
}

/// Deltas of ranks 1 to 130 on three aligned slices, for decode rows, long segments and few logits.
#[test]
fn deltas_of_aligned_shapes() {
    let ops = backend();
    let mut numbers = Numbers(21);
    let sites = [LoraSite::linear(1536, &[512, 128, 192])];
    let adapters: Vec<Vec<LoraPart>> = [1, 8, 16, 31, 64, 130]
        .iter()
        .map(|&r| (0..3).map(|slice| numbers.part((0, slice), &sites[0], r)).collect())
        .collect();
    let slots = resident(&ops, &sites, &adapters);
    let mixed: Vec<Option<u32>> = (0..40).map(|i| (i % 7 < 6).then_some(i % 7)).collect();
    let cases = [
        (vec![(1, 5)], vec![Some(2_u32)]),
        (vec![(1, 3); 40], mixed),
        (vec![(1, 3); 40], vec![Some(3); 40]),
        (vec![(300, 0), (1, 9), (70, 0)], vec![Some(5), None, Some(1)]),
    ];
    for (sequences, slots_of) in cases {
        let host = batch(&sequences, &slots_of);
        let device = device_batch(&ops, &host);
        let (x, w) = (numbers.table(host.rows(), 1536), numbers.table(832, 1536));
        let mut expected = reference::linear(&x, &w, None);
        reference::add_lora(&x, (0, &sites[0]), &host.segments, &adapters, &mut expected);
        let weight = ops.weight(&[tensor(&w)]).unwrap();
        for mut y in [ops.mat(host.rows(), 832).unwrap(), ops.wide_mat(host.rows(), 832).unwrap()] {
            let lora = LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All };
            ops.linear(&mat(&ops, &x), Projection::new(&weight, Some(lora)), Output::Store(&mut y)).unwrap();
            assert_close("deltas", &ops.download(&y).unwrap(), &expected.data, DType::Bf16);
        }
        let mut sums = numbers.table(host.rows(), 832);
        let mut y = wide_mat(&ops, &sums);
        reference::add(&expected, &mut sums);
        let lora = LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All };
        add_products(&ops, &mat(&ops, &x), Projection::new(&weight, Some(lora)), &mut y).unwrap();
        assert_close("deltas onto", &ops.download(&y).unwrap(), &sums.data, DType::Bf16);
    }
}

/// Every number of rows around the borders of the kernels for few of them, on inputs as long as a large model's.
#[test]
fn products_and_deltas_of_few_rows() {
    let ops = backend();
    let mut numbers = Numbers(24);
    for inputs in [600, 4096, 14336] {
        let sites = [LoraSite::linear(inputs, &[256, 64, 80])];
        let adapters: Vec<Vec<LoraPart>> = [16, 1, 33, 128]
            .iter()
            .map(|&r| (0..3).map(|slice| numbers.part((0, slice), &sites[0], r)).collect())
            .collect();
        let slots = resident(&ops, &sites, &adapters);
        let w = numbers.table(400, inputs);
        let weight = ops.weight(&[tensor(&w)]).unwrap();
        for rows in [1, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 48, 56, 57, 70] {
            let slots_of: Vec<Option<u32>> =
                (0..rows).map(|i| Some((i * 5 / rows) as u32).filter(|&s| s < 4)).collect();
            for with_deltas in [false, true] {
                let host = batch(&vec![(1, 3); rows], if with_deltas { &slots_of } else { &[] });
                let device = device_batch(&ops, &host);
                let x = numbers.table(rows, inputs);
                let mut expected = reference::linear(&x, &w, None);
                reference::add_lora(&x, (0, &sites[0]), &host.segments, &adapters, &mut expected);
                let mut y = ops.mat(rows, 400).unwrap();
                let lora = || LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All };
                ops.linear(&mat(&ops, &x), Projection::new(&weight, Some(lora())), Output::Store(&mut y))
                    .unwrap();
                let what = format!("{rows} rows of {inputs}, deltas: {with_deltas}");
                assert_close(&what, &ops.download(&y).unwrap(), &expected.data, DType::Bf16);
                let mut sums = numbers.table(rows, 400);
                let mut y = wide_mat(&ops, &sums);
                reference::add(&expected, &mut sums);
                add_products(&ops, &mat(&ops, &x), Projection::new(&weight, Some(lora())), &mut y).unwrap();
                assert_close(&what, &ops.download(&y).unwrap(), &sums.data, DType::Bf16);
            }
        }
    }
}

#[test]
fn wide_residual_and_logits_keep_f32() {
    let ops = backend();
    let mut numbers = Numbers(22);
    let table = numbers.table(1000, 256);
    let weight = ops.weight(&[tensor(&table)]).unwrap();
    // By each way that products of some rows go.
    for rows in [3, 6, 20, 200] {
        let x = numbers.table(rows, 256);
        let expected = reference::linear(&x, &table, None);
        let mut logits = ops.wide_mat(rows, 1000).unwrap();
        ops.linear(&mat(&ops, &x), Projection::new(&weight, None), Output::Store(&mut logits)).unwrap();
        assert_close("logits", &ops.download(&logits).unwrap(), &expected.data, DType::F32);
        let mut sums = numbers.table(rows, 1000);
        sums.data.iter_mut().for_each(|x| *x += 1e-4);
        let mut residual = wide_mat(&ops, &sums);
        reference::add(&expected, &mut sums);
        add_products(&ops, &mat(&ops, &x), Projection::new(&weight, None), &mut residual).unwrap();
        assert_close("residual", &ops.download(&residual).unwrap(), &sums.data, DType::F32);
    }
}

/// Decode over a context long enough to be split, and a chunk of prefill behind a long one.
#[test]
fn attention_over_long_contexts() {
    let steps = [[(600, 0), (64, 0)], [(98, 600), (1, 64)], [(1, 698), (4, 65)], [(1, 699), (1, 69)]];
    for (query, kv, dim, window) in [(32, 8, 128, None), (6, 2, 96, Some(300)), (20, 1, 64, None)] {
        let plain = AttentionShape { scale: 0.3, ..AttentionShape::causal(Heads { query, kv, dim }) };
        let span = window.map_or(Span::Causal, Span::Window);
        check_attention(&[backend()], &AttentionShape { span, ..plain }, &steps);
    }
}

/// Prefill of odd lengths, whole and in chunks, beside decode rows: groups and head sizes of every kind, edges of causal
/// and window masks at every place of a tile.
#[test]
fn attention_of_prefills() {
    let backends = [DType::Bf16, DType::F16].map(|dtype| CudaBackend::new(dtype, 0).unwrap());
    let steps = [[(301, 0), (1, 0), (65, 0), (2, 0)], [(160, 301), (255, 1), (1, 65), (1, 2)]];
    for (query, kv, dim) in [(2, 2, 128), (4, 1, 128), (8, 1, 64), (6, 2, 96), (9, 1, 40), (2, 2, 64)] {
        let plain = AttentionShape { scale: 0.3, ..AttentionShape::causal(Heads { query, kv, dim }) };
        check_attention(&backends, &plain, &steps);
        check_attention(&backends, &AttentionShape { span: Span::Window(37), ..plain }, &steps);
        let capped = AttentionShape { span: Span::Window(150), softcap: Some(2.0), ..plain };
        check_attention(&backends, &capped, &steps);
    }
    let heads = Heads { query: 8, kv: 2, dim: 128 };
    let plain = AttentionShape { scale: 0.3, ..AttentionShape::causal(heads) };
    let whole = [127, 128, 129, 33, 640].map(|rows| (rows, 0));
    check_attention(&backends, &plain, &[whole, whole.map(|(rows, _)| (1, rows))]);
}

/// Runs steps of the same sequences, their rows and the tokens before them, and checks each.
fn check_attention<const N: usize>(
    backends: &[CudaBackend],
    attention: &AttentionShape,
    steps: &[[(usize, usize); N]],
) {
    let (heads, mut numbers) = (attention.heads, Numbers(23));
    let spec = spec(&vec![0.01; heads.dim / 2], 4096);
    let by = reference::Qkv::rotated(heads, &spec);
    // All steps keep the same number of blocks for each sequence, so that its table does not move.
    let longest = steps[steps.len() - 1].map(|(rows, before)| (rows + before, 0));
    let table = batch(&longest, &[]);
    let blocks = table.blocks.iter().max().map_or(0, |&block| block as usize + 1);
    let mut memory = KvMemory::new(blocks, heads);
    let mut caches: Vec<_> = backends.iter().map(|ops| ops.kv(blocks, heads).unwrap()).collect();
    for step in steps {
        let host = step_of(&table, step);
        let qkv = numbers.table(host.rows(), heads.qkv_cols());
        let mut rotated = qkv.clone();
        reference::rope_and_store(&mut rotated, &by, &host, &mut memory);
        let expected = reference::paged_attention(&rotated, attention, &host, &memory);
        for (ops, cache) in backends.iter().zip(&mut caches) {
            let rope = ops.rope(&spec).unwrap();
            let device = device_batch_for(ops, &host, &[Span::Causal, attention.span]);
            let mut x = mat(ops, &qkv);
            ops.rope_and_store(&mut x, whole(heads, &rope), &device, cache).unwrap();
            let mut y = ops.mat(host.rows(), heads.query * heads.dim).unwrap();
            ops.paged_attention(&x, (*attention).into(), &device, cache, &mut y).unwrap();
            let what = format!("{attention:?} of {step:?}");
            assert_close(&what, &ops.download(&y).unwrap(), &expected.data, ops.dtype());
        }
    }
}

/// A step of the same sequences as those of `table`, with their block tables: the rows of each, and the tokens before
/// them.
fn step_of(table: &Batch, step: &[(usize, usize)]) -> Batch {
    let mut host = batch(step, &[]);
    host.blocks.clone_from(&table.blocks);
    for (sequence, placed) in host.sequences.iter_mut().zip(&table.sequences) {
        sequence.first_block = placed.first_block;
    }
    host.store_at = stores(&host);
    host
}

/// Where the rows of a batch belong by its block tables.
fn stores(host: &Batch) -> Vec<u32> {
    let rows = host.sequences.iter().flat_map(|s| (s.start..s.start + s.rows).map(move |row| (row, s)));
    rows.map(|(row, s)| {
        let position = host.positions[row as usize];
        host.blocks[(s.first_block + position / 16) as usize] * 16 + position % 16
    })
    .collect()
}

/// Steps with deltas before and behind a norm, replayed from a graph, equal the same steps launched one by one.
#[test]
fn captured_steps_equal_launched_ones() {
    let captured = decode_tokens(true);
    assert_eq!(captured, decode_tokens(false));
    assert!(captured.iter().any(|step| step != &captured[0]), "the steps differ");
}

/// Greedy tokens of a few decode steps of changing size through a toy model of one layer without attention.
fn decode_tokens(capture: bool) -> Vec<Vec<u32>> {
    let (hidden, vocab, most) = (640, 200, 70);
    let ops = backend();
    ops.capture_steps(capture);
    let mut numbers = Numbers(24);
    let sites = [vocab, hidden].map(|outputs| LoraSite::linear(hidden, &[outputs]));
    let adapters: Vec<Vec<_>> = [4, 40]
        .iter()
        .map(|&r| (0..2).map(|site| scaled(numbers.part((site, 0), &sites[site], r), 0.05)).collect())
        .collect();
    let slots = resident(&ops, &sites, &adapters);
    let mut weight = |rows| ops.weight(&[tensor(&numbers.table(rows, hidden))]).unwrap();
    let (table, head, inner) = (weight(vocab), weight(vocab), weight(hidden));
    let weights = ops.vector(&vec![1.0; hidden]).unwrap();
    let mut sampler = ops.sampler(most, vocab).unwrap();
    for seat in 0..most as u32 {
        ops.seat(&mut sampler, seat, &SamplingParams::default(), &[], &[]).unwrap();
    }
    let mut device = ops.batch(most, 64, &[Span::Causal]).unwrap();
    let mut products = ops.wide_mat(most, hidden).unwrap();
    let [mut x, mut y, mut last] = [0; 3].map(|_| ops.mat(most, hidden).unwrap());
    let (mut residual, mut logits) =
        (ops.wide_mat(most, hidden).unwrap(), ops.wide_mat(most, vocab).unwrap());
    let mut steps = Vec::new();
    let mut pending = Vec::new();
    for (step, rows) in [9, 9, 10, 3, 66, 9, 12, 66, 10, 3, 66, 3, 11, 70].into_iter().enumerate() {
        let slots_of: Vec<_> = (0..rows).map(|i| [None, Some(0), Some(1)][(i + step) % 3]).collect();
        let mut host = batch(&vec![(1, step); rows], &slots_of);
        let known = |seat: usize| if step == 0 { seat as i32 * 5 } else { -1 - seat as i32 };
        host.tokens = (0..rows).map(known).collect();
        ops.upload(&host, &mut device).unwrap();
        ops.step(&device, Some(&slots), || {
            ops.embed(&device, &sampler, rows_of(&table), &mut residual)?;
            ops.normalize(&residual, rms(&weights), &mut x)?;
            let lora = |site, rows| Some(LinearLora { slots: &slots, site, batch: &device, rows });
            let by = Projection::new(&inner, lora(1, RowSet::All));
            let (stream, products) = (&mut residual, &mut products);
            let next = Some((rms(&weights), &mut y));
            let to = Residual { stream, products, post: None, scale: 1.0, branch: Branch::Only, next };
            ops.linear(&x, by, Output::Residual(to))?;
            ops.gather_logit_rows(&y, &device, &mut last)?;
            let by = Projection::new(&head, lora(0, RowSet::Logits));
            ops.linear(&last, by, Output::Store(&mut logits))
        })
        .unwrap();
        assert!(logits.rows() >= rows);
        let choices: Vec<_> = (0..rows as u32).map(|row| SampleRow { row, seat: row }).collect();
        pending.push(ops.sample(&logits, &choices, &mut sampler).unwrap());
    }
    for pending in pending {
        let mut sampled = Vec::new();
        ops.collect(pending, &mut sampled).unwrap();
        steps.push(sampled.iter().map(|s| s.token).collect());
    }
    steps
}

/// A decoder layer of random weights with two adapters, and its activations.
struct Layer {
    ops: Arc<CudaBackend>,
    weights: [CudaWeight; 4],
    norm: CudaVector,
    rope: CudaRope,
    kv: CudaKv,
    slots: Arc<CudaSlots>,
    x: CudaMat,
    residual: CudaMat,
    products: CudaMat,
    inner: [CudaMat; 4],
}

impl Layer {
    const HIDDEN: usize = 2048;
    const FFN: usize = 4096;
    const HEADS: Heads = Heads { query: 16, kv: 4, dim: 128 };

    fn new(rows: usize, blocks: usize) -> Layer {
        let (ops, mut numbers) = (backend(), Numbers(26));
        let (hidden, qkv) = (Self::HIDDEN, Self::HEADS.qkv_cols());
        let sites = [
            LoraSite::linear(hidden, &[2048, 512, 512]),
            LoraSite::linear(2048, &[hidden]),
            LoraSite::linear(hidden, &[Self::FFN, Self::FFN]),
            LoraSite::linear(Self::FFN, &[hidden]),
        ];
        let small = |mut table: Table| {
            let scale = (table.cols as f32).sqrt().recip();
            table.data.iter_mut().for_each(|x| *x *= scale);
            table
        };
        let adapters: Vec<Vec<LoraPart>> = [16, 70]
            .iter()
            .map(|&r| {
                let slices =
                    sites.iter().enumerate().flat_map(|(i, s)| (0..s.outputs.len()).map(move |j| (i, j)));
                slices.map(|at| numbers.part(at, &sites[at.0], r)).map(|part| scaled(part, 0.02)).collect()
            })
            .collect();
        let mut weight = |rows, cols| ops.weight(&[tensor(&small(numbers.table(rows, cols)))]).unwrap();
        let weights = [
            weight(qkv, hidden),
            weight(hidden, 2048),
            weight(2 * Self::FFN, hidden),
            weight(hidden, Self::FFN),
        ];
        let mat = |cols| ops.mat(rows, cols).unwrap();
        Layer {
            weights,
            norm: ops.vector(&vec![1.0; hidden]).unwrap(),
            rope: ops.rope(&spec(&[0.01; 64], 1024)).unwrap(),
            kv: ops.kv(blocks, Self::HEADS).unwrap(),
            slots: Arc::new(resident(&ops, &sites, &adapters)),
            x: mat(hidden),
            residual: ops.wide_mat(rows, hidden).unwrap(),
            products: ops.wide_mat(rows, hidden).unwrap(),
            inner: [mat(qkv), mat(2048), mat(2 * Self::FFN), mat(Self::FFN)],
            ops: Arc::new(ops),
        }
    }

    /// The layer a few times over, one operation after the other or, of a decode step, from its second run on as a CUDA
    /// graph. Waits for the GPU after every operation if asked to.
    fn run(&mut self, device: &CudaBatch, rows: usize, (graph, wait): (bool, bool)) -> Vec<f32> {
        let ops = self.ops.clone();
        ops.fill(&mut self.residual, &Numbers(27).table(rows, Self::HIDDEN).data).unwrap();
        if graph {
            let slots = self.slots.clone();
            ops.step(device, Some(&slots), || {
                self.launch(device, wait);
                Ok(())
            })
            .unwrap();
        } else {
            self.launch(device, wait);
        }
        ops.download(&self.residual).unwrap()
    }

    fn launch(&mut self, device: &CudaBatch, wait: bool) {
        let Layer { ops, weights, norm, rope, kv, slots, x, residual, products, inner } = self;
        let attention = AttentionShape { scale: 0.1, ..AttentionShape::causal(Self::HEADS) };
        let settle = |()| {
            if wait {
                ops.synchronize().unwrap()
            }
        };
        ops.normalize(residual, rms(norm), x).map(settle).unwrap();
        let [qkv, attn, gate_up, act] = inner;
        for _ in 0..6 {
            let lora =
                |site| Some(LinearLora { slots: slots.as_ref(), site, batch: device, rows: RowSet::All });
            let by = |site: usize| Projection::new(&weights[site], lora(site));
            ops.linear(x, by(0), Output::Store(qkv)).map(settle).unwrap();
            ops.rope_and_store(qkv, whole(Self::HEADS, rope), device, kv).map(settle).unwrap();
            ops.paged_attention(qkv, attention.into(), device, kv, attn).map(settle).unwrap();
            for (site, input) in [(1, &mut *attn), (3, &mut *act)] {
                if site == 3 {
                    ops.linear(x, by(2), Output::Store(gate_up)).map(settle).unwrap();
                    ops.gate(gate_up, Activation::Silu, input).map(settle).unwrap();
                }
                let next = Some((rms(norm), &mut *x));
                let stream = &mut *residual;
                let to = Residual {
                    stream,
                    products: &mut *products,
                    post: None,
                    scale: 1.0,
                    branch: Branch::Only,
                    next,
                };
                ops.linear(input, by(site), Output::Residual(to)).map(settle).unwrap();
            }
        }
    }
}

fn scaled(mut part: LoraPart, by: f32) -> LoraPart {
    part.low_rank.iter_mut().for_each(|low_rank| low_rank.scale *= by);
    part
}

/// Kernels that start before the one ahead of them has ended, or run beside another, compute what they compute one at a
/// time.
#[test]
fn chained_kernels_wait_for_what_they_read() {
    let mixed = |rows: usize| (0..rows).map(|i| [None, Some(0), Some(1)][i * 3 / rows]).collect::<Vec<_>>();
    let cases = [
        (vec![(1, 40)], vec![Some(0_u32)]),
        (vec![(1, 40); 20], mixed(20)),
        (vec![(1, 40); 100], mixed(100)),
        (vec![(300, 0), (1, 9), (200, 0)], vec![Some(1), None, Some(0)]),
    ];
    for (sequences, slots) in cases {
        let host = batch(&sequences, &slots);
        let blocks = host.blocks.iter().max().map_or(0, |&b| b as usize + 1);
        let mut layer = Layer::new(host.rows(), blocks);
        let device = device_batch(&layer.ops, &host);
        let expected = layer.run(&device, host.rows(), (false, true));
        assert!(expected.iter().all(|x| x.is_finite()));
        for capture in [false, true] {
            for _ in 0..5 {
                let got = layer.run(&device, host.rows(), (capture, false));
                assert!(got == expected, "{} rows, captured: {capture}", host.rows());
            }
        }
    }
}

#[test]
fn what_the_card_cannot_do_is_refused() {
    assert_eq!(
        CudaBackend::new(DType::F32, 0).err().unwrap().to_string(),
        "cuda: float32 (use bfloat16 or float16) is not supported"
    );
    assert!(CudaBackend::new(DType::Bf16, 99).err().unwrap().to_string().contains("device 99 of"));
    let ops = backend();
    assert!(ops.kv(4, Heads { query: 4, kv: 2, dim: 20 }).is_err());
    assert!(ops.kv(4, Heads { query: 4, kv: 2, dim: 264 }).is_err());
    let sites = [LoraSite::linear(4, &[4])];
    let part = Numbers(1).part((0, 0), &sites[0], 513);
    assert!(ops.stage(&sites, &[part]).is_err());
    let table = ops.weight(&[tensor(&Numbers(1).table(4, 8))]).unwrap();
    let sampler = ops.sampler(1, 4).unwrap();
    let mut y = ops.wide_mat(8, 8).unwrap();
    let device = device_batch(&ops, &batch(&[(3, 4)], &[]));
    let refused = ops.embed(&device, &sampler, rows_of(&table), &mut y).unwrap_err().to_string();
    assert_eq!(refused, "embed: token 6 is out of range, limit 4");
}
