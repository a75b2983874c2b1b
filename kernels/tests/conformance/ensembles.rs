//! Rows with several adapters, whose deltas and biases are added.

use std::slice;

use kernels::{
    Activation, Backend, Embedding, LinearLora, LoraPart, LoraSite, LowRank, Output, Projection,
    ReplacedRows, RowSet,
    cpu::CpuBackend,
    prelude::*,
    reference::{self, Base, Table},
    testing::{Numbers, assert_close, batch_of_ensembles},
};

use super::{add_and_norm, add_products, device_batch, fill_slots, mat, rms, tensor, wide_mat};

/// Members of an ensemble: slots with weights.
type Members = Vec<(u32, f32)>;

/// The ranks of the adapters in slots 0 to 7. Every third has biases.
const RANKS: [usize; 8] = [1, 16, 3, 33, 64, 17, 130, 8];
const SEQUENCES: [(usize, usize); 14] = [
    (1, 0),
    (5, 0),
    (1, 17),
    (3, 3),
    (1, 1),
    (9, 0),
    (1, 40),
    (17, 16),
    (1, 0),
    (2, 5),
    (1, 3),
    (1, 3),
    (1, 3),
    (4, 0),
];

/// Ensembles of every number of members, beside adapters alone and the base model.
fn lists() -> Vec<Members> {
    vec![
        vec![(0, 1.0), (1, 1.0)],
        vec![(3, 0.5), (2, -1.5), (6, 0.25)],
        vec![],
        vec![(1, 1.0)],
        vec![(1, 0.5)],
        vec![(4, 1.0), (5, 2.0), (7, -0.5), (0, 0.125)],
        vec![(5, 1.0), (4, 2.0)],
        vec![(4, 2.0), (5, 1.0)],
        vec![(6, 1.0), (6, -1.0)],
        vec![(2, 0.0), (3, 1.0)],
        vec![(6, 0.5), (4, 0.5), (3, 0.5), (1, 0.5)],
        vec![(0, 1.0), (1, 1.0)],
        vec![(0, 1.0), (1, 1.0)],
        vec![(7, -2.0)],
    ]
}

/// The adapters in slots 0 to 7 for a site. Each lacks a delta at some slice if there are several.
fn adapters(numbers: &mut Numbers, site: &LoraSite) -> Vec<Vec<LoraPart>> {
    let slices = site.outputs.len();
    let adapter = |(i, rank): (usize, &usize)| {
        let parts = (0..slices).filter(|slice| slices == 1 || i % 4 != *slice);
        let parts = parts.map(|slice| {
            let mut part = numbers.part((0, slice), site, *rank);
            part.low_rank.as_mut().unwrap().scale = 0.25;
            if i % 3 == 2 {
                part.bias = Some(numbers.table(1, site.outputs[slice]).data);
            }
            part
        });
        parts.collect()
    };
    RANKS.iter().enumerate().map(adapter).collect()
}

/// A projection with adapters.
struct Case<B: Backend> {
    site: LoraSite,
    w: Table,
    weight: B::Weight,
    bias: Vec<f32>,
    vector: B::Vector,
    adapters: Vec<Vec<LoraPart>>,
    slots: B::LoraSlots,
}

impl<B: Backend> Case<B> {
    fn new(ops: &B, numbers: &mut Numbers, site: LoraSite, adapters: Vec<Vec<LoraPart>>) -> Case<B> {
        let cols = site.outputs.iter().sum();
        let (w, bias) = (numbers.table(cols, site.inputs), numbers.table(1, cols).data);
        let (weight, vector) = (ops.weight(&[tensor(&w)]).unwrap(), ops.vector(&bias).unwrap());
        let slots = fill_slots(ops, slice::from_ref(&site), &[&weight], &adapters);
        Case { site, w, weight, bias, vector, adapters, slots }
    }

    fn of_ranks(ops: &B, numbers: &mut Numbers, site: LoraSite) -> Case<B> {
        let adapters = adapters(numbers, &site);
        Case::new(ops, numbers, site, adapters)
    }

    fn cols(&self) -> usize {
        self.w.rows()
    }

    fn by<'a>(&'a self, device: &'a B::Batch, rows: RowSet, has_bias: bool) -> Projection<'a, B> {
        let lora = LinearLora { slots: &self.slots, site: 0, batch: device, rows };
        Projection { weight: &self.weight, bias: has_bias.then_some(&self.vector), lora: Some(lora) }
    }

    fn expected(&self, x: &Table, segments: &[kernels::Segment], has_bias: bool) -> Table {
        let bias = has_bias.then_some(self.bias.as_slice());
        let base = Base { weight: &self.w, bias, site: (0, &self.site) };
        reference::adapted_linear(x, base, (segments, &self.adapters), self.cols())
    }
}

/// Compares the products of a step, and what is added to a stream, with the reference.
fn compare<B: Backend>(
    ops: &B,
    case: &Case<B>,
    numbers: &mut Numbers,
    (sequences, lists): (&[(usize, usize)], &[Members]),
) {
    let host = batch_of_ensembles(sequences, lists);
    let device = device_batch(ops, &host);
    for (rows, segments, count) in [
        (RowSet::All, &host.segments, host.rows()),
        (RowSet::Logits, &host.logit_segments, host.logit_rows.len()),
    ] {
        for has_bias in [false, true] {
            let x = numbers.table(count, case.site.inputs);
            let by = case.by(&device, rows, has_bias);
            let expected = case.expected(&x, segments, has_bias);
            let mut y = ops.mat(count, case.cols()).unwrap();
            ops.linear(&mat(ops, &x), by, Output::Store(&mut y)).unwrap();
            assert_close("ensembles", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
            let mut sums = numbers.table(count, case.cols());
            let mut stream = wide_mat(ops, &sums);
            reference::add(&expected, &mut sums);
            add_products(ops, &mat(ops, &x), by, &mut stream).unwrap();
            assert_close("ensembles onto", &ops.download(&stream).unwrap(), &sums.data, ops.dtype());
        }
    }
}

pub(super) fn ensembles_of_any_ranks<B: Backend>(ops: &B) {
    let mut numbers = Numbers(31);
    for (inputs, outputs) in [
        (40, vec![33]),
        (70, vec![48, 20, 31]),
        (64, vec![64, 64]),
        (33, vec![1]),
        (600, vec![128]),
        (1536, vec![64, 64, 64]),
    ] {
        let case = Case::of_ranks(ops, &mut numbers, LoraSite::linear(inputs, &outputs));
        compare(ops, &case, &mut numbers, (&SEQUENCES, &lists()));
        // Decode steps of few rows and of many, and one long prompt beside them.
        for rows in [1, 5, 8, 33] {
            let members: Vec<_> = lists().into_iter().cycle().take(rows).collect();
            compare(ops, &case, &mut numbers, (&vec![(1, 3); rows], &members));
        }
        let long = [(260, 0), (1, 9), (20, 0)];
        compare(ops, &case, &mut numbers, (&long, &[lists()[5].clone(), vec![], lists()[1].clone()]));
    }
}

/// As PEFT's `cat`: A of all members below each other, and B beside each other, times the weights.
fn concatenated(site: &LoraSite, adapters: &[Vec<LoraPart>], members: &Members) -> Vec<LoraPart> {
    let of_slice = |slice: usize| {
        let (inputs, outputs) = (site.inputs, site.outputs[slice]);
        let (mut a, mut columns) = (Vec::new(), vec![Vec::new(); outputs]);
        for &(slot, weight) in members {
            let part = adapters[slot as usize].iter().find(|part| part.slice == slice);
            let Some(LowRank { rank, scale, a: own_a, b }) = part.and_then(|part| part.low_rank.as_ref())
            else {
                continue;
            };
            a.extend(own_a.to_f32());
            for (column, b) in columns.iter_mut().zip(b.to_f32().chunks(*rank)) {
                column.extend(b.iter().map(|b| weight * scale * b));
            }
        }
        let rank = a.len() / inputs;
        (rank > 0).then(|| LoraPart::delta((0, slice), rank, 1.0, &a, &columns.concat()))
    };
    (0..site.outputs.len()).filter_map(of_slice).collect()
}

pub(super) fn ensembles_equal_one_adapter_of_all_ranks<B: Backend>(ops: &B) {
    let mut numbers = Numbers(32);
    for (inputs, outputs) in [(70, vec![48, 20, 31]), (128, vec![128])] {
        let site = LoraSite::linear(inputs, &outputs);
        let mut adapters = adapters(&mut numbers, &site);
        adapters.iter_mut().flatten().for_each(|part| part.bias = None);
        let lists: Vec<_> = lists().into_iter().filter(|members| members.len() > 1).collect();
        let merged = lists.iter().map(|members| concatenated(&site, &adapters, members));
        let merged: Vec<_> = merged.collect();
        let first = adapters.len() as u32;
        adapters.extend(merged);
        let case = Case::new(ops, &mut numbers, site, adapters);
        let sequences = vec![(2, 0); lists.len()];
        let x = numbers.table(2 * lists.len(), inputs);
        let run = |members: &[Members]| {
            let device = device_batch(ops, &batch_of_ensembles(&sequences, members));
            let mut y = ops.mat(x.rows(), case.cols()).unwrap();
            let by = case.by(&device, RowSet::All, true);
            ops.linear(&mat(ops, &x), by, Output::Store(&mut y)).unwrap();
            ops.download(&y).unwrap()
        };
        let alone: Vec<Members> = (0..lists.len() as u32).map(|i| vec![(first + i, 1.0)]).collect();
        assert_close("ensemble and merge", &run(&lists), &run(&alone), ops.dtype());
    }
}

/// Rows with magnitudes, with biases and with ensembles in one step.
pub(super) fn ensembles_beside_every_kind_of_adapter<B: Backend>(ops: &B) {
    let mut numbers = Numbers(33);
    for (inputs, outputs) in [(70, vec![48, 20, 31]), (64, vec![64, 64]), (600, vec![128])] {
        let site = LoraSite::linear(inputs, &outputs);
        let mut adapters = adapters(&mut numbers, &site);
        for slot in [3, 7] {
            for part in &mut adapters[slot] {
                let size = (inputs as f32 / 3.0).sqrt();
                let magnitude = |x: &f32| size * (1.0 + 0.5 * x);
                let random = numbers.table(1, outputs[part.slice]).data;
                part.magnitude = Some(random.iter().map(magnitude).collect());
            }
        }
        let case = Case::new(ops, &mut numbers, site, adapters);
        let lists = [
            vec![(3, 1.0)],
            vec![(0, 1.0), (2, -0.5)],
            vec![(7, 1.0)],
            vec![],
            vec![(2, 1.0)],
            vec![(4, 0.5), (5, 0.5), (6, 0.5), (2, 0.5)],
            vec![(3, 1.0)],
            vec![(0, 1.0), (2, -0.5)],
            vec![(0, 1.0)],
        ];
        compare(ops, &case, &mut numbers, (&SEQUENCES[..9], &lists));
    }
}

pub(super) fn gated_ensembles<B: Backend>(ops: &B) {
    let mut numbers = Numbers(34);
    for (inner, sequences) in [
        (128, &SEQUENCES[..]),
        (20, &SEQUENCES),
        // Steps as long as those for which GPUs gate as they expand.
        (128, &[(200, 0), (1, 5), (150, 3), (40, 0), (1, 0), (70, 0)]),
    ] {
        let case = Case::of_ranks(ops, &mut numbers, LoraSite::linear(72, &[inner; 2]));
        let host = batch_of_ensembles(sequences, &lists());
        let device = device_batch(ops, &host);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let x = numbers.table(host.rows(), 72);
            let expected = reference::gate(&case.expected(&x, &host.segments, false), activation);
            let mut products = ops.mat(host.rows(), 2 * inner).unwrap();
            let mut y = ops.mat(host.rows(), inner).unwrap();
            let out = Output::Gate { activation, products: &mut products, y: &mut y };
            ops.linear(&mat(ops, &x), case.by(&device, RowSet::All, false), out).unwrap();
            assert_close("gated ensembles", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
        }
    }
}

pub(super) fn normed_ensembles<B: Backend>(ops: &B) {
    let mut numbers = Numbers(35);
    for outputs in [64, 33, 512, 2048] {
        let case = Case::of_ranks(ops, &mut numbers, LoraSite::linear(96, &[outputs]));
        let weights = numbers.table(1, outputs).data;
        let vector = ops.vector(&weights).unwrap();
        for sequences in [&SEQUENCES[..], &SEQUENCES[..1], &SEQUENCES[8..], &[(70, 0), (1, 0), (90, 0)]] {
            let host = batch_of_ensembles(sequences, &lists());
            let device = device_batch(ops, &host);
            let (x, mut sums) = (numbers.table(host.rows(), 96), numbers.table(host.rows(), outputs));
            let (mut stream, mut y) = (wide_mat(ops, &sums), ops.mat(host.rows(), outputs).unwrap());
            let by = case.by(&device, RowSet::All, false);
            add_and_norm(ops, &mat(ops, &x), by, &mut stream, Some((rms(&vector), &mut y))).unwrap();
            reference::add(&case.expected(&x, &host.segments, false), &mut sums);
            assert_close("stream", &ops.download(&stream).unwrap(), &sums.data, ops.dtype());
            let expected = reference::rms_norm(&sums, &weights, 1e-5);
            assert_close("norm", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
        }
    }
}

pub(super) fn lookups_of_ensembles<B: Backend>(ops: &B) {
    let mut numbers = Numbers(36);
    let site = LoraSite::lookup(50, 72);
    let table = numbers.table(50, 72);
    let mut adapters = adapters(&mut numbers, &site);
    // The vocabulary of one is smaller.
    let b = numbers.table(72, 4).data;
    adapters[4] = vec![LoraPart::delta((0, 0), 4, 0.5, &numbers.table(4, 30).data, &b)];
    let weight = ops.weight(&[tensor(&table)]).unwrap();
    let slots = fill_slots(ops, slice::from_ref(&site), &[&weight], &adapters);
    let host = batch_of_ensembles(&SEQUENCES, &lists());
    let device = device_batch(ops, &host);
    let sampler = ops.sampler(1, 50).unwrap();
    for scale in [1.0, 3.5] {
        let lora = Some(LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All });
        let by = Embedding { table: &weight, scale, positions: None, lora };
        let mut y = ops.wide_mat(host.rows(), 72).unwrap();
        ops.embed(&device, &sampler, by, &mut y).unwrap();
        let base = Base { weight: &table, bias: None, site: (0, &site) };
        let expected = reference::embed(base, &host, &adapters, scale);
        assert_close("lookups of ensembles", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
    }
}

pub(super) fn members_that_are_not_sums_are_refused<B: Backend>(ops: &B) {
    let mut numbers = Numbers(37);
    let site = LoraSite { kind: kernels::SiteKind::Head, ..LoraSite::linear(40, &[64]) };
    let mut adapters: Vec<Vec<LoraPart>> = (0..3).map(|_| vec![numbers.part((0, 0), &site, 4)]).collect();
    adapters[1][0].magnitude = Some(vec![4.0; 64]);
    let values = tensor(&numbers.table(2, 40));
    let (low_rank, rows) = (None, Some(ReplacedRows { ids: Some(vec![3, 5]), values }));
    adapters[2] = vec![LoraPart { low_rank, rows, ..adapters[0][0].clone() }];
    let case = Case::new(ops, &mut numbers, site, adapters);
    let x = mat(ops, &numbers.table(1, 40));
    for (members, refused) in [
        (vec![(0, 1.0), (0, 0.5)], None),
        (vec![(1, 1.0)], None),
        (vec![(2, 1.0)], None),
        (vec![(1, 0.5)], Some(1)),
        (vec![(2, 2.0)], Some(2)),
        (vec![(0, 1.0), (1, 1.0)], Some(1)),
        (vec![(1, 1.0), (0, 1.0)], Some(1)),
        (vec![(1, 1.0), (1, 1.0)], Some(1)),
        (vec![(0, 1.0), (2, 1.0)], Some(2)),
        (vec![(2, 1.0), (0, 1.0)], Some(2)),
        (vec![(0, 0.5), (0, 0.5), (0, 0.5), (2, 1.0)], Some(2)),
    ] {
        let device = device_batch(ops, &batch_of_ensembles(&[(1, 0)], slice::from_ref(&members)));
        let mut y = ops.mat(1, 64).unwrap();
        let result = ops.linear(&x, case.by(&device, RowSet::All, false), Output::Store(&mut y));
        let got = result.err().map(|error| error.to_string());
        let expected = refused
            .map(|slot| format!("linear: the adapter in slot {slot} cannot be a member of an ensemble"));
        assert_eq!(got, expected, "{members:?}");
    }
}

/// A row's products are the same bits whatever the ensembles of the rows beside it are.
pub(super) fn no_row_depends_on_the_ensembles_beside_it(ops: &CpuBackend) {
    let mut numbers = Numbers(38);
    let case = Case::of_ranks(ops, &mut numbers, LoraSite::linear(70, &[48, 20, 31]));
    let (lists, count) = (lists(), lists().len());
    let x = numbers.table(count, 70);
    let run = |rows: std::ops::Range<usize>| {
        let host = batch_of_ensembles(&vec![(1, 0); rows.len()], &lists[rows.clone()]);
        let device = device_batch(ops, &host);
        let part = Table { cols: 70, data: x.data[rows.start * 70..rows.end * 70].to_vec() };
        let mut y = ops.mat(rows.len(), 99).unwrap();
        ops.linear(&mat(ops, &part), case.by(&device, RowSet::All, true), Output::Store(&mut y)).unwrap();
        ops.download(&y).unwrap()
    };
    let whole = run(0..count);
    for rows in (0..count).map(|row| row..row + 1).chain([0..3, 2..7, 5..14]) {
        assert!(run(rows.clone()) == whole[rows.start * 99..rows.end * 99], "rows {rows:?}");
    }
}
