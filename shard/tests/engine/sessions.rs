//! Sessions: what they end, what outlives them, and which steps belong to them.

use lorax_shard::{
    engine::{Command, StepError},
    step::{Member, Step},
};

use crate::{
    fake::Fault,
    harness::{PATIENCE, Shard, prompt, rows},
};

/// The first step of a sequence, which samples a token.
fn first_step() -> Step {
    Step { added: vec![prompt(5)], rows: vec![rows(5, 0, 20, &[3, 9], true)], ..Step::default() }
}

#[tokio::test]
async fn a_session_ends_the_one_before_and_forgets_its_sequences() {
    let shard = Shard::start();
    let mut old = shard.attach().await;
    old.send(first_step()).await;
    let tokens = old.tokens().await;
    let mut new = shard.attach().await;
    assert!(old.events.next().await.is_none(), "its stream has ended");
    new.send(Step { rows: vec![rows(5, 20, 1, &[], true)], ..Step::default() }).await;
    assert_eq!(new.events.error().await, "sequence 5 does not run");
    let mut newest = shard.attach().await;
    newest.send(first_step()).await;
    assert_eq!(newest.tokens().await, tokens, "its id is free again");
}

#[tokio::test]
async fn steps_of_an_ended_stream_have_no_effect() {
    let shard = Shard::start();
    let mut first = shard.attach().await;
    first.send(first_step()).await;
    let tokens = first.tokens().await;
    let mut second = shard.attach().await;
    let stray = |id, session| Step { id, session, ..first_step() };
    // Late steps of the first stream, some of them as the second session would take them.
    for (id, session) in [(2, 1), (1, 1), (1, 2), (2, 2), (0, 0), (3, 2)] {
        shard.send_as(1, stray(id, session)).await;
    }
    // Nor do refusals that came in a step's place.
    let refused = Command::Step { stream: 1, step: Err(StepError::ContentHash(3)) };
    shard.command(refused).await;
    // And of streams that never were.
    shard.send_as(99, stray(1, 2)).await;
    second.send(first_step()).await;
    assert_eq!(second.tokens().await, tokens);
    assert!(second.events.is_quiet(), "one step, one result");
}

#[tokio::test]
async fn steps_out_of_order_or_of_other_sessions_end_the_stream() {
    let shard = Shard::start();
    // After one step: the id and the session of the next, as offsets from the right ones.
    let cases: [(u64, i64, &str); 10] = [
        (0, 0, "step 0 where step 2 follows"),
        (1, 0, "step 1 where step 2 follows"),
        (3, 0, "step 3 where step 2 follows"),
        (4, 0, "step 4 where step 2 follows"),
        (1 << 40, 0, "step 1099511627776 where step 2 follows"),
        (u64::MAX, 0, "step 18446744073709551615 where step 2 follows"),
        (2, 1, "a step of session 8 in session 7"),
        (2, -1, "a step of session 6 in session 7"),
        (2, -7, "a step of session 0 in session 7"),
        (3, 5, "a step of session 12 in session 7"),
    ];
    for (id, offset, cause) in cases {
        shard.begin(7).await;
        let mut events = shard.open(1).await;
        shard.send_as(1, Step { id: 1, session: 7, ..first_step() }).await;
        assert!(events.next().await.unwrap().is_ok());
        let session = 7_u64.wrapping_add_signed(offset);
        shard.send_as(1, Step { id, session, ..Step::default() }).await;
        assert_eq!(events.error().await, cause);
        // The session is over with its stream.
        shard.send_as(1, Step { id: 2, session: 7, ..Step::default() }).await;
        assert_eq!(shard.open(2).await.error().await, "session 7 has had its stream");
    }
}

#[tokio::test]
async fn a_session_has_one_stream() {
    let shard = Shard::start();
    assert_eq!(shard.open(1).await.error().await, "no session has begun");
    let mut router = shard.attach().await;
    assert_eq!(shard.open(2).await.error().await, "session 1 has had its stream");
    router.send(first_step()).await;
    assert_eq!(router.tokens().await.len(), 1, "the first stream goes on");
}

#[tokio::test]
async fn adapters_outlive_a_session() {
    let shard = Shard::start();
    let (one, two) = (shard.staged("one").await, shard.staged("two").await);
    let expected = shard.generate(Some((1, one)), 20, false).await;
    let mut router = shard.attach().await;
    // The one that was used last is told last.
    let [held_two, held_one] = &router.held.host[..] else { panic!("two are held") };
    assert_eq!((held_one.content, held_two.content), (one, two));
    assert_eq!(router.held.slots, [(1, one, held_one.slot_bytes)]);
    assert!(held_two.host_bytes > 0 && held_two.sites == ["down_proj", "q_proj"]);
    // It is ready at once.
    let mut step = first_step();
    step.added[0].members = vec![Member::alone(1)];
    router.send(step).await;
    assert_eq!(router.tokens().await, expected[..1]);
    router.send(Step { dropped: vec![5], unload: vec![1], ..Step::default() }).await;
    router.result().await;
    assert_eq!(shard.begin(70).await.slots, []);
}

#[tokio::test]
async fn loads_under_way_are_given_up() {
    let (shard, script) = Shard::scripted();
    let one = shard.staged("one").await;
    script.fail("loaded", Fault::Hang);
    let mut router = shard.attach().await;
    router.send(Step { load: vec![(0, one)], ..Step::default() }).await;
    router.result().await;
    let mut router = shard.attach().await;
    assert_eq!(router.held.slots, []);
    script.mend("loaded");
    // Nothing is told of the load that was given up, and its slot is empty.
    router.send(Step { load: vec![(1, one)], ..Step::default() }).await;
    assert_eq!(router.slot_event().await, (1, None));
    let mut step = first_step();
    step.added[0].members = vec![Member::alone(0)];
    router.send(step).await;
    assert_eq!(router.events.error().await, "slot 0 is not ready");
}

#[tokio::test]
async fn a_session_begins_when_the_step_in_flight_has_ended() {
    let (shard, script) = Shard::scripted();
    let mut old = shard.attach().await;
    script.hold();
    let before = script.marks();
    old.send(first_step()).await;
    crate::harness::until(|| script.marks() == before + 2).await;
    let begun = shard.begin(2);
    tokio::pin!(begun);
    let turns = shard.heartbeat.turns();
    tokio::select! {
        biased;
        _ = &mut begun => panic!("the step still runs"),
        () = crate::harness::until(|| shard.heartbeat.turns() > turns) => {}
    }
    script.release();
    tokio::time::timeout(PATIENCE, begun).await.unwrap();
    let mut events = shard.open(2).await;
    shard.send_as(2, Step { id: 1, session: 2, ..first_step() }).await;
    assert_eq!(events.next().await.unwrap().unwrap().session, 2);
    assert!(events.is_quiet(), "nothing of the old step");
}
