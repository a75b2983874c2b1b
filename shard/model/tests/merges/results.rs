//! What merges are made of, beside that they are PEFT's.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    iter,
};

use kernels::{DType, LowRank};
use model::{
    Share,
    adapter::{Adapter, ContentHash, Elementwise, Merge, Recipe, Strategy},
    testing,
};

use super::support::{Part, STRATEGIES, base, delta, merge, opened, parts, path, recipe};

const DARE: Strategy = Strategy::Elementwise(Elementwise::DareLinear);
const PRUNE: Strategy = Strategy::Elementwise(Elementwise::MagnitudePrune);

fn deltas(adapter: &Adapter) -> BTreeMap<String, Vec<f32>> {
    adapter.parts.iter().map(|part| (path(part), delta(part))).collect()
}

/// The bytes of all tensors.
fn bytes(adapter: &Adapter) -> Vec<u8> {
    let low_ranks = adapter.parts.iter().filter_map(|part| part.low_rank.as_ref());
    low_ranks.flat_map(|LowRank { a, b, .. }| a.data.iter().chain(b.data.iter())).copied().collect()
}

/// The fraction of the elements of all A that are not 0.
fn density(adapter: &Adapter) -> f64 {
    let low_ranks = adapter.parts.iter().filter_map(|part| part.low_rank.as_ref());
    let elements: Vec<f32> = low_ranks.flat_map(|LowRank { a, .. }| a.to_f32()).collect();
    elements.iter().filter(|x| **x != 0.0).count() as f64 / elements.len() as f64
}

#[test]
fn every_rank_has_its_share_of_the_same_merge() {
    let folder = tempfile::tempdir().unwrap();
    let whole = base(folder.path(), DType::F32);
    let parts = parts(&["rs", "q-down", "tables", "qv"], &[1.0, -0.5, 0.25, 0.75]);
    for strategy in STRATEGIES {
        let expected = deltas(&merge(&parts, &recipe(strategy), &whole).unwrap());
        for rank in 0..2 {
            let mut base = whole.clone();
            base.share = Share::of(&base.decoder, rank, 2).unwrap();
            let opened_shapes = Merge::open(opened(&parts), &recipe(strategy), &base).unwrap().shapes();
            let merged = merge(&parts, &recipe(strategy), &base).unwrap();
            let shapes: Vec<_> = merged.parts.iter().map(|part| part.shape()).collect();
            assert_eq!(shapes, opened_shapes, "the sizes are those that were announced");
            let got = deltas(&merged);
            assert_eq!(got.len(), expected.len());
            for (path, share) in &got {
                let all = &expected[path];
                // Of a model with 16 columns, of which the output projection of attention has half of the inputs.
                let own: Vec<f32> = match path.rsplit('.').next().unwrap() {
                    "q_proj" | "lm_head" => all[rank * share.len()..][..share.len()].to_vec(),
                    "o_proj" => all.chunks(16).flat_map(|row| &row[8 * rank..][..8]).copied().collect(),
                    "down_proj" => all.chunks(20).flat_map(|row| &row[10 * rank..][..10]).copied().collect(),
                    // Both ranks have the only key head, and the whole table.
                    _ => all.clone(),
                };
                assert_eq!(share, &own, "{strategy:?} {path}");
            }
        }
    }
}

#[test]
fn a_seed_decides_what_dare_drops() {
    let folder = tempfile::tempdir().unwrap();
    let base = base(folder.path(), DType::F32);
    let merged = |weights: &[f64], density: f64, seed: u64| {
        let recipe = Recipe { density: Some(density), seed, ..recipe(DARE) };
        merge(&parts(&["tables", "tables"], weights), &recipe, &base).unwrap()
    };
    let seeds = [0, 1, 2, 3, 1 << 32, 1 << 63, u64::MAX - 1, u64::MAX];
    let results: BTreeSet<Vec<u8>> = seeds.map(|seed| bytes(&merged(&[1.0, 0.0], 0.5, seed))).into();
    assert_eq!(results.len(), seeds.len());
    for seed in seeds {
        assert!(results.contains(&bytes(&merged(&[1.0, 0.0], 0.5, seed))), "the same again");
        for expected in [0.1, 0.5, 0.8] {
            let kept = density(&merged(&[1.0, 0.0], expected, seed));
            // Of 224 elements.
            assert!((kept - expected).abs() < 0.17, "{kept} of {expected}");
            // Parts have masks of their own: an element is dropped if both drop it.
            let either = density(&merged(&[1.0, 1.0], expected, seed));
            assert!((either - (1.0 - (1.0 - expected) * (1.0 - expected))).abs() < 0.17, "{either}");
        }
    }
}

#[test]
fn of_equal_magnitudes_exactly_as_many_are_kept_as_the_density_says() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("adapter");
    let mut files = testing::adapter(&["q_proj"], 4, 1);
    for tensor in files.tensors.values_mut() {
        // A few that are larger than all others, with both signs.
        let numbers = iter::repeat_n(-0.5, 3).chain(iter::repeat(0.25));
        tensor.data = numbers.zip(&tensor.data).map(|(x, old)| if *old < 0.0 { -x } else { x }).collect();
    }
    files.write_adapter(&at).unwrap();
    testing::model().write_model(folder.path()).unwrap();
    let base = model::adapter::BaseModel {
        merged: None,
        decoder: model::Decoder::from_folder(folder.path()).unwrap(),
        path: folder.path().into(),
        dtype: DType::F32,
        share: Share::WHOLE,
    };
    let part = |weight| Part { name: "adapter".into(), folder: at.clone(), weight };
    // A and B of 4 × 32.
    for (wanted, kept) in
        [(0.01, 1), (0.0157, 2), (0.0235, 3), (0.03125, 4), (0.3, 38), (0.7, 89), (0.999, 127), (1.0, 128)]
    {
        let recipe = Recipe { density: Some(wanted), ..recipe(PRUNE) };
        let merged = merge(&[part(1.0), part(0.0)], &recipe, &base).unwrap();
        assert_eq!((density(&merged) * 128.0).round() as usize, kept, "{wanted}");
        let a = merged.parts[0].low_rank.as_ref().unwrap().a.to_f32();
        assert!(a[..kept.min(3)].iter().all(|x| x.abs() > 0.6), "the largest are kept: {a:?}");
    }
}

#[test]
fn results_are_rounded_to_the_type_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let exact = base(folder.path(), DType::F32);
    let parts = parts(&["qv", "bf16"], &[0.3, -1.7]);
    for strategy in STRATEGIES {
        let exact = merge(&parts, &recipe(strategy), &exact).unwrap();
        for dtype in [DType::Bf16, DType::F16] {
            let base = base(folder.path(), dtype);
            let rounded = merge(&parts, &recipe(strategy), &base).unwrap();
            for (rounded, exact) in rounded.parts.iter().zip(&exact.parts) {
                let (rounded, exact) = (rounded.low_rank.as_ref().unwrap(), exact.low_rank.as_ref().unwrap());
                assert_eq!((rounded.a.dtype, rounded.scale), (dtype, exact.scale));
                let round = |x: f32| match dtype {
                    DType::Bf16 => half::bf16::from_f32(x).to_f32(),
                    _ => half::f16::from_f32(x).to_f32(),
                };
                for (rounded, exact) in [(&rounded.a, &exact.a), (&rounded.b, &exact.b)] {
                    assert_eq!(rounded.to_f32(), exact.to_f32().into_iter().map(round).collect::<Vec<_>>());
                }
            }
        }
    }
}

#[test]
fn a_merge_can_be_cancelled_before_each_module() {
    let folder = tempfile::tempdir().unwrap();
    let base = base(folder.path(), DType::F32);
    let parts = parts(&["qv", "q-down"], &[1.0, 1.0]);
    let recipe = recipe(Strategy::Cat);
    let merging = Merge::open(opened(&parts), &recipe, &base).unwrap();
    for last in 0..6 {
        let asked = Cell::new(0);
        let error =
            merging.read_as(ContentHash([1; 32]), &|| asked.replace(asked.get() + 1) == last).unwrap_err();
        assert_eq!((error.to_string().as_str(), asked.get()), ("the merge was cancelled", last + 1));
    }
    let merged = merging.read_as(ContentHash([1; 32]), &|| false).unwrap();
    assert_eq!(merged.parts.len(), 6);
    assert!(merged.parts.iter().all(|part| part.content == ContentHash([1; 32]).number()));
}
