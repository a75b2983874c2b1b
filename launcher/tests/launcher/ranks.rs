//! How many ranks are started, and how they end as one.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::json;

use crate::launcher::{Launcher, kill};

/// The number of sockets in the configuration that the router gets, and the device.
fn ranks(launcher: Launcher) -> (usize, String) {
    let config = { launcher }.configuration();
    let device = config["shard"]["device"].as_str().unwrap().to_owned();
    (config["shards"]["uds"].as_array().unwrap().len(), device)
}

#[test]
fn there_are_as_many_ranks_as_flags_environment_and_gpus_say() {
    for (gpus, args, environment, expected) in [
        (0, &[][..], &[][..], (1, "auto")),
        (1, &[], &[], (1, "auto")),
        (2, &[], &[], (2, "cuda")),
        (8, &[], &[], (8, "cuda")),
        (4, &[], &[("NVIDIA_VISIBLE_DEVICES", "5,6")], (2, "cuda")),
        (4, &[], &[("NVIDIA_VISIBLE_DEVICES", "all")], (4, "cuda")),
        // The driver has applied this one: the shard's program counts what it leaves.
        (4, &[], &[("CUDA_VISIBLE_DEVICES", "0")], (4, "cuda")),
        (4, &["--device", "cpu"], &[], (1, "cpu")),
        (4, &["--num-shard", "1"], &[], (1, "auto")),
        (4, &["--num-shard", "2"], &[], (2, "cuda")),
        (4, &["--sharded", "false"], &[], (1, "auto")),
        (4, &["--sharded", "false", "--num-shard", "4"], &[], (4, "cuda")),
        (4, &["--sharded"], &[], (4, "cuda")),
        (0, &["--num-shard", "8"], &[], (8, "cpu")),
        (0, &["--num-shard", "3", "--device", "cpu"], &[], (3, "cpu")),
        (4, &[], &[("NUM_SHARD", "2")], (2, "cuda")),
        (4, &["--num-shard", "4"], &[("NUM_SHARD", "2")], (4, "cuda")),
        (4, &[], &[("SHARDED", "false")], (1, "auto")),
        (0, &["--device", "cpu"], &[("NUM_SHARD", "2"), ("SHARDED", "true")], (2, "cpu")),
    ] {
        let mut launcher = Launcher::with_model().gpus(gpus).args(args);
        for (name, value) in environment {
            launcher = launcher.env(name, value);
        }
        let (count, device) = ranks(launcher);
        assert_eq!((count, device.as_str()), expected, "{gpus} GPUs, {args:?}, {environment:?}");
    }
}

#[test]
fn too_few_gpus_are_refused_before_anything_starts() {
    for (gpus, args, environment, cause) in [
        (1, &["--num-shard", "2"][..], &[][..], "--num-shard 2: 1 of the 2 GPUs that it needs are visible"),
        (4, &["--num-shard", "8"], &[], "--num-shard 8: 4 of the 8 GPUs"),
        (4, &["--num-shard", "8", "--device", "cuda"], &[], "--num-shard 8: 4 of the 8 GPUs"),
        (1, &["--sharded"], &[], "--sharded true: 1 of the 2 GPUs"),
        (1, &[], &[("SHARDED", "true")], "--sharded true: 1 of the 2 GPUs"),
        (1, &[], &[("NUM_SHARD", "2")], "--num-shard 2: 1 of the 2 GPUs"),
        (
            8,
            &["--num-shard", "4"],
            &[("NVIDIA_VISIBLE_DEVICES", "4,5")],
            "--num-shard 4: 2 of the 4 GPUs that it needs are visible (NVIDIA_VISIBLE_DEVICES=4,5)",
        ),
        (
            2,
            &["--num-shard", "4"],
            &[("CUDA_VISIBLE_DEVICES", "6,7")],
            "--num-shard 4: 2 of the 4 GPUs that it needs are visible (CUDA_VISIBLE_DEVICES=6,7)",
        ),
        (8, &["--sharded"], &[("NVIDIA_VISIBLE_DEVICES", "none")], "--sharded true: 0 of the 2 GPUs"),
        (8, &["--device", "cuda"], &[("NVIDIA_VISIBLE_DEVICES", "none")], "--device cuda: 0 of the 1 GPUs"),
    ] {
        let mut launcher = Launcher::with_model().gpus(gpus).args(args).shard("say shard starts; exit 3");
        for (name, value) in environment {
            launcher = launcher.env(name, value);
        }
        let (status, log) = launcher.fails();
        assert_eq!(status, 64, "{args:?}: {log}");
        assert!(log.contains(cause) && !log.contains("shard starts"), "{cause:?} in {log}");
    }
}

#[test]
fn a_model_is_divided_among_as_many_gpus_as_it_can_be() {
    // Of a model with four heads.
    let four = r#"n=$4; while [ $((4 % n)) != 0 ]; do n=$((n - 1)); done
                  if [ $n = $4 ]; then why=null; else why="\"4 heads cannot be divided among $4 ranks\""; fi
                  echo "{\"ranks\": $n, \"refused\": $why}""#;
    for (gpus, args, expected) in [
        (1, &[][..], (1, "auto")),
        (2, &[], (2, "cuda")),
        (3, &[], (2, "cuda")),
        (4, &[], (4, "cuda")),
        (5, &[], (4, "cuda")),
        (6, &["--device", "cuda"], (4, "cuda")),
        (7, &["--sharded"], (4, "cuda")),
        (8, &[], (4, "cuda")),
        // What is asked for is what there is: the shards refuse it with the numbers.
        (3, &["--num-shard", "3"], (3, "cuda")),
        (8, &["--num-shard", "6"], (6, "cuda")),
    ] {
        assert_eq!(
            ranks(Launcher::with_model().gpus(gpus).args(args).divides(four)),
            (expected.0, expected.1.to_owned()),
            "{gpus} GPUs, {args:?}"
        );
    }
    let never = r#"echo '{"ranks": 1, "refused": "heads that are normed together"}'"#;
    for (args, device) in [(&[][..], "auto"), (&["--device", "cuda"], "cuda")] {
        let launcher = Launcher::with_model().gpus(4).divides(never).args(args);
        assert_eq!(ranks(launcher), (1, device.to_owned()), "{args:?}");
    }
    let (status, log) = Launcher::with_model().gpus(4).divides(never).args(&["--sharded"]).fails();
    assert_eq!(status, 64, "{log}");
    assert!(log.contains("--sharded true: heads that are normed together"), "{log}");
    let mut launcher = Launcher::with_model().gpus(6).divides(four);
    let mut running = launcher.start();
    running.until("4 of the 6 GPUs are used (see --num-shard): 4 heads cannot be divided among 6 ranks");
    running.until("router up");
    running.signal("-TERM");
    running.ended();
    let (status, log) = Launcher::with_model().gpus(2).divides("say no such model; exit 1").fails();
    assert!(status == 1 && log.contains("--divides: exit status: 1 no such model"), "{log}");
}

#[test]
fn a_shard_that_cannot_list_its_gpus_is_quoted() {
    for (script, cause) in [
        ("say the driver is broken; exit 3", "lorax-shard --devices: exit status: 3 the driver is broken"),
        ("kill -SEGV $$", "lorax-shard --devices: signal: 11"),
        ("echo nonsense", "lorax-shard --devices: expected"),
        ("", "lorax-shard --devices: EOF"),
    ] {
        let (status, log) = Launcher::with_model().devices(script).args(&["--num-shard", "2"]).fails();
        assert_eq!(status, 1, "{log}");
        assert!(log.contains(cause), "{cause:?} in {log}");
    }
}

#[test]
fn gpus_are_not_asked_for_where_they_do_not_matter() {
    for args in [
        &["--device", "cpu"][..],
        &["--device", "cpu", "--num-shard", "2"],
        &["--num-shard", "1"],
        &["--num-shard", "1", "--device", "cuda"],
        &["--sharded", "false"],
    ] {
        ranks(Launcher::with_model().devices("say asked; exit 3").args(args));
    }
}

/// A server can be stopped while the driver takes its time.
#[test]
fn a_launcher_that_asks_for_gpus_can_be_stopped() {
    let mut launcher =
        Launcher::with_model().devices("echo asked > \"$CHILDREN/asked\"; read line < \"$CHILDREN/never\"");
    let (asked, _never) = (launcher.fifo("asked"), launcher.fifo("never"));
    let running = launcher.start();
    assert_eq!(asked.read_line(), "asked");
    running.signal("-TERM");
    let (status, log) = running.ended();
    assert_eq!(status, Some(0), "{log:?}");
}

/// Four ranks that say their process, and serve.
const RANKS: &str = "beat; serving; say rank $rank pid $$; serve; say rank $rank down";

/// The processes of the ranks from the lines that they say.
fn pids(lines: &[String]) -> Vec<String> {
    let mut pids: Vec<_> =
        lines.iter().filter_map(|line| line.split_once("say rank ").or(line.split_once("| rank "))).collect();
    pids.sort_unstable();
    pids.iter().filter_map(|(_, said)| Some(said.split_once(" pid ")?.1.to_owned())).collect()
}

fn gone(pid: &str) -> bool {
    !Path::new("/proc").join(pid).exists()
}

const UP: [&str; 4] = ["rank 0 pid", "rank 1 pid", "rank 2 pid", "rank 3 pid"];

/// Starts four ranks of a script, which may be silent for two seconds.
fn four(script: &str) -> Launcher {
    four_within("2", script)
}

fn four_within(step_timeout: &str, script: &str) -> Launcher {
    let args = ["--device", "cpu", "--num-shard", "4", "--step-timeout", step_timeout];
    Launcher::with_model().args(&args).shard(script).router("beat; say router up; serve; say router down")
}

#[test]
fn the_end_of_one_rank_is_the_end_of_all_before_any_starts_again() {
    for (rank, signal) in [(0, "-KILL"), (1, "-KILL"), (3, "-STOP"), (0, "-STOP"), (2, "-TERM")] {
        let mut launcher = four(RANKS);
        let mut running = launcher.start();
        let first = pids(&running.until_all(&[&UP[..], &["router up"]].concat()));
        assert_eq!(first.len(), 4, "{first:?}");
        // With the heartbeat, which is a process of its own here.
        kill(signal, &format!("-{}", first[rank]));
        let ended = running.until("restarting in 0.5 s");
        let of = |text: &str| ended.iter().any(|line| line.contains(text));
        let cause = if signal == "-STOP" { "hangs (no sign of life for" } else { "ended (signal: " };
        assert!(of(&format!("shard-{rank} {cause}")), "{ended:#?}");
        for other in (0..4).filter(|other| *other != rank) {
            assert!(of(&format!("| rank {other} down")), "the others are told to stop: {ended:#?}");
            assert!(of(&format!("shard-{other} was stopped with it (exit status: 0)")), "{ended:#?}");
        }
        assert!(first.iter().all(|pid| gone(pid)), "all are gone before new ones start");
        let second = pids(&running.until_all(&UP));
        assert!(second.len() == 4 && second.iter().all(|pid| !first.contains(pid)), "{second:?}");
        running.signal("-TERM");
        let (status, lines) = running.ended();
        assert_eq!(status, Some(0), "{lines:?}");
        assert!(second.iter().all(|pid| gone(pid)));
    }
}

#[test]
fn a_rank_that_does_not_stop_with_the_others_is_killed() {
    // Rank 2 ignores the end of its stdin, as one in a collective with the dead rank may.
    let mut launcher = four(
        "beat; serving; say rank $rank pid $$
         if [ $rank = 2 ] && mkdir \"$CHILDREN/once\"; then read line < \"$CHILDREN/never\"; fi; serve; say rank $rank down",
    );
    let _never = launcher.fifo("never");
    let mut running = launcher.start();
    let first = pids(&running.until_all(&UP));
    let killed = Instant::now();
    kill("-KILL", &format!("-{}", first[0]));
    running.until("shard-2 did not stop within 3 s, killing it");
    running.until("restarting in 0.5 s");
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
    assert!(first.iter().all(|pid| gone(pid)));
    running.until_all(&UP);
    running.signal("-TERM");
    assert_eq!(running.ended().0, Some(0));
}

/// The rank that has lost another one ends as well, and often its end is seen first.
#[test]
fn the_cause_of_the_end_is_named() {
    for (script, code, cause) in [
        // Rank 0 ends because it has lost rank 2.
        (
            "[ $rank = 2 ] && exit 64; [ $rank = 0 ] && exit 69; serve",
            64,
            "shard-2 could not start (exit status: 64)",
        ),
        (
            "[ $rank = 1 ] && { say no room; exit 3; }; [ $rank = 3 ] && exit 69; serve",
            1,
            "shard-1 could not start (exit status: 3)",
        ),
        ("[ $rank = 3 ] && kill -9 $$; [ $rank = 3 ] || exit 69", 1, "shard-3 could not start (signal: 9"),
        ("exit 69", 1, "could not start (exit status: 69)"),
        ("[ $rank = 1 ] && exit 0; serve", 1, "shard-1 could not start (exit status: 0)"),
    ] {
        let (status, log) = four(&format!("beat; {script}")).fails();
        assert_eq!(status, code, "{script}: {log}");
        assert!(log.contains(cause), "{script}: {cause:?} in {log}");
    }
}

/// A rank that waits for a suspended one may give up before the launcher does.
#[test]
fn a_rank_that_hangs_is_the_cause_though_another_one_ends_first() {
    // The launcher alone would wait for a minute.
    let mut launcher = four_within(
        "60",
        "beat; serving; say rank $rank pid $$
         if [ $rank = 0 ]; then read line < \"$CHILDREN/go\"; exit 70; fi; serve; say rank $rank down",
    );
    let go = launcher.fifo("go");
    let mut running = launcher.start();
    let first = pids(&running.until_all(&UP));
    kill("-STOP", &format!("-{}", first[3]));
    go.write_line("rank 0 has waited long enough");
    let ended = running.until("restarting in 0.5 s");
    let of = |text: &str| ended.iter().any(|line| line.contains(text));
    assert!(of("shard-0 ended (exit status: 70)") && of("shard-3 hangs (no sign of life for"), "{ended:#?}");
    assert!(first.iter().all(|pid| gone(pid)));
    running.signal("-TERM");
    running.ended();
}

/// Freeing the memory of a GPU takes its time, after a rank has closed its stdout: it is not the cause for that.
#[test]
fn a_rank_that_takes_its_time_to_go_is_not_the_cause() {
    let ends = |first: usize, slow: usize| {
        // The launcher alone would wait for a minute, and kills the rank that is slow after three seconds.
        let launcher = four_within(
            "60",
            &format!(
                "beat; [ $rank = {first} ] && exit 70; serve
                 [ $rank = {slow} ] && {{ kill $!; exec >&-; read line < \"$CHILDREN/never\"; }}; say rank $rank down"
            ),
        );
        let never = launcher.fifo("never");
        let (status, log) = launcher.fails();
        drop(never);
        assert_eq!(status, 1, "{log}");
        assert!(log.contains(&format!("shard-{first} could not start (exit status: 70)")), "{log}");
        assert!(log.contains(&format!("shard-{slow} did not stop within 3 s, killing it")), "{log}");
        assert!(!log.contains("hangs"), "{log}");
    };
    std::thread::scope(|scope| {
        for (first, slow) in [(0, 1), (0, 3), (1, 0), (2, 3), (3, 2), (3, 0)] {
            scope.spawn(move || ends(first, slow));
        }
    });
}

/// Whatever a group leaves in its folder is gone when the next one starts.
#[test]
fn nothing_of_a_group_is_left_for_the_next() {
    let mut launcher = four(
        "folder=$(dirname \"$config\"); say rank $rank finds $(ls \"$folder\" \"$folder/ranks\" | tr '\\n' ' ').
         read line < \"$CHILDREN/go\"; touch \"$folder/shard-$rank.sock\" \"$folder/ranks/rank-$rank\"; mkdir -p \"$folder/ranks/deep/$rank\"
         beat; serving; say rank $rank pid $$; serve",
    );
    let go = launcher.fifo("go");
    let mut running = launcher.start();
    for life in 0..3 {
        let found = running.until_all(&["rank 0 finds", "rank 1 finds", "rank 2 finds", "rank 3 finds"]);
        let found: Vec<_> = found.iter().filter_map(|line| line.split_once("finds ")).collect();
        assert_eq!(found.len(), 4);
        for (rank, found) in found {
            let (folder, ranks) = found.split_once("ranks:").unwrap();
            assert!(!folder.contains(".sock") && ranks.trim() == ".", "life {life}: {rank}{found}");
        }
        (0..4).for_each(|_| go.write_line("go"));
        let pids = pids(&running.until_all(&UP));
        if life < 2 {
            kill("-KILL", &format!("-{}", pids[life]));
            running.until("restarting in");
        }
    }
    running.signal("-TERM");
    assert_eq!(running.ended().0, Some(0));
}

#[test]
fn the_folder_of_the_ranks_is_its_users_alone() {
    let mut launcher =
        four("beat; serving; cp \"$config\" \"$CHILDREN/ranks.json\"; say rank $rank pid $$; serve");
    let mut running = launcher.start();
    running.until_all(&UP);
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(launcher.folder().join("ranks.json")).unwrap()).unwrap();
    let folder = PathBuf::from(config["shards"]["rendezvous"].as_str().unwrap());
    assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(folder.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(config["shards"]["uds"].as_array().unwrap().len(), 4);
    assert_ne!(config["shards"]["uds"], json!([]));
    running.signal("-TERM");
    assert_eq!(running.ended().0, Some(0));
    assert!(!folder.exists(), "it ends with the server");
}

#[test]
fn a_group_that_is_ending_can_be_stopped() {
    let mut launcher = four(
        "beat; serving; say rank $rank pid $$; if [ $rank = 2 ]; then read line < \"$CHILDREN/never\"; fi; serve",
    );
    let _never = launcher.fifo("never");
    let mut running = launcher.start();
    let first = pids(&running.until_all(&[&UP[..], &["router up"]].concat()));
    kill("-KILL", &format!("-{}", first[1]));
    running.until("shard-1 ended");
    running.signal("-TERM");
    let (status, lines) = running.ended();
    assert_eq!(status, Some(0), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("router down")), "{lines:?}");
    assert!(first.iter().all(|pid| gone(pid)));
}
