//! Repeats what has failed in passing.

use std::time::Duration;

use tokio::time::sleep;

/// Attempts after the first one.
const RETRIES: u32 = 3;
/// The wait before the first retry. Each further one is twice as long.
const BACKOFF: Duration = Duration::from_millis(250);

/// Makes attempts until one succeeds, fails for good, or was the last one.
pub(crate) async fn repeatedly<T, E, F: Future<Output = Result<T, E>>>(
    is_passing: impl Fn(&E) -> bool,
    mut attempt: impl FnMut() -> F,
) -> Result<T, E> {
    for retry in 0..RETRIES {
        match attempt().await {
            Err(error) if is_passing(&error) => {}
            result => return result,
        }
        sleep(BACKOFF * 2_u32.pow(retry)).await;
    }
    attempt().await
}
