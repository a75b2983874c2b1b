//! Products, with and without low-rank deltas, and what becomes of them.

use std::slice;

use kernels::{
    Activation, Backend, DType, LinearLora, LoraPart, LoraSite, Output, Projection, RowSet,
    reference::{self, Table},
    testing::{Numbers, assert_close, batch},
};

use super::{add_and_norm, add_products, device_batch, fill_slots, mat, rms, tensor, wide_mat};

pub(super) fn linear_of_any_shape<B: Backend>(ops: &B) {
    let mut numbers = Numbers(1);
    for (rows, inputs, outputs) in
        [(1, 1, 1), (1, 64, 48), (3, 33, 17), (5, 100, 64), (13, 576, 31), (40, 70, 161)]
    {
        let (x, w) = (numbers.table(rows, inputs), numbers.table(outputs, inputs));
        let bias = numbers.table(1, outputs).data;
        let (top, bottom) = w.data.split_at(outputs / 2 * inputs);
        let parts = [top, bottom].map(|part| tensor(&Table { cols: inputs, data: part.to_vec() }));
        let weight = ops.weight(&parts).unwrap();
        let mut y = ops.mat(rows, outputs).unwrap();
        let vector = ops.vector(&bias).unwrap();
        for (bias, vector) in [(None, None), (Some(bias.as_slice()), Some(&vector))] {
            let expected = reference::linear(&x, &w, bias);
            let by = Projection { weight: &weight, bias: vector, lora: None };
            ops.linear(&mat(ops, &x), by, Output::Store(&mut y)).unwrap();
            assert_close("linear", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
            let mut sums = numbers.table(rows, outputs);
            let mut wide = wide_mat(ops, &sums);
            reference::add(&expected, &mut sums);
            add_products(ops, &mat(ops, &x), by, &mut wide).unwrap();
            assert_close("linear onto", &ops.download(&wide).unwrap(), &sums.data, ops.dtype());
        }
        let mut other = ops.wide_mat(rows + 1, outputs).unwrap();
        let by = Projection::new(&weight, None);
        let refused = add_products(ops, &mat(ops, &x), by, &mut other).unwrap_err().to_string();
        assert!(refused.contains("rows of y"), "{refused}");
    }
}

/// Two sites, the second with three slices, and adapters of odd and large ranks on some of them.
fn sites_and_adapters(numbers: &mut Numbers) -> (Vec<LoraSite>, Vec<Vec<LoraPart>>) {
    let sites = vec![LoraSite::linear(40, &[33]), LoraSite::linear(70, &[48, 20, 31])];
    let ranks = [1, 2, 3, 7, 8, 16, 33, 64, 256];
    let adapters = ranks.iter().enumerate().map(|(i, &lora_rank)| {
        let slices = (0..3).filter(|slice| i % 4 != *slice);
        let mut parts: Vec<_> =
            slices.map(|slice| numbers.part((1, slice), &sites[1], lora_rank + slice)).collect();
        if i % 2 == 0 {
            parts.push(numbers.part((0, 0), &sites[0], lora_rank));
        }
        parts
    });
    let adapters = adapters.collect();
    (sites, adapters)
}

pub(super) fn low_rank_deltas_of_mixed_ranks<B: Backend>(ops: &B) {
    let mut numbers = Numbers(2);
    let (sites, adapters) = sites_and_adapters(&mut numbers);
    let weights = sites.iter().map(|site| numbers.table(site.outputs.iter().sum(), site.inputs));
    let tables: Vec<Table> = weights.collect();
    let weights: Vec<_> = tables.iter().map(|w| ops.weight(&[tensor(w)]).unwrap()).collect();
    let slots = fill_slots(ops, &sites, &weights.iter().collect::<Vec<_>>(), &adapters);
    let popularity: [Vec<Option<u32>>; 4] = [
        vec![None; 9],
        vec![Some(4); 9],
        (0..9).map(Some).collect(),
        [Some(8), None, Some(8), Some(0), None, Some(3), Some(3), Some(3), None].to_vec(),
    ];
    for slots_of in popularity {
        let sequences = [(1, 0), (5, 0), (1, 17), (2, 3), (1, 1), (9, 0), (1, 40), (4, 16), (1, 0)];
        let host = batch(&sequences, &slots_of);
        let batch = device_batch(ops, &host);
        for (rows, segments, count) in [
            (RowSet::All, &host.segments, host.rows()),
            (RowSet::Logits, &host.logit_segments, host.logit_rows.len()),
        ] {
            for (site, shape) in sites.iter().enumerate() {
                let outputs = shape.outputs.iter().sum();
                let (x, weight) = (numbers.table(count, shape.inputs), &weights[site]);
                let mut expected = reference::linear(&x, &tables[site], None);
                reference::add_lora(&x, (site, shape), segments, &adapters, &mut expected);
                let mut y = ops.mat(count, outputs).unwrap();
                let lora = LinearLora { slots: &slots, site, batch: &batch, rows };
                let by = Projection::new(weight, Some(lora));
                ops.linear(&mat(ops, &x), by, Output::Store(&mut y)).unwrap();
                assert_close("linear with deltas", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
                let mut sums = numbers.table(count, outputs);
                let mut wide = wide_mat(ops, &sums);
                reference::add(&expected, &mut sums);
                add_products(ops, &mat(ops, &x), by, &mut wide).unwrap();
                assert_close("deltas onto", &ops.download(&wide).unwrap(), &sums.data, ops.dtype());
            }
        }
    }
}

/// Matrices that are read in many chunks, at the ends of which pieces of host memory end, too.
pub(super) fn deltas_of_large_matrices<B: Backend>(ops: &B) {
    let mut numbers = Numbers(11);
    let sites = [LoraSite::linear(4200, &[70, 1100]), LoraSite::linear(130, &[9000])];
    let ranks = [(0, 0, 130), (0, 1, 40), (1, 0, 72), (1, 0, 1)];
    let parts: Vec<_> =
        ranks.map(|(site, slice, rank)| numbers.part((site, slice), &sites[site], rank)).into();
    let adapters = [parts[..3].to_vec(), parts[3..].to_vec(), parts[1..3].to_vec()];
    let tables = sites.each_ref().map(|site| numbers.table(site.outputs.iter().sum(), site.inputs));
    let weights = tables.each_ref().map(|w| ops.weight(&[tensor(w)]).unwrap());
    let slots = fill_slots(ops, &sites, &weights.each_ref(), &adapters);
    let host = batch(&[(2, 0), (1, 3), (1, 0), (3, 0)], &[Some(0), Some(1), None, Some(2)]);
    let device = device_batch(ops, &host);
    for (index, site) in sites.iter().enumerate() {
        let x = numbers.table(host.rows(), site.inputs);
        let mut expected = reference::linear(&x, &tables[index], None);
        reference::add_lora(&x, (index, site), &host.segments, &adapters, &mut expected);
        let mut y = ops.mat(host.rows(), site.outputs.iter().sum()).unwrap();
        let lora = LinearLora { slots: &slots, site: index, batch: &device, rows: RowSet::All };
        ops.linear(&mat(ops, &x), Projection::new(&weights[index], Some(lora)), Output::Store(&mut y))
            .unwrap();
        assert_close("large deltas", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
    }
}

pub(super) fn gated_projections_with_deltas<B: Backend>(ops: &B) {
    let mut numbers = Numbers(7);
    for inner in [128, 20] {
        let site = LoraSite::linear(72, &[inner; 2]);
        // The last one has no delta on the gate.
        let adapters: Vec<Vec<_>> = [(16, 0), (1, 0), (40, 1)]
            .into_iter()
            .map(|(rank, first)| (first..2).map(|slice| numbers.part((0, slice), &site, rank)).collect())
            .collect();
        let (w, bias) = (numbers.table(2 * inner, 72), numbers.table(1, 2 * inner).data);
        let (weight, vector) = (ops.weight(&[tensor(&w)]).unwrap(), ops.vector(&bias).unwrap());
        let slots = fill_slots(ops, slice::from_ref(&site), &[&weight], &adapters);
        for sequences in [vec![(1, 3); 5], vec![(3, 0), (270, 0), (1, 9), (70, 0), (65, 1)]] {
            let slots_of = [None, Some(0), None, Some(2), Some(1)];
            let host = batch(&sequences, &slots_of);
            let device = device_batch(ops, &host);
            let x = numbers.table(host.rows(), 72);
            let mut expected = reference::linear(&x, &w, Some(&bias));
            reference::add_lora(&x, (0, &site), &host.segments, &adapters, &mut expected);
            let expected = reference::gate(&expected, Activation::Silu);
            let mut gate_up = ops.mat(host.rows(), 2 * inner).unwrap();
            let mut y = ops.mat(host.rows(), inner).unwrap();
            let lora = LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All };
            let by = Projection { weight: &weight, bias: Some(&vector), lora: Some(lora) };
            let out = Output::Gate { activation: Activation::Silu, products: &mut gate_up, y: &mut y };
            ops.linear(&mat(ops, &x), by, out).unwrap();
            assert_close("gated", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
        }
    }
}

pub(super) fn normed_projections_with_deltas<B: Backend>(ops: &B) {
    let mut numbers = Numbers(8);
    for outputs in [64, 1024, 576, 4096, 4160, 8192, 36] {
        let site = LoraSite::linear(72, &[outputs]);
        let adapters: Vec<Vec<_>> = [16, 1, 40].map(|rank| vec![numbers.part((0, 0), &site, rank)]).into();
        let (w, bias) = (numbers.table(outputs, 72), numbers.table(1, outputs).data);
        let norm = numbers.table(1, outputs).data;
        let (weight, bias_of) = (ops.weight(&[tensor(&w)]).unwrap(), ops.vector(&bias).unwrap());
        let slots = fill_slots(ops, slice::from_ref(&site), &[&weight], &adapters);
        let vector = ops.vector(&norm).unwrap();
        let slots_of = [None, Some(0), None, Some(2), Some(1)];
        for (sequences, slots_of) in [
            (vec![(1, 3); 5], &slots_of[..]),
            (vec![(1, 3); 3], &[]),
            (vec![(3, 0), (270, 0), (1, 9), (70, 0), (65, 1)], &slots_of),
        ] {
            let host = batch(&sequences, slots_of);
            let device = device_batch(ops, &host);
            let (x, mut sums) = (numbers.table(host.rows(), 72), numbers.table(host.rows(), outputs));
            let mut residual = wide_mat(ops, &sums);
            let mut products = reference::linear(&x, &w, Some(&bias));
            reference::add_lora(&x, (0, &site), &host.segments, &adapters, &mut products);
            reference::add(&products, &mut sums);
            let mut y = ops.mat(host.rows(), outputs).unwrap();
            let lora = LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All };
            let by = Projection { weight: &weight, bias: Some(&bias_of), lora: Some(lora) };
            add_and_norm(ops, &mat(ops, &x), by, &mut residual, Some((rms(&vector), &mut y))).unwrap();
            assert_close("stream", &ops.download(&residual).unwrap(), &sums.data, ops.dtype());
            let expected = reference::rms_norm(&sums, &norm, 1e-5);
            assert_close("normed", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
        }
    }
}

/// Products and shrunk rows of small integers are exact in every type: what is lost would be lost of the stream.
pub(super) fn the_stream_is_not_rounded<B: Backend>(ops: &B) {
    let mut numbers = Numbers(9);
    let mut signs = |rows: usize, cols: usize, scale: f32| {
        let data = (0..rows * cols).map(|_| (numbers.below(3) as f32 - 1.0) * scale).collect();
        Table { cols, data }
    };
    for outputs in [128, 36] {
        let site = LoraSite::linear(64, &[outputs]);
        let (a, b) = (signs(20, 64, 1.0).data, signs(outputs, 20, 1.0 / 64.0).data);
        let adapters = [vec![LoraPart::delta((0, 0), 20, 1.0, &a, &b)]];
        let w = signs(outputs, 64, 1.0);
        let (weight, norm) = (ops.weight(&[tensor(&w)]).unwrap(), ops.vector(&vec![1.0; outputs]).unwrap());
        let slots = fill_slots(ops, slice::from_ref(&site), &[&weight], &adapters);
        for rows in [1, 7, 20, 50, 100, 300] {
            for slots_of in [vec![None, None], vec![Some(0), None]] {
                let host = batch(&[(rows, 0), (1, 5)], &slots_of);
                let device = device_batch(ops, &host);
                let x = signs(host.rows(), 64, 1.0);
                let mut sums = signs(host.rows(), outputs, 1.0);
                sums.data.iter_mut().for_each(|x| *x += 1e-4);
                let mut streams = [wide_mat(ops, &sums), wide_mat(ops, &sums)];
                let mut products = reference::linear(&x, &w, None);
                reference::add_lora(&x, (0, &site), &host.segments, &adapters, &mut products);
                reference::add(&products, &mut sums);
                let lora = LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All };
                let by = Projection::new(&weight, Some(lora));
                let (x, mut y) = (mat(ops, &x), ops.mat(host.rows(), outputs).unwrap());
                add_products(ops, &x, by, &mut streams[0]).unwrap();
                add_and_norm(ops, &x, by, &mut streams[1], Some((rms(&norm), &mut y))).unwrap();
                for stream in &streams {
                    assert_close("stream", &ops.download(stream).unwrap(), &sums.data, DType::F32);
                }
            }
        }
    }
}

pub(super) fn a_row_does_not_depend_on_its_neighbours<B: Backend>(ops: &B) {
    let mut numbers = Numbers(3);
    let (sites, adapters) = sites_and_adapters(&mut numbers);
    let (x, w) = (numbers.table(37, 70), numbers.table(99, 70));
    let first = ops.weight(&[tensor(&numbers.table(33, 40))]).unwrap();
    let weight = ops.weight(&[tensor(&w)]).unwrap();
    let slots = fill_slots(ops, &sites, &[&first, &weight], &adapters);
    let product = |first: usize, rows: usize| {
        let host = batch(&[(rows, first)], &[Some(6)]);
        let batch = device_batch(ops, &host);
        let part = Table { cols: 70, data: x.data[first * 70..][..rows * 70].to_vec() };
        let mut y = ops.mat(rows, 99).unwrap();
        let lora = LinearLora { slots: &slots, site: 1, batch: &batch, rows: RowSet::All };
        let by = Projection::new(&weight, Some(lora));
        ops.linear(&mat(ops, &part), by, Output::Store(&mut y)).unwrap();
        ops.download(&y).unwrap()
    };
    let whole = product(0, 37);
    for (first, rows) in [(0, 1), (36, 1), (3, 2), (5, 4), (1, 7), (10, 12), (20, 17)] {
        assert!(product(first, rows) == whole[first * 99..(first + rows) * 99], "rows {first}..+{rows}");
    }
}
