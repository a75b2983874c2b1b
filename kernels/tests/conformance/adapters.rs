//! What adapters change beside low-rank deltas: magnitudes, biases, rows, lookups.

use std::{slice, sync::Arc};

use kernels::{
    Activation, Backend, DType, Embedding, HostTensor, LinearLora, LogitShape, LoraPart, LoraSite, LowRank,
    Output, Projection, ReplacedRows, RowSet,
    cpu::CpuBackend,
    prelude::*,
    reference::{self, Base, Table},
    testing::{Numbers, assert_close, batch},
};

use super::{add_products, device_batch, fill_slots, mat, tensor, wide_mat};

/// Which rows of a step use which slot.
const MIX: [Option<u32>; 9] = [Some(1), None, Some(0), Some(2), None, Some(3), Some(4), Some(5), Some(6)];
const SEQUENCES: [(usize, usize); 9] =
    [(1, 0), (5, 0), (1, 17), (3, 3), (1, 1), (9, 0), (1, 40), (17, 16), (1, 0)];

fn nothing(site: usize, slice: usize) -> LoraPart {
    LoraPart { site, slice, low_rank: None, magnitude: None, bias: None, rows: None, content: 0 }
}

/// Magnitudes, as those of a trained adapter, are near the norms of the weights: gains are near 1.
fn magnitudes(numbers: &mut Numbers, outputs: usize, inputs: usize) -> Option<Vec<f32>> {
    let size = (inputs as f32 / 3.0).sqrt();
    Some((0..outputs).map(|_| size * (1.0 + 0.5 * numbers.number())).collect())
}

/// Adapters of every kind for one projection.
fn kinds(numbers: &mut Numbers, site: &LoraSite) -> Vec<Vec<LoraPart>> {
    let slices = site.outputs.len();
    let delta = |numbers: &mut Numbers, slice: usize, rank: usize| {
        let mut part = numbers.part((0, slice), site, rank);
        part.low_rank.as_mut().unwrap().scale = 0.3;
        part
    };
    (0..7)
        .map(|kind| {
            let parts = (0..slices).map(|slice| {
                let outputs = site.outputs[slice];
                let mut part = if kind % 3 == 2 {
                    nothing(0, slice)
                } else {
                    delta(numbers, slice, 1 + 5 * kind + slice)
                };
                // Slices without a magnitude beside those with one.
                if [1, 2, 4].contains(&kind) || (kind == 6 && slice > 0) {
                    part.magnitude = magnitudes(numbers, outputs, site.inputs);
                }
                if kind >= 3 {
                    part.bias = Some(numbers.table(1, outputs).data);
                }
                part
            });
            parts
                .filter(|part| part.low_rank.is_some() || part.magnitude.is_some() || part.bias.is_some())
                .collect()
        })
        .collect()
}

pub(super) fn magnitudes_and_biases<B: Backend>(ops: &B) {
    let mut numbers = Numbers(21);
    for (inputs, outputs) in
        [(40, vec![33]), (70, vec![48, 20, 31]), (64, vec![64, 64]), (33, vec![1]), (128, vec![7, 9])]
    {
        let site = LoraSite::linear(inputs, &outputs);
        let cols = outputs.iter().sum();
        let adapters = kinds(&mut numbers, &site);
        let w = numbers.table(cols, inputs);
        let bias = numbers.table(1, cols).data;
        let (weight, vector) = (ops.weight(&[tensor(&w)]).unwrap(), ops.vector(&bias).unwrap());
        let slots = fill_slots(ops, slice::from_ref(&site), &[&weight], &adapters);
        let host = batch(&SEQUENCES, &MIX);
        let device = device_batch(ops, &host);
        let lora = LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All };
        for (bias, vector) in [(None, None), (Some(bias.as_slice()), Some(&vector))] {
            let x = numbers.table(host.rows(), inputs);
            let by = Projection { weight: &weight, bias: vector, lora: Some(lora) };
            let base = Base { weight: &w, bias, site: (0, &site) };
            let expected = reference::adapted_linear(&x, base, (&host.segments, &adapters), cols);
            let mut y = ops.mat(host.rows(), cols).unwrap();
            ops.linear(&mat(ops, &x), by, Output::Store(&mut y)).unwrap();
            assert_close("adapted", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
            let mut sums = numbers.table(host.rows(), cols);
            let mut stream = wide_mat(ops, &sums);
            reference::add(&expected, &mut sums);
            add_products(ops, &mat(ops, &x), by, &mut stream).unwrap();
            assert_close("adapted onto", &ops.download(&stream).unwrap(), &sums.data, ops.dtype());
            if let [first, second] = outputs[..]
                && first == second
            {
                let mut gated = ops.mat(host.rows(), first).unwrap();
                let out = Output::Gate { activation: Activation::GeluTanh, products: &mut y, y: &mut gated };
                ops.linear(&mat(ops, &x), by, out).unwrap();
                let expected = reference::gate(&expected, Activation::GeluTanh);
                assert_close("adapted gate", &ops.download(&gated).unwrap(), &expected.data, ops.dtype());
            }
        }
    }
}

/// A row's products are the same bits whatever the adapters of the rows beside it are.
pub(super) fn no_row_depends_on_the_adapters_beside_it(ops: &CpuBackend) {
    let mut numbers = Numbers(22);
    let site = LoraSite::linear(70, &[48, 20, 31]);
    let adapters = kinds(&mut numbers, &site);
    let (w, bias) = (numbers.table(99, 70), numbers.table(1, 99).data);
    let (weight, vector) = (ops.weight(&[tensor(&w)]).unwrap(), ops.vector(&bias).unwrap());
    let slots = fill_slots(ops, slice::from_ref(&site), &[&weight], &adapters);
    let (x, stream) = (numbers.table(8, 70), numbers.table(8, 99));
    let step = |rows: std::ops::Range<usize>| {
        let slots_of: Vec<_> = (0..8).map(|i: u32| i.checked_sub(1)).collect();
        let host = batch(&vec![(1, 0); rows.len()], &slots_of[rows.clone()]);
        let device = device_batch(ops, &host);
        let part = |table: &Table| Table {
            cols: table.cols,
            data: table.data[rows.start * table.cols..rows.end * table.cols].to_vec(),
        };
        let lora = LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All };
        let by = Projection { weight: &weight, bias: Some(&vector), lora: Some(lora) };
        let (mut y, mut onto) = (ops.mat(rows.len(), 99).unwrap(), wide_mat(ops, &part(&stream)));
        ops.linear(&mat(ops, &part(&x)), by, Output::Store(&mut y)).unwrap();
        add_products(ops, &mat(ops, &part(&x)), by, &mut onto).unwrap();
        [ops.download(&y).unwrap(), ops.download(&onto).unwrap()]
    };
    let whole = step(0..8);
    for rows in [0..1, 1..2, 2..3, 3..4, 4..5, 5..6, 6..7, 7..8, 0..3, 2..7] {
        for (whole, part) in whole.iter().zip(step(rows.clone())) {
            assert!(part == whole[rows.start * 99..rows.end * 99], "rows {rows:?}");
        }
    }
}

fn rows_of(numbers: &mut Numbers, ids: Option<&[u32]>, count: usize, cols: usize) -> Option<ReplacedRows> {
    Some(ReplacedRows { ids: ids.map(<[u32]>::to_vec), values: tensor(&numbers.table(count, cols)) })
}

/// Heads of the base model's vocabulary, of larger and of smaller ones, in one step.
pub(super) fn rows_of_the_head<B: Backend>(ops: &B) {
    let mut numbers = Numbers(23);
    for (inputs, known, columns) in [(40, 50, 50), (33, 129, 160), (64, 64, 67), (70, 100, 1000)] {
        let site = LoraSite::head(inputs, columns);
        let ids = [0, 7, 31, known as u32 - 1, columns as u32 - 1];
        let ids: Vec<u32> = ids.into_iter().collect::<std::collections::BTreeSet<_>>().into_iter().collect();
        let mut all = |ids: Option<&[u32]>, count| {
            vec![LoraPart { rows: rows_of(&mut numbers, ids, count, inputs), ..nothing(0, 0) }]
        };
        let mut adapters = vec![
            all(None, known),
            all(None, known - 3),
            all(None, columns),
            all(Some(&ids), ids.len()),
            all(Some(&[1]), 1),
        ];
        let (a, b) = (numbers.table(5, inputs).data, numbers.table(known, 5).data);
        adapters.push(vec![LoraPart::delta((0, 0), 5, 0.5, &a, &b)]);
        let mut scaled = LoraPart::delta((0, 0), 5, 0.5, &a, &b);
        scaled.magnitude = magnitudes(&mut numbers, known, inputs);
        scaled.bias = Some(numbers.table(1, known).data);
        adapters.push(vec![scaled]);
        let (w, bias) = (numbers.table(known, inputs), numbers.table(1, known).data);
        let (weight, vector) = (ops.weight(&[tensor(&w)]).unwrap(), ops.vector(&bias).unwrap());
        let slots = fill_slots(ops, slice::from_ref(&site), &[&weight], &adapters);
        let host = batch(&SEQUENCES, &MIX);
        let device = device_batch(ops, &host);
        let rows = host.logit_rows.len();
        let lora = Some(LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::Logits });
        for (bias, vector) in [(None, None), (Some(bias.as_slice()), Some(&vector))] {
            for shape in [LogitShape::PLAIN, LogitShape { scale: 0.5, softcap: Some(3.0) }] {
                let x = numbers.table(rows, inputs);
                let base = Base { weight: &w, bias, site: (0, &site) };
                let mut expected =
                    reference::adapted_linear(&x, base, (&host.logit_segments, &adapters), columns);
                reference::shape_logits(&mut expected, shape);
                let mut y = ops.wide_mat(rows, columns).unwrap();
                let by = Projection { weight: &weight, bias: vector, lora };
                ops.linear(&mat(ops, &x), by, Output::Logits { y: &mut y, shape }).unwrap();
                let mut got = ops.download(&y).unwrap();
                for (got, expected) in got.iter_mut().zip(&mut expected.data) {
                    assert_eq!(*got == f32::NEG_INFINITY, *expected == f32::NEG_INFINITY);
                    if *got == f32::NEG_INFINITY {
                        (*got, *expected) = (0.0, 0.0);
                    }
                }
                assert_close("logits", &got, &expected.data, ops.dtype());
            }
        }
    }
}

/// Tables of the base model's vocabulary, of larger and of smaller ones, in one step.
pub(super) fn lookups_that_adapters_change<B: Backend>(ops: &B) {
    let mut numbers = Numbers(24);
    for (cols, known, tokens) in [(40, 50, 50), (33, 60, 77), (576, 50, 51), (128, 64, 200)] {
        let site = LoraSite::lookup(tokens, cols);
        let mut own = |ids: Option<&[u32]>, count| {
            vec![LoraPart { rows: rows_of(&mut numbers, ids, count, cols), ..nothing(0, 0) }]
        };
        let last = tokens as u32 - 1;
        let mut adapters =
            vec![own(None, known), own(None, tokens), own(Some(&[2, 19, last]), 3), own(Some(&[0]), 1)];
        for kind in 0..3 {
            let (a, b) = (numbers.table(3 + kind, known), numbers.table(cols, 3 + kind));
            let (a, b) = (tensor(&a), tensor(&b));
            let low_rank = Some(LowRank { rank: 3 + kind, scale: 0.3, a, b });
            let magnitude = if kind > 0 { magnitudes(&mut numbers, cols, known) } else { None };
            let bias = (kind == 2).then(|| numbers.table(1, cols).data);
            adapters.push(vec![LoraPart { low_rank, magnitude, bias, ..nothing(0, 0) }]);
        }
        let table = numbers.table(known, cols);
        let weight = ops.weight(&[tensor(&table)]).unwrap();
        let slots = fill_slots(ops, slice::from_ref(&site), &[&weight], &adapters);
        let mut host = batch(&SEQUENCES, &MIX);
        // A token that only the second and third adapters know.
        for (i, row) in [(1, host.segments[0]), (2, host.segments[2])] {
            assert_eq!(row.slot, i);
            host.tokens[row.start as usize] = last as i32;
        }
        let device = device_batch(ops, &host);
        let sampler = ops.sampler(1, tokens).unwrap();
        for scale in [1.0, 6.5] {
            let lora = Some(LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All });
            let by = Embedding { table: &weight, scale, positions: None, lora };
            let mut y = ops.wide_mat(host.rows(), cols).unwrap();
            ops.embed(&device, &sampler, by, &mut y).unwrap();
            let base = Base { weight: &table, bias: None, site: (0, &site) };
            let expected = reference::embed(base, &host, &adapters, scale);
            assert_close("lookup", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
        }
    }
}

/// The gains of adapters whose vocabulary is smaller than the table: their norms are those over their own tokens.
pub(super) fn gains_over_smaller_vocabularies<B: Backend>(ops: &B) {
    let mut numbers = Numbers(27);
    for (cols, known, tokens) in [(40, 50, 50), (33, 60, 77), (576, 50, 51), (128, 300, 300)] {
        let site = LoraSite::lookup(tokens, cols);
        let sizes = [1, 2, 7, 16, 31, 32, 33, known - 17, known - 2, known - 1, known];
        let adapters: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(i, &size)| {
                let lora_rank = 1 + 3 * i;
                // Beyond the end of a row there would be a much larger value, the first of the next one.
                let (mut a, b) = (numbers.table(lora_rank, size), numbers.table(cols, lora_rank));
                a.data.chunks_mut(size).enumerate().for_each(|(r, row)| row[0] *= 1.0 + r as f32);
                let low_rank = Some(LowRank { rank: lora_rank, scale: 0.3, a: tensor(&a), b: tensor(&b) });
                let magnitude = magnitudes(&mut numbers, cols, size);
                vec![LoraPart { low_rank, magnitude, ..nothing(0, 0) }]
            })
            .collect();
        let table = numbers.table(known, cols);
        let weight = ops.weight(&[tensor(&table)]).unwrap();
        let slots = fill_slots(ops, slice::from_ref(&site), &[&weight], &adapters);
        // Every adapter looks up tokens that it has, and the ones behind them.
        let slots_of: Vec<_> = (0..sizes.len() as u32).map(Some).collect();
        let mut host = batch(&vec![(4, 0); sizes.len()], &slots_of);
        for (tokens, size) in host.tokens.chunks_mut(4).zip(sizes) {
            let end = known - 1;
            let near = [0, size - 1, size.min(end), end];
            tokens.iter_mut().zip(near).for_each(|(token, near)| *token = near as i32);
        }
        let device = device_batch(ops, &host);
        let sampler = ops.sampler(1, tokens).unwrap();
        let lora = Some(LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All });
        let by = Embedding { table: &weight, scale: 1.0, positions: None, lora };
        let mut y = ops.wide_mat(host.rows(), cols).unwrap();
        ops.embed(&device, &sampler, by, &mut y).unwrap();
        let base = Base { weight: &table, bias: None, site: (0, &site) };
        let expected = reference::embed(base, &host, &adapters, 1.0);
        assert_close("lookup", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
    }
}

/// Everything that an adapter has takes memory, and what is promised is what is taken.
pub(super) fn adapters_are_counted<B: Backend>(ops: &B) {
    let mut numbers = Numbers(25);
    let sites = [LoraSite::linear(64, &[48, 80]), LoraSite::head(64, 100), LoraSite::lookup(100, 64)];
    let element = ops.dtype().size();
    let mut delta = numbers.part((0, 1), &sites[0], 8);
    let plain = delta.clone();
    delta.magnitude = Some(vec![1.0; 80]);
    let scaled = delta.clone();
    delta.bias = Some(vec![1.0; 80]);
    let head = LoraPart { rows: rows_of(&mut numbers, None, 90, 64), ..nothing(1, 0) };
    let table = LoraPart { rows: rows_of(&mut numbers, Some(&[3, 4, 99]), 3, 64), ..nothing(2, 0) };
    let bias = LoraPart { bias: Some(vec![1.0; 48]), ..nothing(0, 0) };
    let mut last = 0;
    for (parts, least) in [
        (vec![plain], 8 * 144 * element),
        (vec![scaled], 8 * 144 * element + 4 * 80),
        (vec![delta.clone()], 8 * 144 * element + 8 * 80),
        (vec![delta.clone(), bias.clone()], 8 * 144 * element + 8 * 80 + 4 * 48),
        (vec![delta.clone(), bias.clone(), table.clone()], 8 * 144 * element + 8 * 80 + 3 * 64 * element),
        (vec![delta, bias, table, head], 93 * 64 * element + 8 * 144 * element + 8 * 80),
    ] {
        let shapes: Vec<_> = parts.iter().map(LoraPart::shape).collect();
        let adapter = ops.stage(&sites, &parts).unwrap();
        let (promised, taken) = (ops.host_bytes(&sites, &shapes).unwrap(), ops.adapter_bytes(&adapter));
        assert!(taken >= least && promised >= taken, "{least} <= {taken} <= {promised}");
        assert!(taken >= last, "{taken} after {last}");
        last = taken;
    }
}

#[test]
fn parts_that_fit_nowhere_are_refused() {
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    let sites = [LoraSite::linear(8, &[4, 6]), LoraSite::head(8, 20), LoraSite::lookup(20, 8)];
    let mut numbers = Numbers(26);
    let mut rows = |ids: Option<&[u32]>, count, cols| rows_of(&mut numbers, ids, count, cols);
    let zeros = |rows: usize, cols: usize| HostTensor::from_f32(rows, cols, &vec![0.0; rows * cols]);
    let delta = |rank, a, b| Some(LowRank { rank, scale: 1.0, a, b });
    let values = |count| Some(vec![1.0; count]);
    let cases = [
        (nothing(0, 0), "ranks above 0"),
        (LoraPart { bias: values(4), ..nothing(3, 0) }, "site 3"),
        (LoraPart { bias: values(4), ..nothing(0, 2) }, "slice 2"),
        (LoraPart { bias: values(5), ..nothing(0, 0) }, "elements of the bias"),
        (LoraPart { magnitude: values(4), ..nothing(0, 1) }, "elements of the magnitude"),
        (LoraPart { magnitude: values(21), ..nothing(1, 0) }, "elements of the magnitude"),
        (LoraPart { rows: rows(None, 4, 8), ..nothing(0, 0) }, "replaced rows of a layer"),
        (LoraPart { rows: rows(None, 21, 8), ..nothing(1, 0) }, "replaced row 20"),
        (LoraPart { rows: rows(Some(&[3, 20]), 2, 8), ..nothing(2, 0) }, "replaced row 20"),
        (LoraPart { rows: rows(Some(&[3, 3]), 2, 8), ..nothing(1, 0) }, "replaced row 3"),
        (LoraPart { rows: rows(Some(&[4, 3]), 2, 8), ..nothing(1, 0) }, "replaced row 3"),
        (LoraPart { rows: rows(Some(&[3]), 2, 8), ..nothing(1, 0) }, "numbers of replaced rows"),
        (LoraPart { rows: rows(None, 4, 7), ..nothing(1, 0) }, "elements of replaced rows"),
        (LoraPart { rows: rows(None, 4, 8), magnitude: values(20), ..nothing(1, 0) }, "beside a delta"),
        (LoraPart { low_rank: delta(2, zeros(2, 7), zeros(4, 2)), ..nothing(0, 0) }, "elements of A"),
        (LoraPart { low_rank: delta(2, zeros(2, 8), zeros(5, 2)), ..nothing(0, 0) }, "elements of B"),
        (LoraPart { low_rank: delta(2, zeros(2, 8), zeros(21, 2)), ..nothing(1, 0) }, "elements of B"),
        (LoraPart { low_rank: delta(2, zeros(2, 21), zeros(8, 2)), ..nothing(2, 0) }, "elements of A"),
    ];
    for (part, cause) in cases {
        let refused = ops.stage(&sites, &[part]).unwrap_err().to_string();
        assert!(refused.contains(cause), "{refused}, expected {cause}");
    }
    // What a magnitude is divided by must be known when it is loaded.
    let part = LoraPart { magnitude: values(4), ..nothing(0, 0) };
    let adapter = Arc::new(ops.stage(&sites, &[part]).unwrap());
    let mut slots = ops.lora_slots(&sites, 1).unwrap();
    let refused = ops.load(&mut slots, 0, &adapter, &[]).unwrap_err().to_string();
    assert!(refused.contains("weight 0"), "{refused}");
    let other = ops.weight(&[zeros(10, 9)]).unwrap();
    let refused = ops.load(&mut slots, 0, &adapter, &[&other]).unwrap_err().to_string();
    assert!(refused.contains("columns of a weight"), "{refused}");
}
