//! Odd configurations of all families: each is read as transformers reads it, or refused by the name of its odd field. None
//! panics. See `integration-tests/fixtures/make_odd_configs.py`.

use std::{fs, path::Path};

use kernels::{RopeSpec, Span};
use model::Decoder;
use serde::Deserialize;
use serde_json::Value;

use crate::read;

#[derive(Deserialize)]
struct Case {
    /// The field that is odd.
    field: String,
    config: Value,
    /// What transformers makes of it, unless it fails.
    values: Option<Values>,
}

#[derive(Debug, Deserialize)]
struct Values {
    hidden: usize,
    vocab: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    window: Vec<Option<u32>>,
    ropes: Vec<Rope>,
    tied: bool,
    softcaps: [Option<f32>; 2],
    attention_bias: bool,
}

#[derive(Debug, Deserialize)]
struct Rope {
    inv_freq: Vec<f32>,
    scale: f32,
}

impl Rope {
    fn is(&self, spec: &RopeSpec) -> bool {
        let close = |x: f32, y: f32| (x - y).abs() <= 2e-6 * y.abs();
        spec.inv_freq.len() == self.inv_freq.len()
            && spec.inv_freq.iter().zip(&self.inv_freq).all(|(x, y)| close(*x, *y))
            && close(spec.scale, self.scale)
    }
}

fn expect(decoder: &Decoder, values: &Values, config: &Value) {
    let attention = &decoder.layers[0].attention;
    let (heads, shape) = (decoder.heads(), attention.shape);
    assert_eq!(
        (decoder.hidden, decoder.vocab, decoder.layers.len(), decoder.head.tied),
        (values.hidden, values.vocab, values.layers, values.tied),
        "{config}"
    );
    assert_eq!(
        (heads.query, heads.kv, heads.dim, attention.qkv_bias),
        (values.heads, values.kv_heads, values.head_dim, values.attention_bias),
        "{config}"
    );
    assert!((shape.scale - values.scale).abs() < 1e-6, "{}: {config}", shape.scale);
    assert_eq!([shape.softcap, decoder.head.shape.softcap], values.softcaps, "{config}");
    let window = |span| match span {
        Span::Window(window) => Some(window),
        Span::Causal | Span::Bidirectional => None,
    };
    let windows: Vec<_> = decoder.layers.iter().map(|layer| window(layer.attention.shape.span)).collect();
    assert_eq!(windows, values.window, "{config}");
    // Only those that layers have: transformers makes no others.
    let used = |index: &usize| {
        decoder.layers.iter().any(|layer| layer.attention.rope.is_some_and(|(i, _)| i == *index))
    };
    let ropes: Vec<_> = (0..decoder.ropes.len()).filter(used).map(|index| &decoder.ropes[index]).collect();
    assert_eq!(ropes.len(), values.ropes.len(), "{config}");
    for (spec, rope) in ropes.into_iter().zip(&values.ropes) {
        assert!(rope.is(spec), "{spec:?}, transformers has {rope:?}: {config}");
    }
}

#[test]
fn odd_configurations_are_read_as_transformers_does_or_refused() {
    #[derive(Deserialize)]
    struct Cases {
        cases: Vec<Case>,
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/config/odd.json");
    let Cases { cases } = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(cases.len() > 70);
    let mut served = 0;
    for Case { field, config, values } in cases {
        match (read(&config), values) {
            (Ok(decoder), Some(values)) => {
                served += 1;
                expect(&decoder, &values, &config);
            }
            (Ok(_), None) => panic!("{field}: transformers refuses {config}"),
            (Err(refusal), _) => assert!(refusal.contains(&field), "{field}: {refusal}"),
        }
    }
    assert!(served > 35, "{served} are served");
}
