//! Managing adapters: `/v1/adapters`, and the routes that controllers of other servers call.

mod aibrix;
mod body;
mod held;
mod vllm;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use axum::{
    Json,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use exchange::{Content, Exchange, Resident, Slot, Tier, TierStats};
use schemars::JsonSchema;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use sources::Reference;
use tokio::time::Instant;

use super::error::{ApiError, Dialect};
use crate::{
    adapters::{Failure, Use},
    registry::{New, Registered, RegistryError},
    server::{
        App,
        accept::{Accepted, Body, Caller},
    },
};
pub(crate) use aibrix::{
    LoadRequest as AibrixLoad, UnloadRequest as AibrixUnload, load as aibrix_load, unload as aibrix_unload,
};
use body::{Adapter, Bytes, Capacity, DeviceTier, LastError, List, LoadSeconds, Text, TierUse, Unloaded};
pub(crate) use vllm::{
    LoadRequest as VllmLoad, UnloadRequest as VllmUnload, load as vllm_load, unload as vllm_unload,
};

/// Time for which `DELETE` waits for the requests that run, unless it says otherwise.
const DRAIN: Duration = Duration::from_secs(30);
/// The longest time that it may ask for, in seconds.
const LONGEST_DRAIN: f64 = 3600.0;

/// Body of `POST /v1/adapters`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RegisterRequest {
    adapter_id: String,
    adapter_source: Option<String>,
    /// The name; that of the adapter if there is none.
    id: Option<String>,
    #[schemars(with = "Option<String>")]
    api_token: Option<SecretString>,
    #[serde(default)]
    pin: bool,
    /// Takes the place of a registration of this name, and looks for a new version.
    #[serde(default)]
    replace: bool,
}

impl Body for RegisterRequest {
    const DIALECT: Dialect = Dialect::OpenAi;
}

#[derive(Debug, Deserialize)]
pub(crate) struct Drain {
    timeout_s: Option<f64>,
}

/// `POST /v1/adapters`: brings an adapter into host memory, and registers it.
pub(crate) async fn register(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<RegisterRequest>,
) -> Response {
    let answer = async {
        let reference = app.reference("adapter_id", &body.adapter_id, body.adapter_source.as_deref())?;
        let id = body.id.unwrap_or_else(|| reference.to_string());
        let credential = caller.credential.or_in_body(body.api_token).into_given();
        let new = New { id: id.clone(), reference, credential, pinned: body.pin };
        app.register(&caller, new, body.replace).await?;
        let places = Places::of(&app).await?;
        let registered = app.registry.find(&id);
        let adapter = registered.map(|registered| describe(&app, &places, id.clone(), &registered));
        // Somebody else may have removed it since.
        adapter.ok_or(ApiError::AdapterUnknown { id })
    };
    respond(answer.await)
}

/// `GET /v1/adapters`: those that are registered, and those that requests have named.
pub(crate) async fn list(State(app): State<Arc<App>>) -> Response {
    let places = match Places::of(&app).await {
        Ok(places) => places,
        Err(error) => return error.respond(Dialect::OpenAi),
    };
    let registered = app.registry.all();
    let mut data: Vec<Adapter> =
        registered.iter().map(|(id, registered)| describe(&app, &places, id.clone(), registered)).collect();
    // The names that other tenants use are for the administrator alone.
    if !app.is_shared_by_tenants() {
        let is_known = |named: &Reference| registered.iter().any(|(_, entry)| entry.reference == *named);
        let named = app.adapters.book().references().into_iter().filter(|named| !is_known(named));
        data.extend(named.map(|named| Adapter::new(named.to_string(), &named).with(&app, &places, None)));
    }
    Json(List { object: "list", data }).into_response()
}

/// `GET /v1/adapters/{id}`
pub(crate) async fn show(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    let answer = async {
        let registered = app.registry.find(&id).ok_or(ApiError::AdapterUnknown { id: id.clone() })?;
        Ok(describe(&app, &Places::of(&app).await?, id, &registered))
    };
    respond(answer.await)
}

/// `DELETE /v1/adapters/{id}`: ends a registration, waits until no request uses the adapter, and removes its copies.
pub(crate) async fn remove(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    Query(Drain { timeout_s }): Query<Drain>,
) -> Response {
    let answer = async {
        let seconds = timeout_s.unwrap_or(DRAIN.as_secs_f64());
        if !(0.0..=LONGEST_DRAIN).contains(&seconds) {
            return Err(ApiError::invalid("timeout_s", format!("must be between 0 and {LONGEST_DRAIN}")));
        }
        let registered = app.registry.unregister(&id).await?;
        let reference = registered.reference.clone();
        // Its pin ends here.
        drop(registered);
        let running = app.registry.unload(&reference, Duration::from_secs_f64(seconds)).await;
        Ok(Unloaded { id, object: "adapter.deleted", deleted: true, unloaded: running == 0, running })
    };
    respond(answer.await)
}

/// `GET /v1/adapters/capacity`: what the tiers have and may have.
pub(crate) async fn capacity(State(app): State<Arc<App>>) -> Response {
    let Some(stats) = app.adapters.look(Exchange::stats).await else {
        return stopping().respond(Dialect::OpenAi);
    };
    let limits = app.adapters.limits();
    let info = app.engine.info();
    let tier = |stats: TierStats, limit| TierUse {
        limit_bytes: limit,
        bytes: stats.bytes,
        pinned_bytes: stats.pinned_bytes,
        reserved_bytes: stats.reserved_bytes,
        leaving_bytes: stats.leaving_bytes,
        adapters: stats.copies,
    };
    let capacity = Capacity {
        device: DeviceTier {
            slots: info.as_ref().map(|info| info.num_slots),
            // 0 is no bound.
            limit_bytes: info.as_ref().map(|info| info.adapter_bytes).filter(|bytes| *bytes > 0),
            adapters: stats.device.copies,
        },
        host: tier(stats.host, limits.host_bytes),
        disk: tier(stats.disk, limits.disk_bytes),
        max_adapter_bytes: limits.adapter_bytes,
        max_lora_rank: app.config.router.max_lora_rank,
        waiting: stats.waiting,
        leased: stats.leased,
    };
    (StatusCode::OK, Json(capacity)).into_response()
}

fn respond(answer: Result<impl Serialize, ApiError>) -> Response {
    answer.map_or_else(|error| error.respond(Dialect::OpenAi), |body| Json(body).into_response())
}

fn stopping() -> ApiError {
    ApiError::Unavailable("the server is about to stop".into())
}

impl App {
    /// Registers an adapter for a caller who waits.
    async fn register(&self, caller: &Caller, new: New, replace: bool) -> Result<(), RegistryError> {
        let deadline = Instant::now() + self.config.router.prepare_timeout;
        self.registry.register(new, replace, caller.principal.tenant.asking(), deadline).await
    }
}

/// Where adapters are.
struct Places {
    host: HashMap<Content, Resident>,
    disk: HashMap<Content, Resident>,
    device: HashMap<Content, Slot>,
}

impl Places {
    async fn of(app: &App) -> Result<Places, ApiError> {
        let book = app.adapters.book();
        let uses = book.references().into_iter().filter_map(|reference| book.of(&reference)?.content);
        let contents: Vec<Content> = uses.collect();
        let look = move |exchange: &Exchange<_>| {
            let tier =
                |tier| exchange.residents(tier).into_iter().map(|found| (found.content, found)).collect();
            let slot = |content| (content, exchange.slot_of(content));
            Places {
                host: tier(Tier::Host),
                disk: tier(Tier::Disk),
                device: contents.into_iter().map(slot).collect(),
            }
        };
        app.adapters.look(look).await.ok_or_else(stopping)
    }

    /// The nearest tier that has a content.
    fn tier(&self, content: Content) -> &'static str {
        match self.device.get(&content) {
            Some(Slot::Ready) => "device",
            _ if self.host.contains_key(&content) => "host",
            _ if self.disk.contains_key(&content) => "disk",
            _ => "source",
        }
    }
}

fn describe(app: &App, places: &Places, id: String, registered: &Registered) -> Adapter {
    let mut adapter = Adapter::new(id, &registered.reference).with(app, places, registered.failure());
    (adapter.registered, adapter.pinned) = (true, registered.pinned);
    adapter.created = registered.created.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs());
    adapter
}

impl Adapter {
    fn new(id: String, reference: &Reference) -> Adapter {
        let (adapter_id, adapter_source) = (reference.to_string(), reference.kind.name());
        let reference = reference.clone();
        Adapter {
            id,
            object: "adapter",
            adapter_id,
            adapter_source,
            tier: "source",
            reference,
            ..Adapter::default()
        }
    }

    /// Adds what is known of it. `failure` is that of its registration.
    fn with(mut self, app: &App, places: &Places, failure: Option<Failure>) -> Adapter {
        let book = app.adapters.book();
        let used = book.of(&self.reference);
        let failure = failure.or_else(|| used.as_ref()?.failure.clone());
        self.last_error = failure.map(|failure| LastError {
            message: failure.message,
            at: failure.at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        });
        let Some(used) = used else { return self };
        self.count(&used);
        let Some(content) = used.content else { return self };
        let facts = book.facts(content);
        let seconds = |took: Option<Duration>| took.map(|took| took.as_secs_f64());
        let (host, disk) = (places.host.get(&content), places.disk.get(&content));
        self.content = Some(content.0.iter().map(|byte| format!("{byte:02x}")).collect());
        self.tier = places.tier(content);
        self.text = app.text_sides.known(content).map(|read| match read {
            Ok(side) => {
                Text { chat_template: side.has_templates, added_tokens: side.new_tokens, error: None }
            }
            Err(error) => Text { error: Some(error.to_string()), ..Text::default() },
        });
        self.pins = host.map_or(0, |host| host.pins);
        self.bytes = Bytes {
            files: facts.bytes,
            disk: disk.map_or(0, |disk| disk.bytes),
            host: host.map_or(0, |host| host.bytes),
            slot: facts.staged.as_ref().map_or(0, |staged| staged.slot_bytes),
        };
        self.load_seconds = LoadSeconds {
            fetch: seconds(facts.fetched_in),
            stage: seconds(facts.staged_in),
            last_wait: seconds(used.waited),
        };
        if let Some(staged) = facts.staged {
            self.lora_rank = Some(staged.max_lora_rank);
            (self.sites, self.invocation) = (staged.sites, staged.invocation);
        }
        self
    }

    fn count(&mut self, used: &Use) {
        (self.requests, self.tokens) = used.counts.usage.requests_and_tokens();
        self.running = used.counts.running();
        self.last_used = used.last.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs());
    }
}
