//! Values as words of a line.

use std::{fmt::Write, str::SplitWhitespace, sync::Arc, time::Duration};

use crate::{
    Ask, AskId, Budget, CallId, Content, CredentialId, Fault, Fetched, Found, Held, Input, Limits, Output,
    Place, ReferenceId, Slot, SourceId, StageFault, Staged, Tenant, Tier, Version,
};

/// A value that is written as some words, each behind a space.
pub(super) trait Word: Sized {
    fn write(&self, line: &mut String);
    fn read(words: &mut SplitWhitespace<'_>) -> Option<Self>;
}

/// Values with a text of their own.
macro_rules! plain {
    ($($name:ty)*) => {$(
        impl Word for $name {
            fn write(&self, line: &mut String) {
                // Writing into a string does not fail.
                let _ = write!(line, " {self}");
            }
            fn read(words: &mut SplitWhitespace<'_>) -> Option<Self> {
                words.next()?.parse().ok()
            }
        }
    )*};
}

/// Structs, by their fields in order.
macro_rules! fields {
    ($($name:ty { $($field:tt)* })*) => {$(
        impl Word for $name {
            fn write(&self, line: &mut String) {
                $(self.$field.write(line);)*
            }
            fn read(words: &mut SplitWhitespace<'_>) -> Option<Self> {
                Some(Self { $($field: Word::read(words)?),* })
            }
        }
    )*};
}

/// Enums, by a word for each variant and its values in order.
macro_rules! variants {
    ($($name:ty { $($word:literal $variant:ident $(($($part:ident)*))? $({ $($field:ident)* })?,)* })*) => {$(
        impl Word for $name {
            fn write(&self, line: &mut String) {
                match self {
                    $(Self::$variant $(($($part),*))? $({ $($field),* })? => {
                        line.push_str(concat!(" ", $word));
                        $($($part.write(line);)*)?
                        $($($field.write(line);)*)?
                    })*
                }
            }
            fn read(words: &mut SplitWhitespace<'_>) -> Option<Self> {
                match words.next()? {
                    $($word => {
                        $($(let $part = Word::read(words)?;)*)?
                        $($(let $field = Word::read(words)?;)*)?
                        Some(Self::$variant $(($($part),*))? $({ $($field),* })?)
                    })*
                    _ => None,
                }
            }
        }
    )*};
}

plain! { bool u32 u64 u128 usize }

fields! {
    AskId { 0 }
    CallId { 0 }
    SourceId { 0 }
    ReferenceId { 0 }
    CredentialId { 0 }
    Version { 0 }
    Content { 0 }
    Tenant { id weight }
    Found { version bytes in_place fresh_for }
    Fetched { content bytes }
    Staged { host_bytes slot_bytes }
    Held { content staged }
    Ask<()> { id tenant source reference credential tier pin deadline payload }
    Budget { source tenant deadline }
    Limits {
        disk_bytes host_bytes adapter_bytes lookups fetches stages tenant_calls slow_after first_backoff
        longest_backoff remembered
    }
}

variants! {
    Tier { "disk" Disk, "host" Host, }
    Slot { "loading" Loading, "ready" Ready, "empty" Empty, }
    Place { "cache" Cache, "in_place" InPlace(version), }
    Fault {
        "not_found" NotFound(message), "denied" Denied(message), "unavailable" Unavailable(message),
        "ranks" Ranks(message), "invalid" Invalid(message), "too_large" TooLarge { bytes limit }, "slow" Slow, "changed" Changed,
        "pins_full" PinsFull(tier), "session_lost" SessionLost, "duplicate" Duplicate,
    }
    StageFault { "needs_room" NeedsRoom { bytes }, "gone" Gone, "failed" Failed(fault), }
    Input<()> {
        "ask" Ask(ask), "ask_together" AskTogether(asks), "release" Release(ask), "looked_up" LookedUp { call result },
        "progress" Progress { call bytes }, "fetched" Fetched { call result }, "staged" Staged { call result },
        "deleted" Deleted(content), "unstaged" Unstaged(content), "on_disk" OnDisk { content bytes versions },
        "slot" Slot { content slot }, "attached" Attached { host }, "detached" Detached,
        "reload" Reload(reference), "evict" Evict(content), "tick" Tick,
    }
    Output<()> {
        "lookup" Lookup { call payload }, "fetch" Fetch { call version max_bytes payload },
        "stage" Stage { call content place max_bytes payload }, "abort" Abort(call), "delete" Delete(content),
        "unstage" Unstage(content), "ready" Ready { ask content tier slot_bytes }, "failed" Failed { ask fault },
    }
}

/// Payloads are left out.
impl Word for () {
    fn write(&self, _: &mut String) {}

    fn read(_: &mut SplitWhitespace<'_>) -> Option<Self> {
        Some(())
    }
}

/// Messages are left out.
impl Word for Arc<str> {
    fn write(&self, _: &mut String) {}

    fn read(_: &mut SplitWhitespace<'_>) -> Option<Self> {
        Some("".into())
    }
}

/// In nanoseconds.
impl Word for Duration {
    fn write(&self, line: &mut String) {
        self.as_nanos().write(line);
    }

    fn read(words: &mut SplitWhitespace<'_>) -> Option<Self> {
        let nanos = u128::read(words)?;
        let seconds = u64::try_from(nanos / 1_000_000_000).ok()?;
        Some(Duration::new(seconds, (nanos % 1_000_000_000) as u32))
    }
}

/// In hexadecimal digits.
impl Word for [u8; 32] {
    fn write(&self, line: &mut String) {
        line.push(' ');
        for byte in self {
            let _ = write!(line, "{byte:02x}");
        }
    }

    fn read(words: &mut SplitWhitespace<'_>) -> Option<Self> {
        let digits = words.next().filter(|digits| digits.len() == 64 && digits.is_ascii())?;
        let mut bytes = [0; 32];
        for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&digits[at..at + 2], 16).ok()?;
        }
        Some(bytes)
    }
}

impl<A: Word, B: Word> Word for (A, B) {
    fn write(&self, line: &mut String) {
        self.0.write(line);
        self.1.write(line);
    }

    fn read(words: &mut SplitWhitespace<'_>) -> Option<Self> {
        Some((A::read(words)?, B::read(words)?))
    }
}

impl<T: Word, E: Word> Word for Result<T, E> {
    fn write(&self, line: &mut String) {
        match self {
            Ok(value) => {
                line.push_str(" ok");
                value.write(line);
            }
            Err(error) => {
                line.push_str(" err");
                error.write(line);
            }
        }
    }

    fn read(words: &mut SplitWhitespace<'_>) -> Option<Self> {
        match words.next()? {
            "ok" => T::read(words).map(Ok),
            "err" => E::read(words).map(Err),
            _ => None,
        }
    }
}

impl<T: Word> Word for Vec<T> {
    fn write(&self, line: &mut String) {
        self.len().write(line);
        self.iter().for_each(|item| item.write(line));
    }

    fn read(words: &mut SplitWhitespace<'_>) -> Option<Self> {
        let len = usize::read(words)?;
        (0..len).map(|_| T::read(words)).collect()
    }
}
