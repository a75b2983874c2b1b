//! The wire: what a router is answered, over a socket.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/client.rs"]
mod client;
#[path = "support/fake.rs"]
mod fake;
#[path = "service/merges.rs"]
mod merges;
#[path = "support/tiny.rs"]
mod tiny;

use std::{future::pending, time::Duration};

use fake::{Fake, Fault, Script};
use lifecycle::{Failure, Supervisor};
use lorax_shard::{
    engine::StepError,
    pump::{self, Incoming},
    server::{self, Rank},
    step::Info,
};
use proto::{
    AttachRequest, AttachResponse, ExecuteEvent, ExecuteRequest, Gone, HealthRequest, InfoRequest, Mask,
    Masks, NeedsRoom, NewSequence, Pooling, SequenceRows, SlotLoad, StageRequest, Staged, Step, StepResult,
    UnstageRequest, execute_event::Event, execute_request::Request, pooling, shard_client::ShardClient,
    stage_response::Answer as StageAnswer,
};
use tokio::{net::UnixListener, sync::mpsc};
use tokio_stream::{
    StreamExt,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{Code, Streaming, transport::Channel};

const PATIENCE: Duration = Duration::from_secs(60);

/// A shard in this process, and a client of it.
struct Served {
    client: ShardClient<Channel>,
    script: Script,
    folder: tempfile::TempDir,
}

impl Served {
    async fn start() -> Served {
        Served::start_as(0).await
    }

    /// A shard with this rank.
    async fn start_as(rank: u32) -> Served {
        Served::start_with(Info { rank, ..client::info() }).await
    }

    /// A shard that tells this of itself, and has as many slots.
    async fn start_with(info: Info) -> Served {
        let script = Script::default();
        let folder = tempfile::tempdir().unwrap();
        let (fake, slots) = (Fake::new(script.clone()), info.num_slots as usize);
        let (engine, adapters) = tiny::engine_with_slots(fake, folder.path(), slots);
        let socket = folder.path().join("shard.sock");
        let connections = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        let rank = Rank { engine, adapters, info };
        let supervisor = Supervisor::reporting_to(|_| ()).unwrap();
        tokio::spawn(async move {
            server::serve(rank, connections, PATIENCE, pending(), &supervisor).await.unwrap();
        });
        Served { client: client::connect(&socket).await, script, folder }
    }

    async fn execute(&mut self) -> (mpsc::Sender<Step>, Streaming<ExecuteEvent>) {
        let (steps, outgoing) = mpsc::channel(4);
        let outgoing = ReceiverStream::new(outgoing).map(client::request);
        (steps, self.client.execute(outgoing).await.unwrap().into_inner())
    }

    /// Stages an adapter; returns its content and the answer.
    async fn stage(&mut self, session: u64) -> (Vec<u8>, Result<StageAnswer, tonic::Status>) {
        let request = self.order(session);
        let content = request.content.clone();
        let answer = self.client.stage(request).await;
        (content, answer.map(|response| response.into_inner().answer.unwrap()))
    }

    fn order(&self, session: u64) -> StageRequest {
        self.order_of("one", session)
    }

    /// Has an adapter staged.
    fn order_of(&self, name: &str, session: u64) -> StageRequest {
        client::order(&self.folder.path().join("adapters").join(name), session)
    }

    /// Stages an adapter; returns its content and its properties.
    async fn staged(&mut self, session: u64) -> (Vec<u8>, Staged) {
        match self.stage(session).await {
            (content, Ok(StageAnswer::Staged(staged))) => (content, staged),
            other => panic!("{other:?}"),
        }
    }

    async fn attach(&mut self, session: u64) -> proto::AttachResponse {
        self.client.attach(AttachRequest { session }).await.unwrap().into_inner()
    }
}

/// The result of the next step.
async fn step_result(events: &mut Streaming<ExecuteEvent>) -> StepResult {
    match next(events).await.unwrap().unwrap().event {
        Some(Event::Step(result)) => result,
        event => panic!("a result, not {event:?}"),
    }
}

async fn next(events: &mut Streaming<ExecuteEvent>) -> Result<Option<ExecuteEvent>, tonic::Status> {
    tokio::time::timeout(PATIENCE, events.message()).await.unwrap()
}

#[tokio::test]
async fn what_contradicts_the_session_is_a_failed_precondition() {
    let mut served = Served::start().await;
    let mask = |bytes| Mask { sequence: 5, row: 0, allowed: vec![255; bytes] };
    let (_steps, mut events) = served.execute().await;
    let status = next(&mut events).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "no session has begun"));
    for (step, code) in [
        (Step { session: 9, ..client::first_step(7) }, Code::FailedPrecondition),
        (Step { id: 2, ..client::first_step(7) }, Code::FailedPrecondition),
        (Step { dropped: vec![3], ..client::first_step(7) }, Code::InvalidArgument),
        (Step { masks: vec![mask(11)], ..client::first_step(7) }, Code::InvalidArgument),
        (Step { masks: vec![mask(13)], ..client::first_step(7) }, Code::InvalidArgument),
        (
            Step { load: vec![SlotLoad { slot: 0, content: vec![1] }], ..client::first_step(7) },
            Code::InvalidArgument,
        ),
    ] {
        served.attach(7).await;
        let (steps, mut events) = served.execute().await;
        steps.send(step).await.unwrap();
        assert_eq!(next(&mut events).await.unwrap_err().code(), code);
    }
}

#[tokio::test]
async fn a_session_is_answered_with_its_number_and_begun_with_what_is_held() {
    let mut served = Served::start().await;
    let info = served.client.info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.longest_step_us, 1000);
    assert_eq!(served.attach(41).await, AttachResponse::default());
    let (content, staged) = served.staged(41).await;
    let (steps, mut events) = served.execute().await;
    let load = vec![SlotLoad { slot: 1, content: content.clone() }];
    let mut step = Step { load, ..client::first_step(41) };
    let mut bad = step.added[0].clone();
    (bad.sequence, bad.tokens[7]) = (6, 96);
    step.added.push(bad);
    steps.send(step).await.unwrap();
    let (mut ran, mut loaded) = (false, false);
    while !(ran && loaded) {
        let ExecuteEvent { session, event } = next(&mut events).await.unwrap().unwrap();
        assert_eq!(session, 41);
        match event.unwrap() {
            Event::Step(result) => {
                assert_eq!((result.id, result.tokens.len()), (1, 1));
                assert!(result.duration_us > 0);
                let [refused] = &result.refused[..] else { panic!("one is refused") };
                assert_eq!((refused.sequence, &*refused.reason), (6, "token 96 is out of range, limit 96"));
                ran = true;
            }
            Event::Slot(slot) => {
                assert_eq!((slot.slot, slot.error), (1, String::new()));
                loaded = true;
            }
        }
    }
    let held = served.attach(42).await;
    assert_eq!(next(&mut events).await.unwrap(), None, "the stream of the session before has ended");
    let [slot] = &held.slots[..] else { panic!("one slot is filled") };
    assert_eq!((slot.slot, &slot.content, slot.bytes), (1, &content, staged.slot_bytes));
    let [host] = &held.host[..] else { panic!("one adapter is held") };
    assert_eq!(
        (&host.content, host.bytes, host.slot_bytes),
        (&content, staged.host_bytes, staged.slot_bytes)
    );
    assert_eq!(
        (host.max_lora_rank, &host.sites[..]),
        (3, &["down_proj".to_owned(), "q_proj".to_owned()][..])
    );
    assert!(host.bytes > 0);
    let (steps, mut events) = served.execute().await;
    steps.send(client::first_step(42)).await.unwrap();
    assert_eq!(next(&mut events).await.unwrap().unwrap().session, 42);
}

/// The ids of a result's tokens.
fn tokens(result: &StepResult) -> Vec<u32> {
    result.tokens.iter().map(|sampled| sampled.token.unwrap().id).collect()
}

#[tokio::test]
async fn masks_and_given_tokens_cross_the_wire() {
    let mut served = Served::start().await;
    served.attach(3).await;
    let (requests, outgoing) = mpsc::channel(4);
    let mut events = served.client.execute(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    let only = |row, token: usize| {
        let mut allowed = vec![0; 12];
        allowed[token / 8] = 1 << (token % 8);
        Mask { sequence: 5, row, allowed }
    };
    // One mask comes with the step, the other behind it.
    let mut first = Step { masks: vec![only(0, 77)], ..client::first_step(3) };
    (first.rows[0].masked, first.rows[0].sample) = (true, 2);
    requests.send(client::request(first)).await.unwrap();
    let late = Masks { step: 1, masks: vec![only(1, 41)], session: 3 };
    requests.send(ExecuteRequest { request: Some(Request::Masks(late)) }).await.unwrap();
    assert_eq!(tokens(&step_result(&mut events).await), [77, 41]);
    // Tokens are given in place of the one that was sampled.
    let rows = SequenceRows { sequence: 5, position: 20, rows: 2, sample: 1, ..SequenceRows::default() };
    let rows = vec![SequenceRows { tokens: vec![8, 9], ..rows }];
    requests.send(client::request(Step { id: 2, session: 3, rows, ..Step::default() })).await.unwrap();
    let given = tokens(&step_result(&mut events).await);
    // It goes on as if the sequence had come with those tokens.
    let known = [client::first_step(3).added[0].tokens.clone(), vec![8, 9]].concat();
    let added = vec![NewSequence { sequence: 6, prompt_len: 20, tokens: known, ..NewSequence::default() }];
    let rows = SequenceRows { sequence: 6, rows: 22, sample: 1, ..SequenceRows::default() };
    let rows = vec![SequenceRows { new_blocks: vec![1, 2], ..rows }];
    requests.send(client::request(Step { id: 3, session: 3, added, rows, ..Step::default() })).await.unwrap();
    assert_eq!(tokens(&step_result(&mut events).await), given);
    // A request that is neither a step nor masks ends the stream.
    requests.send(ExecuteRequest { request: None }).await.unwrap();
    assert_eq!(next(&mut events).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn hidden_states_and_pooled_vectors_cross_the_wire() {
    let mut served = Served::start().await;
    served.attach(3).await;
    let (steps, mut events) = served.execute().await;
    let (mut added, mut rows) = (Vec::new(), Vec::new());
    let kinds = [pooling::Kind::First, pooling::Kind::Last, pooling::Kind::Mean, pooling::Kind::None];
    for (sequence, kind) in (0..).zip(kinds) {
        let pooling =
            Some(Pooling { kind: kind as i32, normalize: kind != pooling::Kind::Mean, classes: false });
        let tokens = vec![4, 9, 5, 17, 30, 2];
        added.push(NewSequence { sequence, pooling, tokens, prompt_len: 6, ..NewSequence::default() });
        let new_blocks = vec![sequence as u32];
        rows.push(SequenceRows { sequence, rows: 6, new_blocks, ..SequenceRows::default() });
    }
    steps.send(Step { id: 1, session: 3, added, rows, ..Step::default() }).await.unwrap();
    let result = step_result(&mut events).await;
    let ([first, last, mean], [states]) = (&result.pooled[..], &result.hidden[..]) else {
        panic!("three vectors and all states, not {result:?}")
    };
    assert_eq!([first.sequence, last.sequence, mean.sequence, states.sequence], [0, 1, 2, 3]);
    assert_eq!((states.position, states.values.len()), (0, 6 * 32));
    assert_eq!(first.values, states.values[..32]);
    assert_eq!(last.values, states.values[5 * 32..]);
    let norm = |vector: &[f32]| vector.iter().map(|x| x * x).sum::<f32>();
    assert!(states.values.chunks(32).all(|state| (norm(state) - 1.0).abs() < 1e-5), "they are normalized");
    assert!(mean.values.len() == 32 && (norm(&mean.values) - 1.0).abs() > 1e-3, "the mean is not");
}

#[tokio::test]
async fn results_of_steps_are_rank_0s_to_tell() {
    for rank in [1, 2, 7] {
        let mut served = Served::start_as(rank).await;
        served.attach(1).await;
        let (content, _) = served.staged(1).await;
        let (steps, mut events) = served.execute().await;
        steps.send(client::first_step(1)).await.unwrap();
        let load = vec![SlotLoad { slot: 1, content }];
        steps.send(Step { id: 2, session: 1, load, ..Step::default() }).await.unwrap();
        let event = next(&mut events).await.unwrap().unwrap().event.unwrap();
        assert!(matches!(event, Event::Slot(slot) if slot.slot == 1), "the end of a load");
        served.attach(2).await;
        assert_eq!(next(&mut events).await.unwrap(), None);
    }
}

#[tokio::test]
async fn all_slots_may_be_filled_at_once() {
    for num_slots in [2, 300, 2000] {
        let mut served = Served::start_with(Info { num_slots, ..client::info() }).await;
        served.attach(1).await;
        let (content, _) = served.staged(1).await;
        let (steps, mut events) = served.execute().await;
        let load = (0..num_slots).map(|slot| SlotLoad { slot, content: content.clone() }).collect();
        steps.send(Step { load, ..client::first_step(1) }).await.unwrap();
        let (mut slots, mut results) = (Vec::new(), 0);
        while slots.len() < num_slots as usize || results == 0 {
            match next(&mut events).await.unwrap().expect("the stream goes on").event.unwrap() {
                Event::Slot(slot) => slots.push(slot.slot),
                Event::Step(_) => results += 1,
            }
        }
        slots.sort_unstable();
        assert_eq!(slots, (0..num_slots).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_step_that_cannot_be_read_is_answered() {
    let mut served = Served::start().await;
    served.attach(1).await;
    let (steps, mut events) = served.execute().await;
    // Above the limit of a message.
    let load = vec![SlotLoad { slot: 0, content: vec![0; proto::MAX_MESSAGE + 1] }];
    steps.send(Step { load, ..client::first_step(1) }).await.unwrap();
    let status = next(&mut events).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("a step that cannot be read: "), "{}", status.message());
    served.attach(2).await;
    let (steps, mut events) = served.execute().await;
    steps.send(client::first_step(2)).await.unwrap();
    assert_eq!(next(&mut events).await.unwrap().unwrap().session, 2, "the next session runs");
}

#[tokio::test]
async fn health_is_answered_while_the_loop_hangs() {
    let mut served = Served::start().await;
    served.attach(1).await;
    let (steps, _events) = served.execute().await;
    served.script.fail("embed", Fault::Hang);
    steps.send(client::first_step(1)).await.unwrap();
    let mut ages = Vec::new();
    let aging = async {
        while ages.len() < 3 {
            let health = served.client.health(HealthRequest {}).await.unwrap().into_inner();
            let age = health.oldest_ms.filter(|age| ages.last() < Some(age));
            ages.extend(age);
        }
    };
    tokio::time::timeout(PATIENCE, aging).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_steps_that_panics_or_hangs_is_reported_with_the_tasks_name() {
    // A panic may take long to print its backtrace.
    for (hangs, limit) in [(false, PATIENCE), (true, Duration::from_millis(200))] {
        let (report, mut reported) = mpsc::channel(4);
        let supervisor = Supervisor::reporting_to(move |failure| report.try_send(failure).unwrap()).unwrap();
        let ((open, opened), (commands, _received)) = (mpsc::channel(1), mpsc::channel(1));
        supervisor.task("step streams", limit, pump::run(opened, commands));
        let (go_on, gone_on) = std::sync::mpsc::sync_channel::<()>(0);
        let steps = Box::pin(tokio_stream::once(()).map(move |()| match hangs {
            true => Err(StepError::Unreadable(gone_on.recv().unwrap_err().to_string())),
            false => panic!("the test's panic"),
        }));
        // Another stream is open meanwhile.
        let other = Box::pin(tokio_stream::pending());
        for (stream, steps) in [(1, other as pump::Steps), (2, steps as pump::Steps)] {
            assert!(open.send(Incoming { stream, steps, ended: Default::default() }).await.is_ok());
        }
        let failure = tokio::time::timeout(PATIENCE, reported.recv()).await.unwrap().unwrap();
        match failure {
            Failure::Panicked { message, .. } if !hangs => assert_eq!(message, "the test's panic"),
            Failure::Overdue { ref name, .. } if hangs => assert_eq!(&**name, "step streams"),
            failure => panic!("{failure}"),
        }
        drop(go_on);
    }
}

#[tokio::test]
async fn an_adapter_that_cannot_be_staged_is_not_the_clients_fault() {
    let mut served = Served::start().await;
    served.attach(1).await;
    for (fault, code) in [
        (Fault::OutOfMemory, Code::Unavailable),
        (Fault::Device, Code::Unavailable),
        (Fault::Panic, Code::Internal),
        (Fault::Hang, Code::DeadlineExceeded),
        (Fault::Unsupported, Code::InvalidArgument),
        (Fault::Shape, Code::InvalidArgument),
    ] {
        served.script.fail("stage", fault);
        let (content, answer) = tokio::time::timeout(PATIENCE, served.stage(1)).await.unwrap();
        assert_eq!(answer.unwrap_err().code(), code, "{fault:?}");
        served.script.mend("stage");
        served.staged(1).await;
        let unstage = UnstageRequest { session: 1, content };
        served.client.unstage(unstage).await.unwrap();
        assert_eq!(served.attach(1).await.host, []);
    }
}

async fn outcome(served: &mut Served, request: StageRequest) -> Result<StageAnswer, tonic::Status> {
    served.client.stage(request).await.map(|response| response.into_inner().answer.unwrap())
}

#[tokio::test]
async fn orders_that_cannot_be_followed_are_refused() {
    let mut served = Served::start().await;
    let order = served.order(3);
    let refused = outcome(&mut served, order).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "no session has begun");
    served.attach(3).await;
    type Change = fn(&mut StageRequest);
    let cases: [(Change, Code, &str); 11] = [
        (|order| order.session = 2, Code::FailedPrecondition, "a stage of session 2 in session 3"),
        (|order| order.session = 4, Code::FailedPrecondition, "a stage of session 4 in session 3"),
        (|order| order.content.clear(), Code::InvalidArgument, "a content hash of 0 bytes"),
        (|order| _ = order.content.pop(), Code::InvalidArgument, "a content hash of 31 bytes"),
        (|order| order.content.push(0), Code::InvalidArgument, "a content hash of 33 bytes"),
        (|order| order.parts.clear(), Code::InvalidArgument, "adapter one has 0 parts, and no way to"),
        (|order| order.parts.extend(order.parts.clone()), Code::InvalidArgument, "adapter one has 2 parts"),
        (
            |order| order.parts[0].files.clear(),
            Code::InvalidArgument,
            "adapter one: adapter_config.json is missing",
        ),
        (
            |order| _ = order.parts[0].files.pop(),
            Code::InvalidArgument,
            "adapter one: adapter_model.safetensors is missing",
        ),
        (
            |order| order.parts[0].files[1].name = "adapter_model.txt".into(),
            Code::InvalidArgument,
            "adapter one: adapter_model.safetensors is missing",
        ),
        (
            |order| {
                // The configuration is no file of tensors.
                let file = |name: &str| proto::AdapterFile { name: name.into(), stamp: None };
                order.parts[0].files = vec![file("adapter_config.json"), file("x/adapter_config.json")];
            },
            Code::InvalidArgument,
            "adapter one: adapter_model.safetensors is missing",
        ),
    ];
    for (change, code, words) in cases {
        let mut order = served.order(3);
        change(&mut order);
        let refused = outcome(&mut served, order).await.unwrap_err();
        assert_eq!(refused.code(), code, "{words}");
        assert!(refused.message().starts_with(words), "{} is not {words}", refused.message());
    }
}

#[tokio::test]
async fn all_answers_to_a_stage_cross_the_wire() {
    let mut served = Served::start().await;
    served.attach(3).await;
    let (order, room) = (served.order(3), served.staged(3).await.1.host_bytes);
    served.client.unstage(UnstageRequest { session: 3, content: order.content.clone() }).await.unwrap();
    for max_bytes in [0, 1, room / 2, room - 1] {
        let answer = outcome(&mut served, StageRequest { max_bytes, ..order.clone() }).await.unwrap();
        assert_eq!(answer, StageAnswer::NeedsRoom(NeedsRoom { host_bytes: room }));
    }
    let mut gone = order.clone();
    gone.parts[0].files[0].stamp.as_mut().unwrap().changed_ns += 1;
    assert_eq!(outcome(&mut served, gone).await.unwrap(), StageAnswer::Gone(Gone {}));
    for (session, content, code) in [
        (2, order.content.clone(), Code::FailedPrecondition),
        (3, vec![1; 31], Code::InvalidArgument),
        (3, Vec::new(), Code::InvalidArgument),
    ] {
        let refused = served.client.unstage(UnstageRequest { session, content }).await.unwrap_err();
        assert_eq!(refused.code(), code);
    }
}

#[tokio::test]
async fn a_stage_whose_call_is_cancelled_leaves_nothing() {
    let mut served = Served::start().await;
    served.attach(3).await;
    served.script.fail("stage", Fault::Hang);
    let order = served.order(3);
    let (mut client, request) = (served.client.clone(), order.clone());
    let call = tokio::spawn(async move { client.stage(request).await });
    let reads = async {
        while served.script.count("stage") == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, reads).await.unwrap();
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    // Whoever removes it waits for the thread that reads it. Other calls go on.
    let mut client = served.client.clone();
    let unstage = UnstageRequest { session: 3, content: order.content };
    let unstaged = tokio::spawn(async move { client.unstage(unstage).await });
    served.client.health(HealthRequest {}).await.unwrap();
    assert!(!unstaged.is_finished());
    served.script.mend("stage");
    tokio::time::timeout(PATIENCE, unstaged).await.unwrap().unwrap().unwrap();
    assert_eq!(served.attach(4).await.host, []);
    served.staged(4).await;
}
