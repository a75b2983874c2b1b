//! Traces: they can be played again, they tell where decisions differ, and they have no secrets.

use exchange::{
    Ask, AskId, CallId, Content, CredentialId, Exchange, Fault, Input, Limits, ReferenceId, SourceId, Tenant,
    Tier,
    trace::{self, ReplayError},
};

use crate::world::{World, limits, secs};

/// A short run with a lease, a failure, and an eviction.
fn trace() -> String {
    let mut world = World::traced(Limits { host_bytes: 150, ..limits() });
    for reference in 0..3 {
        world.originals.insert(reference, crate::world::Original::new(reference, 70));
    }
    world.original(1).denied.insert(0);
    for reference in [0, 1, 2, 0] {
        let id = world.ask(reference);
        world.settle();
        world.release(id);
        world.wait(secs(40));
    }
    world.trace.unwrap()
}

#[test]
fn a_trace_can_be_played_again_and_shows_what_was_decided() {
    let text = trace();
    let exchange = trace::replay(&text).unwrap();
    exchange.check();
    assert_eq!(exchange.stats().host.loads, 2);
    for word in ["limits ", "> 0 attached 0", "< lookup 1", "< failed 2 denied", "< ready ", "< stage "] {
        assert!(text.contains(word), "{word:?} in {text}");
    }
}

#[test]
fn a_line_that_was_changed_is_found() {
    let text = trace();
    let lines: Vec<_> = text.lines().collect();
    let mut found = 0;
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.starts_with('<')) {
        let number = at + 1;
        for changed in [format!("{line}1"), format!("{line} 1"), line.replace("< ", "< x"), String::new()] {
            let mut lines = lines.clone();
            lines[at] = &changed;
            let error = trace::replay(&lines.join("\n")).unwrap_err();
            assert!(
                matches!(error, ReplayError::Differs { line, .. } if line == number),
                "{changed}: {error}"
            );
            found += 1;
        }
        // A line that is missing shows with the next one.
        let mut lines = lines.clone();
        lines.remove(at);
        let error = trace::replay(&lines.join("\n")).unwrap_err();
        assert!(matches!(error, ReplayError::Differs { line, .. } if line.abs_diff(number) <= 1), "{error}");
    }
    assert!(found >= 40, "{found}");
}

#[test]
fn a_line_that_cannot_be_read_is_named() {
    let first = trace::limits(&limits());
    for (text, line) in [
        (String::new(), 1),
        ("> 0 tick".into(), 1),
        ("limits 1 2 3".into(), 1),
        (format!("{first} 1"), 1),
        (format!("{first}\n> 0 tick\n> 0 tock"), 3),
        (format!("{first}\n> 0"), 2),
        (format!("{first}\n> -1 tick"), 2),
        (format!("{first}\n> 0 release"), 2),
        (format!("{first}\n> 0 release 1 2"), 2),
        (format!("{first}\n> 0 deleted 00"), 2),
        (format!("{first}\n> 0 deleted {}", "é".repeat(32)), 2),
        (format!("{first}\n> 0 attached 1"), 2),
        (format!("{first}\n> 0 fetched 1 maybe"), 2),
        (format!("{first}\n> 999999999999999999999999999999 tick"), 2),
    ] {
        assert_eq!(trace::replay(&text).unwrap_err(), ReplayError::Malformed { line }, "{text}");
    }
}

#[test]
fn a_trace_has_no_payloads_and_no_messages() {
    let mut exchange = Exchange::new(limits());
    let ask = Ask {
        id: AskId(1),
        tenant: Tenant { id: 1, weight: 1 },
        source: SourceId(1),
        reference: ReferenceId(1),
        credential: CredentialId(1),
        tier: Tier::Host,
        pin: false,
        deadline: secs(9),
        payload: "hf_secret",
    };
    let mut text = String::new();
    for input in [
        Input::Ask(ask),
        Input::LookedUp { call: CallId(1), result: Err(Fault::Unavailable("not for hf_secret".into())) },
        Input::Deleted(Content([7; 32])),
    ] {
        text += &trace::input(&input, secs(1));
        for output in exchange.handle(input, secs(1)) {
            text += &trace::output(&output);
        }
    }
    assert!(text.contains("unavailable") && !text.contains("secret"), "{text}");
}
