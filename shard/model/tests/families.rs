//! Every family against transformers and PEFT: seeded models with the family's odd features switched on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "families/driver.rs"]
mod driver;
#[path = "families/goldens.rs"]
mod goldens;
#[path = "families/kinds.rs"]
mod kinds;
#[path = "families/limits.rs"]
mod limits;
#[path = "families/merged.rs"]
mod merged;
#[path = "families/names.rs"]
mod names;
#[path = "families/page.rs"]
mod page;
#[path = "families/ranks.rs"]
mod ranks;
#[path = "families/wrappers.rs"]
mod wrappers;
#[path = "families/written.rs"]
mod written;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::OnceLock,
};

use driver::{Driver, Sequence};
use goldens::{Case, Goldens};
use kernels::DType;
use model::testing::seeded::Manifest;
use page::Row;

/// Most that a log-probability may differ from that of transformers in f32.
const BAR: f32 = 2e-3;
/// Adapters of a fixture.
const ADAPTERS: [&str; 2] = ["linear", "head"];

/// Largest differences by adapter.
type Worst = BTreeMap<Option<String>, f32>;

fn largest(worst: &Worst) -> Option<f32> {
    worst.values().copied().reduce(f32::max)
}

/// A fixture's files.
struct Fixture {
    name: &'static str,
    goldens: Goldens,
    model: PathBuf,
    adapters: Vec<PathBuf>,
    _folder: tempfile::TempDir,
}

impl Fixture {
    fn new(name: &'static str) -> Fixture {
        let folder = tempfile::tempdir().unwrap();
        let write = |manifest: &str, to: &str| {
            let to = folder.path().join(to);
            Manifest::read(&goldens::folder(name).join(manifest)).unwrap().write(&to, DType::F32).unwrap();
            to
        };
        let goldens = Goldens::read(name);
        let has_adapters = goldens::folder(name).join("adapters").is_dir();
        let adapters = ADAPTERS.iter().filter(|_| has_adapters);
        Fixture {
            name,
            goldens,
            model: write("model.json", "model"),
            adapters: adapters.map(|name| write(&format!("adapters/{name}.json"), name)).collect(),
            _folder: folder,
        }
    }

    /// The context length of the training before rotary frequencies were scaled.
    fn original_context(&self) -> usize {
        let manifest = Manifest::read(&goldens::folder(self.name).join("model.json")).unwrap();
        manifest.config["original_max_position_embeddings"].as_u64().unwrap() as usize
    }

    /// The cases of adapters that are tried, as sequences.
    fn sequences(&self) -> (Vec<&Case>, Vec<Sequence>) {
        let slot = |case: &Case| {
            let slot = |name| ADAPTERS.iter().position(|other| *other == name).map(|slot| slot as u32);
            case.adapter.as_deref().map(slot)
        };
        let tried = self.goldens.cases.iter().filter(|case| slot(case) != Some(None));
        let sequence = |case: &Case| {
            let top = case.top.iter().map(|top| top.position);
            let scored: BTreeSet<_> = case.positions.iter().copied().chain(top).collect();
            Sequence::new(&self.goldens.prompts[case.prompt], slot(case).flatten(), scored)
        };
        tried.map(|case| (case, sequence(case))).unzip()
    }

    /// Runs the sequences that outgrow the original context.
    fn cross(&self, driver: &mut Driver) {
        for crossing in &self.goldens.crossing {
            let (name, original) = (self.name, self.original_context());
            let sequence = driver.crossing(Sequence::new(&crossing.ids, None, BTreeSet::new()), original);
            assert_eq!(
                sequence.tokens[sequence.prompt..],
                crossing.tokens,
                "{name} beyond {original} tokens"
            );
            for (i, expected) in crossing.token_logprobs.iter().enumerate() {
                let got = sequence.scores[&(sequence.prompt - 1 + i)].top[0].1;
                let place = || format!("{name}, token {i} beyond {original} tokens");
                assert!((got - expected).abs() <= BAR, "{}: {got}, {expected}", place());
            }
        }
    }

    /// Runs the model's GGUF file, if it has one: the largest difference.
    fn gguf(&self) -> Option<f32> {
        let file = goldens::folder(self.name).join("model.gguf");
        if !file.exists() {
            return None;
        }
        let mut driver = Driver::new(DType::F32, &file, &self.adapters);
        let (cases, mut sequences) = self.sequences();
        driver.alone(&mut sequences);
        largest(&self.compare("as GGUF", &cases, &sequences))
    }

    /// Compares what was computed, and returns the largest differences of log-probabilities.
    fn compare(&self, how: &str, cases: &[&Case], sequences: &[Sequence]) -> Worst {
        let mut all = Worst::new();
        for (case, sequence) in cases.iter().zip(sequences) {
            let place = || format!("{} {how}, {:?}, {} tokens", self.name, case.adapter, sequence.prompt);
            let worst = all.entry(case.adapter.clone()).or_insert(0.0);
            let mut see = |position: usize, got: f32, expected: f32| {
                let difference = (got - expected).abs();
                let place = place();
                assert!(difference <= BAR, "{place}: {got} at {position}, transformers has {expected}");
                *worst = worst.max(difference);
            };
            for (position, expected) in case.positions.iter().zip(&case.logprobs) {
                see(*position, sequence.scores[position].logprob, *expected);
            }
            for top in &case.top {
                let got = &sequence.scores[&top.position].top;
                for (rank, (id, expected)) in top.ids.iter().zip(&top.logprobs).enumerate() {
                    // Tokens that are as likely as each other may change places.
                    let same = got.iter().find(|(got, _)| got == id);
                    let got = same.map_or(got[rank].1, |(_, logprob)| *logprob);
                    see(top.position, got, *expected);
                }
            }
            for (i, expected) in case.token_logprobs.iter().enumerate() {
                let position = sequence.prompt - 1 + i;
                see(position, sequence.scores[&position].top[0].1, *expected);
            }
            assert_eq!(sequence.tokens[sequence.prompt..], case.tokens, "{}", place());
        }
        all
    }
}

/// Runs all cases of a fixture in every manner.
fn measure(name: &'static str) -> Row {
    let fixture = Fixture::new(name);
    let mut driver = Driver::new(DType::F32, &fixture.model, &fixture.adapters);
    let (cases, mut sequences) = fixture.sequences();
    driver.alone(&mut sequences);
    let alone = fixture.compare("alone", &cases, &sequences);
    let (cases, mut sequences) = fixture.sequences();
    driver.mixed(&mut sequences, 61, 150);
    let mixed = fixture.compare("mixed", &cases, &sequences);
    fixture.cross(&mut driver);
    let of = |adapter: Option<&str>| alone.get(&adapter.map(str::to_owned)).copied();
    Row {
        name: name.into(),
        features: fixture.goldens.sensitivity.iter().map(|one| one.feature.clone()).collect(),
        measured: vec![of(None), of(Some("linear")), of(Some("head")), largest(&mixed), fixture.gguf()],
    }
}

/// What was measured of the fixture of that index in [`NAMES`]; measured once.
fn measured(index: usize) -> &'static Row {
    static ROWS: [OnceLock<Row>; NAMES.len()] = [const { OnceLock::new() }; NAMES.len()];
    ROWS[index].get_or_init(|| measure(NAMES[index]))
}

/// What `docs/models.md` says was tried is what was tried.
#[test]
fn the_table_of_what_is_served_is_what_was_measured() {
    let rows: Vec<&Row> = (0..NAMES.len()).map(measured).collect();
    page::check(&page::FIXTURES, &rows);
}

/// In bf16, log-probabilities of the prompt of 300 tokens are at most a tenth as far from f32 as those of transformers: the
/// CPU keeps activations in f32.
#[test]
fn bf16_is_closer_to_f32_than_in_transformers() {
    const PROMPT: usize = 3;
    for name in NAMES {
        let fixture = Fixture::new(name);
        let is_base = |case: &&Case| case.adapter.is_none() && case.prompt == PROMPT;
        let case = fixture.goldens.cases.iter().find(is_base).unwrap();
        let scored = case.positions.iter().copied().collect();
        let mut sequences = [Sequence::new(&fixture.goldens.prompts[PROMPT], None, scored)];
        Driver::new(DType::Bf16, &fixture.model, &[]).alone(&mut sequences);
        let expected = case.positions.iter().zip(&case.logprobs);
        let differences = expected.map(|(at, expected)| (sequences[0].scores[at].logprob - expected).abs());
        let mut differences: Vec<f32> = differences.collect();
        differences.sort_by(f32::total_cmp);
        let (median, most) = (differences[differences.len() / 2], differences[differences.len() - 1]);
        let noise = fixture.goldens.noise.iter().find(|noise| noise.dtype == "bfloat16").unwrap();
        assert!(median <= 0.1 * noise.median && most <= 0.1 * noise.most, "{name}: {median}, {most}");
    }
}

/// What every fixture must be sensitive to: a model too flat to tell a feature from its absence would prove nothing.
#[test]
fn every_odd_feature_shows() {
    for name in NAMES {
        for sensitivity in Goldens::read(name).sensitivity {
            let goldens::Sensitivity { feature, change, most } = sensitivity;
            assert!(most >= 0.05, "{name}: without {feature} ({change}), numbers move by {most} only");
        }
    }
}

macro_rules! families {
    ($($test:ident: $name:literal;)*) => {$(
        #[test]
        fn $test() {
            let index = NAMES.iter().position(|name| *name == $name).unwrap();
            measured(index);
        }
    )*

    const NAMES: &[&str] = &[$($name),*];
    };
}

families! {
    llama: "llama";
    llama_tied: "llama-tied";
    mistral: "mistral";
    qwen2: "qwen2";
    qwen2_full: "qwen2-full";
    qwen3: "qwen3";
    gemma: "gemma";
    gemma2: "gemma2";
    gemma2_usual: "gemma2-usual";
    gemma3: "gemma3";
    gemma3_usual: "gemma3-usual";
    phi: "phi";
    phi3: "phi3";
    phi4: "phi4";
    phi4_mini: "phi4-mini";
    gpt2: "gpt2";
    gpt_neox: "gpt-neox";
    gpt_neox_sequential: "gpt-neox-sequential";
    rope_linear: "rope-linear";
    rope_dynamic: "rope-dynamic";
    rope_yarn: "rope-yarn";
    rope_yarn_mscale: "rope-yarn-mscale";
    rope_longrope: "rope-longrope";
}
