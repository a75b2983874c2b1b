//! Long random histories with failing and late answers: every ask ends, nobody gets what he may not read, no bound is
//! exceeded, and nothing is left behind.

use std::{env, sync::Arc};

use exchange::{
    Ask, Budget, Content, CredentialId, Fault, Input, Limits, ReferenceId, Slot, SourceId, Tenant, Tier,
    trace,
};
use proptest::{collection::vec, prelude::*, sample::Index};

use crate::world::{Original, World, ms, secs};

/// Events of a history.
const LENGTH: usize = 400;
/// Events of all histories of a test, unless `EXCHANGE_EVENTS` says otherwise.
const EVENTS: usize = 40_000;

#[derive(Debug, Clone)]
enum Op {
    Ask { tenant: u64, reference: u128, credential: u128, disk: bool, pin: bool, deadline: u64 },
    Together { tenant: u64, references: Vec<u128>, host: bool, deadline: u64 },
    Release(Index),
    Answer(Index),
    Fail(Index, u8),
    Publish(Index),
    Progress(Index, u64),
    Delete(Index),
    Unstage(Index),
    Slot(Index, u8),
    Wait(u64),
    Change(u128),
    Permit { reference: u128, credential: u128, allowed: bool },
    Reload(u128),
    Evict(Index),
    LoseFiles(Index),
    Session,
}

const REFERENCES: u128 = 14;

fn op() -> impl Strategy<Value = Op> {
    let index = any::<Index>;
    let ask = (0..4u64, 0..REFERENCES, 0..3u128, prop::bool::weighted(0.15), prop::bool::weighted(0.1));
    let deadline = || prop_oneof![1 => 1..2000u64, 4 => 20_000..90_000u64];
    prop_oneof![
        24 => (ask, deadline()).prop_map(|((tenant, reference, credential, disk, pin), deadline)| {
            Op::Ask { tenant, reference, credential, disk, pin, deadline }
        }),
        4 => (0..4u64, vec(0..REFERENCES, 1..5), any::<bool>(), deadline()).prop_map(
            |(tenant, references, host, deadline)| Op::Together { tenant, references, host, deadline }
        ),
        14 => index().prop_map(Op::Release),
        40 => index().prop_map(Op::Answer),
        4 => (index(), 0..5u8).prop_map(|(call, fault)| Op::Fail(call, fault)),
        4 => index().prop_map(Op::Publish),
        2 => (index(), 0..500u64).prop_map(|(call, bytes)| Op::Progress(call, bytes)),
        5 => index().prop_map(Op::Delete),
        5 => index().prop_map(Op::Unstage),
        8 => (index(), 0..3u8).prop_map(|(ask, slot)| Op::Slot(ask, slot)),
        6 => prop_oneof![3 => 0..1500u64, 1 => 0..40_000u64].prop_map(Op::Wait),
        2 => (0..REFERENCES).prop_map(Op::Change),
        2 => (0..REFERENCES, 0..3u128, any::<bool>()).prop_map(|(reference, credential, allowed)| {
            Op::Permit { reference, credential, allowed }
        }),
        1 => (0..REFERENCES).prop_map(Op::Reload),
        1 => index().prop_map(Op::Evict),
        1 => index().prop_map(Op::LoseFiles),
        1 => prop::bool::weighted(0.3).prop_map(|end| if end { Op::Session } else { Op::Wait(1) }),
    ]
}

fn some_limits() -> impl Strategy<Value = Limits> {
    let bytes = (200..900u64, 150..600u64, 100..500u64);
    let budget = || {
        (1..5u32, 1..4u32, 5..40u64).prop_map(|(source, tenant, deadline)| Budget {
            source,
            tenant,
            deadline: secs(deadline),
        })
    };
    let budgets = (budget(), budget(), budget(), 1..12u32);
    (bytes, budgets, 1..10u64, prop_oneof![Just(1000usize), 1..12usize]).prop_map(
        |(
            (disk_bytes, host_bytes, adapter_bytes),
            (lookups, fetches, stages, tenant_calls),
            slow,
            remembered,
        )| {
            Limits {
                disk_bytes,
                host_bytes,
                adapter_bytes,
                lookups,
                fetches,
                stages,
                tenant_calls,
                slow_after: secs(slow),
                first_backoff: secs(1),
                longest_backoff: secs(8),
                remembered,
            }
        },
    )
}

/// Adapters of many sizes: some with the same bytes, some read in place, some too large, one missing.
fn populate(mut world: World) -> World {
    world.padding = 1;
    for reference in 0..REFERENCES - 1 {
        let mut original = Original::new(reference, [5, 20, 60, 110, 170, 300, 450][reference as usize % 7]);
        original.in_place = reference % 5 == 4;
        original.family = reference % 11;
        original.bytes =
            if reference >= 11 { [5, 20, 60][(reference - 11) as usize] } else { original.bytes };
        original.fresh_for = if original.in_place { ms(0) } else { secs(10 * (reference as u64 % 4)) };
        world.originals.insert(reference, original);
    }
    world
}

fn nth<K: Copy, V>(map: &std::collections::BTreeMap<K, V>, index: &Index) -> Option<K> {
    let keys: Vec<_> = map.keys().copied().collect();
    (!keys.is_empty()).then(|| *index.get(&keys))
}

fn fault(kind: u8) -> Fault {
    let message: Arc<str> = "as the history says".into();
    match kind {
        0 => Fault::NotFound(message),
        1 => Fault::Denied(message),
        2 => Fault::Unavailable(message),
        3 => Fault::Invalid(message),
        _ => Fault::Slow,
    }
}

fn play(world: &mut World, op: &Op) {
    match op {
        Op::Ask { tenant, reference, credential, disk, pin, deadline } => {
            let deadline = world.now + ms(*deadline);
            let ask = Ask {
                tenant: Tenant { id: *tenant, weight: 1 + *tenant as u32 },
                source: SourceId(*reference as u64 % 3),
                credential: CredentialId(*credential),
                tier: if *disk { Tier::Disk } else { Tier::Host },
                pin: *pin,
                deadline,
                ..world.new_ask(*reference)
            };
            world.submit(ask);
        }
        Op::Together { tenant, references, host, deadline } => {
            let deadline = world.now + ms(*deadline);
            let ask = |&reference: &u128| Ask {
                tenant: Tenant { id: *tenant, weight: 1 + *tenant as u32 },
                source: SourceId(reference as u64 % 3),
                tier: if *host { Tier::Host } else { Tier::Disk },
                deadline,
                ..world.new_ask(reference)
            };
            let asks = references.iter().map(ask).collect();
            world.submit_together(asks);
        }
        Op::Release(index) => {
            if let Some(id) = nth(&world.open, index) {
                world.release(id);
            }
        }
        Op::Wait(milliseconds) => world.wait(ms(*milliseconds)),
        Op::Change(reference) => {
            if let Some(original) = world.originals.get_mut(reference) {
                original.revision = (original.revision + 1) % 4;
            }
        }
        Op::Permit { reference, credential, allowed } => {
            if let Some(original) = world.originals.get_mut(reference) {
                if *allowed {
                    original.denied.remove(credential);
                } else {
                    original.denied.insert(*credential);
                }
            }
        }
        Op::Reload(reference) => drop(world.give(Input::Reload(ReferenceId(*reference)))),
        Op::Evict(index) => {
            if let Some(content) = nth(&world.disk, index) {
                world.give(Input::Evict(content));
            }
        }
        Op::LoseFiles(index) => {
            if let Some(content) = nth(&world.disk, index) {
                world.disk.remove(&content);
            }
        }
        Op::Session => world.toggle_session(),
        _ => play_call(world, op),
    }
}

/// What the sources, the disk and the ranks do.
fn play_call(world: &mut World, op: &Op) {
    match op {
        Op::Answer(index) => {
            if let Some(call) = nth(&world.calls, index) {
                world.answer(call);
            }
        }
        Op::Fail(index, kind) => {
            if let Some(call) = nth(&world.calls, index) {
                world.fail(call, fault(*kind));
            }
        }
        Op::Publish(index) => {
            if let Some(call) = nth(&world.calls, index) {
                world.publish(call);
            }
        }
        Op::Progress(index, bytes) => {
            if let Some(call) = nth(&world.calls, index) {
                world.give(Input::Progress { call, bytes: *bytes });
            }
        }
        Op::Delete(index) if !world.deletes.is_empty() => world.delete(index.index(world.deletes.len())),
        Op::Unstage(index) if !world.unstages.is_empty() => world.unstage(index.index(world.unstages.len())),
        Op::Slot(index, slot) => {
            let ready: Vec<Content> = world.open.values().filter_map(|open| open.ready).collect();
            if world.attached && !ready.is_empty() {
                let slot = [Slot::Loading, Slot::Ready, Slot::Empty][usize::from(*slot)];
                world.slot(*index.get(&ready), slot);
            }
        }
        _ => {}
    }
}

/// Histories that have so many events in all, or as many as the environment says.
fn cases() -> ProptestConfig {
    let events = env::var("EXCHANGE_EVENTS").ok().map_or(EVENTS, |events| events.parse().unwrap());
    ProptestConfig {
        cases: events.div_ceil(LENGTH) as u32,
        failure_persistence: None,
        max_shrink_iters: 2_000,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn whatever_happens_every_ask_ends_and_no_bound_is_exceeded(
        limits in some_limits(),
        ops in vec(op(), LENGTH / 2..LENGTH * 3 / 2),
    ) {
        let mut world = populate(World::new(limits));
        ops.iter().for_each(|op| play(&mut world, op));
        // Loads that are under way end.
        let loaded: Vec<_> = world.ready.values().copied().collect();
        loaded.into_iter().for_each(|content| world.slot(content, Slot::Empty));
        world.run_to_end();
    }

    #[test]
    fn a_trace_gives_the_same_decisions_again(limits in some_limits(), ops in vec(op(), 1..LENGTH / 2)) {
        let mut world = populate(World::traced(limits));
        ops.iter().for_each(|op| play(&mut world, op));
        let trace = world.trace.take().unwrap();
        let again = trace::replay(&trace).unwrap();
        again.check();
        prop_assert_eq!(again.stats(), world.exchange.stats());
        prop_assert_eq!(again.residents(Tier::Host), world.exchange.residents(Tier::Host));
    }
}
