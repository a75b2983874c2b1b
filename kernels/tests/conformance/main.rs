//! Every operation of every backend against the scalar reference, and the promise that a row's result does not depend
//! on the rows beside it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod exact;
mod sampling;

use std::{slice, sync::Arc};

use kernels::{
    Activation, AttentionShape, Backend, Batch, DType, Embedding, Heads, HostTensor, LinearLora, LoraPart,
    LoraSite, Matrix, Norm, NormKind, Output, Pairs, Projection, Qkv, Residual, Result, RopeSpec, Rotation,
    RowSet, SampleRow, Sampled, SamplingParams, Span, Stretch,
    cpu::{CpuBackend, Tier},
    prelude::*,
    reference::{self, KvMemory, Table},
    testing::{Numbers, assert_close, batch},
};

/// Runs a check on every tier and type that this machine's CPU has.
fn on_cpu(check: impl Fn(&CpuBackend)) {
    for tier in Tier::available() {
        for dtype in [DType::F32, DType::Bf16] {
            check(&CpuBackend::with_tier(dtype, 3, tier).unwrap());
        }
    }
}

/// Runs a check on every type of the first card. Fails where there is none.
#[cfg(feature = "cuda")]
fn on_cuda(check: impl Fn(&kernels::cuda::CudaBackend)) {
    for dtype in [DType::Bf16, DType::F16] {
        check(&kernels::cuda::CudaBackend::new(dtype, 0).unwrap());
    }
}

/// The checks that every backend passes.
macro_rules! on_every_backend {
    ($($check:ident),* $(,)?) => {
        mod cpu {
            $(#[test]
            fn $check() {
                super::on_cpu(|ops| super::$check(ops));
            })*
        }

        #[cfg(feature = "cuda")]
        mod cuda {
            $(#[test]
            fn $check() {
                super::on_cuda(|ops| super::$check(ops));
            })*
        }
    };
}

use sampling::{
    counts_of_seen_tokens_stop_at_the_last, draws_depend_on_their_seat_alone, every_parameter_has_an_effect,
    penalties_over_a_large_vocabulary, sampling_among_thousands_of_tokens, sampling_and_scoring_of_many_rows,
    sampling_filters_and_reports, sampling_of_a_large_vocabulary,
    tokens_without_a_probability_are_never_chosen,
};

on_every_backend!(
    linear_of_any_shape,
    low_rank_deltas_of_mixed_ranks,
    gated_projections_with_deltas,
    normed_projections_with_deltas,
    the_stream_is_not_rounded,
    norms_and_activations,
    attention_over_blocks,
    embedding_takes_the_token_sampled_last,
    sampling_filters_and_reports,
    sampling_of_a_large_vocabulary,
    sampling_among_thousands_of_tokens,
    penalties_over_a_large_vocabulary,
    counts_of_seen_tokens_stop_at_the_last,
    sampling_and_scoring_of_many_rows,
    draws_depend_on_their_seat_alone,
    every_parameter_has_an_effect,
    tokens_without_a_probability_are_never_chosen,
);

#[test]
fn no_row_depends_on_its_neighbours_on_the_cpu() {
    on_cpu(a_row_does_not_depend_on_its_neighbours);
}

#[test]
fn any_logits_give_a_token_on_the_cpu() {
    on_cpu(sampling::any_logits_give_a_token);
}

#[test]
fn masks_hold_on_the_cpu() {
    on_cpu(sampling::masks_hold_for_any_logits);
    on_cpu(sampling::masks_change_nothing_else);
}

/// A few outputs and numbers of rows: the plainest tier takes its time.
#[test]
fn products_of_small_integers_are_exact_on_the_cpu() {
    let rows = [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 65];
    on_cpu(|ops| {
        exact::products_of_small_integers(ops, &[16, 20, 3], &rows);
        exact::normed_products_of_small_integers(ops, 33, &rows);
        exact::gated_products_of_small_integers(ops, 20, &rows);
    });
}

/// Every number of rows around the borders of the kernels for few of them, and larger ones.
#[cfg(feature = "cuda")]
#[test]
fn products_of_small_integers_are_exact_on_cuda() {
    let few: Vec<usize> = (1..=66).collect();
    let many = [few.clone(), vec![100, 128, 129, 300, 513, 700]].concat();
    on_cuda(|ops| {
        exact::products_of_small_integers(ops, &[256, 64, 80], &many);
        exact::products_of_small_integers(ops, &[320], &many);
        exact::normed_products_of_small_integers(ops, 512, &many);
        exact::normed_products_of_small_integers(ops, 4096, &few);
        exact::gated_products_of_small_integers(ops, 256, &many);
    });
}

/// The CPU keeps keys and values in f16, whose range is smaller than theirs.
#[test]
fn values_beyond_f16_are_cut_off_on_the_cpu() {
    let heads = Heads { query: 1, kv: 1, dim: 16 };
    let attention = AttentionShape { scale: 1.0, ..AttentionShape::causal(heads) };
    let host = batch(&[(1, 0)], &[]);
    for tier in Tier::available() {
        let ops = CpuBackend::with_tier(DType::Bf16, 1, tier).unwrap();
        let mut kv = ops.kv(1, heads).unwrap();
        let device = device_batch(&ops, &host);
        let mut qkv = Table { cols: 48, data: vec![1e6; 48] };
        qkv.data[47] = -1e6;
        let (mut x, mut y) = (mat(&ops, &qkv), ops.mat(1, 16).unwrap());
        let by = Qkv { heads, clamp: None, norms: None, rope: None };
        ops.rope_and_store(&mut x, by, &device, &mut kv).unwrap();
        ops.paged_attention(&x, attention.into(), &device, &kv, &mut y).unwrap();
        let mut expected = [65504.0; 16];
        expected[15] = -65504.0;
        assert_eq!(ops.download(&y).unwrap(), expected, "{tier:?}");
    }
}

fn filled<B: Backend>(ops: &B, mut x: B::Mat, table: &Table) -> B::Mat {
    ops.fill(&mut x, &table.data).unwrap();
    x
}

fn mat<B: Backend>(ops: &B, table: &Table) -> B::Mat {
    filled(ops, ops.mat(table.rows().max(1), table.cols).unwrap(), table)
}

fn wide_mat<B: Backend>(ops: &B, table: &Table) -> B::Mat {
    filled(ops, ops.wide_mat(table.rows().max(1), table.cols).unwrap(), table)
}

fn tensor(table: &Table) -> HostTensor<'static> {
    let data = table.data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    HostTensor { dtype: DType::F32, rows: table.rows(), cols: table.cols, data: data.into() }
}

fn device_batch<B: Backend>(ops: &B, host: &Batch) -> B::Batch {
    device_batch_for(ops, host, Span::Causal)
}

/// As [`device_batch`], for attention over a span.
fn device_batch_for<B: Backend>(ops: &B, host: &Batch, span: Span) -> B::Batch {
    let mut batch = ops.batch(host.rows(), host.blocks.len(), &[span]).unwrap();
    ops.upload(host, &mut batch).unwrap();
    batch
}

/// Adds products to a stream.
fn add_products<B: Backend>(ops: &B, x: &B::Mat, by: Projection<'_, B>, stream: &mut B::Mat) -> Result<()> {
    add_and_norm(ops, x, by, stream, None)
}

/// Adds products to a stream, and norms it.
fn add_and_norm<B: Backend>(
    ops: &B,
    x: &B::Mat,
    by: Projection<'_, B>,
    stream: &mut B::Mat,
    next: Option<(Norm<'_, B>, &mut B::Mat)>,
) -> Result<()> {
    let products = &mut ops.wide_mat(x.rows().max(1), stream.cols())?;
    let to = Residual { stream, products, post: None, scale: 1.0, more: false, next };
    ops.linear(x, by, Output::Residual(to))
}

/// An RMS norm without a bias.
fn rms<B: Backend>(weight: &B::Vector) -> Norm<'_, B> {
    Norm { kind: NormKind::Rms, weight, bias: None, eps: 1e-5 }
}

/// Angles of some frequencies, which no length stretches.
fn angles<B: Backend>(ops: &B, inv_freq: &[f32], positions: usize) -> B::Rope {
    let spec = RopeSpec { inv_freq: inv_freq.to_vec(), scale: 1.0, positions, stretch: Stretch::None };
    ops.rope(&spec).unwrap()
}

fn linear_of_any_shape<B: Backend>(ops: &B) {
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

fn fill_slots<B: Backend>(
    ops: &B,
    sites: &[LoraSite],
    weights: &[&B::Weight],
    adapters: &[Vec<LoraPart>],
) -> B::LoraSlots {
    let mut slots = ops.lora_slots(sites, adapters.len()).unwrap();
    for (slot, parts) in adapters.iter().enumerate() {
        let adapter = Arc::new(ops.stage(sites, parts).unwrap());
        assert!(ops.adapter_bytes(&adapter) > 0);
        ops.load(&mut slots, slot as u32, &adapter, weights).unwrap();
    }
    let mut loaded = ops.loaded(&mut slots).unwrap();
    while loaded.len() < adapters.len() {
        loaded.extend(ops.loaded(&mut slots).unwrap());
    }
    slots
}

fn low_rank_deltas_of_mixed_ranks<B: Backend>(ops: &B) {
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

fn gated_projections_with_deltas<B: Backend>(ops: &B) {
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
            let expected = reference::silu_mul(&expected);
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

fn normed_projections_with_deltas<B: Backend>(ops: &B) {
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
fn the_stream_is_not_rounded<B: Backend>(ops: &B) {
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

fn a_row_does_not_depend_on_its_neighbours<B: Backend>(ops: &B) {
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

fn norms_and_activations<B: Backend>(ops: &B) {
    let mut numbers = Numbers(4);
    for (rows, cols) in [(1, 1), (1, 64), (7, 33), (20, 576)] {
        let mut x = numbers.table(rows, cols);
        let w = numbers.table(1, cols).data;
        let mut y = ops.mat(rows, cols).unwrap();
        ops.normalize(&wide_mat(ops, &x), rms(&ops.vector(&w).unwrap()), &mut y).unwrap();
        let expected = reference::rms_norm(&x, &w, 1e-5);
        assert_close("norm", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
        x.data.extend(x.data.clone().iter().map(|x| x * 90.0));
        let gates = Table { cols: 2 * cols, data: x.data };
        ops.gate(&mat(ops, &gates), Activation::Silu, &mut y).unwrap();
        assert_close("gate", &ops.download(&y).unwrap(), &reference::silu_mul(&gates).data, ops.dtype());
    }
}

/// Runs a prefill of `lens` tokens each, then one decode step, and checks both.
fn check_attention<B: Backend>(ops: &B, attention: &AttentionShape, lens: &[usize]) {
    let mut numbers = Numbers(5);
    let heads = attention.heads;
    let inv_freq: Vec<f32> = (0..heads.dim / 2).map(|j| 0.1_f32.powf(j as f32 / 8.0)).collect();
    let table = angles(ops, &inv_freq, 512);
    let blocks = 2 * lens.iter().map(|len| len / 16 + 2).sum::<usize>();
    let (mut kv, mut memory) = (ops.kv(blocks, heads).unwrap(), KvMemory::new(blocks, heads));
    assert!(ops.kv_block_bytes(heads) > 0);
    // One prefill whose sequences already have their last block, then decode rows behind it.
    let prefill = batch(&lens.iter().map(|len| (*len, 0)).collect::<Vec<_>>(), &[]);
    let mut decode = batch(&lens.iter().map(|len| (1, *len)).collect::<Vec<_>>(), &[]);
    // A longer table may begin with other blocks: decode only where it does not.
    if decode.blocks != prefill.blocks {
        decode = batch(&[], &[]);
    }
    for host in [prefill, decode] {
        let qkv = numbers.table(host.rows().max(1), heads.qkv_cols());
        let qkv = Table { cols: qkv.cols, data: qkv.data[..host.rows() * qkv.cols].to_vec() };
        let device = device_batch_for(ops, &host, attention.span);
        let mut x = mat(ops, &qkv);
        let rope = Some(Rotation { table: &table, pairs: Pairs::Halves });
        let by = Qkv { heads, clamp: None, norms: None, rope };
        ops.rope_and_store(&mut x, by, &device, &mut kv).unwrap();
        let mut rotated = qkv.clone();
        reference::rope_and_store(&mut rotated, heads, &inv_freq, &host, &mut memory);
        assert_close("rope", &ops.download(&x).unwrap(), &rotated.data, ops.dtype());
        let mut y = ops.mat(host.rows().max(1), heads.query * heads.dim).unwrap();
        ops.paged_attention(&x, (*attention).into(), &device, &kv, &mut y).unwrap();
        let expected = reference::paged_attention(&rotated, attention, &host, &memory);
        assert_close("attention", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
    }
}

fn attention_over_blocks<B: Backend>(ops: &B) {
    for (query, kv, dim) in [(4, 2, 16), (9, 3, 64), (2, 2, 24), (12, 1, 32), (1, 1, 256)] {
        let heads = Heads { query, kv, dim };
        let plain = AttentionShape { scale: 0.2, ..AttentionShape::causal(heads) };
        check_attention(ops, &plain, &[1, 5, 16, 17, 150, 261]);
        check_attention(ops, &AttentionShape { span: Span::Window(20), ..plain }, &[7, 190]);
        check_attention(ops, &AttentionShape { softcap: Some(3.0), ..plain }, &[40]);
    }
}

fn collect<B: Backend>(ops: &B, pending: B::Pending) -> Vec<Sampled> {
    let mut out = Vec::new();
    ops.collect(pending, &mut out).unwrap();
    out
}

/// A table's rows as they are.
fn rows_of<B: Backend>(table: &B::Weight) -> Embedding<'_, B> {
    Embedding { table, scale: 1.0, positions: None, lora: None }
}

fn embedding_takes_the_token_sampled_last<B: Backend>(ops: &B) {
    let table = Numbers(6).table(60, 40);
    let weight = ops.weight(&[tensor(&table)]).unwrap();
    let mut sampler = ops.sampler(4, 60).unwrap();
    ops.seat(&mut sampler, 2, &SamplingParams::default(), &[1], &[]).unwrap();
    let mut logits = vec![0.0; 60];
    logits[17] = 3.0;
    let row = SampleRow { row: 0, seat: 2 };
    let pending = ops.sample(&mat(ops, &Table { cols: 60, data: logits }), &[row], &mut sampler).unwrap();
    assert_eq!(collect(ops, pending)[0].token, 17);
    let mut host = batch(&[(2, 0)], &[]);
    host.tokens = vec![5, -3];
    let mut y = ops.wide_mat(2, 40).unwrap();
    ops.embed(&device_batch(ops, &host), &sampler, rows_of(&weight), &mut y).unwrap();
    let expected = Table { cols: 40, data: [table.row(5), table.row(17)].concat() };
    assert_close("embed", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
    let mut last = ops.mat(2, 40).unwrap();
    ops.gather_logit_rows(&mat(ops, &expected), &device_batch(ops, &host), &mut last).unwrap();
    assert_eq!(last.rows(), 1);
    assert_close("gather", &ops.download(&last).unwrap(), table.row(17), ops.dtype());
}

#[test]
fn contradicting_indices_are_refused() {
    let ops = CpuBackend::new(DType::Bf16, 2).unwrap();
    let mut device = ops.batch(8, 8, &[Span::Causal]).unwrap();
    let good = batch(&[(3, 0), (1, 20)], &[Some(0), None]);
    ops.upload(&good, &mut device).unwrap();
    let breaks: [fn(&mut Batch); 8] = [
        |batch| batch.positions.truncate(1),
        |batch| batch.sequences[0].rows = 2,
        |batch| batch.blocks.truncate(1),
        |batch| batch.segments[0].end = 9,
        |batch| batch.logit_rows[1] = 4,
        |batch| batch.sequences[1].kv_len = 0,
        // Another sequence's block, in the middle of it and at its beginning.
        |batch| batch.store_at[3] = batch.store_at[1] + 5,
        |batch| batch.store_at[3] = batch.store_at[0],
    ];
    for (i, damage) in breaks.iter().enumerate() {
        let mut bad = good.clone();
        damage(&mut bad);
        assert!(ops.upload(&bad, &mut device).is_err(), "damage {i}");
    }
    let table = ops.weight(&[tensor(&Numbers(1).table(4, 8))]).unwrap();
    let mut y = ops.mat(8, 8).unwrap();
    let sampler = ops.sampler(1, 4).unwrap();
    let refused = ops.embed(&device, &sampler, rows_of(&table), &mut y).unwrap_err().to_string();
    assert_eq!(refused, "embed: token 27 is out of range, limit 4");
    let sites = [LoraSite::linear(8, &[4])];
    let slots = ops.lora_slots(&sites, 1).unwrap();
    let lora = LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All };
    y.set_rows(4);
    let mut out = ops.mat(8, 4).unwrap();
    let by = Projection::new(&table, Some(lora));
    let refused = ops.linear(&y, by, Output::Store(&mut out)).unwrap_err().to_string();
    assert_eq!(refused, "linear: slot 0 is empty");
}
