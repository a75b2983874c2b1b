//! What the three programs share about starting and ending.
//!
//! - [`fail`] is the one way to print an error and exit.
//! - [`Stop`] tells when the process should end: by signal, or because its parent is gone.
//! - [`Supervisor`] ends the process when a task or a thread that it cannot live without panics, returns, or makes no
//!   progress. A process that has lost one of them must not go on and call itself healthy: its parent starts a new one.
//! - [`start_heartbeat`] shows the parent that the process as a whole is not suspended.

mod exit;
mod heartbeat;
mod stop;
mod supervisor;
mod watchdog;

pub use exit::{EX_SOFTWARE, EX_USAGE, before_exit, fail};
pub use heartbeat::{HEARTBEAT, start_heartbeat};
pub use stop::Stop;
pub use supervisor::{Failure, Supervisor};
pub use watchdog::Pulse;
