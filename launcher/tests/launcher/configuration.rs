//! Flags and environment: what is refused, and what reaches the children.

use std::{fs, os::unix::fs::PermissionsExt};

use serde_json::json;

use crate::launcher::Launcher;

#[test]
fn what_cannot_work_is_refused_at_once() {
    for (args, cause) in [
        (&["--no-such-flag"][..], "--no-such-flag"),
        (&["stray"], "stray"),
        (&["--port", "http"], "--port"),
        (&["--port", "70000"], "--port"),
        (&["--dtype", "float8"], "--dtype"),
        (&["--device", "tpu"], "--device"),
        (&["--kv-memory", "2XiB"], "--kv-memory"),
        (&["--num-shard", "0"], "--num-shard 0: it must be between 1 and 8"),
        (&["--num-shard", "9"], "--num-shard 9: it must be between 1 and 8"),
        (&["--num-shard", "two"], "--num-shard"),
        (&["--num-shard=-1"], "--num-shard"),
        (&["--sharded", "maybe"], "--sharded"),
        (
            &["--sharded", "true", "--num-shard", "1"],
            "--sharded true, but --num-shard 1: a sharded model has at",
        ),
        (&["--sharded", "--device", "cpu"], "--sharded true with --device cpu needs --num-shard"),
        (&["--sharded", "true"], "--sharded true: 0 of the 2 GPUs that it needs are visible: no driver"),
        (&["--num-shard", "2", "--device", "cuda"], "--num-shard 2: 0 of the 2 GPUs"),
        (&["--device", "cuda"], "--device cuda: 0 of the 1 GPUs that it needs are visible: no driver"),
        (&["--adapter-buckets", "s3://one,hub://two"], "--adapter-buckets hub://two"),
        (&["--served-model-name", ""], "--served-model-name \"\""),
        (&["--served-model-name", "a,b\u{7}"], "--served-model-name \"b\\u{7}\""),
        (&["--adapter-source", "ftp"], "it must be local, hub, s3, gs, az, or pbase"),
        (&["--adapter-auth-ttl-s", "soon"], "--adapter-auth-ttl-s"),
        (&["--adapter-auth-ttl-s", "18446744073709551615"], "--adapter-auth-ttl-s must be at most"),
        (&["--adapter-cache-size", "2PiB"], "--adapter-cache-size must be at most 1.0 PiB"),
        (&["--adapter-dir", "/no/such/folder"], "/no/such/folder is not a folder"),
        (&["--adapter-roots", "/,/no/such/folder"], "/no/such/folder is not a folder"),
        (&["--threads", "100000"], "--threads must be at most 1024"),
        (&["--step-timeout", "0"], "--step-timeout must be at least 0.001 s"),
        (&["--body-timeout", "soon"], "--body-timeout"),
        (&["--router-threads", "0"], "--router-threads must be at least 1"),
        (&["--prefix-cache-scope", "world"], "--prefix-cache-scope"),
        (&["--api-key-file", "/no/such/file"], "/no/such/file is not a file"),
        (&["--shutdown-deadline", "18446744073709551615"], "--shutdown-deadline must be at most"),
        (&["--max-client-batch-size", "0"], "--max-client-batch-size must be at least 1"),
        (&["--request-timeout", "0"], "--request-timeout must be at least 0.001 s"),
        (&["--threads", "0"], "--threads must be"),
        (&["--default-adapter-source", "ftp"], "--default-adapter-source \"ftp\""),
        (&["--adapter-memory-fraction", "1.5"], "--adapter-memory-fraction must be"),
        (&["--cuda-memory-fraction=-1"], "--cuda-memory-fraction must be"),
    ] {
        let (status, log) = Launcher::with_model().args(args).fails();
        assert_eq!(status, 64, "{args:?}: {log}");
        assert!(log.contains(cause), "{cause:?} in {log}");
    }
}

#[test]
fn limits_have_bounds() {
    for (args, cause) in [
        (&["--max-adapter-size", "0"][..], "--max-adapter-size must be at least 1 B"),
        (&["--max-adapter-lookups", "0"], "--max-adapter-lookups must be at least 1"),
        (&["--max-adapter-downloads", "1025"], "--max-adapter-downloads must be at most 1024"),
        (&["--max-adapter-stages", "0"], "--max-adapter-stages must be at least 1"),
        (&["--max-batch-size", "0"], "--max-batch-size must be at least 1"),
        (&["--max-batch-size", "18446744073709551615"], "--max-batch-size must be at most 65536"),
        (&["--max-active-adapters", "18446744073709551615"], "--max-active-adapters must be at most"),
        (&["--max-body-size", "2GiB"], "--max-body-size must be at most 1.0 GiB"),
        (&["--max-body-size", "256MiB"], "--max-body-memory must be at least 256.0 MiB"),
        (&["--max-connections", "0"], "--max-connections must be at least 1"),
        (&["--max-concurrent-requests", "0"], "--max-concurrent-requests must be"),
        (&["--max-batch-prefill-tokens", "0"], "--max-batch-prefill-tokens must be"),
        (&["--max-best-of", "0"], "--max-best-of must be at least 1"),
        (&["--max-best-of", "129"], "--max-best-of must be at most 128"),
        (&["--max-input-length", "9", "--max-total-tokens", "9"], "must be less than --max-total-tokens 9"),
        (&["--max-total-tokens", "1"], "--max-total-tokens must be at least 2"),
    ] {
        let (status, log) = Launcher::with_model().args(args).fails();
        assert_eq!(status, 64, "{args:?}: {log}");
        assert!(log.contains(cause), "{cause:?} in {log}");
    }
}

#[test]
fn a_model_must_be_named() {
    for (args, cause) in [
        (&[][..], "--model-id"),
        (&["--model-id", "/no/such/model"], "neither a path that exists nor a hub id"),
        (&["--model-id", "./nope"], "neither a path that exists nor a hub id"),
        (&["--model-id", "/"], "neither a folder with a config.json nor a GGUF file"),
    ] {
        let (status, log) = Launcher::new().args(args).fails();
        assert_eq!(status, 64, "{args:?}");
        assert!(log.contains(cause), "{log}");
    }
}

#[test]
fn the_environment_is_checked_as_flags_are() {
    for (name, value) in [("PORT", "http"), ("MAX_BATCH_SIZE", "0"), ("PREFIX_CACHING", "perhaps")] {
        let (status, log) = Launcher::with_model().env(name, value).fails();
        assert_eq!(status, 64, "{name}: {log}");
    }
}

#[test]
fn a_container_s_name_is_no_address_to_listen_on() {
    for (name, address) in [("3f2a9c0d1e77", "0.0.0.0"), ("127.0.0.1", "127.0.0.1"), ("::1", "::1")] {
        let config = Launcher::with_model().env("HOSTNAME", name).configuration();
        assert_eq!(config["router"]["hostname"], json!(address));
    }
}

#[test]
fn flags_come_before_the_environment_before_defaults() {
    let mut launcher = Launcher::with_model()
        .env("PORT", "1234")
        .env("MAX_INPUT_LENGTH", "77")
        .env("MAX_TOTAL_TOKENS", "99")
        .env("ADAPTER_HOST_MEMORY", "5MiB")
        .args(&["--port", "4321", "--max-input-length", "88", "--prefix-caching", "false"]);
    let config = launcher.configuration();
    for (section, name, value) in [
        ("router", "port", json!(4321)),
        ("router", "max_input_length", json!(88)),
        ("router", "max_total_tokens", json!(99)),
        ("router", "prefix_caching", json!(false)),
        ("router", "max_concurrent_requests", json!(1024)),
        ("router", "max_body_size", json!(2 << 20)),
        ("shard", "adapter_host_memory", json!(5 << 20)),
        ("shard", "max_active_adapters", json!(128)),
        ("shard", "dtype", json!(null)),
    ] {
        assert_eq!(config[section][name], value, "{section}.{name}");
    }
}

#[test]
fn help_and_version_are_no_errors() {
    for flag in ["--help", "--version"] {
        assert_eq!(Launcher::new().args(&[flag]).fails().0, 0, "{flag}");
    }
}

/// Keys are given by flag and by environment, reach the router's file, and are shown nowhere else; the hub's token is
/// shown nowhere at all.
#[test]
fn secrets_are_told_to_nobody_but_the_router() {
    for (args, environment) in [
        (&["--api-key", "sk-first,sk-second"][..], None),
        (&["--api-key", "sk-first", "--api-key", "sk-second"], None),
        (&[], Some("sk-first,sk-second")),
    ] {
        let launcher = Launcher::with_model().args(args).env("LOG_LEVEL", "trace");
        // Models are fetched before there are children.
        let launcher = launcher.env("HF_TOKEN", "sk-hub").env("HUGGING_FACE_HUB_TOKEN", "sk-hub");
        // A child says how it was called, and the environment that it was given.
        let router = "cp \"$config\" \"$CHILDREN/config.json\"; say $0 $@ $(env); say router up; serve";
        let mut launcher = launcher.router(router);
        if let Some(keys) = environment {
            launcher = launcher.env("LORAX_API_KEY", keys);
        }
        let mut running = launcher.start();
        let mut lines = running.until("router up");
        let mode = fs::metadata(launcher.folder().join("config.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "only its owner may read it");
        running.signal("-TERM");
        lines.extend(running.ended().1);
        assert!(lines.iter().all(|line| !line.contains("sk-")), "{lines:#?}");
        let config = fs::read(launcher.folder().join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config["router"]["api_keys"], json!(["sk-first", "sk-second"]));
    }
}

#[test]
fn an_api_key_that_is_refused_is_not_shown() {
    for key in ["sk-umlaut-\u{e4}", "sk-with space", "sk-good,,sk-other", "sk-tab\t", "", ","] {
        let (status, log) = Launcher::with_model().args(&["--api-key", key]).fails();
        assert_eq!(status, 64, "{key:?}: {log}");
        assert!(log.contains("--api-key") && !log.contains("sk-"), "{log}");
    }
    let out = Launcher::new().env("LORAX_API_KEY", "sk-first").args(&["--help"]).output();
    assert!(out.contains("LORAX_API_KEY") && !out.contains("sk-first"), "{out}");
}
