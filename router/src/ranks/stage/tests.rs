use std::collections::HashSet;

use sources::Stamp;
use tempfile::TempDir;
use tokio::time::timeout;

use super::{super::Group, *};
use crate::{
    ranks::stage::tests::shard::{Gate, PATIENCE, Script, ScriptedShard, content},
    wire::stage::{AdapterFile, AdapterPart},
};

#[path = "../../../tests/http/shard.rs"]
#[allow(dead_code, reason = "each program of tests uses a part of it")]
mod shard;

const SESSION: u64 = 7;

/// Ranks that scripted shards stand for.
struct World {
    ranks: Ranks,
    shards: Vec<ScriptedShard>,
    _folder: TempDir,
}

impl World {
    fn new<const N: usize>(change: impl FnOnce(&mut [Script; N])) -> World {
        let mut rank = 0..N as u32;
        let mut scripts = [(); N].map(|()| {
            let mut script = Script::saying(vec![5]);
            (script.info.rank, script.info.world) = (rank.next().unwrap(), N as u32);
            script
        });
        change(&mut scripts);
        let folder = tempfile::tempdir().unwrap();
        let sockets: Vec<_> = (0..N).map(|rank| folder.path().join(rank.to_string())).collect();
        let shards =
            scripts.into_iter().zip(&sockets).map(|(script, at)| ScriptedShard::start(script, at)).collect();
        World { ranks: Ranks::new(&sockets, PATIENCE), shards, _folder: folder }
    }

    async fn stage(&self, name: &str) -> Result<StageAnswer, StageError> {
        timeout(PATIENCE, self.ranks.stage(SESSION, &order(name))).await.unwrap()
    }

    async fn attach(&self) -> Group {
        let info = self.ranks.info().await.unwrap();
        self.ranks.attach(SESSION, info, PATIENCE).await.unwrap()
    }

    fn held(&self) -> Vec<Vec<String>> {
        self.shards.iter().map(ScriptedShard::host).collect()
    }
}

fn key_of(name: &str) -> AdapterKey {
    AdapterKey(content(name).try_into().unwrap())
}

fn order(name: &str) -> StageOrder {
    let stamp = Stamp { device: 1, inode: 2, size: 3, modified: (4, 5), changed: (6, 7) };
    let file = |name: &str, stamp| AdapterFile { name: name.into(), stamp };
    let files = vec![file("adapter_config.json", Some(stamp)), file("adapter_model.safetensors", None)];
    let parts = vec![AdapterPart::new("/adapters/one".into(), files)];
    StageOrder { content: key_of(name), name: name.into(), parts, merge: None, max_bytes: 5000 }
}

fn staged(host_bytes: u64, slot_bytes: u64) -> StageAnswer {
    let sites = vec!["q_proj".into()];
    StageAnswer::Staged(Staged { host_bytes, slot_bytes, max_lora_rank: 8, sites, invocation: Vec::new() })
}

#[tokio::test]
async fn every_rank_is_told_the_same_and_the_largest_sizes_count() {
    let world = World::new(|scripts: &mut [Script; 3]| {
        (scripts[1].host_bytes, scripts[2].adapter_bytes) = (4000, 3000);
    });
    assert_eq!(world.stage("sql").await, Ok(staged(4000, 3000)));
    for shard in &world.shards {
        let told = shard.saw(|seen| seen.staged.first().cloned()).await;
        assert_eq!((told.session, &told.content, &*told.name), (SESSION, &content("sql"), "sql"));
        assert_eq!((told.max_bytes, told.merge), (5000, None));
        let [part] = &told.parts[..] else { panic!("one part") };
        let [config, weights] = &part.files[..] else { panic!("two files") };
        assert_eq!(
            (&*part.folder, &*config.name, &*weights.name),
            ("/adapters/one", "adapter_config.json", "adapter_model.safetensors")
        );
        let stamp = config.stamp.unwrap();
        assert_eq!((stamp.device, stamp.inode, stamp.size), (1, 2, 3));
        assert_eq!((stamp.modified_s, stamp.modified_ns, stamp.changed_s, stamp.changed_ns), (4, 5, 6, 7));
        assert_eq!(weights.stamp, None);
    }
    world.ranks.unstage(SESSION, key_of("sql")).await.unwrap();
    assert_eq!(world.held(), [[""; 0]; 3]);
    assert!(world.shards[2].saw(|seen| Some(seen.unstaged[0].session == SESSION)).await);
}

#[tokio::test]
async fn what_one_rank_cannot_have_no_rank_keeps() {
    type Change = fn(&mut Script);
    let cases: [(Change, Result<StageAnswer, &str>); 12] = [
        (|script| script.host_bytes = 6000, Ok(StageAnswer::NeedsRoom { bytes: 6000 })),
        (|script| script.host_bytes = u64::MAX, Ok(StageAnswer::NeedsRoom { bytes: u64::MAX })),
        (|script| _ = script.gone.insert("sql"), Ok(StageAnswer::Gone)),
        (
            |script| script.max_lora_rank = 9,
            Err("`max_lora_rank` of an adapter is 8 on rank 0 and 9 on rank 1"),
        ),
        (|script| fails(script, Code::InvalidArgument), Err("the test's")),
        (|script| fails(script, Code::DeadlineExceeded), Err("the test's")),
        (|script| fails(script, Code::FailedPrecondition), Err("the test's")),
        (|script| fails(script, Code::Unavailable), Err("the adapter is not available: the test's")),
        (|script| fails(script, Code::Internal), Err("the adapter is not available: the test's")),
        (|script| fails(script, Code::Unknown), Err("the adapter is not available: the test's")),
        (|script| fails(script, Code::ResourceExhausted), Err("the adapter is not available: the test's")),
        (|script| fails(script, Code::Unimplemented), Err("the adapter is not available: the test's")),
    ];
    for (case, (change, expected)) in cases.into_iter().enumerate() {
        let world = World::new(|scripts: &mut [Script; 3]| change(&mut scripts[1]));
        let answer = world.stage("sql").await.map_err(|error| error.to_string());
        assert_eq!(answer, expected.map_err(str::to_owned), "case {case}");
        assert_eq!(world.held(), [[""; 0]; 3], "case {case}");
        for shard in &world.shards {
            assert_eq!(shard.saw(|seen| Some(seen.unstaged.len())).await, 1, "case {case}");
        }
    }
}

fn fails(script: &mut Script, code: Code) {
    script.unstageable.insert("sql", Status::new(code, "the test's"));
}

#[tokio::test]
async fn a_failure_does_not_wait_for_the_slowest_rank() {
    let world = World::new(|scripts: &mut [Script; 3]| fails(&mut scripts[0], Code::InvalidArgument));
    world.shards[2].hold(Gate::Stage("sql".into()));
    let failure = world.stage("sql").await;
    assert_eq!(failure, Err(StageError::Invalid("the test's".into())));
    world.shards[2].release(&Gate::Stage("sql".into()));
    assert_eq!(world.held()[2], [""; 0], "its call has ended");
    let mut codes = HashSet::new();
    for code in [Code::DeadlineExceeded, Code::FailedPrecondition, Code::InvalidArgument, Code::Aborted] {
        codes.insert(std::mem::discriminant(&StageError::from(Status::new(code, ""))));
    }
    assert_eq!(codes.len(), 4, "they are told apart");
}

#[test]
fn answers_of_ranks_are_merged() {
    let room = |bytes| StageAnswer::NeedsRoom { bytes };
    let gone = || StageAnswer::Gone;
    let cases = [
        (vec![staged(1, 2)], staged(1, 2)),
        (vec![staged(1, 2), staged(2, 1)], staged(2, 2)),
        (vec![staged(1, 1), staged(3, 4), staged(2, 5)], staged(3, 5)),
        (vec![staged(u64::MAX, 0), staged(0, u64::MAX)], staged(u64::MAX, u64::MAX)),
        (vec![room(5)], room(5)),
        (vec![room(5), room(9), room(7)], room(9)),
        (vec![staged(8, 8), room(9)], room(9)),
        (vec![room(9), staged(8, 8)], room(9)),
        (vec![gone()], gone()),
        (vec![staged(1, 1), gone()], gone()),
        (vec![gone(), staged(1, 1)], gone()),
        (vec![room(9), gone(), room(8)], gone()),
    ];
    for (answers, expected) in cases {
        assert_eq!(merge(answers.clone()), Ok(expected), "{answers:?}");
    }
    let StageAnswer::Staged(one) = staged(1, 1) else { panic!("staged") };
    let sites: [&[&str]; 10] = [
        &[],
        &["k_proj"],
        &["Q_proj"],
        &["q_proj", "q_proj"],
        &["q_proj", "v_proj"],
        &["a", "q_proj"],
        &["q_proj "],
        &["q"],
        &["q_proj.0"],
        &[""],
    ];
    for sites in sites {
        let other = Staged { sites: sites.iter().map(|site| (*site).into()).collect(), ..one.clone() };
        let refused = merge(vec![StageAnswer::Staged(one.clone()), StageAnswer::Staged(other)]);
        assert!(matches!(refused, Err(StageError::Differs { field: "sites", rank: 1, .. })), "{sites:?}");
    }
    assert!(merge(Vec::new()).is_err());
}

#[tokio::test]
async fn a_session_begins_with_what_all_ranks_hold() {
    let cases: [[&[&str]; 3]; 10] = [
        [&[], &[], &[]],
        [&["a"], &["a"], &["a"]],
        [&["a"], &[], &["a"]],
        [&[], &["a"], &[]],
        [&["a", "b"], &["b", "a"], &["a", "b"]],
        [&["b", "a"], &["a", "b"], &["a", "b"]],
        [&["a", "b", "c"], &["c", "b"], &["d", "b"]],
        [&["a", "b"], &["c", "d"], &["e", "f"]],
        [&["e", "d", "c", "b", "a"], &["a", "c", "e"], &["e", "c", "a"]],
        [&["a"], &["a"], &["a", "b", "c", "d"]],
    ];
    for held in cases {
        let world = World::new(|scripts: &mut [Script; 3]| {
            for (script, held) in scripts.iter_mut().zip(held) {
                script.host = held.to_vec();
            }
            (scripts[1].host_bytes, scripts[2].adapter_bytes) = (4000, 3000);
        });
        let group = world.attach().await;
        let common: Vec<&str> =
            held[0].iter().copied().filter(|id| held.iter().all(|held| held.contains(id))).collect();
        let expected = common.iter().map(|id| (key_of(id), staged(4000, 3000)));
        let host = group.resident.host.into_iter().map(|(key, staged)| (key, StageAnswer::Staged(staged)));
        assert_eq!(host.collect::<Vec<_>>(), expected.collect::<Vec<_>>(), "{held:?}");
        for (rank, held) in world.held().into_iter().enumerate() {
            let (held, common): (HashSet<_>, HashSet<_>) =
                (held.into_iter().collect(), common.iter().map(|id| (*id).to_owned()).collect());
            assert_eq!(held, common, "rank {rank}");
        }
    }
}
