//! Traces of a run: what the exchange was told and what it decided, as lines of text, from which the run can be played
//! again.
//!
//! The first line has the limits. A line that begins with `>` is an input with its time, one with `<` is an output.
//! There are no payloads and no messages of faults in them, and so no secrets. The format may change with any version.

mod word;

use std::{error::Error, fmt, str::SplitWhitespace, time::Duration};

use crate::{Ask, Exchange, Input, Limits, Output};
use word::Word;

/// The first line of a trace.
pub fn limits(limits: &Limits) -> String {
    let mut line = String::from("limits");
    limits.write(&mut line);
    line
}

/// The line of an input.
pub fn input<P>(input: &Input<P>, now: Duration) -> String {
    let mut line = String::from(">");
    now.write(&mut line);
    bare_input(input).write(&mut line);
    line
}

/// The line of an output.
pub fn output<P>(output: &Output<P>) -> String {
    let mut line = String::from("<");
    bare_output(output).write(&mut line);
    line
}

/// Plays a trace again, from its beginning. Returns the exchange as it is at the end.
///
/// # Errors
/// If a line cannot be read, or if the exchange decides otherwise than it did.
pub fn replay(trace: &str) -> Result<Exchange<()>, ReplayError> {
    let mut lines = (1..).zip(trace.lines());
    let malformed = |line| ReplayError::Malformed { line };
    let first = lines.next().and_then(|(_, line)| line.strip_prefix("limits"));
    let limits = first.and_then(read_all::<Limits>).ok_or(malformed(1))?;
    let mut exchange = Exchange::new(limits);
    let mut decided = Vec::new().into_iter();
    for (line, text) in lines {
        if let Some(told) = text.strip_prefix('>') {
            if let Some(decided) = decided.next() {
                return Err(ReplayError::Differs { line, traced: String::new(), decided });
            }
            let (now, input) = read_all::<(Duration, Input<()>)>(told).ok_or(malformed(line))?;
            let outputs: Vec<_> = exchange.handle(input, now).iter().map(output).collect();
            decided = outputs.into_iter();
        } else {
            let decided = decided.next().unwrap_or_default();
            if decided != text {
                return Err(ReplayError::Differs { line, traced: text.into(), decided });
            }
        }
    }
    match decided.next() {
        Some(decided) => {
            Err(ReplayError::Differs { line: trace.lines().count(), traced: String::new(), decided })
        }
        None => Ok(exchange),
    }
}

/// The reason that a trace could not be played again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplayError {
    /// A line is none of a trace of this version.
    Malformed {
        /// Its number, from 1.
        line: usize,
    },
    /// The exchange has decided otherwise.
    Differs {
        /// The number of the line at which that shows.
        line: usize,
        /// The output in the trace; empty if it has none more.
        traced: String,
        /// The output now; empty if there is none more.
        decided: String,
    },
}

impl fmt::Display for ReplayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed { line } => write!(f, "line {line} cannot be read"),
            Self::Differs { line, traced, decided } => {
                write!(f, "line {line}: the trace has {traced:?}, now it is {decided:?}")
            }
        }
    }
}

impl Error for ReplayError {}

/// Reads a value that takes a whole line.
fn read_all<W: Word>(line: &str) -> Option<W> {
    let mut words: SplitWhitespace<'_> = line.split_whitespace();
    let value = W::read(&mut words)?;
    words.next().is_none().then_some(value)
}

fn bare_input<P>(input: &Input<P>) -> Input<()> {
    match input {
        Input::Ask(ask) => Input::Ask(bare_ask(ask)),
        Input::AskTogether(asks) => Input::AskTogether(asks.iter().map(bare_ask).collect()),
        Input::Release(ask) => Input::Release(*ask),
        Input::LookedUp { call, result } => Input::LookedUp { call: *call, result: result.clone() },
        Input::Progress { call, bytes } => Input::Progress { call: *call, bytes: *bytes },
        Input::Fetched { call, result } => Input::Fetched { call: *call, result: result.clone() },
        Input::Staged { call, result } => Input::Staged { call: *call, result: result.clone() },
        Input::Deleted(content) => Input::Deleted(*content),
        Input::Unstaged(content) => Input::Unstaged(*content),
        Input::OnDisk { content, bytes, versions } => {
            Input::OnDisk { content: *content, bytes: *bytes, versions: versions.clone() }
        }
        Input::Slot { content, slot } => Input::Slot { content: *content, slot: *slot },
        Input::Attached { host } => Input::Attached { host: host.clone() },
        Input::Detached => Input::Detached,
        Input::Reload(reference) => Input::Reload(*reference),
        Input::Evict(content) => Input::Evict(*content),
        Input::Tick => Input::Tick,
    }
}

fn bare_ask<P>(ask: &Ask<P>) -> Ask<()> {
    Ask {
        payload: (),
        id: ask.id,
        tenant: ask.tenant,
        source: ask.source,
        reference: ask.reference,
        credential: ask.credential,
        tier: ask.tier,
        pin: ask.pin,
        deadline: ask.deadline,
    }
}

fn bare_output<P>(output: &Output<P>) -> Output<()> {
    let payload = ();
    match output {
        Output::Lookup { call, .. } => Output::Lookup { call: *call, payload },
        Output::Fetch { call, version, max_bytes, .. } => {
            Output::Fetch { call: *call, version: *version, max_bytes: *max_bytes, payload }
        }
        Output::Stage { call, content, place, max_bytes, .. } => {
            Output::Stage { call: *call, content: *content, place: *place, max_bytes: *max_bytes, payload }
        }
        Output::Abort(call) => Output::Abort(*call),
        Output::Delete(content) => Output::Delete(*content),
        Output::Unstage(content) => Output::Unstage(*content),
        Output::Ready { ask, content, tier, slot_bytes } => {
            Output::Ready { ask: *ask, content: *content, tier: *tier, slot_bytes: *slot_bytes }
        }
        Output::Failed { ask, fault } => Output::Failed { ask: *ask, fault: fault.clone() },
    }
}
