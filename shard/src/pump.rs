//! Forwards the steps of the router's streams to the engine.

use std::pin::Pin;

use futures::stream::{FuturesUnordered, Stream, StreamExt};
use tokio::sync::mpsc::{Receiver, Sender};
use tokio_util::sync::CancellationToken;

use crate::{
    engine::{Command, StepError},
    step::Request,
};

/// Steps and masks as they arrive; an error stands for a message that is not valid.
pub type Steps = Pin<Box<dyn Stream<Item = Result<Request, StepError>> + Send>>;

/// A stream that the router has opened.
pub struct Incoming {
    /// The number of the stream.
    pub stream: u64,
    /// Its messages.
    pub steps: Steps,
    /// Cancelled when the engine takes no more of its steps.
    pub ended: CancellationToken,
}

/// Forwards the steps of all streams, those of each stream in order. Returns only when no more streams can be opened,
/// which does not happen while the process serves. All streams are part of this one task, so that supervising it covers
/// them all.
pub async fn run(mut opened: Receiver<Incoming>, engine: Sender<Command>) {
    let mut streams = FuturesUnordered::new();
    loop {
        tokio::select! {
            incoming = opened.recv() => match incoming {
                Some(incoming) => streams.push(forward(incoming, engine.clone())),
                None => return,
            },
            // The router or the engine has ended a stream.
            Some(()) = streams.next() => {}
        }
    }
}

/// Forwards one stream until it ends.
async fn forward(incoming: Incoming, engine: Sender<Command>) {
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
    // It makes no difference which of the two ends first.
    let _ = ended.run_until_cancelled(all).await;
}
