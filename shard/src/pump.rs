//! Passes the steps of the router's streams on to the engine.

use std::{panic::resume_unwind, pin::Pin};

use tokio::{
    sync::mpsc::{Receiver, Sender},
    task::{JoinError, JoinSet},
};
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;

use crate::{
    engine::{Command, StepError},
    step::Step,
};

/// Steps as they arrive, each of them or what is wrong with it.
pub type Steps = Pin<Box<dyn Stream<Item = Result<Box<Step>, StepError>> + Send>>;

/// A stream that the router has opened.
pub struct Incoming {
    /// The number of the stream.
    pub stream: u64,
    /// What it carries.
    pub steps: Steps,
    /// The engine takes no more of its steps.
    pub ended: CancellationToken,
}

/// Passes on the steps of all streams, each in its order. Must not end, and does so only when nobody can open a stream
/// any more. A panic in one of the streams is a panic of this.
pub async fn run(mut opened: Receiver<Incoming>, engine: Sender<Command>) {
    let mut streams = JoinSet::<()>::new();
    loop {
        tokio::select! {
            incoming = opened.recv() => match incoming {
                Some(incoming) => drop(streams.spawn(pass_on(incoming, engine.clone()))),
                None => return,
            },
            // Otherwise the router has closed the stream, or the engine has.
            Some(ended) = streams.join_next() => if let Err(Ok(panic)) = ended.map_err(JoinError::try_into_panic) {
                resume_unwind(panic)
            },
        }
    }
}

async fn pass_on(incoming: Incoming, engine: Sender<Command>) {
    let Incoming { stream, mut steps, ended } = incoming;
    let all = async {
        while let Some(step) = steps.next().await {
            if engine.send(Command::Step { stream, step }).await.is_err() {
                break;
            }
        }
    };
    // Which of the two ends it makes no difference.
    let _ = ended.run_until_cancelled(all).await;
}
