//! Configurations as models were published, with fields that have no say beside those that have.

use std::{fs, path::Path};

use kernels::{Span, Stretch};
use model::Decoder;
use serde::Deserialize;
use serde_json::Value;

use crate::read;

/// A configuration, and what it says.
#[derive(Deserialize)]
struct Published {
    config: Value,
    layers: usize,
    /// Queries, keys, and their size.
    heads: [usize; 3],
    /// Rotated pairs of a head.
    pairs: usize,
    positions: usize,
    /// Layers with a window, and its size.
    window: Option<(usize, u32)>,
}

fn published() -> Vec<Published> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/published.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn window(decoder: &Decoder) -> Option<(usize, u32)> {
    let windows = decoder.layers.iter().filter_map(|layer| match layer.attention.shape.span {
        Span::Window(window) => Some(window),
        Span::Causal | Span::Bidirectional => None,
    });
    let windows: Vec<u32> = windows.collect();
    windows.first().map(|window| (windows.len(), *window))
}

#[test]
fn published_configurations_are_read() {
    let published = published();
    assert_eq!(published.len(), 10);
    for Published { config, layers, heads, pairs, positions, window: expected } in &published {
        let decoder = read(config).unwrap();
        let got = decoder.heads();
        let rotated = decoder.ropes.first().map_or(0, |rope| rope.inv_freq.len());
        assert_eq!((decoder.layers.len(), [got.query, got.kv, got.dim]), (*layers, *heads), "{config}");
        assert_eq!(
            (rotated, decoder.max_positions, window(&decoder)),
            (*pairs, *positions, *expected),
            "{config}"
        );
    }
    let long = published.iter().find(|one| one.config["rope_scaling"]["type"] == "longrope").unwrap();
    let rope = read(&long.config).unwrap().ropes.remove(0);
    assert!(matches!(rope.stretch, Stretch::Long { original: 4096, .. }));
    // √(1 + ln 32 / ln 4096).
    assert!((rope.scale - 1.190_238).abs() < 1e-5, "{}", rope.scale);
}
