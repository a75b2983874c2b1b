//! Tokens that an adapter has rows for and the model has none.

use lorax_shard::step::{Member, NewSequence, Refusal, Step};
use model::testing::{self, Tensor};

use crate::harness::{Shard, prompt, rows, tokens_of};

/// Writes an adapter whose tables have so many rows. Those that the model has are the model's; of the others, that of token
/// 100 has by far the largest logits.
pub(crate) fn write_resized(shard: &Shard<kernels::cpu::CpuBackend>, name: &str, tokens: usize) {
    let base = testing::model();
    let mut files = testing::adapter(&["q_proj"], 4, 1);
    for module in ["model.embed_tokens", "lm_head"] {
        let Tensor { mut data, .. } = base.tensors[&format!("{module}.weight")].clone();
        data.resize(tokens * 32, 0.25);
        if let Some(row) = data.get_mut(100 * 32..101 * 32) {
            row.iter_mut().enumerate().for_each(|(i, x)| *x = if i % 2 == 0 { 40.0 } else { -40.0 });
        }
        files
            .tensors
            .insert(format!("base_model.model.{module}.weight"), Tensor { shape: vec![tokens, 32], data });
    }
    files.write_adapter(&shard.folder.path().join("adapters").join(name)).unwrap();
}

#[tokio::test]
async fn tokens_of_an_adapter_are_taken_with_it_and_refused_without() {
    let shard = Shard::start();
    write_resized(&shard, "resized", 101);
    let (resized, one) = (shard.staged("resized").await, shard.staged("one").await);
    let mut router = shard.attach().await;
    router.send(Step { load: vec![(0, resized), (1, one)], ..Step::default() }).await;
    assert_eq!(router.slot_event().await.1, None);
    assert_eq!(router.slot_event().await.1, None);
    for (i, (slot, token, limit)) in [
        (Some(0), 95, None),
        (Some(0), 96, None),
        (Some(0), 99, None),
        (Some(0), 100, None),
        (Some(0), 101, Some(101)),
        (Some(0), 351, Some(101)),
        (Some(0), 352, Some(101)),
        (Some(0), u32::MAX, Some(101)),
        (Some(1), 95, None),
        (Some(1), 96, Some(96)),
        (Some(1), 100, Some(96)),
        (None, 95, None),
        (None, 96, Some(96)),
        (None, 100, Some(96)),
    ]
    .into_iter()
    .enumerate()
    {
        let id = i as u64;
        let mut new = NewSequence { members: slot.map(Member::alone).into_iter().collect(), ..prompt(id) };
        new.tokens[7] = token;
        router
            .send(Step { added: vec![new], rows: vec![rows(id, 0, 20, &[3, 9], true)], ..Step::default() })
            .await;
        let result = router.result().await;
        let refused = limit.map(|limit| {
            let reason = format!("token {token} is out of range, limit {limit}");
            Refusal { sequence: id, reason }
        });
        assert_eq!(result.refused, Vec::from_iter(refused), "{token} in slot {slot:?}");
        assert_eq!(tokens_of(&result).len(), usize::from(limit.is_none()), "{token} in slot {slot:?}");
        router.send(Step { dropped: vec![id], ..Step::default() }).await;
        router.result().await;
    }
}

#[tokio::test]
async fn a_sampled_token_of_an_adapter_is_looked_up_in_its_rows() {
    let shard = Shard::start();
    write_resized(&shard, "resized", 101);
    let resized = shard.staged("resized").await;
    let tokens = shard.generate(Some((0, resized)), 20, true).await;
    assert!(tokens.contains(&100), "{tokens:?}");
    assert_eq!(tokens.len(), 9, "it went on behind it");
    // The model alone has no such token.
    assert!(shard.generate(None, 20, true).await.iter().all(|token| *token < 96));
}
