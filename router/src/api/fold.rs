//! Dialects as folds: a sequence's events become deltas, and deltas add up to the whole.

use futures::{Stream, StreamExt, stream};

use super::{error::ApiError, group::Generation};
use crate::text::TextEvent;

/// A dialect's way to report one sequence.
pub(crate) trait Fold: Send + 'static {
    /// The part of a response that one event of a stream carries.
    type Delta: Send;
    /// The whole response.
    type Whole;

    /// Returns the deltas that come before the first event.
    fn open(&mut self) -> Vec<Self::Delta> {
        Vec::new()
    }

    /// Returns the deltas of an event.
    fn push(&mut self, event: TextEvent) -> Vec<Self::Delta>;

    /// Returns whether the response is complete before its sequence has ended.
    fn is_done(&self) -> bool {
        false
    }

    /// Returns the whole response before the first delta.
    fn empty(&self) -> Self::Whole;

    /// Adds a delta to the whole.
    fn add(whole: &mut Self::Whole, delta: Self::Delta);
}

/// The deltas of a sequence as they come. An error is the last.
pub(crate) fn deltas<F: Fold>(
    generation: Generation,
    mut fold: F,
) -> impl Stream<Item = Result<F::Delta, ApiError>> + Send {
    let opening = fold.open().into_iter().map(Ok).collect::<Vec<_>>();
    let following = stream::unfold(Some((generation, fold)), async |state| {
        let (mut generation, mut fold) = state?;
        Some(match generation.next().await? {
            Ok(event) => {
                let deltas = fold.push(event).into_iter().map(Ok).collect();
                let rest = Some((generation, fold)).filter(|(_, fold)| !fold.is_done());
                (deltas, rest)
            }
            Err(error) => (vec![Err(error)], None),
        })
    });
    stream::iter(opening).chain(following.flat_map(|deltas: Vec<_>| stream::iter(deltas)))
}

/// Waits for the end of a sequence, and returns the whole.
pub(crate) async fn collect<F: Fold>(generation: &mut Generation, mut fold: F) -> Result<F::Whole, ApiError> {
    let mut whole = fold.empty();
    fold.open().into_iter().for_each(|delta| F::add(&mut whole, delta));
    while !fold.is_done()
        && let Some(event) = generation.next().await
    {
        fold.push(event?).into_iter().for_each(|delta| F::add(&mut whole, delta));
    }
    Ok(whole)
}
