//! Compares every operation of every backend with the scalar reference, and checks that a row's result does not depend
//! on the other rows.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod adapters;
mod attention;
mod ensembles;
mod exact;
mod linear;
mod masks;
mod rows;
mod sampling;

use std::sync::Arc;

use kernels::{
    AttentionShape, Backend, Batch, Branch, DType, Embedding, Heads, HostTensor, LinearLora, LoraPart,
    LoraSite, Matrix, Norm, NormKind, Output, Projection, Qkv, Residual, Result, RowSet, Sampled, Segment,
    Span,
    cpu::{CpuBackend, Tier},
    prelude::*,
    reference::Table,
    testing::{Numbers, batch},
};

/// Runs a check with every type on every tier that this machine's CPU has.
fn on_cpu(check: impl Fn(&CpuBackend)) {
    for tier in Tier::available() {
        for dtype in [DType::F32, DType::Bf16] {
            check(&CpuBackend::with_tier(dtype, 3, tier).unwrap());
        }
    }
}

/// Runs a check with every type on the first GPU. Fails if there is none.
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

use adapters::{
    adapters_are_counted, gains_over_smaller_vocabularies, lookups_that_adapters_change,
    magnitudes_and_biases, rows_of_the_head,
};
use attention::{
    attention_over_blocks, attention_over_windows, attention_to_both_sides,
    queries_and_keys_are_clamped_and_normed, rotations_of_every_kind, sinks_and_slopes,
};
use ensembles::{
    ensembles_beside_every_kind_of_adapter, ensembles_equal_one_adapter_of_all_ranks, ensembles_of_any_ranks,
    gated_ensembles, lookups_of_ensembles, members_that_are_not_sums_are_refused, normed_ensembles,
};
use linear::{
    deltas_of_large_matrices, gated_projections_with_deltas, linear_of_any_shape,
    low_rank_deltas_of_mixed_ranks, normed_projections_with_deltas, the_stream_is_not_rounded,
};
use masks::{
    masks_change_nothing_else, masks_come_before_filters, masks_hold_for_any_logits, masks_of_many_rows,
    masks_without_a_probable_token, tokens_under_a_mask_are_counted,
};
use rows::{
    activations_and_gates, embedding_takes_the_token_sampled_last, embeddings_are_scaled_and_know_positions,
    logits_are_scaled_and_capped, norms_of_any_width, norms_of_the_stream_itself, parallel_branches,
    products_onto_the_stream, products_that_are_activated,
};
use sampling::{
    any_logits_give_a_token, banned_tokens_wait, counts_of_seen_tokens_stop_at_the_last,
    draws_depend_on_their_seat_alone, every_parameter_has_an_effect, penalties_over_a_large_vocabulary,
    sampling_among_thousands_of_tokens, sampling_and_scoring_of_many_rows, sampling_filters_and_reports,
    sampling_of_a_large_vocabulary, tokens_without_a_probability_are_never_chosen,
};

on_every_backend!(
    linear_of_any_shape,
    low_rank_deltas_of_mixed_ranks,
    deltas_of_large_matrices,
    gated_projections_with_deltas,
    normed_projections_with_deltas,
    the_stream_is_not_rounded,
    magnitudes_and_biases,
    ensembles_of_any_ranks,
    ensembles_equal_one_adapter_of_all_ranks,
    ensembles_beside_every_kind_of_adapter,
    gated_ensembles,
    normed_ensembles,
    lookups_of_ensembles,
    members_that_are_not_sums_are_refused,
    rows_of_the_head,
    lookups_that_adapters_change,
    gains_over_smaller_vocabularies,
    adapters_are_counted,
    norms_of_any_width,
    norms_of_the_stream_itself,
    activations_and_gates,
    products_that_are_activated,
    products_onto_the_stream,
    parallel_branches,
    logits_are_scaled_and_capped,
    embeddings_are_scaled_and_know_positions,
    attention_over_blocks,
    attention_over_windows,
    attention_to_both_sides,
    sinks_and_slopes,
    rotations_of_every_kind,
    queries_and_keys_are_clamped_and_normed,
    embedding_takes_the_token_sampled_last,
    sampling_filters_and_reports,
    sampling_of_a_large_vocabulary,
    sampling_among_thousands_of_tokens,
    penalties_over_a_large_vocabulary,
    counts_of_seen_tokens_stop_at_the_last,
    sampling_and_scoring_of_many_rows,
    draws_depend_on_their_seat_alone,
    banned_tokens_wait,
    every_parameter_has_an_effect,
    tokens_without_a_probability_are_never_chosen,
    any_logits_give_a_token,
    masks_hold_for_any_logits,
    masks_change_nothing_else,
    masks_come_before_filters,
    tokens_under_a_mask_are_counted,
    masks_without_a_probable_token,
    masks_of_many_rows,
);

#[test]
fn no_row_depends_on_its_neighbours_on_the_cpu() {
    on_cpu(linear::a_row_does_not_depend_on_its_neighbours);
    on_cpu(adapters::no_row_depends_on_the_adapters_beside_it);
    on_cpu(ensembles::no_row_depends_on_the_ensembles_beside_it);
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
    let to = Residual { stream, products, post: None, scale: 1.0, branch: Branch::Only, next };
    ops.linear(x, by, Output::Residual(to))
}

/// An RMS norm without a bias.
fn rms<B: Backend>(weight: &B::Vector) -> Norm<'_, B> {
    Norm { kind: NormKind::Rms, weight, bias: None, eps: 1e-5 }
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

fn collect<B: Backend>(ops: &B, pending: B::Pending) -> Vec<Sampled> {
    let mut out = Vec::new();
    ops.collect(pending, &mut out).unwrap();
    out
}

/// A table's rows as they are.
fn rows_of<B: Backend>(table: &B::Weight) -> Embedding<'_, B> {
    Embedding { table, scale: 1.0, positions: None, lora: None }
}

#[test]
fn contradicting_indices_are_refused() {
    let ops = CpuBackend::new(DType::Bf16, 2).unwrap();
    let mut device = ops.batch(8, 8, &[Span::Causal]).unwrap();
    let good = batch(&[(3, 0), (1, 20)], &[Some(0), None]);
    ops.upload(&good, &mut device).unwrap();
    let breaks: [fn(&mut Batch); 11] = [
        |batch| batch.positions.truncate(1),
        |batch| batch.sequences[0].rows = 2,
        |batch| batch.blocks.truncate(1),
        |batch| batch.segments[0].end = 9,
        // Segments that have some rows in common but not all, and a row with too many adapters.
        |batch| batch.segments.push(Segment::new(1, 3, 0)),
        |batch| batch.segments.push(Segment::new(0, 2, 0)),
        |batch| batch.segments = vec![batch.segments[0]; 5],
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
