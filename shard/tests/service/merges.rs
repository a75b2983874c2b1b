//! Merges, as a router orders them.

use kernels::{DType, LowRank};
use model::{
    Decoder, Share,
    adapter::{
        Adapter, AdapterFiles, BaseModel, ContentHash, Elementwise, MajoritySign, Merge as ModelMerge,
        MergePart, Recipe, Strategy,
    },
    testing::{self, Tensor},
};
use proto::{Merge, StageRequest, merge};
use tonic::Code;

use super::*;

/// The same recipe on the wire and in the model.
fn recipes() -> Vec<(Merge, Recipe)> {
    use merge::{MajoritySign as Sign, Strategy as Way};
    let elementwise = [
        (Way::Linear, Elementwise::Linear),
        (Way::Ties, Elementwise::Ties),
        (Way::DareLinear, Elementwise::DareLinear),
        (Way::DareTies, Elementwise::DareTies),
        (Way::MagnitudePrune, Elementwise::MagnitudePrune),
    ];
    let elementwise = elementwise.map(|(way, strategy)| (way, Strategy::Elementwise(strategy)));
    let whole = [
        (Way::TiesSvd, Elementwise::Ties),
        (Way::DareLinearSvd, Elementwise::DareLinear),
        (Way::DareTiesSvd, Elementwise::DareTies),
        (Way::MagnitudePruneSvd, Elementwise::MagnitudePrune),
    ];
    let whole = whole.map(|(way, strategy)| (way, Strategy::Dense(strategy)));
    let ways: Vec<_> = elementwise
        .into_iter()
        .chain(whole)
        .chain([(Way::Cat, Strategy::Cat), (Way::Svd, Strategy::Svd)])
        .collect();
    let mut recipes = Vec::new();
    for (strategy, expected) in ways {
        for (density, sign, seed, svd_rank) in [(0.5, Sign::Total, 0, 0), (0.3, Sign::Frequency, u64::MAX, 1)]
        {
            let density = Some(density);
            let majority_sign =
                if sign == Sign::Total { MajoritySign::Total } else { MajoritySign::Frequency };
            recipes.push((
                Merge { strategy: strategy.into(), density, majority_sign: sign.into(), seed, svd_rank },
                Recipe {
                    strategy: expected,
                    density,
                    majority_sign,
                    seed,
                    svd_rank: (svd_rank > 0).then_some(svd_rank as usize),
                },
            ));
        }
    }
    recipes
}

const WEIGHTS: [f64; 3] = [0.7, -0.4, 1.1];

/// Has three adapters merged.
fn order(served: &Served, content: u8, merge: Merge) -> StageRequest {
    let orders = ["one", "two", "three"].map(|name| served.order_of(name, 1));
    let parts = orders.into_iter().zip(WEIGHTS).map(|(order, weight)| {
        let part = order.parts.into_iter().next().unwrap();
        proto::AdapterPart { weight, ..part }
    });
    StageRequest {
        content: vec![content; 32],
        name: "all of them".into(),
        parts: parts.collect(),
        merge: Some(merge),
        ..served.order(1)
    }
}

/// What is to come of the merge of three adapters.
fn merged(served: &Served, recipe: &Recipe) -> Adapter {
    let path = served.folder.path().join("model");
    let decoder = Decoder::from_folder(&path).unwrap();
    let base = BaseModel { merged: None, decoder, path, dtype: DType::F32, share: Share::WHOLE };
    let parts = ["one", "two", "three"].into_iter().zip(WEIGHTS).map(|(name, weight)| {
        let files = AdapterFiles::open(&served.folder.path().join("adapters").join(name)).unwrap();
        MergePart { name: name.into(), files, weight }
    });
    let merge = ModelMerge::open(parts.collect(), recipe, &base).unwrap();
    merge.read_as(ContentHash([0; 32]), &|| false).unwrap()
}

/// Writes an adapter with these tensors.
fn write(served: &Served, name: &str, adapter: &Adapter) {
    let rank = adapter.max_lora_rank;
    let mut files = testing::adapter(&["q_proj", "down_proj"], rank, 0);
    files.config["lora_alpha"] = rank.into();
    for part in &adapter.parts {
        let LowRank { a, b, scale, .. } = part.low_rank.as_ref().unwrap();
        assert_eq!(*scale, 1.0);
        let module = if part.site % 4 == 0 { "self_attn.q_proj" } else { "mlp.down_proj" };
        for (matrix, tensor) in [("A", a), ("B", b)] {
            let name =
                format!("base_model.model.model.layers.{}.{module}.lora_{matrix}.weight", part.site / 4);
            let tensor = Tensor { shape: vec![tensor.rows, tensor.cols], data: tensor.to_f32() };
            files.tensors.insert(name, tensor).unwrap();
        }
    }
    files.write_adapter(&served.folder.path().join("adapters").join(name)).unwrap();
}

/// A shard with a third adapter, and slots for two.
async fn start() -> Served {
    let mut served = Served::start().await;
    tiny::write_adapter(&served.folder.path().join("adapters/three"), 3);
    served.attach(1).await;
    served
}

#[tokio::test]
async fn merges_compute_what_their_merged_tensors_do() {
    let mut served = start().await;
    let (steps, mut events) = served.execute().await;
    let (mut id, mut seen) = (0, Vec::new());
    for (number, (wire, recipe)) in (1..).zip(recipes()) {
        let merge = order(&served, number, wire);
        let expected = merged(&served, &recipe);
        write(&served, "plain", &expected);
        let plain = StageRequest { content: vec![100 + number; 32], ..served.order_of("plain", 1) };
        for order in [&merge, &plain] {
            let answer = outcome(&mut served, order.clone()).await.unwrap();
            let StageAnswer::Staged(staged) = answer else { panic!("{answer:?}") };
            assert_eq!(staged.max_lora_rank as usize, expected.max_lora_rank, "{recipe:?}");
            assert_eq!(staged.sites, ["down_proj", "q_proj"]);
        }
        // The slots are filled anew, and one sequence runs in each.
        let load = |(slot, content): (u32, &Vec<u8>)| SlotLoad { slot, content: content.clone() };
        let load = (0..).zip([&merge.content, &plain.content]).map(load).collect();
        id += 1;
        steps.send(Step { id, session: 1, load, ..Step::default() }).await.unwrap();
        let mut filled = 0;
        while filled < 2 {
            if let Some(Event::Slot(slot)) = next(&mut events).await.unwrap().unwrap().event {
                assert_eq!(slot.error, "");
                filled += 1;
            }
        }
        let pooling = Some(Pooling { kind: pooling::Kind::Mean as i32, normalize: false, classes: false });
        let tokens = vec![4, 9, 5, 17, 30, 2];
        let sequence = |slot| NewSequence {
            sequence: id * 2 + slot,
            members: vec![proto::Member { slot: slot as u32, weight: 1.0 }],
            pooling,
            tokens: tokens.clone(),
            prompt_len: 6,
            ..NewSequence::default()
        };
        let added: Vec<_> = [0, 1].map(sequence).into();
        let rows = added.iter().map(|added| SequenceRows {
            sequence: added.sequence,
            rows: 6,
            new_blocks: vec![added.members[0].slot],
            ..SequenceRows::default()
        });
        let rows = rows.collect();
        let dropped: Vec<u64> = added.iter().map(|added| added.sequence).collect();
        id += 1;
        steps.send(Step { id, session: 1, added, rows, ..Step::default() }).await.unwrap();
        let result = step_result(&mut events).await;
        let [merged, plain] = &result.pooled[..] else { panic!("two vectors: {result:?}") };
        assert_eq!(merged.values, plain.values, "{recipe:?}");
        if !seen.contains(&merged.values) {
            seen.push(merged.values.clone());
        }
        id += 1;
        steps.send(Step { id, session: 1, dropped, ..Step::default() }).await.unwrap();
        step_result(&mut events).await;
        let unstage = UnstageRequest { session: 1, content: vec![100 + number; 32] };
        served.client.unstage(unstage).await.unwrap();
    }
    assert_eq!(seen.len(), 20, "all are different, but that linear and cat prune nothing");
}

#[tokio::test]
async fn merges_need_room_and_unchanged_parts() {
    let mut served = start().await;
    let plain = order(&served, 7, Merge { strategy: merge::Strategy::Cat.into(), ..Merge::default() });
    let StageAnswer::Staged(staged) = outcome(&mut served, plain.clone()).await.unwrap() else { panic!() };
    assert_eq!(staged.max_lora_rank, 9);
    let unstage = UnstageRequest { session: 1, content: plain.content.clone() };
    served.client.unstage(unstage).await.unwrap();
    for max_bytes in [0, 1, staged.host_bytes - 1] {
        let answer = outcome(&mut served, StageRequest { max_bytes, ..plain.clone() }).await.unwrap();
        assert_eq!(answer, StageAnswer::NeedsRoom(NeedsRoom { host_bytes: staged.host_bytes }));
    }
    for part in 0..3 {
        for file in 0..2 {
            let mut gone = plain.clone();
            gone.parts[part].files[file].stamp.as_mut().unwrap().modified_ns += 1;
            assert_eq!(outcome(&mut served, gone).await.unwrap(), StageAnswer::Gone(Gone {}));
            let mut gone = plain.clone();
            gone.parts[part].folder += "-not";
            assert_eq!(outcome(&mut served, gone).await.unwrap(), StageAnswer::Gone(Gone {}));
        }
    }
    assert_eq!(outcome(&mut served, plain).await.unwrap(), StageAnswer::Staged(staged));
}

#[tokio::test]
async fn merges_that_are_refused_name_their_parts() {
    let mut served = start().await;
    let adapters = served.folder.path().join("adapters");
    let mut dora = testing::adapter(&["q_proj"], 3, 4);
    dora.config["use_dora"] = true.into();
    dora.write_adapter(&adapters.join("dora")).unwrap();
    testing::adapter(&["q_proj"], 5, 4).write_adapter(&adapters.join("five")).unwrap();
    let of = |served: &Served, name: &str| served.order_of(name, 1).parts.into_iter().next().unwrap();
    let (dora, five) = (of(&served, "dora"), of(&served, "five"));
    type Change<'a> = Box<dyn Fn(&mut StageRequest) + 'a>;
    let merge = |change: fn(&mut Merge)| -> Change<'_> {
        Box::new(move |order: &mut StageRequest| change(order.merge.as_mut().unwrap()))
    };
    let cases: Vec<(Change<'_>, &str)> = vec![
        (Box::new(|order| order.parts.clear()), "adapter all of them: a merge needs at least one adapter"),
        (
            Box::new(|order| order.parts[1] = dora.clone()),
            "adapter all of them: adapter dora, which is to be merged: \
          adapter_config.json: use_dora",
        ),
        (
            Box::new(|order| order.parts[2] = five.clone()),
            "adapter all of them: ties merges equal ranks only; those \
          of all are [3, 3, 5]",
        ),
        (
            Box::new(|order| order.parts[2].weight = f64::NAN),
            "adapter all of them: the weight of adapter three is NaN",
        ),
        (
            Box::new(|order| _ = order.parts[1].files.pop()),
            "adapter two: adapter_model.safetensors is missing",
        ),
        (Box::new(|order| order.parts[2].files.clear()), "adapter three: adapter_config.json is missing"),
        (merge(|merge| merge.density = None), "adapter all of them: ties needs a density"),
        (merge(|merge| merge.density = Some(0.0)), "adapter all of them: density = 0 is not above 0"),
        (merge(|merge| merge.density = Some(1.5)), "adapter all of them: density = 1.5 is not above 0"),
        (merge(|merge| merge.strategy = 99), "a merge with 99 for its strategy"),
        (merge(|merge| merge.strategy = -1), "a merge with -1 for its strategy"),
        (merge(|merge| merge.majority_sign = 2), "a merge with 2 for its majority_sign"),
        (
            Box::new(|order| order.parts.iter_mut().for_each(|part| part.weight = 0.0)),
            "adapter all of them: the merge \
          changes nothing",
        ),
    ];
    for (change, words) in cases {
        let ties = merge::Strategy::Ties.into();
        let mut order = order(&served, 9, Merge { strategy: ties, density: Some(0.5), ..Merge::default() });
        change(&mut order);
        let refused = outcome(&mut served, order).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{words}");
        assert!(refused.message().starts_with(words), "{} is not {words}", refused.message());
    }
}
