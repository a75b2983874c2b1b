//! Decides where adapters live: on the server's disk, in host memory, or only at their source, and which calls are made
//! to bring them nearer.
//!
//! The exchange is a pure state machine, like the scheduler: an [`Input`] and the time go in, [`Output`]s come out, and
//! the same history gives the same outputs. Whoever needs an adapter [asks](Ask) for it, and ends with a lease or a
//! failure. `docs/decisions/0022-the-exchange-decides-where-adapters-live.md` states the policy and its reasons.
//!
//! ```
//! # use std::time::Duration;
//! # use exchange::{
//! #     Ask, AskId, Content, CredentialId, Exchange, Fetched, Found, Input, Limits, Output, ReferenceId, SourceId,
//! #     Staged, Tenant, Tier, Version,
//! # };
//! let mut exchange = Exchange::new(Limits { disk_bytes: 1000, host_bytes: 1000, ..Limits::default() });
//! let now = Duration::ZERO;
//! exchange.handle(Input::Attached { host: Vec::new() }, now);
//! let ask = Ask {
//!     id: AskId(1),
//!     tenant: Tenant { id: 0, weight: 1 },
//!     source: SourceId(0),
//!     reference: ReferenceId(7),
//!     credential: CredentialId(0),
//!     tier: Tier::Host,
//!     pin: false,
//!     deadline: Duration::from_secs(60),
//!     payload: "hub: somebody/sql",
//! };
//! // Nothing is known of the reference, so its source is asked.
//! let outputs = exchange.handle(Input::Ask(ask), now);
//! let [Output::Lookup { call, payload, .. }] = &outputs[..] else { panic!("{outputs:?}") };
//! assert_eq!(*payload, "hub: somebody/sql");
//! let found = Found { version: Version([1; 32]), bytes: 84, in_place: false, fresh_for: now };
//! let outputs = exchange.handle(Input::LookedUp { call: *call, result: Ok(found) }, now);
//! let [Output::Fetch { call, max_bytes: 84, .. }] = &outputs[..] else { panic!("{outputs:?}") };
//! let fetched = Fetched { content: Content([2; 32]), bytes: 84 };
//! let outputs = exchange.handle(Input::Fetched { call: *call, result: Ok(fetched) }, now);
//! let [Output::Stage { call, content, .. }] = &outputs[..] else { panic!("{outputs:?}") };
//! assert_eq!(*content, Content([2; 32]));
//! let staged = Staged { host_bytes: 84, slot_bytes: 80 };
//! let outputs = exchange.handle(Input::Staged { call: *call, result: Ok(staged) }, now);
//! let [Output::Ready { ask: AskId(1), slot_bytes: 80, .. }] = &outputs[..] else { panic!("{outputs:?}") };
//! ```

mod ask;
mod backoff;
mod calls;
mod exchange;
mod fault;
mod flights;
mod limits;
mod lru;
mod message;
mod queue;
mod stats;
mod tenants;
mod tier;
mod timers;
pub mod trace;

pub use ask::{Ask, AskId, CallId, Content, CredentialId, ReferenceId, SourceId, Tenant, Tier, Version};
pub use exchange::Exchange;
pub use fault::{Fault, StageFault};
pub use limits::{Budget, Limits};
pub use message::{Fetched, Found, Held, Input, Output, Place, Slot, Staged};
pub use stats::{Resident, Stats, TierStats};
