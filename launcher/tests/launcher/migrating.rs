//! `docs/migrating.md`: every flag and variable of LoRAX and of vLLM is what its table says.

use std::{collections::BTreeSet, fs, path::Path, thread};

use serde_json::Value;

use crate::launcher::Launcher;

/// Launchers that run at the same time.
const AT_ONCE: usize = 4;

/// Flags that reach no child, or with the value that is the default.
const ELSEWHERE: [&str; 14] = [
    "--model-id",
    "--model",
    // It needs an adapter.
    "--merge-adapter-weights",
    "--revision",
    "--source",
    "--sharded",
    "--num-shard",
    "--tensor-parallel-size",
    "--env",
    "--download-only",
    "--huggingface-hub-cache",
    "--download-dir",
    "--predibase-api-token",
    "--enable-prefix-caching",
];

/// All flags of LoRAX's launcher at its last commit (a7394ba3), and of its documentation.
const OF_LORAX: &str = "model-id adapter-id source default-adapter-source adapter-source revision validation-workers \
    sharded num-shard quantize compile eager compile-max-batch-size compile-max-rank compile-batch-size \
    speculative-tokens speculation-max-batch-size preloaded-adapter-ids preloaded-adapter-source predibase-api-token \
    dtype trust-remote-code max-concurrent-requests max-best-of max-stop-sequences max-input-length max-total-tokens \
    waiting-served-ratio max-batch-prefill-tokens max-batch-total-tokens max-waiting-tokens eager-prefill \
    chunked-prefill prefix-caching merge-adapter-weights max-active-adapters adapter-cycle-time-s \
    adapter-memory-fraction hostname port shard-uds-path master-addr master-port huggingface-hub-cache \
    weights-cache-override disable-custom-kernels cuda-memory-fraction json-output otlp-endpoint cors-allow-origin \
    cors-allow-header cors-expose-header cors-allow-method cors-allow-credentials watermark-gamma watermark-delta ngrok \
    ngrok-authtoken ngrok-edge env download-only tokenizer-config-path backend embedding-dim disable-sgmv \
    memory-wiggle-room";

/// A row of a table.
#[derive(Debug, Clone)]
struct Row {
    /// A flag with its dashes, or a variable.
    name: String,
    value: Option<String>,
    fate: String,
}

fn page() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/migrating.md")).unwrap()
}

/// The rows of the table under a heading.
fn rows(heading: &str) -> Vec<Row> {
    let page = page();
    let (_, section) = page.split_once(&format!("## {heading}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let cells = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let row = |line: &str| {
        let (given, rest) = line.split_once('`').unwrap();
        let fate = rest.split('|').nth(1).unwrap().trim().to_owned();
        let (name, value) = match given.split_once(['=', ' ']) {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (given, None),
        };
        Row { name: name.to_owned(), value, fate }
    };
    cells.map(row).collect()
}

/// A launcher with a model, which a value may name.
fn launcher(value: Option<&str>) -> (Launcher, Option<String>) {
    let launcher = Launcher::with_model();
    let model = launcher.folder().join("model.gguf");
    let config = launcher.folder().join("tokenizer_config.json");
    let value = value.map(|value| match value {
        "MODEL" => model.to_str().unwrap().to_owned(),
        "CONFIG" => config.to_str().unwrap().to_owned(),
        other => other.to_owned(),
    });
    (launcher, value)
}

/// What the router is told, without what differs from one start to the next.
fn told(config: &Value) -> Value {
    let mut config = config.clone();
    config["model"] = Value::Null;
    config["shards"] = Value::Null;
    config
}

/// Starts, and checks that the row's fate is what happens.
fn check(row: &Row, mut launcher: Launcher, given: &str, plain: &Value) {
    let warning = format!("{given} has no effect: ");
    if row.fate == "refused" {
        let (status, log) = launcher.fails();
        assert_eq!(status, 64, "{given}: {log}");
        assert!(log.contains(&format!("{given} is not supported: ")), "{given}: {log}");
        return;
    }
    let mut running = launcher.start();
    let last = if row.name == "--download-only" { "the model is at" } else { "router up" };
    let mut log = running.until(last);
    running.signal("-TERM");
    let (status, rest) = running.ended();
    log.extend(rest);
    assert_eq!(status, Some(0), "{given}: {log:#?}");
    let warnings = log.iter().filter(|line| line.contains(&warning)).count();
    assert_eq!(warnings, usize::from(row.fate == "no effect"), "{given}: {log:#?}");
    if row.fate == "served" && row.name.starts_with("--") && !ELSEWHERE.contains(&&*row.name) {
        let config = fs::read(launcher.folder().join("config.json")).unwrap();
        let config = told(&serde_json::from_slice(&config).unwrap());
        assert_ne!(config, *plain, "{given} changes nothing");
    }
}

/// Does something for each row, a few at the same time.
fn for_each(rows: &[Row], check: impl Fn(&Row, &Value) + Sync) {
    let plain = told(&Launcher::with_model().configuration());
    thread::scope(|scope| {
        for part in rows.chunks(rows.len().div_ceil(AT_ONCE)) {
            let (check, plain) = (&check, &plain);
            scope.spawn(move || part.iter().for_each(|row| check(row, plain)));
        }
    });
}

#[test]
fn the_tables_have_every_flag() {
    let names = |heading| rows(heading).into_iter().map(|row| row.name.trim_start_matches('-').to_owned());
    let of_lorax: BTreeSet<String> = names("LoRAX's flags").collect();
    assert_eq!(of_lorax, OF_LORAX.split_whitespace().map(str::to_owned).collect());
    // Whatever only other servers have is in one of the tables.
    let all: BTreeSet<String> =
        of_lorax.into_iter().chain(names("vLLM's flags")).chain(names("LoRAX's variables")).collect();
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/foreign/table.rs");
    let table = fs::read_to_string(table).unwrap();
    let mut calls = 0;
    for call in ["lorax(", "vllm(", "variable("] {
        for rest in table.split(call).skip(1).filter_map(|rest| rest.trim_start().strip_prefix('"')) {
            let name = rest.split('"').next().unwrap();
            assert!(all.contains(name), "{name} is not in docs/migrating.md");
            calls += 1;
        }
    }
    assert!(calls > 50, "{calls}");
}

#[test]
fn every_flag_is_what_the_table_says() {
    let flags = [rows("LoRAX's flags"), rows("vLLM's flags")].concat();
    for_each(&flags, |row, plain| {
        let (launcher, value) = launcher(row.value.as_deref());
        let args: Vec<&str> = [&*row.name].into_iter().chain(value.as_deref()).collect();
        check(row, launcher.args(&args), &row.name, plain);
    });
}

#[test]
fn every_variable_is_what_the_table_says() {
    let flags = rows("LoRAX's flags").into_iter().filter(|row| row.name != "--env");
    let all: Vec<Row> = flags.chain(rows("LoRAX's variables")).collect();
    for_each(&all, |row, plain| {
        let (launcher, value) = launcher(row.value.as_deref());
        let name = row.name.trim_start_matches('-').replace('-', "_").to_uppercase();
        let launcher = launcher.env(&name, value.as_deref().unwrap_or("true"));
        check(row, launcher, &name, plain);
    });
}

/// An empty variable asks for nothing, and neither does a switch that is off.
#[test]
fn what_is_off_is_not_refused() {
    for name in ["QUANTIZE", "WEIGHTS_CACHE_OVERRIDE", "ROPE_SCALING", "REQUEST_LOGGER_URL"] {
        Launcher::with_model().env(name, "").configuration();
    }
    for name in ["NGROK", "MERGE_ADAPTER_WEIGHTS"] {
        for off in ["false", "0", "no"] {
            Launcher::with_model().env(name, off).configuration();
        }
        let (status, log) = Launcher::with_model().env(name, "perhaps").fails();
        assert_eq!(status, 64, "{log}");
    }
    for (flag, value) in
        [("--waiting-served-ratio", "much"), ("--master-port", "here"), ("--compile", "perhaps")]
    {
        let (status, log) = Launcher::with_model().args(&[flag, value]).fails();
        assert_eq!(status, 64, "{flag}: {log}");
        assert!(log.contains(flag), "{log}");
    }
}

#[test]
fn the_command_lines_of_lorax_s_documentation_work() {
    let page = page();
    let (_, section) = page.split_once("## Command lines of LoRAX's documentation\n").unwrap();
    let lines: Vec<&str> =
        section.split("```").nth(1).unwrap().lines().filter(|line| !line.is_empty()).collect();
    assert!(lines.len() >= 7, "{lines:?}");
    for line in lines {
        let launcher = Launcher::with_model().gpus(2);
        let model = launcher.folder().join("model.gguf");
        let mut words: Vec<&str> = line.split(' ').collect();
        if words[0] == "--model-id" {
            words[1] = model.to_str().unwrap();
        }
        let config = launcher.args(&words).configuration();
        let adapter = words.iter().position(|word| *word == "--adapter-id").map(|at| words[at + 1]);
        assert_eq!(config["router"]["adapter_id"].as_str(), adapter, "{line}");
    }
    for kind in ["bitsandbytes-nf4", "awq", "gptq", "eetq", "hqq-2bit"] {
        let (status, log) = Launcher::with_model().args(&["--quantize", kind]).fails();
        assert_eq!(status, 64, "{log}");
        assert!(log.contains("--quantize is not supported"), "{log}");
    }
}
