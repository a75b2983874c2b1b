//! Sessions with the ranks: what they hold at the start, and what ends with them.

use exchange::{Ask, Fault, Output, Slot, Tier};

use crate::world::{World, limits, secs};

#[test]
fn what_all_ranks_hold_is_kept() {
    // Bytes that fit of six adapters of 100 in the host memory of the next exchange.
    for (host_bytes, kept) in [(1000, 6), (600, 6), (599, 5), (310, 3), (100, 1), (99, 0), (0, 0)] {
        let mut world = World::with(exchange::Limits { host_bytes: 1000, ..limits() }, &[100; 6]);
        let asks: Vec<_> = (0..6).map(|reference| world.ask(reference)).collect();
        world.settle();
        asks.into_iter().for_each(|id| world.release(id));
        // Another router attaches to the same ranks.
        let held: Vec<_> =
            world.host.iter().map(|(&content, &staged)| exchange::Held { content, staged }).collect();
        let next = exchange::Limits { host_bytes, ..limits() };
        let mut exchange = exchange::Exchange::<()>::new(next);
        let outputs = exchange.handle(exchange::Input::Attached { host: held }, world.now);
        exchange.check();
        assert_eq!(exchange.stats().host.copies, kept, "{host_bytes}");
        assert_eq!(outputs.len(), 6 - kept, "{outputs:?}");
        assert!(outputs.iter().all(|output| matches!(output, Output::Unstage(_))));
    }
}

#[test]
fn leases_of_requests_end_with_the_session_and_pins_come_back() {
    // Whether the ranks still have their copies when the next session begins.
    for kept in [true, false] {
        let mut world = World::with(limits(), &[20, 30, 40]);
        let request = world.ask(0);
        let ask = world.new_ask(1);
        let pin = world.submit(Ask { pin: true, ..ask });
        let ask = world.new_ask(2);
        let on_disk = world.submit(Ask { tier: Tier::Disk, ..ask });
        world.settle();
        world.slot(world.ready[&request], Slot::Ready);
        world.ready.remove(&pin);
        world.detach();
        assert_eq!(world.failed.get(&request), Some(&Fault::SessionLost));
        assert_eq!(world.waiting(), [pin]);
        assert!(world.open[&on_disk].ready.is_some(), "the disk has no session");
        assert!(world.calls.is_empty(), "nothing can be staged now");
        if !kept {
            world.host.clear();
        }
        world.attach();
        assert_eq!(world.calls.len(), usize::from(!kept));
        world.settle();
        assert!(world.ready.contains_key(&pin), "kept: {kept}");
        let content = world.ready[&request];
        assert_eq!(world.exchange.slot_of(content), Slot::Empty, "the scheduler says what is in slots");
        world.run_to_end();
    }
}

#[test]
fn asks_wait_for_the_next_session() {
    for calls in 0..3 {
        let mut world = World::with(limits(), &[20]);
        let ask = world.new_ask(0);
        let id = world.submit(Ask { deadline: secs(300), ..ask });
        for _ in 0..calls {
            world.answer(world.first());
        }
        world.detach();
        world.settle();
        assert_eq!(world.waiting(), [id], "lookup and fetch go on, and then it waits");
        world.wait(secs(100));
        world.attach();
        world.settle();
        assert!(world.ready.contains_key(&id), "{calls}");
        world.run_to_end();
    }
}

#[test]
fn an_answer_of_an_old_session_is_ignored() {
    let mut world = World::with(limits(), &[20]);
    world.ask(0);
    for _ in 0..2 {
        world.answer(world.first());
    }
    let call = world.first();
    world.detach();
    world.attach();
    let staged = exchange::Staged { host_bytes: 20, slot_bytes: 20 };
    let late = exchange::Input::Staged { call, result: Ok(staged) };
    assert_eq!(world.give(late), []);
    assert_eq!(world.exchange.stats().host.copies, 0);
    world.run_to_end();
}

#[test]
fn a_session_that_begins_anew_ends_the_one_before() {
    let mut world = World::with(limits(), &[20]);
    let id = world.ask(0);
    world.settle();
    world.open.get_mut(&id).unwrap().ready = None;
    world.attach();
    assert_eq!(world.failed.get(&id), Some(&Fault::SessionLost));
    world.run_to_end();
}
