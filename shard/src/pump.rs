//! Passes the steps of the router's streams on to the engine.

use std::pin::Pin;

use futures::stream::{FuturesUnordered, Stream, StreamExt};
use tokio::sync::mpsc::{Receiver, Sender};
use tokio_util::sync::CancellationToken;

use crate::{
    engine::{Command, StepError},
    step::Request,
};

/// Steps and their masks as they arrive, each of them or what is wrong with it.
pub type Steps = Pin<Box<dyn Stream<Item = Result<Request, StepError>> + Send>>;

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
/// any more. The streams have no tasks of their own, so that whoever watches this one watches them all.
pub async fn run(mut opened: Receiver<Incoming>, engine: Sender<Command>) {
    let mut streams = FuturesUnordered::new();
    loop {
        tokio::select! {
            incoming = opened.recv() => match incoming {
                Some(incoming) => streams.push(pass_on(incoming, engine.clone())),
                None => return,
            },
            // The router has closed the stream, or the engine has.
            Some(()) = streams.next() => {}
        }
    }
}

async fn pass_on(incoming: Incoming, engine: Sender<Command>) {
    let Incoming { stream, mut steps, ended } = incoming;
    let all = async {
        while let Some(step) = steps.next().await {
            let command = match step {
                Ok(Request::Step(step)) => Command::Step { stream, step: Ok(step) },
                Ok(Request::Masks(masks)) => Command::Masks { stream, masks },
                Err(error) => Command::Step { stream, step: Err(error) },
            };
            if engine.send(command).await.is_err() {
                break;
            }
        }
    };
    // Which of the two ends it makes no difference.
    let _ = ended.run_until_cancelled(all).await;
}
