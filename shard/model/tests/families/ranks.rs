//! Models that are divided among ranks: every family, with the goldens of transformers and PEFT.
//!
//! Ranks are threads here, each with a group, a backend and a model of its own.

#[path = "../support/logits.rs"]
mod logits;

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use kernels::{DType, Group, Heads, SampleRow, SamplingParams, cpu::CpuBackend, prelude::*};
use logits::logits_of;
use model::{LoadError, Model, WeightBytes};
use serde_json::json;

use crate::{
    Fixture, NAMES,
    driver::{Driver, Sequence},
    goldens,
};

/// How long ranks wait for each other.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `f` on as many threads as ranks, and returns what each returned.
pub(crate) fn on_ranks<T: Send>(ranks: usize, f: impl Fn(CpuBackend) -> T + Sync) -> Vec<T> {
    in_folder(ranks, |folder, rank| f(backend(folder, rank, ranks)))
}

fn in_folder<T: Send>(ranks: usize, f: impl Fn(&Path, usize) -> T + Sync) -> Vec<T> {
    let folder = tempfile::tempdir().unwrap();
    let (f, path) = (&f, folder.path());
    thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || f(path, rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn backend(folder: &Path, rank: usize, ranks: usize) -> CpuBackend {
    let group = Group::join(folder, rank, ranks, PATIENCE).unwrap().with_patience(PATIENCE);
    CpuBackend::new(DType::F32, 1).unwrap().with_group(Arc::new(group)).unwrap()
}

fn load(ops: &CpuBackend, path: &Path) -> Model<CpuBackend> {
    Model::load(ops, path, &mut |_| {}).unwrap()
}

/// Everything that was computed of sequences, bit for bit.
pub(crate) fn bits(sequences: &[Sequence]) -> Vec<(Vec<u32>, Vec<u32>)> {
    let scores = |sequence: &Sequence| {
        let scores = sequence.scores.values().flat_map(|score| {
            let top = score.top.iter().flat_map(|(id, logprob)| [*id, logprob.to_bits()]);
            [score.logprob.to_bits()].into_iter().chain(top).collect::<Vec<_>>()
        });
        scores.collect()
    };
    sequences.iter().map(|sequence| (sequence.tokens.clone(), scores(sequence))).collect()
}

/// Whether all ranks have computed the same.
pub(crate) fn assert_same<T: PartialEq>(what: &str, of_ranks: &[T]) {
    assert!(of_ranks.iter().all(|of_rank| *of_rank == of_ranks[0]), "{what}: ranks differ");
}

/// Runs all cases of a fixture on some ranks, alone and in mixed batches.
fn divided(name: &'static str, ranks: usize) {
    let fixture = Fixture::new(name);
    let computed = on_ranks(ranks, |ops| {
        let model = load(&ops, &fixture.model);
        let mut driver = Driver::of(ops, model, &fixture.model, &fixture.adapters);
        let (cases, mut alone) = fixture.sequences();
        driver.alone(&mut alone);
        fixture.compare(&format!("alone on {ranks} ranks"), &cases, &alone);
        let (cases, mut mixed) = fixture.sequences();
        driver.mixed(&mut mixed, 61, 150);
        fixture.compare(&format!("mixed on {ranks} ranks"), &cases, &mixed);
        (bits(&alone), bits(&mixed))
    });
    // Every rank samples for itself: only the same bits give the same tokens.
    assert_same(name, &computed);
}

macro_rules! divided {
    ($($test:ident: $name:literal on $($ranks:literal)*;)*) => {$(
        #[test]
        fn $test() {
            $(divided($name, $ranks);)*
        }
    )*

    /// The fixtures, and the most ranks that each is divided among.
    const DIVIDED: &[(&str, &[usize])] = &[$(($name, &[$($ranks),*])),*];
    };
}

divided! {
    llama: "llama" on 2 4;
    llama_tied: "llama-tied" on 2 4;
    mistral: "mistral" on 2 4;
    qwen2: "qwen2" on 2 4;
    qwen2_full: "qwen2-full" on 2;
    qwen3: "qwen3" on 2 4;
    gemma: "gemma" on 2 4;
    gemma2: "gemma2" on 2 4;
    gemma2_usual: "gemma2-usual" on 2;
    gemma3: "gemma3" on 2 4;
    gemma3_usual: "gemma3-usual" on 2;
    phi: "phi" on 2;
    phi3: "phi3" on 2;
    phi4: "phi4" on 2 4;
    phi4_mini: "phi4-mini" on 2;
    gpt2: "gpt2" on 2 4;
    gpt_neox: "gpt-neox" on 2;
    gpt_neox_sequential: "gpt-neox-sequential" on 2;
    rope_linear: "rope-linear" on 2;
    rope_dynamic: "rope-dynamic" on 2;
    rope_yarn: "rope-yarn" on 2;
    rope_yarn_mscale: "rope-yarn-mscale" on 2;
    rope_longrope: "rope-longrope" on 2;
}

#[test]
fn every_fixture_is_divided() {
    let divided: Vec<&str> = DIVIDED.iter().map(|(name, _)| *name).collect();
    assert_eq!(divided, NAMES);
}

/// Every rank draws for itself from logits that it has gathered: the same tokens, whatever the parameters are.
#[test]
fn all_ranks_draw_the_same_tokens() {
    let fixture = Fixture::new("llama");
    let params: Vec<SamplingParams> = (0..12)
        .map(|i: u64| SamplingParams {
            temperature: [0.0, 0.7, 1.0, 1.6][i as usize % 4],
            top_k: [0, 5, 40][i as usize % 3],
            top_p: [1.0, 0.9, 0.5][i as usize / 4],
            seed: 1 + i * i,
            num_top: 3,
            ..SamplingParams::default()
        })
        .collect();
    let drawn = on_ranks(4, |ops| {
        let model = load(&ops, &fixture.model);
        let mut drawn = Vec::new();
        for prompt in 1..9 {
            let logits = logits_of(&ops, &model, prompt);
            let mut x = ops.wide_mat(1, logits.len()).unwrap();
            ops.fill(&mut x, &logits).unwrap();
            let mut sampler = ops.sampler(params.len(), logits.len()).unwrap();
            for (seat, params) in (0..).zip(&params) {
                ops.seat(&mut sampler, seat, params, &[1, 2, 3], &[]).unwrap();
                let sampled = ops.sample(&x, &[SampleRow { row: 0, seat }], &mut sampler).unwrap();
                ops.collect(sampled, &mut drawn).unwrap();
            }
        }
        drawn.into_iter().map(|one| (one.token, one.logprob.to_bits())).collect::<Vec<_>>()
    });
    assert_same("draws", &drawn);
    let distinct: BTreeSet<u32> = drawn[0].iter().map(|(token, _)| *token).collect();
    assert!(distinct.len() > 10, "{distinct:?}");
}

/// GGUF files, whose blocks need not end where a share ends.
#[test]
fn gguf_files_are_divided() {
    let mut files = 0;
    for name in NAMES {
        let file = goldens::folder(name).join("model.gguf");
        if !file.exists() {
            continue;
        }
        files += 1;
        let fixture = Fixture::new(name);
        let computed = on_ranks(2, |ops| {
            let model = load(&ops, &file);
            let mut driver = Driver::of(ops, model, &file, &fixture.adapters);
            let (cases, mut sequences) = fixture.sequences();
            driver.mixed(&mut sequences, 61, 150);
            fixture.compare("as GGUF on 2 ranks", &cases, &sequences);
            bits(&sequences)
        });
        assert_same(name, &computed);
    }
    assert!(files >= 9);
}

/// The files of torch: one archive, one of the older format, and several archives.
#[test]
fn files_of_torch_are_divided() {
    for name in ["zip", "legacy", "sharded"] {
        let path = goldens::folder("../pickle").join(name);
        let run = |ops: CpuBackend| logits_of(&ops, &load(&ops, &path), 6);
        let expected = run(CpuBackend::new(DType::F32, 1).unwrap());
        let computed = on_ranks(2, run);
        assert_same(name, &computed);
        for (got, expected) in computed[0].iter().zip(&expected) {
            assert!((got - expected).abs() <= 1e-4, "{name}: {got}, expected {expected}");
        }
    }
}

/// A fixture with other numbers of heads in place of its own, whose weights have the same sizes.
fn with_heads(name: &'static str, config: &[(&str, usize)]) -> Fixture {
    let fixture = Fixture::new(name);
    let file = fixture.model.join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for (field, value) in config {
        json[*field] = json!(value);
    }
    std::fs::write(&file, json.to_string()).unwrap();
    fixture
}

/// Eight ranks, with as many query heads, and key heads for each or for several of them: against one rank.
#[test]
fn eight_ranks_compute_what_one_does() {
    let heads = |kv: usize| vec![("num_attention_heads", 8), ("num_key_value_heads", kv), ("head_dim", 16)];
    for (name, config) in [
        ("llama", heads(4)),
        ("gemma2", heads(4)),
        ("gpt2", vec![("n_head", 8)]),
        ("gpt-neox", vec![("num_attention_heads", 8)]),
    ] {
        let fixture = with_heads(name, &config);
        let run = |ops: CpuBackend| {
            let model = load(&ops, &fixture.model);
            let bytes = model.weight_bytes(&ops);
            let mut driver = Driver::of(ops, model, &fixture.model, &fixture.adapters);
            let (_, mut sequences) = fixture.sequences();
            sequences.truncate(6);
            driver.mixed(&mut sequences, 61, 150);
            (sequences, bytes)
        };
        let (expected, _) = run(CpuBackend::new(DType::F32, 1).unwrap());
        let computed = on_ranks(8, run);
        assert_same(name, &computed.iter().map(|(sequences, _)| bits(sequences)).collect::<Vec<_>>());
        for (got, expected) in computed[0].0.iter().zip(&expected) {
            assert_eq!(got.tokens, expected.tokens, "{name}");
            for (position, score) in &expected.scores {
                let difference = (got.scores[position].logprob - score.logprob).abs();
                assert!(difference <= 1e-3, "{name} at {position}: off by {difference}");
            }
        }
    }
}

/// A rank that has its neighbour's weights, or its neighbour's share of the adapters, is found out.
#[test]
fn a_neighbours_share_is_found_out() {
    let fixture = Fixture::new("llama");
    for (swaps_weights, swaps_adapters) in [(false, false), (true, false), (false, true)] {
        let other = tempfile::tempdir().unwrap();
        let computed = in_folder(4, |folder, rank| {
            let ops = backend(folder, rank, 4);
            // In another group, ranks 1 and 2 have changed places. Rank 1 takes what it would have there.
            let swapped = backend(other.path(), [0, 2, 1, 3][rank], 4);
            let of = |swaps: bool| load(if swaps && rank == 1 { &swapped } else { &ops }, &fixture.model);
            let (weights, share) = (of(swaps_weights), of(swaps_adapters).share());
            let mut driver = Driver::with_share(ops, (weights, share), &fixture.model, &fixture.adapters);
            let (_, mut sequences) = fixture.sequences();
            driver.mixed(&mut sequences, 61, 150);
            sequences
        });
        let (cases, _) = fixture.sequences();
        let compared = catch_unwind(AssertUnwindSafe(|| fixture.compare("swapped", &cases, &computed[0])));
        assert_eq!(compared.is_err(), swaps_weights || swaps_adapters);
    }
}

#[test]
fn a_rank_has_its_share_of_the_weights() {
    for (name, ranks) in DIVIDED {
        let fixture = Fixture::new(name);
        let loaded = |ops: CpuBackend| {
            let model = load(&ops, &fixture.model);
            (model.weight_bytes(&ops), model.decoder().clone())
        };
        let (all, decoder) = loaded(CpuBackend::new(DType::F32, 1).unwrap());
        let (Heads { kv, dim, .. }, hidden, layers) = (decoder.heads(), decoder.hidden, decoder.layers.len());
        // The output projection is divided even where it is the embedding table.
        let divided = all.share + if decoder.head.tied { decoder.vocab * hidden * 4 } else { 0 };
        // Panels of the CPU have 16 rows: those of a layer's first projections, and of the output projection.
        let padding = (2 * layers + 1) * 15 * hidden * 4;
        for &ranks in *ranks {
            // Keys and values of a head that several ranks have.
            let replicated =
                if kv < ranks { 2 * layers * dim * hidden * 4 * (ranks - kv) / ranks } else { 0 };
            for (WeightBytes { share, whole }, _) in on_ranks(ranks, loaded) {
                assert_eq!(whole, all.whole, "{name}: what is not divided");
                let most = divided / ranks + replicated + padding;
                assert!(share <= most, "{name} on {ranks} ranks: {share} bytes of {divided}, at most {most}");
            }
        }
    }
}

#[test]
fn models_that_do_not_divide_are_refused_with_numbers() {
    let fixture = Fixture::new("llama");
    let refused = |fixture: &Fixture, ranks: usize| -> Vec<String> {
        on_ranks(ranks, |ops| match Model::load(&ops, &fixture.model, &mut |_| {}) {
            Err(error @ LoadError::Share { .. }) => error.to_string(),
            Err(error) => panic!("{error}"),
            Ok(_) => String::new(),
        })
    };
    for (fixture, ranks, says) in [
        (&fixture, 3, "4 query heads cannot be divided among 3 ranks"),
        (&fixture, 8, "4 query heads cannot be divided among 8 ranks"),
        (&fixture, 5, "4 query heads cannot be divided among 5 ranks"),
        (
            &with_heads("llama", &[("num_attention_heads", 16)]),
            6,
            "16 query heads cannot be divided among 6 ranks",
        ),
        (&with_heads("llama", &[("intermediate_size", 97)]), 2, "97 columns of the feed-forward networks"),
        (&with_heads("llama", &[("intermediate_size", 98)]), 4, "98 columns of the feed-forward networks"),
        (
            &with_heads("gpt-neox", &[("num_attention_heads", 1)]),
            2,
            "1 query heads cannot be divided among 2",
        ),
        (&with_heads("phi3", &[("vocab_size", 1)]), 2, "1 tokens cannot be divided among 2 ranks"),
    ] {
        for refusal in refused(fixture, ranks) {
            assert!(refusal.starts_with(says), "{refusal}, expected {says}");
        }
    }
    // Three key heads among two ranks, whose six query heads would divide.
    let refusals =
        refused(&with_heads("qwen3", &[("num_attention_heads", 6), ("num_key_value_heads", 3)]), 2);
    assert_eq!(refusals, vec!["3 key heads cannot be divided among 2 ranks"; 2]);
}
