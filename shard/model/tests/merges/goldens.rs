//! What PEFT's `add_weighted_adapter` makes of adapters.

use std::{collections::BTreeSet, fs};

use kernels::DType;
use model::adapter::{MajoritySign, Recipe};
use safetensors::SafeTensors;
use serde::Deserialize;

use super::support::{STRATEGIES, base, delta, difference, fixtures, merge, parts, path};

#[derive(Deserialize, Debug)]
struct Case {
    parts: Vec<String>,
    weights: Vec<f64>,
    strategy: String,
    density: Option<f64>,
    majority_sign_method: Option<String>,
    svd_rank: Option<usize>,
    #[serde(default)]
    seed: u64,
    /// Why PEFT merges them not.
    error: Option<String>,
    /// The modules that it leaves out.
    #[serde(default)]
    dropped: Vec<String>,
}

impl Case {
    fn recipe(&self) -> Recipe {
        let strategy = STRATEGIES.into_iter().find(|strategy| strategy.name() == self.strategy).unwrap();
        let majority_sign = match self.majority_sign_method.as_deref() {
            Some("frequency") => MajoritySign::Frequency,
            _ => MajoritySign::Total,
        };
        let Case { density, svd_rank, seed, .. } = *self;
        Recipe { strategy, density, majority_sign, svd_rank, seed }
    }
}

#[derive(Deserialize)]
struct Cases {
    cases: Vec<Case>,
}

fn cases() -> Vec<Case> {
    let Cases { cases } = serde_json::from_slice(&fs::read(fixtures().join("cases.json")).unwrap()).unwrap();
    assert!(cases.len() > 60);
    cases
}

#[test]
fn merges_are_those_of_peft() {
    let folder = tempfile::tempdir().unwrap();
    let base = base(folder.path(), DType::F32);
    let file = fs::read(fixtures().join("deltas.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&file).unwrap();
    let (mut wrong, mut paths, mut compared) = (Vec::new(), BTreeSet::new(), 0);
    for (number, case) in cases().iter().enumerate() {
        let names: Vec<&str> = case.parts.iter().map(String::as_str).collect();
        let merged = merge(&parts(&names, &case.weights), &case.recipe(), &base);
        if !case.dropped.is_empty() {
            let refusal = merged.unwrap_err().to_string();
            assert!(refusal.contains("out of the merge") && refusal.contains(&case.dropped[0]), "{refusal}");
            continue;
        }
        // Of PEFT's refusals, that of a pattern beside a list is not needed.
        match &case.error {
            Some(error) if error.contains("same target modules type") => {
                merged.unwrap();
                continue;
            }
            Some(_) => {
                let refusal = merged.unwrap_err().to_string();
                assert!(refusal.contains("merges equal ranks only"), "{case:?}: {refusal}");
                continue;
            }
            None => {}
        }
        let merged = merged.unwrap();
        for part in &merged.parts {
            let Ok(expected) = golden.tensor(&format!("{number}/{}", path(part))) else { continue };
            let expected: Vec<f32> =
                expected.data().chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect();
            let apart = difference(&delta(part), &expected);
            if apart.is_nan() || apart > 1e-5 {
                wrong.push(format!("{case:?} {}: {apart}", path(part)));
            }
            compared += 1;
            paths.insert(path(part));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(compared, golden.len(), "every tensor has been compared");
    for kind in ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens", "lm_head"] {
        assert!(paths.iter().any(|path| path.ends_with(kind)), "{kind} in {paths:?}");
    }
}
