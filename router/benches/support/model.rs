//! The model of the benchmarks of the router: a tokenizer, and a configuration that names it.

use std::{fs, io, path::Path};

use config::{Config, LogConfig, ModelConfig, RouterConfig, ShardConfig, ShardsConfig};
use serde_json::json;

const SPECIAL: usize = 256;

/// Writes a byte-level tokenizer, as Llama 3's: bytes, then words of two and three letters, then special tokens. Returns the ordinary ones.
pub(crate) fn write_tokenizer(folder: &Path) -> io::Result<u32> {
    let kept = (33..=126u32).chain(161..=172).chain(174..=255);
    let bytes = kept.chain(256..324).filter_map(char::from_u32).map(String::from);
    let mut tokens: Vec<String> = bytes.collect();
    let mut merges = Vec::new();
    let letters = || ('a'..='z').map(String::from);
    let pairs: Vec<String> = letters().flat_map(|a| letters().map(move |b| a.clone() + &b)).collect();
    for pair in &pairs {
        merges.push(format!("{} {}", &pair[..1], &pair[1..]));
    }
    tokens.extend(pairs.iter().cloned());
    for (pair, letter) in pairs.iter().flat_map(|pair| letters().map(move |letter| (pair, letter))) {
        merges.push(format!("{pair} {letter}"));
        tokens.push(format!("{pair}{letter}"));
    }
    let ordinary = tokens.len();
    let special = (0..SPECIAL).map(|i| {
        json!({"id": ordinary + i, "content": format!("<|special_{i}|>"), "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false})
    });
    let special: Vec<_> = special.collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let vocab: serde_json::Map<_, _> =
        tokens.into_iter().enumerate().map(|(i, token)| (token, json!(i))).collect();
    let whole = json!({"version": "1.0", "added_tokens": special, "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}});
    fs::write(folder.join("tokenizer.json"), whole.to_string())?;
    Ok(ordinary as u32)
}

/// The configuration of a router on a free port.
pub(crate) fn configuration(model: &Path, socket: &Path) -> Config {
    Config {
        model: ModelConfig {
            id: "bench".into(),
            path: model.into(),
            merged_adapter: None,
            revision: None,
            sha: None,
        },
        shards: ShardsConfig { uds: vec![socket.into()], rendezvous: "/none".into() },
        router: RouterConfig {
            hostname: "127.0.0.1".into(),
            port: 0,
            max_batch_prefill_tokens: Some(1792),
            prefix_caching: false,
            ..RouterConfig::default()
        },
        shard: ShardConfig::default(),
        log: LogConfig::default(),
    }
}
