//! Children: their logs, their deaths, and how they are stopped.

use crate::launcher::Launcher;

#[test]
fn lines_of_children_have_their_name_and_their_order() {
    let talk = |name: &str| format!("i=0; while [ $i -lt 500 ]; do say {name} line $i; i=$((i+1)); done");
    let mut launcher = Launcher::with_model()
        .shard(&format!("touch \"$socket\"; {}; serve", talk("shard")))
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
fn a_shard_that_dies_is_started_again_after_longer_and_longer() {
    let mut launcher = Launcher::with_model().shard(
        "echo >> \"$CHILDREN/lives\"; touch \"$socket\"
         if [ \"$(wc -l < \"$CHILDREN/lives\")\" -lt 3 ]; then say shard dies; exit 9; fi
         say shard lives; serve; say shard down",
    );
    let mut running = launcher.start();
    let lines = running.until("shard lives");
    let waits: Vec<_> = lines.iter().filter_map(|line| line.split_once("restarting in ")).collect();
    assert_eq!(waits.iter().map(|(_, wait)| *wait).collect::<Vec<_>>(), ["0.5 s", "1.0 s"]);
    assert_eq!(lines.iter().filter(|line| line.contains("shard-0 ended (exit status: 9)")).count(), 2);
    running.signal("-TERM");
    let (status, rest) = running.ended();
    assert_eq!(status, Some(0));
    let routers = lines.iter().chain(&rest).filter(|line| line.contains("router up")).count();
    assert_eq!(routers, 1, "the router is not touched: {lines:#?}");
}

#[test]
fn a_server_whose_router_is_about_to_be_restarted_can_be_stopped() {
    // Longer than a life that is taken for a fault.
    let mut launcher = Launcher::with_model().router("say router up; sleep 3.2; exit 5");
    let mut running = launcher.start();
    running.until("restarting in");
    running.signal("-TERM");
    let (status, lines) = running.ended();
    assert_eq!(status, Some(0), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("shard down")), "{lines:?}");
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
