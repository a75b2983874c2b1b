//! Children: their logs, their deaths, and how they are stopped.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use crate::launcher::Launcher;

#[test]
fn lines_of_children_have_their_name_and_their_order() {
    let talk = |name: &str| format!("i=0; while [ $i -lt 500 ]; do say {name} line $i; i=$((i+1)); done");
    let mut launcher = Launcher::with_model()
        .shard(&format!("serving; {}; serve", talk("shard")))
        .router(&format!("{}; say router up; serve", talk("router")));
    let mut running = launcher.start();
    let mut lines = running.until("router up");
    running.signal("-TERM");
    let (status, rest) = running.ended();
    assert_eq!(status, Some(0), "{rest:?}");
    lines.extend(rest);
    for (prefix, name) in [("shard-0 | ", "shard"), ("router  | ", "router")] {
        let said: Vec<_> = lines
            .iter()
            .filter_map(|line| line.strip_prefix(prefix))
            .filter(|line| line.contains("line"))
            .collect();
        assert_eq!(said, (0..500).map(|i| format!("{name} line {i}")).collect::<Vec<_>>());
    }
}

/// Nobody has to wait for a child that does not stop once the others have failed.
#[test]
fn a_launcher_that_gives_up_can_be_stopped() {
    for signal in ["-TERM", "-INT"] {
        let mut launcher = Launcher::with_model()
            .shard("beat; read line < \"$CHILDREN/go\"; exit 3")
            .router("beat; say router up; serve; say router stays; read line < \"$CHILDREN/never\"");
        let (go, _never) = (launcher.fifo("go"), launcher.fifo("never"));
        let mut running = launcher.start();
        running.until("router up");
        go.write_line("fail");
        running.until("router stays");
        let told = Instant::now();
        running.signal(signal);
        let (status, log) = running.ended();
        assert!(told.elapsed() < Duration::from_secs(3), "{signal}: {:?}", told.elapsed());
        assert_eq!(status, Some(1), "{signal}: {log:?}");
        let has = |text: &str| log.iter().any(|line| line.contains(text));
        assert!(has("told to stop meanwhile: stopping at once"), "{signal}: {log:?}");
        assert!(has("shard-0 could not start (exit status: 3)"), "{signal}: {log:?}");
    }
}

#[test]
fn json_lines_are_passed_on_as_they_are() {
    let line = r#"{"level":"INFO"}"#;
    let mut launcher = Launcher::with_model()
        .args(&["--json-output"])
        .router(&format!("say '{line}'; printf 'no newline' >&2; serve"));
    let mut running = launcher.start();
    assert_eq!(running.until("level\":\"INFO\"}").last().unwrap(), line);
    running.signal("-TERM");
    let (status, rest) = running.ended();
    assert_eq!(status, Some(0));
    assert!(rest.contains(&"no newline".to_owned()), "{rest:?}");
}

#[test]
fn a_shard_that_dies_is_started_again_after_longer_and_longer_up_to_two_seconds() {
    let mut launcher = Launcher::with_model().shard(
        "echo >> \"$CHILDREN/lives\"; serving
         if [ \"$(wc -l < \"$CHILDREN/lives\")\" -lt 5 ]; then say shard dies; exit 9; fi
         say shard lives; serve; say shard down",
    );
    let mut running = launcher.start();
    let lines = running.until("shard lives");
    let waits: Vec<_> = lines.iter().filter_map(|line| line.split_once("restarting in ")).collect();
    assert_eq!(waits.iter().map(|(_, wait)| *wait).collect::<Vec<_>>(), ["0.5 s", "1.0 s", "2.0 s", "2.0 s"]);
    assert_eq!(lines.iter().filter(|line| line.contains("shard-0 ended (exit status: 9)")).count(), 4);
    running.signal("-TERM");
    let (status, rest) = running.ended();
    assert_eq!(status, Some(0));
    let routers = lines.iter().chain(&rest).filter(|line| line.contains("router up")).count();
    assert_eq!(routers, 1, "the router is not touched: {lines:#?}");
}

#[test]
fn a_server_with_a_restart_ahead_can_be_stopped() {
    let mut launcher = Launcher::with_model().shard("serving; exit 9");
    let mut running = launcher.start();
    running.until("restarting in 2.0 s");
    running.signal("-TERM");
    let (status, lines) = running.ended();
    assert_eq!(status, Some(0), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("router down")), "{lines:?}");
}

#[test]
fn the_router_is_watched_while_shards_are_about_to_be_restarted() {
    let mut launcher = Launcher::with_model()
        .shard("serving; say shard up; exit 9")
        .router("read line < \"$CHILDREN/end\"; exit 5");
    let end = launcher.fifo("end");
    let mut running = launcher.start();
    // Early: a router that has lived for longer than three seconds is started again.
    running.until("restarting in 2.0 s");
    let ended = Instant::now();
    end.write_line("now");
    let lines = running.until("router could not start");
    assert!(ended.elapsed() < Duration::from_millis(1500), "told while the shard's restart is waited for");
    assert!(lines.iter().any(|line| line.contains("router ended (exit status: 5)")), "{lines:#?}");
    assert!(!lines.iter().any(|line| line.contains("shard up")), "before the shard is back: {lines:#?}");
}

/// SIGSTOP as an example of a process that is there and does nothing.
#[test]
fn a_child_that_hangs_is_killed_and_started_again() {
    let hanging = "beat; serving; say pid $$; serve; say down";
    for name in ["shard-0", "router"] {
        // Longer than a life that is taken for a fault.
        let mut launcher = Launcher::with_model().args(&["--step-timeout", "3.5"]);
        launcher = launcher.shard("beat; serving; say shard up; serve").router("beat; say router up; serve");
        launcher = if name == "router" { launcher.router(hanging) } else { launcher.shard(hanging) };
        let mut running = launcher.start();
        let pid = |line: &str| line.split_once("pid ").unwrap().1.to_owned();
        let lines = running.until_all(&["pid ", if name == "router" { "shard up" } else { "router up" }]);
        let first = pid(lines.iter().find(|line| line.contains("pid ")).unwrap());
        // The whole group of the child, whose heartbeat is a process of its own.
        crate::launcher::kill("-STOP", &format!("-{first}"));
        let lines = running.until(&format!("{name} hangs (no sign of life for"));
        assert!(!lines.iter().any(|line| line.contains("restarting")), "{lines:#?}");
        running.until("restarting in 0.5 s");
        let second = pid(running.until("pid ").last().unwrap());
        assert_ne!(first, second);
        assert!(!Path::new("/proc").join(&first).exists(), "it is gone");
        running.signal("-TERM");
        let (status, lines) = running.ended();
        assert_eq!(status, Some(0), "{lines:?}");
    }
}

/// Heartbeats that children sent while the launcher was suspended count.
#[test]
fn a_launcher_that_was_suspended_itself_takes_nobody_to_hang() {
    let mut launcher = Launcher::with_model()
        .args(&["--step-timeout", "2"])
        .shard("serving; while printf .; do echo beat > \"$CHILDREN/beats\"; sleep 0.2; done & serve; say shard down")
        .router("beat; say router up; serve");
    let beats = launcher.fifo("beats");
    let mut running = launcher.start();
    running.until("router up");
    running.signal("-STOP");
    // Longer than anybody may be silent.
    let stopped = Instant::now();
    while stopped.elapsed() < Duration::from_secs(3) {
        assert_eq!(beats.read_line(), "beat");
    }
    running.signal("-CONT");
    for _ in 0..5 {
        assert_eq!(beats.read_line(), "beat");
    }
    running.signal("-TERM");
    let (status, lines) = running.ended();
    assert_eq!(status, Some(0), "{lines:?}");
    assert!(!lines.iter().any(|line| line.contains("hangs")), "{lines:?}");
}

#[test]
fn a_child_that_hangs_before_it_serves_ends_it_all() {
    let (code, log) =
        Launcher::with_model().args(&["--step-timeout", "2"]).shard("serve").router("beat; serve").fails();
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("shard-0 could not start (no sign of life for"), "{log}");
}

/// All ranks of one life are gone before the next begins: they would find no memory beside the dying ones.
#[test]
fn a_shard_is_gone_with_all_it_has_started_before_the_next_one_starts() {
    // The first one leaves a process of its group behind, which holds what the second one needs.
    let mut launcher = Launcher::with_model().args(&["--step-timeout", "2"]).shard(
        "serving; if mkdir \"$CHILDREN/first\"; then sh -c 'cat > /dev/null' 0< \"$CHILDREN/held\" & say left $!; serve; fi
         beat; say second; serve",
    ).router("beat; say router up; serve");
    let held = launcher.fifo("held");
    let mut running = launcher.start();
    let left = running.until("left ").last().unwrap().split_once("left ").unwrap().1.to_owned();
    running.until("second");
    let state = fs::read_to_string(format!("/proc/{left}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "{state}");
    drop(held);
    running.signal("-TERM");
    assert_eq!(running.ended().0, Some(0));
}

/// Children that say more than all pipes and queues hold, and a launcher whose log nobody reads.
#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    for closed in [false, true] {
        let mut launcher = Launcher::with_model().shard(
            "serving; echo >> \"$CHILDREN/lives\"; echo up > \"$CHILDREN/news\"; i=0
             while [ $i -lt 3000 ]; do say 'a line as long as those of a log are, or somewhat longer than that'; i=$((i+1)); done
             if [ \"$(wc -l < \"$CHILDREN/lives\")\" -lt 3 ]; then exit 9; fi; serve",
        );
        let news = launcher.fifo("news");
        let mut running = launcher.start();
        running.until("router up");
        if closed {
            running.close_log();
        }
        for _ in 0..3 {
            assert_eq!(news.read_line(), "up", "closed: {closed}");
        }
        running.signal("-TERM");
        assert_eq!(running.status(), Some(0), "closed: {closed}");
    }
}

#[test]
fn a_line_of_any_length_is_passed_on_in_parts() {
    let mut launcher = Launcher::with_model()
        .shard("serving; head -c 100000 /dev/zero | tr '\\0' x >&2; say; head -c 16384 /dev/zero | tr '\\0' y >&2; say; say z; serve");
    let mut running = launcher.start();
    let mut lines = running.until("| z");
    running.signal("-TERM");
    lines.extend(running.ended().1);
    let of = |mark: char| -> Vec<usize> {
        let said = lines.iter().filter_map(|line| line.strip_prefix("shard-0 | "));
        said.filter(|line| line.starts_with(mark)).map(str::len).collect()
    };
    assert_eq!(of('x'), [16384, 16384, 16384, 16384, 16384, 16384, 1696]);
    assert_eq!(of('y'), [16384]);
    assert!(!lines.iter().any(|line| line == "shard-0 | "), "no empty line is made up");
}

#[test]
fn a_child_that_never_serves_ends_it_all() {
    for (shard, router, status, cause) in [
        ("say no room; exit 3", "serve", 1, "shard-0 could not start (exit status: 3)"),
        ("say no such dtype; exit 64", "serve", 64, "shard-0 could not start (exit status: 64)"),
        ("serve", "say port taken; exit 1", 1, "router could not start (exit status: 1)"),
        ("serve", "kill -9 $$", 1, "router could not start (signal: 9"),
    ] {
        let (code, log) = Launcher::with_model().shard(shard).router(router).fails();
        assert_eq!(code, status, "{log}");
        assert!(log.contains(cause), "{log}");
    }
}

#[test]
fn the_router_finishes_before_the_shard_is_stopped() {
    for signal in ["-TERM", "-INT"] {
        let mut launcher =
            Launcher::with_model().router("say router up; serve; say streams finish; say router down");
        let mut running = launcher.start();
        running.until("router up");
        running.signal(signal);
        let (status, lines) = running.ended();
        assert_eq!(status, Some(0), "{lines:?}");
        let at = |text: &str| lines.iter().position(|line| line.contains(text)).unwrap();
        assert!(at("stopping: streams have 30 s") < at("streams finish"));
        assert!(at("router down") < at("shard down"), "{lines:#?}");
    }
}

/// The router gets what it was promised, and five seconds to spare.
#[test]
fn a_router_that_does_not_stop_is_killed_after_delay_and_deadline() {
    let mut launcher = Launcher::with_model()
        .args(&["--shutdown-delay", "1", "--shutdown-deadline", "0.5"])
        .router("say router up; serve; say router waits; while :; do read line < \"$CHILDREN/never\"; done");
    let _never = launcher.fifo("never");
    let mut running = launcher.start();
    running.until("router up");
    running.signal("-TERM");
    let (status, lines) = running.ended();
    assert_eq!(status, Some(1), "{lines:?}");
    let at = |text: &str| lines.iter().position(|line| line.contains(text)).unwrap();
    assert!(at("router did not stop within 6.5 s, killing it") < at("shard down"), "{lines:#?}");
    assert!(lines.last().unwrap().contains("not every process stopped in order"));
}

#[test]
fn a_second_signal_stops_at_once() {
    let mut launcher =
        Launcher::with_model().router("say router up; serve; say router waits; while :; do :; done");
    let mut running = launcher.start();
    running.until("router up");
    running.signal("-TERM");
    running.until("router waits");
    running.signal("-TERM");
    let (status, lines) = running.ended();
    assert_eq!(status, Some(0));
    assert!(lines.iter().any(|line| line.contains("stopping at once")), "{lines:?}");
}

#[test]
fn children_end_with_a_launcher_that_is_killed() {
    let mut launcher = Launcher::with_model();
    let mut running = launcher.start();
    running.until("router up");
    running.signal("-KILL");
    // Their ends of the log close with them.
    let (status, _) = running.ended();
    assert_eq!(status, None);
}
