//! Hidden states and what is pooled of them.

use std::{fs, path::Path};

use kernels::{DType, cpu::CpuBackend};
use lorax_shard::step::{Member, NewSequence, Output, Pooling, PoolingKind, Rows, Step};
use model::{adapter::ContentHash, testing::seeded::Manifest};
use serde_json::Value;

use crate::harness::{Router, Shard, prompt, rows, tokens_of};

fn new(kind: PoolingKind, normalize: bool, len: usize) -> NewSequence {
    let tokens: Vec<u32> = (0..len as u32).map(|i| (i * 13 + 5) % 96).collect();
    NewSequence {
        tokens,
        prompt_len: len,
        pooling: Some(Pooling { kind, normalize, classes: false }),
        ..prompt(5)
    }
}

/// The vectors that a sequence gives, in chunks of so many rows, beside one that generates.
async fn vectors(router: &mut Router<'_, CpuBackend>, new: NewSequence, chunk: usize) -> Vec<Output> {
    let len = new.tokens.len();
    let mut outputs = Vec::new();
    let mut added = vec![new, prompt(6)];
    for position in (0..len).step_by(chunk) {
        let count = chunk.min(len - position);
        let new_blocks: &[u32] = if position == 0 { &[1, 2, 3, 4] } else { &[] };
        let mut all = vec![rows(5, position, count, new_blocks, false)];
        if position == 0 && chunk < 12 {
            all.push(rows(6, 0, 20, &[7, 8], true));
        }
        router.send(Step { added: std::mem::take(&mut added), rows: all, ..Step::default() }).await;
        outputs.extend(router.result().await.outputs);
    }
    router.send(Step { dropped: vec![5, 6], ..Step::default() }).await;
    router.result().await;
    outputs.retain(|output| !matches!(output, Output::Token { .. }));
    outputs
}

/// All hidden states of a sequence.
async fn states(router: &mut Router<'_, CpuBackend>, new: NewSequence, chunk: usize) -> Vec<Vec<f32>> {
    let mut states: Vec<Vec<f32>> = Vec::new();
    for output in vectors(router, new, chunk).await {
        let Output::HiddenStates { sequence: 5, position, values } = output else { panic!("{output:?}") };
        assert_eq!(position, states.len());
        states.extend(values.chunks(32).map(<[f32]>::to_vec));
    }
    states
}

fn normalized(vector: &[f64]) -> Vec<f64> {
    let norm = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
    vector.iter().map(|x| x / norm).collect()
}

#[tokio::test]
async fn pooled_vectors_are_those_of_the_hidden_states() {
    let shard = Shard::start();
    let mut router = shard.attach().await;
    for (len, chunk) in
        [(1, 1), (2, 2), (7, 7), (7, 3), (16, 8), (20, 1), (32, 32), (33, 11), (50, 11), (64, 32), (64, 9)]
    {
        let states = states(&mut router, new(PoolingKind::None, false, len), chunk).await;
        assert_eq!(states.len(), len);
        let wide: Vec<Vec<f64>> =
            states.iter().map(|state| state.iter().map(|&x| f64::from(x)).collect()).collect();
        let mean = (0..32).map(|i| wide.iter().map(|state| state[i]).sum::<f64>() / len as f64).collect();
        for (kind, expected) in [
            (PoolingKind::First, wide[0].clone()),
            (PoolingKind::Last, wide[len - 1].clone()),
            (PoolingKind::Mean, mean),
        ] {
            for (normalize, expected) in [(false, expected.clone()), (true, normalized(&expected))] {
                let case = format!("{kind:?} of {len} in chunks of {chunk}, normalized: {normalize}");
                let outputs = vectors(&mut router, new(kind, normalize, len), chunk).await;
                let [Output::Pooled { sequence: 5, values }] = &outputs[..] else {
                    panic!("{case}: {outputs:?}")
                };
                let off = values.iter().zip(&expected).map(|(x, y)| (f64::from(*x) - y).abs());
                assert!(values.len() == 32 && off.fold(0.0, f64::max) < 1e-6, "{case}");
            }
        }
        let normal = self::states(&mut router, new(PoolingKind::None, true, len), chunk).await;
        for (state, expected) in normal.iter().zip(&wide) {
            let off = state.iter().zip(normalized(expected)).map(|(x, y)| (f64::from(*x) - y).abs());
            assert!(off.fold(0.0, f64::max) < 1e-6);
        }
    }
}

#[tokio::test]
async fn hidden_states_follow_tokens_and_adapters() {
    let shard = Shard::start();
    let one: ContentHash = shard.staged("one").await;
    let mut router = shard.attach().await;
    router.send(Step { load: vec![(0, one)], ..Step::default() }).await;
    assert_eq!(router.slot_event().await, (0, None));
    let plain = states(&mut router, new(PoolingKind::None, false, 20), 20).await;
    let chunked = states(&mut router, new(PoolingKind::None, false, 20), 3).await;
    assert_eq!(plain, chunked, "chunks change nothing");
    let adapted = NewSequence { members: vec![Member::alone(0)], ..new(PoolingKind::None, false, 20) };
    let adapted = states(&mut router, adapted, 20).await;
    assert!(plain.iter().zip(&adapted).all(|(plain, adapted)| plain != adapted), "an adapter has a say");
    let longer = states(&mut router, new(PoolingKind::None, false, 31), 31).await;
    assert_eq!(plain, longer[..20], "what follows has none");
}

/// The tensor of that name in a safetensors file of f32.
fn tensor(file: &Path, name: &str) -> Vec<f32> {
    let all = fs::read(file).unwrap();
    let (len, rest) = all.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    let header: Value = serde_json::from_slice(header).unwrap();
    let offsets: [usize; 2] = serde_json::from_value(header[name]["data_offsets"].clone()).unwrap();
    data[offsets[0]..offsets[1]].as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// PEFT's log-probabilities follow from hidden states and the output projection alone, also where an adapter has trained
/// the bias of the last norm.
#[tokio::test]
async fn hidden_states_have_the_trained_bias_of_the_last_norm() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/families");
    for (family, head) in [("gpt2", "transformer.wte.weight"), ("gpt-neox", "embed_out.weight")] {
        let (from, folder) = (fixtures.join(family), tempfile::tempdir().unwrap());
        let write = |manifest: &str, to: &str| {
            let manifest = Manifest::read(&from.join(manifest)).unwrap();
            manifest.write(&folder.path().join(to), DType::F32).unwrap();
        };
        write("model.json", "model");
        write("kinds/bias-all.json", "adapters/one");
        write("kinds/lora-bias.json", "adapters/two");
        let head = tensor(&folder.path().join("model/model.safetensors"), head);
        let kinds: Value = serde_json::from_slice(&fs::read(from.join("kinds.json")).unwrap()).unwrap();
        let shard = Shard::in_folder(folder, CpuBackend::new(DType::F32, 1).unwrap());
        let (one, two) = (shard.staged("one").await, shard.staged("two").await);
        let mut router = shard.attach().await;
        for (slot, content) in [(0, one), (1, two)] {
            router.send(Step { load: vec![(slot, content)], ..Step::default() }).await;
            assert_eq!(router.slot_event().await, (slot, None));
        }
        for (slot, kind, chunk) in
            [(0, "bias-all", 32), (0, "bias-all", 7), (1, "lora-bias", 32), (1, "lora-bias", 9)]
        {
            let cases = kinds["cases"].as_array().unwrap();
            let case = cases.iter().find(|case| case["adapter"] == kind).unwrap();
            let tokens: Vec<u32> =
                serde_json::from_value(kinds["prompts"][case["prompt"].as_u64().unwrap() as usize].clone())
                    .unwrap();
            let pooling = Some(Pooling { kind: PoolingKind::None, normalize: false, classes: false });
            let new = NewSequence {
                members: vec![Member::alone(slot)],
                prompt_len: tokens.len(),
                tokens,
                pooling,
                ..prompt(5)
            };
            let tokens = new.tokens.clone();
            let mut states = Vec::new();
            for output in vectors(&mut router, new, chunk).await {
                let Output::HiddenStates { values, .. } = output else { panic!("{output:?}") };
                states.extend(values.chunks(64).map(<[f32]>::to_vec));
            }
            assert_eq!(states.len(), tokens.len());
            let positions =
                case["positions"].as_array().unwrap().iter().zip(case["logprobs"].as_array().unwrap());
            for (at, expected) in positions {
                let at = at.as_u64().unwrap() as usize;
                let dot =
                    |row: &[f32]| row.iter().zip(&states[at]).map(|(x, y)| f64::from(x * y)).sum::<f64>();
                let logits: Vec<f64> = head.chunks(64).map(dot).collect();
                let sum = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
                let got = logits[tokens[at + 1] as usize] - sum;
                let off = (got - expected.as_f64().unwrap()).abs();
                assert!(off <= 2e-3, "{family}, {kind} in chunks of {chunk}, at {at}: off by {off}");
            }
        }
    }
}

#[tokio::test]
async fn steps_behind_hidden_states_do_not_overtake_them() {
    let shard = Shard::start();
    let mut router = shard.attach().await;
    let expected = vectors(&mut router, new(PoolingKind::Mean, false, 20), 20).await;
    let plain = shard.generate(None, 20, false).await[0];
    let mut router = shard.attach().await;
    let first = rows(5, 0, 20, &[1, 2], false);
    let step = Step { added: vec![new(PoolingKind::Mean, false, 20)], rows: vec![first], ..Step::default() };
    router.send(step).await;
    let other = rows(6, 0, 20, &[3, 9], true);
    router.send(Step { added: vec![prompt(6)], rows: vec![other], ..Step::default() }).await;
    let result = router.result().await;
    assert_eq!(format!("{:?}", result.outputs), format!("{expected:?}"));
    assert_eq!(tokens_of(&router.result().await), [(6, plain)]);
    // Nothing is sampled from it.
    let rows = Rows { sample: 1, ..rows(5, 19, 1, &[], false) };
    router.send(Step { rows: vec![rows], ..Step::default() }).await;
    let cause = "rows to sample from of a sequence that is pooled 1 is out of range, limit 1";
    assert_eq!(router.events.error().await, cause);
}
