//! Adapters take turns: shares of the work, and bounds on waiting.

use std::{collections::BTreeMap, time::Duration};

use scheduler::{AGED_SLOTS, Limits, OVERDUE, RequestId};

use crate::world::{CYCLE_TIME, World, limits, prompt, request};

/// Requests of many adapters, numbered so that the adapter can be told from the id.
struct Crowd {
    world: World,
    next: u64,
}

impl Crowd {
    fn new(limits: Limits) -> Self {
        Self { world: World::new(limits), next: 0 }
    }

    fn submit(&mut self, adapter: u16, prompt_len: usize, max_new: u32) {
        let id = self.next * 65_536 + u64::from(adapter);
        self.world.submit(request(id, adapter, prompt(id, prompt_len), max_new)).unwrap();
        self.next += 1;
    }

    fn turns(&mut self, count: usize) {
        for _ in 0..count {
            self.world.turn();
        }
    }

    /// Requests finished by adapter.
    fn finished(&self) -> BTreeMap<u16, usize> {
        let mut finished = BTreeMap::new();
        self.world.finished.iter().for_each(|id| *finished.entry(adapter_of(*id)).or_default() += 1);
        finished
    }
}

fn adapter_of(id: RequestId) -> u16 {
    (id.0 % 65_536) as u16
}

#[test]
fn a_newcomer_passes_a_long_queue() {
    let mut crowd = Crowd::new(limits());
    for _ in 0..500 {
        crowd.submit(1, 4, 10);
    }
    crowd.turns(50);
    crowd.submit(2, 4, 10);
    crowd.submit(0, 4, 10);
    // One generation for a seat, one load, and its own generation.
    crowd.turns(30);
    let finished = crowd.finished();
    assert_eq!((finished.get(&2), finished.get(&0)), (Some(&1), Some(&1)), "{finished:?}");
}

#[test]
fn service_is_counted_in_tokens_not_in_requests() {
    let mut crowd = Crowd::new(limits());
    for _ in 0..600 {
        crowd.submit(1, 4, 4);
        crowd.submit(2, 4, 24);
    }
    crowd.turns(600);
    let finished = crowd.finished();
    // Virtual tokens: 4 + 2 * 4 against 4 + 2 * 24.
    let (short, long) = (finished[&1] * 12, finished[&2] * 52);
    let share = short as f64 / (short + long) as f64;
    assert!((0.45..0.55).contains(&share), "{finished:?}: the short ones' share is {share}");
}

#[test]
fn an_idle_adapter_saves_nothing_up() {
    let mut crowd = Crowd::new(limits());
    for _ in 0..400 {
        crowd.submit(1, 4, 10);
    }
    crowd.turns(300);
    for _ in 0..400 {
        crowd.submit(2, 4, 10);
    }
    let before = crowd.finished()[&1];
    crowd.turns(200);
    let finished = crowd.finished();
    let (old, new) = (finished[&1] - before, finished[&2]);
    assert!(old * 3 > new * 2 && new * 3 > old * 2, "the old one finished {old}, the new one {new}");
}

#[test]
fn with_more_adapters_than_slots_all_get_their_share() {
    let mut crowd = Crowd::new(Limits { num_slots: 3, ..limits() });
    for _ in 0..60 {
        (1..=12).for_each(|adapter| crowd.submit(adapter, 4, 20));
    }
    let mut last = BTreeMap::from_iter((1..=12).map(|adapter| (adapter, 0)));
    let mut longest = 0;
    for turn in 0..1_500 {
        let before = crowd.world.finished.len();
        crowd.world.turn();
        for id in &crowd.world.finished[before..] {
            let gap = turn - last.insert(adapter_of(*id), turn).unwrap();
            longest = longest.max(gap);
        }
    }
    let finished = crowd.finished();
    let (least, most) = (finished.values().min().unwrap(), finished.values().max().unwrap());
    assert_eq!(finished.len(), 12);
    assert!(least * 2 > *most, "{finished:?}");
    // A slot is kept for at most SLICE virtual tokens beside its last sequences; 12 adapters share 3.
    assert!(longest < 700, "an adapter waited for {longest} turns");
    // The slots stay busy: 8 seats, a generation of 20 turns.
    let total: usize = finished.values().sum();
    assert!(total > 1_500 * 8 / 20 * 7 / 10, "{total} finished");
}

#[test]
fn a_hot_adapter_leaves_its_slot_to_a_cold_one() {
    let mut crowd = Crowd::new(Limits { num_slots: 1, ..limits() });
    for _ in 0..1_000 {
        crowd.submit(1, 4, 20);
    }
    crowd.turns(100);
    crowd.submit(2, 4, 1);
    let mut turns = 0;
    while !crowd.finished().contains_key(&2) {
        crowd.world.turn();
        turns += 1;
    }
    // The last generations of the hot one, and the load.
    assert!(turns < 30, "{turns} turns");
}

#[test]
fn an_overdue_adapter_is_served_out_of_turn_whatever_it_owes() {
    let mut crowd =
        Crowd::new(Limits { max_sequences: 1, max_prefill_rows: Some(200), max_rows: 200, ..limits() });
    // Adapter 1 has had as much as 116 requests of each of the others, which would keep it waiting for 10 seconds.
    crowd.submit(1, 150, 100);
    crowd.submit(1, 4, 1);
    (0..600u64).for_each(|number| crowd.submit(2 + (number % 3) as u16, 1, 1));
    let mut elapsed = Duration::ZERO;
    while crowd.finished().get(&1) != Some(&2) {
        crowd.world.turn();
        crowd.world.now += Duration::from_millis(20);
        elapsed = crowd.world.now;
    }
    assert!(elapsed < OVERDUE + Duration::from_secs(1), "{elapsed:?}");
    assert!(crowd.world.open.len() > 50, "others still wait");
    crowd.world.run_to_end();
}

#[test]
fn requests_of_one_adapter_start_in_order() {
    let mut crowd = Crowd::new(limits());
    for number in 0..60u16 {
        crowd.submit(1 + number % 2, 1 + usize::from(number) % 9, 3);
    }
    let mut started = Vec::new();
    loop {
        let plan = crowd.world.plan();
        started.extend(plan.iter().flat_map(|plan| &plan.added).map(|added| added.id));
        if plan.is_none() && !crowd.world.turn() {
            break;
        }
    }
    for adapter in [1, 2] {
        let own: Vec<_> = started.iter().filter(|id| adapter_of(**id) == adapter).collect();
        assert!(own.len() == 30 && own.is_sorted(), "{own:?}");
    }
}

/// The least and the most service of any flow, relative to the mean.
fn spread<'a>(service: impl IntoIterator<Item = &'a u64>) -> (f64, f64) {
    let service: Vec<f64> = service.into_iter().map(|&service| service as f64).collect();
    let mean = service.iter().sum::<f64>() / service.len() as f64;
    let relative = || service.iter().map(|service| service / mean);
    (relative().fold(f64::MAX, f64::min), relative().fold(0.0, f64::max))
}

#[test]
fn many_adapters_that_always_wait_get_equal_shares_of_tokens() {
    let answer = |adapter: u16| if adapter % 2 == 1 { 12 } else { 48 };
    let mut crowd = Crowd::new(Limits { num_slots: 240, num_blocks: 400, ..limits() });
    // Each adapter has two requests waiting at all times.
    (0..2).for_each(|_| (1..=240).for_each(|adapter| crowd.submit(adapter, 4, answer(adapter))));
    // In 60,000 turns each adapter has some 4,000 virtual tokens.
    for _ in 0..60_000 {
        let before = crowd.world.finished.len();
        crowd.world.turn();
        crowd.world.now += Duration::from_millis(10);
        let ended: Vec<_> = crowd.world.finished[before..].iter().map(|id| adapter_of(*id)).collect();
        ended.into_iter().for_each(|adapter| crowd.submit(adapter, 4, answer(adapter)));
    }
    assert!(crowd.world.now > OVERDUE * 200);
    let (least, most) = spread(crowd.world.service.values());
    assert!(least > 0.95 && most < 1.05, "from {least} to {most} of the mean");
}

#[test]
fn with_fewer_slots_than_adapters_waits_are_bounded_and_shares_are_equal() {
    const ADAPTERS: u16 = 60;
    let answer = |adapter: u16| if adapter % 2 == 1 { 12 } else { 48 };
    for (slots, seats) in [(1, 8), (6, 8), (6, 2), (20, 8), (59, 8)] {
        let limits = Limits { num_slots: slots, max_sequences: seats, num_blocks: 400, ..limits() };
        let mut crowd = Crowd::new(limits);
        for _ in 0..20 {
            (1..=ADAPTERS).for_each(|adapter| crowd.submit(adapter, 4, answer(adapter)));
        }
        let mut last = BTreeMap::from_iter((1..=ADAPTERS).map(|adapter| (adapter, 0)));
        let mut longest = 0;
        for turn in 0..60_000 {
            let before = crowd.world.finished.len();
            crowd.world.turn();
            crowd.world.now += Duration::from_millis(10);
            let ended: Vec<_> = crowd.world.finished[before..].iter().map(|id| adapter_of(*id)).collect();
            for adapter in ended {
                longest = longest.max(turn - last.insert(adapter, turn).unwrap());
                crowd.submit(adapter, 4, answer(adapter));
            }
        }
        longest = longest.max(last.values().map(|turn| 60_000 - turn).max().unwrap());
        // In a round, each adapter has a slice and the rest of the answers that run when it must leave. A turn serves
        // two virtual tokens for each seat; half of that allows for seats that are empty while a slot changes hands.
        let round = usize::from(ADAPTERS) * (1_024 + 100 * seats as usize) / seats as usize;
        let case = format!("{slots} slots, {seats} seats: waited {longest} turns");
        assert!(longest < round, "{case}, a round is {round}");
        let (least, most) = spread(crowd.world.service.values());
        // No adapter is behind the others by more than a slice and the answers that run at its end.
        let mean = crowd.world.service.values().sum::<u64>() as f64 / f64::from(ADAPTERS);
        let slack = (1_024 + 100 * u64::from(seats)) as f64 / mean;
        assert!(least > 1.0 - slack && most < 1.0 + slack, "{case}: from {least} to {most} of the mean");
    }
}

#[test]
fn an_adapter_in_debt_gets_a_slot_in_a_stream_of_new_adapters() {
    let limits = Limits { num_slots: 1, max_sequences: 2, num_blocks: 400, ..limits() };
    let mut crowd = Crowd::new(limits);
    crowd.submit(1, 1_000, 250);
    crowd.submit(2, 4, 1);
    // New adapters keep coming, so that two wait at all times. They start from less service than the first one has had.
    let mut adapter = 3;
    let mut turn = |crowd: &mut Crowd| {
        while crowd.world.scheduler.stats().waiting < 3 {
            crowd.submit(adapter, 4, 1);
            adapter += 1;
        }
        assert!(crowd.world.turn() && adapter < 5_000, "it never starts");
    };
    while crowd.world.finished.is_empty() {
        turn(&mut crowd);
    }
    for _ in 0..2 {
        // Others have the slot by then.
        (0..20).for_each(|_| turn(&mut crowd));
        crowd.submit(1, 4, 1);
        let (begun, finished) = (crowd.world.now, crowd.finished()[&1]);
        while crowd.finished()[&1] == finished {
            turn(&mut crowd);
        }
        // Each slot that is given out of turn is followed by three in turn, each of which takes a load and a request.
        let (waited, turn) = (crowd.world.now - begun, Duration::from_millis(10));
        assert!(waited > CYCLE_TIME, "it is not its turn before {waited:?}");
        assert!(waited < CYCLE_TIME + turn * 10 * AGED_SLOTS as u32, "{waited:?}");
    }
}
