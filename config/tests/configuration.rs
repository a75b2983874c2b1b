//! The file: what is written is what is read, and what cannot work is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use config::{Config, ConfigError, LogConfig, ModelConfig, RouterConfig, ShardConfig, ShardsConfig};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};

fn defaults() -> Config {
    Config {
        model: ModelConfig {
            id: "m".into(),
            path: "/m".into(),
            merged_adapter: None,
            revision: None,
            sha: None,
        },
        shards: ShardsConfig { uds: vec!["/run/shard-0.sock".into()], rendezvous: "/run/ranks".into() },
        router: RouterConfig::default(),
        shard: ShardConfig::default(),
        log: LogConfig::default(),
    }
}

#[test]
fn what_is_written_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let mut written = defaults();
    written.router.api_keys = vec![SecretString::from("sk-1"), SecretString::from("sk-2")];
    written.router.step_timeout = Some(Duration::from_millis(2500));
    written.router.max_batch_prefill_tokens = Some(100);
    written.write(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let read = Config::read(&path).unwrap();
    let keys: Vec<_> = read.router.api_keys.iter().map(ExposeSecret::expose_secret).collect();
    assert_eq!(keys, ["sk-1", "sk-2"]);
    assert_eq!(read.router.step_timeout, written.router.step_timeout);
    assert_eq!(read.router.shutdown_deadline, Duration::from_secs(30));
    assert_eq!(read.max_rows(), Some(228));
    assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::to_value(&written).unwrap());
    assert!(matches!(written.write(&path), Err(ConfigError::Io { .. })), "a file that is there is kept");
}

#[test]
fn secrets_are_not_printed() {
    let mut config = defaults();
    config.router.api_keys = vec![SecretString::from("sk-1")];
    let printed = format!("{config:?} {config:#?}");
    assert!(printed.contains("api_keys") && !printed.contains("sk-1"), "{printed}");
}

#[test]
fn a_file_that_is_no_configuration_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let good = serde_json::to_value(defaults()).unwrap();
    let changed = |change: fn(&mut Value)| {
        let mut config = good.clone();
        change(&mut config);
        config.to_string()
    };
    for (text, cause) in [
        ("".to_owned(), "EOF"),
        ("[]".into(), "invalid"),
        (changed(|config| config["router"]["prot"] = json!(1)), "unknown field `prot`"),
        (changed(|config| config["extra"] = json!({})), "unknown field `extra`"),
        (changed(|config| config["shard"]["device"] = json!("tpu")), "unknown variant `tpu`"),
        (changed(|config| config["router"]["port"] = json!(70000)), "70000"),
        (changed(|config| config["router"]["body_timeout"] = json!(-1)), "negative"),
        (changed(|config| config["log"] = json!(null)), "invalid type"),
        (changed(|config| drop(config["router"].as_object_mut().unwrap().remove("port"))), "missing field"),
        (
            changed(|config| config["shard"]["max_batch_size"] = json!(0)),
            "--max-batch-size must be at least 1",
        ),
        (
            changed(|config| config["router"]["max_body_size"] = json!(1_u64 << 40)),
            "--max-body-size must be at most",
        ),
        (changed(|config| config["router"]["api_keys"] = json!([""])), "--api-key: key 1"),
    ] {
        fs::write(&path, &text).unwrap();
        let error = Config::read(&path).unwrap_err().to_string();
        assert!(error.contains(cause), "{cause:?} in {error}");
    }
    let missing = Config::read(&folder.path().join("none")).unwrap_err().to_string();
    assert!(missing.contains("/none: "), "{missing}");
}

/// A setting whose largest number is not refused has no bound, or is not checked. Two are lowered later to what fits.
#[test]
fn every_setting_has_a_bound() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let good = serde_json::to_value(defaults()).unwrap();
    for section in ["router", "shard"] {
        for name in good[section].as_object().unwrap().keys() {
            let mut config = good.clone();
            config[section][name] = json!(u64::MAX);
            fs::write(&path, config.to_string()).unwrap();
            let lowered = ["max_input_length", "max_total_tokens"].contains(&&**name);
            assert_eq!(Config::read(&path).is_ok(), lowered, "{section}.{name}");
        }
    }
    // This one has a bound of its own, however much memory there is for bodies.
    for (size, allowed) in [(1_u64 << 30, true), ((1 << 30) + 1, false), (1 << 40, false)] {
        let mut config = good.clone();
        config["router"]["max_body_memory"] = json!(1_u64 << 50);
        config["router"]["max_body_size"] = json!(size);
        fs::write(&path, config.to_string()).unwrap();
        assert_eq!(Config::read(&path).is_ok(), allowed, "{size}");
    }
}

#[test]
fn a_rank_has_its_socket() {
    let config = defaults();
    assert_eq!(config.socket(0).unwrap().to_str(), Some("/run/shard-0.sock"));
    assert_eq!(
        config.socket(1).unwrap_err().to_string(),
        "--rank 1: the configuration has 1 ranks, counted from 0"
    );
}

#[test]
fn an_address_has_half_of_the_connections_unless_told_otherwise() {
    let with = |all, address| RouterConfig {
        max_connections: all,
        max_connections_per_address: address,
        ..RouterConfig::default()
    };
    assert_eq!(with(10, None).connections_per_address(), 5);
    assert_eq!(with(1, None).connections_per_address(), 1);
    assert_eq!(with(10, Some(7)).connections_per_address(), 7);
}
