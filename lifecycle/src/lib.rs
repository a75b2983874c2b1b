//! What the three programs share about starting and ending.
//!
//! - [`fail`] is the one way to print an error and exit; [`end_now`] exits without giving anything back.
//! - [`Parent`] is the process that started this one: it tells us to stop, and we show it that we are there.
//! - [`Supervisor`] ends the process when a task or a thread that it cannot live without panics, returns, or makes no
//!   progress. A process that has lost one of them must not go on and call itself healthy: its parent starts a new one.

mod exit;
mod heartbeat;
mod parent;
mod stop;
mod supervisor;
mod watchdog;

pub use exit::{EX_SOFTWARE, EX_UNAVAILABLE, EX_USAGE, before_exit, end_now, exit, fail};
pub use heartbeat::{HEARTBEAT, SERVING, STARTING};
pub use parent::Parent;
pub use supervisor::{Failure, Supervisor};
pub use watchdog::Pulse;
