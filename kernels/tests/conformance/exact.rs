//! GEMMs of small integers, which are exact in every type: an input that is lost changes the result by a whole number,
//! where a tolerance relative to the largest element would hide it.

use std::{slice, sync::Arc};

use kernels::{
    Activation, Backend, Batch, LinearLora, LoraPart, LoraSite, Output, Projection, RowSet,
    reference::Table,
    testing::{Numbers, batch},
};

use super::{add_and_norm, add_products, device_batch, mat, rms, tensor, wide_mat};

/// Inputs of projections of large models.
const INPUTS: [usize; 2] = [4096, 14336];
/// What the gates of a gated projection are: SiLU changes nothing of it, and products with it keep their digits.
const GATE: usize = 64;
const LORA_RANK: usize = 16;

/// The signs of a matrix of -1, 0 and 1, most of them 0: sums stay below 256, which is exact in bf16.
struct Signs(Numbers);

impl Signs {
    /// One of `most` elements is not 0.
    fn table(&mut self, rows: usize, cols: usize, most: usize) -> Table {
        let numbers = &mut self.0;
        let mut sign = || if numbers.below(most) > 0 { 0.0 } else { 1.0 - 2.0 * numbers.below(2) as f32 };
        Table { cols, data: (0..rows * cols).map(|_| sign()).collect() }
    }
}

/// `x · Wᵀ`, where most of x is 0.
fn product(x: &Table, w: &Table) -> Table {
    let row = |i: usize| {
        let x: Vec<(usize, f32)> = x.row(i).iter().copied().enumerate().filter(|(_, x)| *x != 0.0).collect();
        (0..w.rows()).map(move |o| x.iter().map(|&(k, x)| x * w.row(o)[k]).sum::<f32>()).collect::<Vec<_>>()
    };
    Table { cols: w.rows(), data: (0..x.rows()).flat_map(row).collect() }
}

fn first_rows(table: &Table, rows: usize) -> Table {
    Table { cols: table.cols, data: table.data[..rows * table.cols].to_vec() }
}

/// A projection with the deltas of two adapters, and what it computes.
struct Case<B: Backend> {
    weight: B::Weight,
    slots: B::LoraSlots,
    x: Table,
    /// Of the base, and with the deltas of each adapter.
    sums: [Table; 3],
}

/// Which adapter the rows of a step use, in runs: none, the first, the second.
fn adapter_of(row: usize, rows: usize) -> usize {
    row * 3 / rows.max(3)
}

impl<B: Backend> Case<B> {
    fn new(ops: &B, x: Table, w: &Table, outputs: &[usize], signs: &mut Signs) -> Case<B> {
        let site = LoraSite::linear(x.cols, outputs);
        let base = product(&x, w);
        let mut sums = [base.clone(), base.clone(), base];
        let weight = ops.weight(&[tensor(w)]).unwrap();
        let mut slots = ops.lora_slots(slice::from_ref(&site), 2).unwrap();
        let mut loaded = 0;
        for slot in 0..2 {
            // The second has another number of ranks, and no delta on the first slice.
            let rank = LORA_RANK + 3 * slot;
            let mut first = 0;
            let mut parts = Vec::new();
            for (slice, &count) in outputs.iter().enumerate() {
                let (a, b) = (signs.table(rank, x.cols, 2), signs.table(count, rank, 16));
                if slot == 0 || slice > 0 {
                    let delta = product(&product(&x, &a), &b);
                    for row in 0..x.rows() {
                        let to = &mut sums[slot + 1].data[row * w.rows() + first..][..count];
                        to.iter_mut().zip(delta.row(row)).for_each(|(to, delta)| *to += delta);
                    }
                    parts.push(LoraPart::delta((0, slice), rank, 1.0, &a.data, &b.data));
                }
                first += count;
            }
            let adapter = Arc::new(ops.stage(slice::from_ref(&site), &parts).unwrap());
            ops.load(&mut slots, slot as u32, &adapter, &[&weight]).unwrap();
        }
        while loaded < 2 {
            loaded += ops.loaded(&mut slots).unwrap().len();
        }
        assert!(sums.iter().flat_map(|sums| &sums.data).all(|sum| sum.abs() <= 256.0), "exact in bf16");
        Case { weight, slots, x, sums }
    }

    /// A step of so many rows, each of them a sequence, with or without deltas; its result.
    fn step(&self, rows: usize, deltas: bool) -> (Batch, Table) {
        let adapter = |row| if deltas { adapter_of(row, rows) } else { 0 };
        let slots: Vec<Option<u32>> = (0..rows).map(|row| (adapter(row) as u32).checked_sub(1)).collect();
        let data = (0..rows).flat_map(|row| self.sums[adapter(row)].row(row).to_vec()).collect();
        (batch(&vec![(1, 3); rows], &slots), Table { cols: self.sums[0].cols, data })
    }

    fn by<'a>(&'a self, device: &'a B::Batch) -> Projection<'a, B> {
        let lora = LinearLora { slots: &self.slots, site: 0, batch: device, rows: RowSet::All };
        Projection::new(&self.weight, Some(lora))
    }
}

/// Every projection of `outputs` for every number of rows.
pub(super) fn products_of_small_integers<B: Backend>(ops: &B, outputs: &[usize], rows: &[usize]) {
    let most = *rows.iter().max().unwrap();
    for inputs in INPUTS {
        let mut signs = Signs(Numbers(inputs as u64));
        let x = signs.table(most, inputs, 32);
        let w = signs.table(outputs.iter().sum(), inputs, 2);
        let case = Case::new(ops, x, &w, outputs, &mut signs);
        for (&rows, deltas) in rows.iter().flat_map(|rows| [(rows, false), (rows, true)]) {
            let what = format!("{rows} rows of {inputs} inputs, deltas: {deltas}");
            let (host, expected) = case.step(rows, deltas);
            let device = device_batch(ops, &host);
            let x = mat(ops, &first_rows(&case.x, rows));
            let mut y = ops.wide_mat(rows, expected.cols).unwrap();
            ops.linear(&x, case.by(&device), Output::Store(&mut y)).unwrap();
            assert!(ops.download(&y).unwrap() == expected.data, "linear of {what}");
            let mut half = ops.mat(rows, expected.cols).unwrap();
            ops.linear(&x, case.by(&device), Output::Store(&mut half)).unwrap();
            assert!(ops.download(&half).unwrap() == expected.data, "linear to activations of {what}");
            let stream = signs.table(rows, expected.cols, 2);
            let sums: Vec<f32> = stream.data.iter().zip(&expected.data).map(|(a, b)| a + b).collect();
            let mut residual = wide_mat(ops, &stream);
            add_products(ops, &x, case.by(&device), &mut residual).unwrap();
            assert!(ops.download(&residual).unwrap() == sums, "products onto the stream of {what}");
        }
    }
}

/// The projection onto the stream that is followed by a norm, which has a kernel of its own for one slice.
pub(super) fn normed_products_of_small_integers<B: Backend>(ops: &B, outputs: usize, rows: &[usize]) {
    let most = *rows.iter().max().unwrap();
    let norm = ops.vector(&vec![1.0; outputs]).unwrap();
    for inputs in INPUTS {
        let mut signs = Signs(Numbers(inputs as u64 + 1));
        let (x, w) = (signs.table(most, inputs, 32), signs.table(outputs, inputs, 2));
        let case = Case::new(ops, x, &w, &[outputs], &mut signs);
        for (&rows, deltas) in rows.iter().flat_map(|rows| [(rows, false), (rows, true)]) {
            let (host, expected) = case.step(rows, deltas);
            let device = device_batch(ops, &host);
            let x = mat(ops, &first_rows(&case.x, rows));
            let stream = signs.table(rows, outputs, 2);
            let sums: Vec<f32> = stream.data.iter().zip(&expected.data).map(|(a, b)| a + b).collect();
            let (mut residual, mut y) = (wide_mat(ops, &stream), ops.mat(rows, outputs).unwrap());
            let next = Some((rms(&norm), &mut y));
            add_and_norm(ops, &x, case.by(&device), &mut residual, next).unwrap();
            let what = format!("{rows} rows of {inputs} inputs, deltas: {deltas}");
            assert!(ops.download(&residual).unwrap() == sums, "products onto the normed stream of {what}");
        }
    }
}

/// Gates that are all 64, so that what is gated is multiplied with a power of two.
pub(super) fn gated_products_of_small_integers<B: Backend>(ops: &B, outputs: usize, rows: &[usize]) {
    let most = *rows.iter().max().unwrap();
    for inputs in INPUTS {
        let mut signs = Signs(Numbers(inputs as u64 + 2));
        let (mut x, mut w) = (signs.table(most, inputs, 32), signs.table(2 * outputs, inputs, 2));
        for (k, element) in x.data.chunks_exact_mut(inputs).flat_map(|row| row.iter_mut().enumerate()) {
            // The gates' inputs are spread over all of them.
            if k.is_multiple_of(inputs / GATE) {
                *element = 1.0;
            }
        }
        for (output, row) in w.data.chunks_exact_mut(inputs).enumerate() {
            let gate = |k: usize| if k.is_multiple_of(inputs / GATE) { 1.0 } else { 0.0 };
            row.iter_mut().enumerate().filter(|_| output < outputs).for_each(|(k, w)| *w = gate(k));
        }
        let up = Case::new(ops, x, &w, &[outputs, outputs], &mut signs);
        for &rows in rows {
            // The second adapter has no delta on the gates, the first would change them.
            for deltas in [false, true] {
                let adapter = |row| if deltas { adapter_of(row, rows) & 2 } else { 0 };
                let slots: Vec<Option<u32>> =
                    (0..rows).map(|row| (adapter(row) as u32).checked_sub(1)).collect();
                let host = batch(&vec![(1, 3); rows], &slots);
                let device = device_batch(ops, &host);
                let expected: Vec<f32> = (0..rows)
                    .flat_map(|row| up.sums[adapter(row)].row(row)[outputs..].to_vec())
                    .map(|sum| sum * GATE as f32)
                    .collect();
                let x = mat(ops, &first_rows(&up.x, rows));
                let (mut gate_up, mut y) =
                    (ops.mat(rows, 2 * outputs).unwrap(), ops.mat(rows, outputs).unwrap());
                let out = Output::Gate { activation: Activation::Silu, products: &mut gate_up, y: &mut y };
                ops.linear(&x, up.by(&device), out).unwrap();
                let what = format!("{rows} rows of {inputs} inputs, deltas: {deltas}");
                assert!(ops.download(&y).unwrap() == expected, "gated products of {what}");
            }
        }
    }
}
