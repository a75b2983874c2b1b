//! Every kind of adapter that PEFT writes: what it computes of each, or that it is refused by name.

use std::{collections::BTreeSet, path::PathBuf};

use kernels::DType;
use model::{
    Decoder,
    adapter::{self, BaseModel},
    testing::seeded::Manifest,
};

use crate::{
    driver::{Driver, Sequence},
    goldens::{self, Case, Goldens},
};

/// Most that a log-probability may differ from PEFT's in f32.
const BAR: f32 = 2e-3;
/// What every kind moves a log-probability by, and what a reader is off by that passes over it.
const SENSITIVE: f32 = 0.05;
/// The kind whose initialization is not repeated: it takes the singular vectors of every weight.
const UNREPEATED: &str = "pissa";
/// Rows of a step of the mixed batch, and of a chunk of a prompt in it.
const STEP: (usize, usize) = (200, 23);

/// A base with adapters of all kinds, as files.
struct Base {
    name: &'static str,
    goldens: Goldens,
    folder: tempfile::TempDir,
}

impl Base {
    fn new(name: &'static str) -> Base {
        let base =
            Base { name, goldens: Goldens::of(name, "kinds.json"), folder: tempfile::tempdir().unwrap() };
        base.write("model.json", "model");
        base
    }

    /// Writes the folder of a manifest.
    fn write(&self, manifest: &str, to: &str) -> PathBuf {
        let to = self.folder.path().join(to);
        let manifest = Manifest::read(&goldens::folder(self.name).join(manifest)).unwrap();
        manifest.write(&to, DType::F32).unwrap();
        to
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    fn sequence(&self, case: &Case, slot: Option<u32>) -> Sequence {
        let top = case.top.iter().map(|top| top.position);
        let scored: BTreeSet<_> = case.positions.iter().copied().chain(top).collect();
        Sequence::new(&self.goldens.prompts[case.prompt], slot, scored)
    }

    /// The largest difference of a case's log-probabilities from PEFT's; its tokens must be PEFT's.
    fn compare(&self, how: &str, case: &Case, sequence: &Sequence) -> f32 {
        let place = format!("{} {how}, {:?}", self.name, case.adapter);
        let scored = case.positions.iter().map(|position| sequence.scores[position].logprob);
        let chosen = (sequence.prompt - 1..).take(case.tokens.len());
        let chosen = chosen.map(|position| sequence.scores[&position].top[0].1);
        let expected = case.logprobs.iter().chain(&case.token_logprobs);
        let worst = scored.chain(chosen).zip(expected).map(|(got, expected)| (got - expected).abs());
        let worst = worst.fold(0.0, f32::max);
        assert!(worst <= BAR, "{place}: off by {worst}");
        assert_eq!(sequence.tokens[sequence.prompt..], case.tokens, "{place}");
        worst
    }
}

/// All kinds of a base: each alone, then all in one batch with plain adapters and rows of the base.
fn run(name: &'static str) {
    let base = Base::new(name);
    let kind = |case: &Case| case.adapter.clone().unwrap();
    let kinds: Vec<&Case> = base.goldens.cases.iter().filter(|case| kind(case) != UNREPEATED).collect();
    let plain = Goldens::of(name, "goldens.json");
    let mut adapters: Vec<PathBuf> =
        kinds.iter().map(|case| base.write(&format!("kinds/{}.json", kind(case)), &kind(case))).collect();
    adapters.push(base.write("adapters/linear.json", "linear"));
    let mut driver = Driver::new(DType::F32, &base.model(), &adapters);
    let kind_sequences =
        || kinds.iter().zip(0..).map(|(case, slot)| base.sequence(case, Some(slot))).collect::<Vec<_>>();
    let mut alone = kind_sequences();
    driver.alone(&mut alone);
    for (case, sequence) in kinds.iter().copied().zip(&alone) {
        assert!(case.moves.unwrap() >= SENSITIVE && case.ignored.is_none_or(|ignored| ignored >= SENSITIVE));
        let worst = base.compare("alone", case, sequence);
        eprintln!("{name}, {}: {worst:.1e}", kind(case));
    }
    // Short prompts of the base, and of a plain adapter.
    let last = adapters.len() as u32 - 1;
    let others = plain.cases.iter().filter(|case| plain.prompts[case.prompt].len() <= 64);
    let others = others.filter_map(|case| match case.adapter.as_deref() {
        None => Some((case, None)),
        Some("linear") => Some((case, Some(last))),
        Some(_) => None,
    });
    let others: Vec<_> = others.collect();
    let more = Base { goldens: plain.clone(), folder: tempfile::tempdir().unwrap(), name };
    let mut mixed = kind_sequences();
    mixed.extend(others.iter().map(|(case, slot)| more.sequence(case, *slot)));
    driver.mixed(&mut mixed, STEP.1, STEP.0);
    for (case, sequence) in kinds.iter().copied().chain(others.iter().map(|(case, _)| *case)).zip(&mixed) {
        base.compare("mixed", case, sequence);
    }
}

macro_rules! kinds {
    ($($test:ident: $name:literal;)*) => {$(
        #[test]
        fn $test() {
            run($name);
        }
    )*};
}

kinds! {
    llama: "llama";
    gemma2: "gemma2";
    phi3: "phi3";
    gpt2: "gpt2";
    gpt_neox: "gpt-neox";
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let base = Base::new("llama");
    let (decoder, path) = (Decoder::from_folder(&base.model()).unwrap(), base.model());
    let model = BaseModel { decoder, path, dtype: DType::F32 };
    assert!(base.goldens.refused.len() >= 25);
    let unrepeated =
        goldens::Refused { adapter: UNREPEATED.into(), reason: "init_lora_weights = pissa".into() };
    for refused in base.goldens.refused.iter().chain([&unrepeated]) {
        let folder = base.write(&format!("kinds/{}.json", refused.adapter), &refused.adapter);
        let refusal = adapter::read(&folder, &model).err().map(|error| error.to_string());
        let refusal = refusal.unwrap_or_else(|| panic!("{} is served", refused.adapter));
        assert!(refusal.contains(&refused.reason), "{}: {refusal}", refused.adapter);
    }
}
