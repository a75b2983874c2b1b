//! Adapters on their way to the ranks: requests ask for them, and the exchange decides what is done.
//!
//! One task owns the [`exchange::Exchange`]. It makes the calls that the exchange tells it to make, each in a task of
//! its own, and waits for nobody. Whoever asks gets a [`Lease`], which ends when it is dropped.

mod book;
mod calls;
mod driver;
mod ids;
mod inbox;
mod merge;
mod trace;

use std::{
    env,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use config::{Config, RouterConfig};
use exchange::{Ask, AskId, Content, Exchange, Fault, Tenant, Tier};
use futures::future::try_join_all;
use lifecycle::Supervisor;
use scheduler::Adapter;
use secrecy::SecretString;
use sources::{Reference, Sources};
use store::Store;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    metrics::{AdapterMetrics, Metrics},
    ranks::Ranks,
    server::{StartError, longest_poll},
    tokenizer::TextFiles,
};
pub(crate) use book::{Book, Failure, InUse, Use};
use calls::{Calls, Files, Means};
use driver::Driver;
use ids::Credentials;
pub(crate) use inbox::{Inbox, News};
pub(crate) use merge::{MajoritySign, Merge, Part, Recipe, Strategy};
use trace::Trace;

/// The task's name, also in the log.
const NAME: &str = "adapters";
/// Orders on their way to the driver.
const ORDERS: usize = 1024;

/// An adapter that somebody needs.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) reference: Reference,
    /// The secret that is shown to its source.
    pub(crate) credential: Option<SecretString>,
}

/// What the exchange hands on from an ask to the calls that are made for it.
#[derive(Clone)]
pub(crate) enum Payload {
    /// An adapter of a source.
    Adapter(Arc<Wanted>),
    /// One that is made of others, which are on the disk.
    Merge(Arc<Merge>),
}

/// What the driver is told by those who wait for it.
enum Order {
    /// An adapter is needed.
    Ask(Asked),
    /// Several adapters are needed at the same time, on the same tier.
    AskTogether(Vec<Asked>),
    /// The metrics are to be brought up to date.
    Publish(oneshot::Sender<()>),
    /// Somebody wants to know where adapters are.
    Look(Look),
}

/// A look at the exchange.
type Look = Box<dyn FnOnce(&Exchange<Payload>) + Send>;

/// An ask on its way to the driver.
struct Asked {
    ask: Ask<Payload>,
    answer: oneshot::Sender<Result<Ready, Fault>>,
    /// Told of the end of a pin.
    lost: Option<oneshot::Sender<Fault>>,
}

/// An adapter that is on the disk, or that all ranks have in host memory, while it is leased.
#[derive(Debug, Clone)]
struct Ready {
    adapter: Adapter,
    invocation: Option<Arc<[u32]>>,
    session: u64,
}

/// An adapter, and the lease that keeps it in host memory.
#[derive(Debug)]
pub(crate) struct Leased {
    pub(crate) adapter: Adapter,
    /// The tokens at which it begins to act; `None` if it acts from the first row on.
    pub(crate) invocation: Option<Arc<[u32]>>,
    pub(crate) lease: Lease,
}

/// Keeps an adapter on the disk, or in the host memory of all ranks, until it is dropped. In host memory, the lease ends
/// with the ranks' session, too.
#[derive(Debug)]
pub(crate) struct Lease {
    ask: AskId,
    /// The session in which it holds.
    session: u64,
    inbox: Arc<Inbox>,
}

impl Lease {
    /// Returns whether it holds in a session.
    pub(crate) fn holds_in(&self, session: u64) -> bool {
        self.session == session
    }
}

/// The leases of one request.
#[derive(Debug, Default)]
pub(crate) struct Leases(Vec<Lease>);

impl Leases {
    /// Returns whether all of them hold in a session.
    pub(crate) fn hold_in(&self, session: u64) -> bool {
        self.0.iter().all(|lease| lease.holds_in(session))
    }
}

impl FromIterator<Lease> for Leases {
    fn from_iter<I: IntoIterator<Item = Lease>>(leases: I) -> Leases {
        Leases(leases.into_iter().collect())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.inbox.add(News::Released(self.ask));
    }
}

/// A pin, whose lease keeps an adapter in host memory through all sessions.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub(crate) lease: Lease,
    pub(crate) lost: Lost,
}

/// Tells of the end of a pin that comes before that of its lease.
#[derive(Debug)]
pub(crate) struct Lost(oneshot::Receiver<Fault>);

impl Lost {
    /// Waits until the adapter cannot be kept any more.
    pub(crate) async fn wait(self) -> Fault {
        self.0.await.unwrap_or_else(|_| stopped())
    }
}

fn stopped() -> Fault {
    Fault::Ranks("the server stops".into())
}

/// Asks for adapters.
#[derive(Clone)]
pub(crate) struct Adapters {
    orders: mpsc::Sender<Order>,
    inbox: Arc<Inbox>,
    ids: Arc<AtomicU64>,
    sources: Arc<Sources>,
    credentials: Arc<Credentials>,
    metrics: Arc<AdapterMetrics>,
    book: Arc<Book>,
    limits: exchange::Limits,
    files: Files,
    /// The driver's time 0.
    begun: Instant,
}

impl Adapters {
    /// Starts the driver, which calls the ranks by connections of its own.
    pub(crate) fn start(
        config: &Config,
        sources: Sources,
        metrics: &Metrics,
        supervisor: &Supervisor,
    ) -> Result<Adapters, StartError> {
        let limit = longest_poll(&config.router);
        let (orders, received) = mpsc::channel(ORDERS);
        let (inbox, begun) = (Arc::new(Inbox::default()), Instant::now());
        let (metrics, sources, limits) = (Arc::new(metrics.adapters()), Arc::new(sources), limits(config));
        let book = Arc::new(Book::new());
        let calls = Calls::new(Means {
            sources: sources.clone(),
            store: cache(&config.router)?,
            ranks: Ranks::new(&config.shards.uds, limit),
            metrics: metrics.clone(),
            fresh_for: config.router.adapter_auth_ttl_s,
            max_lora_rank: config.router.max_lora_rank,
            book: book.clone(),
        });
        let files = calls.files();
        let path = config.router.adapter_trace.as_deref();
        let trace = path.map(|path| {
            let started = Trace::start(path, &limits, supervisor);
            started.map_err(|source| StartError::Trace { path: path.into(), source })
        });
        let driver = Driver::new(limits, calls, metrics.clone(), trace.transpose()?, begun);
        supervisor.task(NAME, limit, driver.run(received, inbox.clone()));
        Ok(Adapters {
            orders,
            inbox,
            ids: Arc::default(),
            sources,
            credentials: Arc::new(Credentials::new()),
            metrics,
            book,
            limits,
            files,
            begun,
        })
    }

    /// What is known of adapters.
    pub(crate) fn book(&self) -> &Book {
        &self.book
    }

    /// The bounds of all tiers.
    pub(crate) fn limits(&self) -> &exchange::Limits {
        &self.limits
    }

    /// Asks the exchange where adapters are. `None` if the server stops.
    pub(crate) async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Exchange<Payload>) -> T + Send + 'static,
    ) -> Option<T> {
        let (seen, answer) = oneshot::channel();
        // Whoever looks may have left.
        let look = Box::new(move |exchange: &Exchange<Payload>| drop(seen.send(look(exchange))));
        self.orders.send(Order::Look(look)).await.ok()?;
        answer.await.ok()
    }

    /// Whatever is remembered of a reference is asked again.
    pub(crate) fn reload(&self, reference: &Reference) {
        self.inbox.add(News::Reload(ids::reference(reference)));
    }

    /// Removes the copies of an adapter that nobody needs.
    pub(crate) fn evict(&self, content: Content) {
        self.inbox.add(News::Evict(content));
    }

    /// Where the engine reports what happens to the ranks.
    pub(crate) fn inbox(&self) -> Arc<Inbox> {
        self.inbox.clone()
    }

    /// Brings the metrics up to date.
    pub(crate) async fn publish(&self) {
        let (published, done) = oneshot::channel();
        // Fails when the server stops.
        if self.orders.send(Order::Publish(published)).await.is_ok() {
            let _ = done.await;
        }
    }

    /// Waits until an adapter is in the host memory of all ranks. Dropping the future gives up the ask.
    pub(crate) async fn ask(
        &self,
        wanted: Wanted,
        tenant: Tenant,
        deadline: Instant,
    ) -> Result<Leased, Fault> {
        let counted = self.metrics.ask();
        let asked = self.ask_uncounted(wanted, tenant, deadline, None).await;
        counted.end(asked.as_ref().err());
        asked
    }

    /// The same, and keeps it there.
    pub(crate) async fn pin(
        &self,
        wanted: Wanted,
        tenant: Tenant,
        deadline: Instant,
    ) -> Result<Pinned, Fault> {
        let (told, lost) = oneshot::channel();
        let leased = self.ask_uncounted(wanted, tenant, deadline, Some(told)).await?;
        Ok(Pinned { lease: leased.lease, lost: Lost(lost) })
    }

    /// An ask for a pin, if there is somebody to tell of its end.
    async fn ask_uncounted(
        &self,
        wanted: Wanted,
        tenant: Tenant,
        deadline: Instant,
        lost: Option<oneshot::Sender<Fault>>,
    ) -> Result<Leased, Fault> {
        let (begun, reference) = (Instant::now(), wanted.reference.clone());
        let (mut asked, waiting) = self.new_ask(wanted, Tier::Host, tenant, deadline);
        (asked.ask.pin, asked.lost) = (lost.is_some(), lost);
        self.order(Order::Ask(asked)).await?;
        let leased = waiting.leased().await;
        let content = leased.as_ref().map(|leased| Content(leased.adapter.key.0));
        self.book.asked(&reference, begun.elapsed(), content);
        leased
    }

    /// Waits until the parts of a merge are on the disk, and then until their merge is in the host memory of all ranks.
    /// Also returns the contents of the parts. A fault has the number of the part that it is about. Dropping the future gives up the asks.
    pub(crate) async fn ask_merged(
        &self,
        parts: Vec<(Wanted, f64)>,
        recipe: Recipe,
        tenant: Tenant,
        deadline: Instant,
    ) -> Result<(Leased, Vec<Content>), (Option<usize>, Fault)> {
        let counted = self.metrics.ask();
        let asked = self.ask_merged_uncounted(parts, recipe, tenant, deadline).await;
        counted.end(asked.as_ref().err().map(|(_, fault)| fault));
        asked
    }

    /// Waits until all adapters of an ensemble are in the host memory of all ranks. A fault has the number of the member that
    /// it is about. Dropping the future gives up the asks.
    pub(crate) async fn ask_ensemble(
        &self,
        members: Vec<Wanted>,
        tenant: Tenant,
        deadline: Instant,
    ) -> Result<Vec<Leased>, (Option<usize>, Fault)> {
        let counted = self.metrics.ask();
        let asked = self.ask_together(members, Tier::Host, tenant, deadline).await;
        counted.end(asked.as_ref().err().map(|(_, fault)| fault));
        asked
    }

    /// Waits until adapters are on a tier, all of them.
    async fn ask_together(
        &self,
        wanted: Vec<Wanted>,
        tier: Tier,
        tenant: Tenant,
        deadline: Instant,
    ) -> Result<Vec<Leased>, (Option<usize>, Fault)> {
        let (asked, waiting): (Vec<_>, Vec<_>) =
            wanted.into_iter().map(|wanted| self.new_ask(wanted, tier, tenant, deadline)).unzip();
        self.order(Order::AskTogether(asked)).await.map_err(|fault| (None, fault))?;
        let answers = waiting
            .into_iter()
            .enumerate()
            .map(async |(number, waiting)| waiting.leased().await.map_err(|fault| (Some(number), fault)));
        try_join_all(answers).await
    }

    async fn ask_merged_uncounted(
        &self,
        parts: Vec<(Wanted, f64)>,
        recipe: Recipe,
        tenant: Tenant,
        deadline: Instant,
    ) -> Result<(Leased, Vec<Content>), (Option<usize>, Fault)> {
        let whole = |fault| (None, fault);
        let described: Vec<_> =
            parts.iter().map(|(wanted, weight)| (wanted.reference.to_string(), *weight)).collect();
        let wanted = parts.into_iter().map(|(wanted, _)| wanted).collect();
        // They are leased until the merge has been read.
        let on_disk = self.ask_together(wanted, Tier::Disk, tenant, deadline).await?;
        let contents = on_disk.iter().map(|leased| Content(leased.adapter.key.0)).collect();
        let part = |((name, weight), leased): ((String, f64), &Leased)| Part {
            name,
            content: Content(leased.adapter.key.0),
            weight,
        };
        let merge = Merge::new(described.into_iter().zip(&on_disk).map(part).collect(), recipe);
        let (answer, waiting) = self.waiting();
        let content = merge.content();
        let ask = Ask {
            id: waiting.lease.ask,
            tenant,
            source: ids::source(MERGES),
            reference: ids::merge(content),
            credential: self.credentials.name(None),
            tier: Tier::Host,
            pin: false,
            deadline: deadline.duration_since(self.begun),
            payload: Payload::Merge(Arc::new(merge)),
        };
        self.order(Order::Ask(Asked { ask, answer, lost: None })).await.map_err(whole)?;
        Ok((waiting.leased().await.map_err(whole)?, contents))
    }

    /// Reads the files of a content that say how texts become its tokens. `None` if they are not on this machine any more.
    /// Blocks.
    pub(crate) fn text_files(
        &self,
        content: Content,
        adapter: &Reference,
    ) -> Result<Option<TextFiles>, Fault> {
        self.files.text(content, adapter)
    }

    /// Waits until an adapter is on the disk, where it is kept until the lease is dropped.
    pub(crate) async fn ask_for_files(
        &self,
        wanted: Wanted,
        tenant: Tenant,
        deadline: Instant,
    ) -> Result<Leased, Fault> {
        let (asked, waiting) = self.new_ask(wanted, Tier::Disk, tenant, deadline);
        self.order(Order::Ask(asked)).await?;
        waiting.leased().await
    }

    fn new_ask(&self, wanted: Wanted, tier: Tier, tenant: Tenant, deadline: Instant) -> (Asked, Waiting) {
        let (answer, waiting) = self.waiting();
        let ask = Ask {
            id: waiting.lease.ask,
            tenant,
            source: ids::source(&self.sources.place(&wanted.reference)),
            reference: ids::reference(&wanted.reference),
            credential: self.credentials.name(wanted.credential.as_ref()),
            tier,
            pin: false,
            deadline: deadline.duration_since(self.begun),
            payload: Payload::Adapter(Arc::new(wanted)),
        };
        (Asked { ask, answer, lost: None }, waiting)
    }

    fn waiting(&self) -> (oneshot::Sender<Result<Ready, Fault>>, Waiting) {
        let id = AskId(self.ids.fetch_add(1, Ordering::Relaxed));
        let (answer, answered) = oneshot::channel();
        let lease = Lease { ask: id, session: 0, inbox: self.inbox.clone() };
        (answer, Waiting { answered, lease })
    }

    async fn order(&self, order: Order) -> Result<(), Fault> {
        self.orders.send(order).await.map_err(|_| stopped())
    }
}

/// The source of merges.
const MERGES: &str = "merges";

/// An ask that has no answer yet. The driver takes no ask whose receiver has gone, and learns of the end of any that it
/// has taken; so the receiver is dropped first.
struct Waiting {
    answered: oneshot::Receiver<Result<Ready, Fault>>,
    lease: Lease,
}

impl Waiting {
    async fn leased(self) -> Result<Leased, Fault> {
        let Waiting { answered, mut lease } = self;
        let Ready { adapter, invocation, session } = answered.await.map_err(|_| stopped())??;
        lease.session = session;
        Ok(Leased { adapter, invocation, lease })
    }
}

/// Opens the cache on the disk. If no flag names one and there is no place for it, adapters are read in place only.
fn cache(config: &RouterConfig) -> Result<Option<Store>, StartError> {
    let Some(path) = config.adapter_cache.clone().or_else(default_cache) else { return Ok(None) };
    match Store::open(&path, config.adapter_cache_size) {
        Ok(store) => Ok(Some(store)),
        Err(source) if config.adapter_cache.is_some() => Err(StartError::AdapterCache { path, source }),
        Err(error) => {
            tracing::warn!(
                "adapters cannot be downloaded, because {} cannot be used: {error}",
                path.display()
            );
            Ok(None)
        }
    }
}

/// The place of the cache where users keep theirs.
fn default_cache() -> Option<PathBuf> {
    let own = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = own.or_else(|| Some(env::home_dir()?.join(".cache")))?;
    Some(caches.join("lorax/adapters"))
}

/// Bytes of an adapter that is not refused, however small host memory is, if it fits: about those of rank 64 on all
/// projections of a model of 8 billion parameters in 16 bits, 336 MB, and some more.
const LARGE: u64 = 512 << 20;

/// Bytes of the largest adapter, where no flag says. Of those that take a quarter of host memory, others can still be
/// loaded beside one, also while pins have their half.
fn largest_adapter(host_bytes: u64) -> u64 {
    (host_bytes / 4).max(LARGE).min(host_bytes)
}

/// The bounds that the flags set.
fn limits(config: &Config) -> exchange::Limits {
    let router = &config.router;
    let host_bytes = config.shard.adapter_host_memory;
    let budget = |source: u32, deadline| exchange::Budget { source, tenant: source.div_ceil(2), deadline };
    exchange::Limits {
        disk_bytes: router.adapter_cache_size,
        host_bytes,
        adapter_bytes: router.max_adapter_size.unwrap_or_else(|| largest_adapter(host_bytes)),
        lookups: budget(router.max_adapter_lookups, LOOKUP),
        fetches: budget(router.max_adapter_downloads, DOWNLOAD.max(router.prepare_timeout)),
        stages: budget(router.max_adapter_stages, STAGE.max(router.prepare_timeout)),
        ..exchange::Limits::default()
    }
}

/// Time for a question to a source.
const LOOKUP: Duration = Duration::from_secs(30);
/// Time for a download. It goes on when the requests that have asked for it have failed, for those that come later.
const DOWNLOAD: Duration = Duration::from_secs(600);
/// Time for a copy into host memory, which goes on in the same manner.
const STAGE: Duration = Duration::from_secs(60);
