//! Sends a workload: closed loop (a fixed number of streams, each asking again as soon as it is answered) or open loop
//! (requests at times of their own, whether or not earlier ones are answered).

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use rand::{SeedableRng, rngs::StdRng};
use tokio::task::JoinSet;

use super::{
    arrivals::Arrivals,
    client::{Outcome, Target},
    workload::{Ask, Workload},
};

/// The schedule of requests.
#[derive(Debug, Clone)]
pub enum Loop {
    /// As many streams, until as many requests have been sent.
    Closed {
        /// Requests in flight.
        streams: usize,
        /// Requests in all.
        requests: usize,
    },
    /// At random times, until as many requests have been sent.
    Open {
        /// Distribution of the gaps.
        arrivals: Arrivals,
        /// Requests in all.
        requests: usize,
    },
    /// At the times of a trace, in seconds.
    Trace(Vec<(f64, Ask)>),
}

/// Sends everything and waits for all answers. Returns them in the order in which they ended, and the start.
pub async fn run(target: &Target, workload: &Workload, pace: Loop) -> Vec<Outcome> {
    let progress = progress_bar();
    let outcomes = match pace {
        Loop::Closed { streams, requests } => closed(target, workload, streams, requests, &progress).await,
        Loop::Open { arrivals, requests } => {
            let mut rng = StdRng::seed_from_u64(workload.seed);
            let mut time = 0.0;
            let asks = (0..requests).map(|i| {
                time += arrivals.next_gap(&mut rng);
                (time, workload.ask(i, i))
            });
            open(target, asks.collect(), &progress).await
        }
        Loop::Trace(asks) => open(target, asks, &progress).await,
    };
    progress.finish_and_clear();
    outcomes
}

fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{elapsed_precise} {pos} tokens, {per_sec}")
        .expect("invariant: the template is constant and valid");
    ProgressBar::no_length().with_style(style)
}

async fn closed(
    target: &Target,
    workload: &Workload,
    streams: usize,
    requests: usize,
    progress: &ProgressBar,
) -> Vec<Outcome> {
    let next = Arc::new(AtomicUsize::new(0));
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for stream in 0..streams {
        let (target, workload, next, progress) =
            (target.clone(), workload.clone(), next.clone(), progress.clone());
        tasks.spawn(async move {
            let mut outcomes = Vec::new();
            loop {
                let request = next.fetch_add(1, Ordering::Relaxed);
                if request >= requests {
                    return outcomes;
                }
                let planned = start.elapsed();
                let ask = workload.ask(request, stream);
                outcomes.push(target.send(&ask, start, planned, &progress).await);
            }
        });
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

async fn open(target: &Target, asks: Vec<(f64, Ask)>, progress: &ProgressBar) -> Vec<Outcome> {
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for (time, ask) in asks {
        let planned = Duration::from_secs_f64(time);
        tokio::time::sleep_until((start + planned).into()).await;
        let (target, progress) = (target.clone(), progress.clone());
        tasks.spawn(async move { target.send(&ask, start, planned, &progress).await });
    }
    tasks.join_all().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_is_late_when_the_generator_is_slow() {
        // Closed again: nobody answers there.
        let url =
            format!("http://{}", std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
        let target = Target::new(&url, "", true, Duration::from_secs(60)).unwrap();
        // A prompt whose text takes long to write.
        let ask = Ask { adapter: None, prompt: vec![7; 300_000], output_tokens: 1 };
        let outcomes = open(&target, vec![(0.0, ask)], &ProgressBar::hidden()).await;
        assert_eq!(outcomes[0].planned, Duration::ZERO);
        assert!(outcomes[0].lateness() > Duration::from_millis(1), "{:?}", outcomes[0].lateness());
    }
}
