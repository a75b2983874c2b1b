//! The disk tier of adapters: a folder of contents that several servers share.
//!
//! ```text
//! VERSION                     the layout; a folder with another one is refused
//! lock                        locked while one of the following changes
//! partial/<random>-<bytes>/   an adapter that is being written; its name is the reservation
//!   lock                      locked by the process that writes it, for as long as that lives
//!   files/                    its files
//! contents/<content>/         an adapter that has been published
//!   lock                      shared by all who use it; the time of its last change is that of the last use
//!   entry.json                names and sizes of its files; versions and references that led to it
//!   files/
//! versions/<version>          the content of a version
//! references/<reference>      the version that a reference led to last
//! removing/<random>-<bytes>/  what is on its way out
//! ```
//!
//! **Publishing.** A partial adapter becomes an entry by one `rename`, after its files have been hashed and written
//! through to the disk. So an entry is whole whenever a process ends. Nothing is remembered but what the folder shows:
//! a partial adapter whose lock is free belongs to a process that has ended, and is removed.
//!
//! **The bound.** The lengths of all files that are published, reserved or on their way out are never more than the
//! limit, for all servers together. Lengths are counted and not blocks, because a reservation is a length that a source
//! has reported. What the store itself writes for an adapter is not counted; it is less than 16 KiB.
//!
//! **Damage.** Before an entry is used for the first time in a process, its files are hashed again, unless this process
//! has published it. Later uses compare the stamps of the files. An entry that is not what its name says is removed.
//!
//! **Order of use.** The time of the last use is kept in the file times of an entry's lock. A restart does not lose it,
//! servers share it, a process may be killed at any point, and there is no journal that has to be made shorter.
//!
//! Locks are those of `flock`, so the folder must be on a file system of this machine, or on one that passes them on.
//! Everything here blocks.

mod content;
mod entry;
mod error;
mod layout;
mod partial;
mod room;
mod store;

pub use content::content_of;
pub use error::StoreError;
pub use partial::Partial;
pub use store::{Deletion, Fetched, Hold, OnDisk, Store};
