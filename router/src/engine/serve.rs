//! The engine's thread: attaches to the ranks, serves until the session ends, and begins again.

use std::{
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use config::RouterConfig;
use exchange::Content;
use futures::future::{select_all, try_join_all};
use lifecycle::Supervisor;
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};

use super::{Cancels, Readiness, Submit, batcher::Batcher, device::DeviceNews};
use crate::{
    adapters::{self, News},
    generation::{Failure, Update},
    grammar::mask_workers::MaskWorkers,
    metrics::{End, EngineMetrics},
    ranks::{Group, RankError, Ranks},
    server::longest_poll,
    wire::Info,
};

/// The thread's name, also in the log.
const NAME: &str = "engine";
/// Time between two attempts to reach the ranks.
const RECONNECT: Duration = Duration::from_millis(100);
/// Time between two heartbeats of a rank.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Unless the configuration sets a deadline for steps, a step gets this long, or this many times what the longest
/// step of the warm-up took if that is longer.
const LEAST_STEP_TIMEOUT: Duration = Duration::from_secs(10);
const STEP_TIMEOUT_FACTOR: u32 = 20;

/// The engine's inputs.
pub(super) struct Inbox {
    pub(super) submits: mpsc::Receiver<Submit>,
    pub(super) cancels: Arc<Cancels>,
    /// Where it reports what happens to adapters.
    pub(super) adapters: Arc<adapters::Inbox>,
}

/// A session of the engine with the ranks.
pub(super) struct Session {
    pub(super) number: u64,
    pub(super) deadlines: Deadlines,
    pub(super) device: DeviceNews,
}

/// Deadlines of the ranks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadlines {
    /// Deadline of a step, and of any call but `Info` and `Stage`.
    pub(super) step: Duration,
    /// Deadline of a load into a slot.
    pub(super) load: Duration,
}

impl Deadlines {
    fn new(config: &RouterConfig, longest_step: Duration) -> Deadlines {
        let by_warm_up = LEAST_STEP_TIMEOUT.max(longest_step * STEP_TIMEOUT_FACTOR);
        Deadlines { step: config.step_timeout.unwrap_or(by_warm_up), load: config.prepare_timeout }
    }
}

/// Starts the thread. It ends when all senders of jobs are gone, which must not be before the process is told to stop.
/// The threads that compute masks end when the result is dropped as well: an engine that fails does not end them, so that
/// nobody takes them for the cause.
pub(super) fn start(
    sockets: Vec<PathBuf>,
    config: RouterConfig,
    inbox: Inbox,
    (readiness, metrics): (watch::Sender<Readiness>, Arc<EngineMetrics>),
    supervisor: &Supervisor,
) -> io::Result<Arc<MaskWorkers>> {
    let limit = longest_poll(&config);
    let mask_workers = Arc::new(MaskWorkers::start(limit, supervisor)?);
    let kept = mask_workers.clone();
    supervisor.runtime(NAME, limit, async move {
        let connector = Connector {
            ranks: Ranks::new(&sockets, limit),
            config,
            readiness,
            metrics,
            mask_workers,
            session: 0,
        };
        serve(connector, inbox).await;
    })?;
    Ok(kept)
}

async fn serve(mut connector: Connector, mut inbox: Inbox) {
    loop {
        let (group, deadlines) = tokio::select! {
            attached = connector.connect() => attached,
            () = refuse_all(&mut inbox) => return,
        };
        let info = Arc::new(group.info.clone());
        let metrics = connector.metrics.clone();
        metrics.sessions.increment(1);
        metrics.ranks.set(connector.ranks.world() as f64);
        inbox.adapters.add(connector.attached(&group));
        let device = DeviceNews::new(inbox.adapters.clone(), &group.resident.slots);
        let session = Session { number: connector.session, deadlines, device };
        let mut batcher =
            Batcher::new(group, &connector.config, session, connector.mask_workers.clone(), metrics);
        connector.readiness.send_replace(Readiness::Ready(info.clone()));
        connector.greet(&info);
        let ended = tokio::select! {
            ended = batcher.run(&mut inbox) => ended,
            error = heartbeats(&connector.ranks, deadlines.step) => Err(error),
        };
        let reason = ended.as_ref().err().map_or_else(|| "the server stops".into(), ToString::to_string);
        connector.readiness.send_replace(Readiness::NotReady(reason));
        inbox.adapters.add(News::Detached);
        batcher.fail_all();
        match ended {
            Ok(()) => return,
            Err(error) => {
                tracing::warn!("lost the model: {error}");
                connector.metrics.session_failures.increment(1);
            }
        }
    }
}

/// Fails the jobs that come while there is no session. Returns when nobody can send any more.
async fn refuse_all(inbox: &mut Inbox) {
    loop {
        tokio::select! {
            submit = inbox.submits.recv() => match submit {
                Some(submit) => {
                    submit.outcome.end(End::Unavailable);
                    let _ = submit.updates.try_send(Update::Failed(Failure::Unavailable));
                }
                None => return,
            },
            // These jobs have been failed already.
            () = inbox.cancels.added.notified() => drop(inbox.cancels.take()),
        }
    }
}

/// Begins sessions.
struct Connector {
    ranks: Ranks,
    config: RouterConfig,
    readiness: watch::Sender<Readiness>,
    metrics: Arc<EngineMetrics>,
    mask_workers: Arc<MaskWorkers>,
    /// Number of the last session.
    session: u64,
}

impl Connector {
    /// Begins a session as soon as that is possible. Says why it is not whenever the reason changes.
    async fn connect(&mut self) -> (Group, Deadlines) {
        let mut told = None;
        loop {
            match self.attach().await {
                Ok(attached) => return attached,
                Err(error) if told.as_ref() != Some(&error) => {
                    match error {
                        RankError::Absent { .. } => tracing::info!("waiting for the model: {error}"),
                        _ => tracing::warn!("waiting for the model: {error}"),
                    }
                    self.readiness.send_replace(Readiness::NotReady(error.to_string()));
                    told = Some(error);
                }
                Err(_) => {}
            }
            sleep(RECONNECT).await;
        }
    }

    async fn attach(&mut self) -> Result<(Group, Deadlines), RankError> {
        let info = self.ranks.info().await?;
        let deadlines = Deadlines::new(&self.config, info.longest_step);
        // A rank that hangs would lose the session again at once.
        let beats = (0..self.ranks.world()).map(|rank| beat(&self.ranks, rank, deadlines.step));
        try_join_all(beats).await?;
        self.session = next_session(self.session);
        Ok((self.ranks.attach(self.session, info, deadlines.step).await?, deadlines))
    }

    /// The news that a session has begun.
    fn attached(&self, group: &Group) -> News {
        let host = group.resident.host.iter().map(|(key, staged)| (Content(key.0), staged.clone()));
        News::Attached { session: self.session, host: host.collect() }
    }

    fn greet(&self, info: &Info) {
        let (ranks, session) = (self.ranks.world(), self.session);
        tracing::info!(device = info.device, dtype = info.dtype, ranks, session, "connected to the model");
        let most = info.max_total_tokens();
        if let Some(asked) = self.config.max_total_tokens.filter(|asked| *asked > most) {
            tracing::warn!("max-total-tokens: {asked} do not fit, a request may have {most}");
        }
    }
}

/// A number greater than that of any session before, of this process or of an earlier one: the time in microseconds, or
/// one more than the last if the clock has not moved on since.
fn next_session(last: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_micros() as u64);
    now.max(last + 1)
}

/// Asks every rank for its heartbeat, over and over; ends with what is wrong with the first one that does not live.
async fn heartbeats(ranks: &Ranks, limit: Duration) -> RankError {
    let lives = (0..ranks.world()).map(|rank| Box::pin(last_beat(ranks, rank, limit)));
    select_all(lives).await.0
}

async fn last_beat(ranks: &Ranks, rank: usize, limit: Duration) -> RankError {
    loop {
        sleep(HEARTBEAT).await;
        if let Err(error) = beat(ranks, rank, limit).await {
            return error;
        }
    }
}

/// Fails if a rank does not answer, or if its step loop has been at one piece of work for longer than `limit`.
async fn beat(ranks: &Ranks, rank: usize, limit: Duration) -> Result<(), RankError> {
    match ranks.oldest_work(rank, limit).await? {
        Some(age) if age > limit => Err(RankError::Stuck { rank, age, limit }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_numbers_grow_whatever_the_clock_does() {
        let first = next_session(0);
        assert!(first > 1_700_000_000_000_000, "a time in microseconds");
        let late = u64::MAX / 2;
        assert_eq!(next_session(late), late + 1, "the clock was set back");
        let mut last = 0;
        for _ in 0..1000 {
            let next = next_session(last);
            assert!(next > last);
            last = next;
        }
    }

    #[test]
    fn a_step_gets_twenty_times_the_longest_one_of_the_warm_up_and_at_least_ten_seconds() {
        let mut config = RouterConfig::default();
        for (longest, seconds) in
            [(0, 10.0), (1, 10.0), (500_000, 10.0), (500_050, 10.001), (3_000_000, 60.0)]
        {
            let deadlines = Deadlines::new(&config, Duration::from_micros(longest));
            assert_eq!(deadlines.step, Duration::from_secs_f64(seconds), "{longest}");
        }
        // The largest time that a shard can name overflows nothing.
        assert!(Deadlines::new(&config, Duration::from_micros(u64::MAX)).step > Duration::from_secs(1 << 40));
        config.step_timeout = Some(Duration::from_secs(3));
        assert_eq!(Deadlines::new(&config, Duration::from_secs(3)).step, Duration::from_secs(3));
    }
}
