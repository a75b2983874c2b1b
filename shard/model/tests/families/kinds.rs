//! Every kind of adapter that PEFT writes: what it computes of each, or that it is refused by name.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::OnceLock,
};

use kernels::{DType, HostTensor, LoraPart, MatrixSource};
use model::{
    Decoder, Model, Share,
    adapter::{self, AdapterFolder, BaseModel, Matrix},
    testing::{self, seeded::Manifest},
};

use crate::{
    driver::{Driver, Sequence},
    goldens::{self, Case, Goldens},
    page::{self, Row},
    ranks,
};

/// Most that a log-probability may differ from PEFT's in f32.
pub(crate) const BAR: f32 = 2e-3;
/// What every kind moves a log-probability by, and what a reader is off by that passes over it.
const SENSITIVE: f32 = 0.05;
/// Kinds that say the same in other words.
const SAME: [&[&str]; 3] = [
    &["tokens", "tokens-by-module", "tokens-tied"],
    &["resized-saved", "resized-copies"],
    // Of a base without biases.
    &["bias-all", "bias-lora-only"],
];
/// The kind whose initialization is not repeated: it takes the singular vectors of every weight.
const UNREPEATED: &str = "pissa";
/// Rows of a step of the mixed batch, and of a chunk of a prompt in it.
const STEP: (usize, usize) = (200, 23);

/// A base with adapters of all kinds, as files.
pub(crate) struct Base {
    name: String,
    pub(crate) goldens: Goldens,
    folder: tempfile::TempDir,
}

impl Base {
    pub(crate) fn new(name: &str) -> Base {
        let base = Base {
            name: name.into(),
            goldens: Goldens::of(name, "kinds.json"),
            folder: tempfile::tempdir().unwrap(),
        };
        base.write("model.json", "model");
        base
    }

    /// Writes the folder of a manifest.
    pub(crate) fn write(&self, manifest: &str, to: &str) -> PathBuf {
        let to = self.folder.path().join(to);
        let manifest = Manifest::read(&goldens::folder(&self.name).join(manifest)).unwrap();
        manifest.write(&to, DType::F32).unwrap();
        to
    }

    pub(crate) fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    /// The cases of all kinds that are served.
    pub(crate) fn kinds(&self) -> Vec<&Case> {
        self.goldens.cases.iter().filter(|case| kind(case) != UNREPEATED).collect()
    }

    /// The folders of all kinds, and of a plain adapter.
    fn adapters(&self) -> Vec<PathBuf> {
        let kinds = self.kinds().into_iter().map(kind);
        let kinds = kinds.map(|kind| self.write(&format!("kinds/{kind}.json"), &kind));
        kinds.chain([self.write("adapters/linear.json", "linear")]).collect()
    }

    pub(crate) fn sequence(&self, case: &Case, slot: Option<u32>) -> Sequence {
        let top = case.top.iter().map(|top| top.position);
        let scored: BTreeSet<_> = case.positions.iter().copied().chain(top).collect();
        Sequence::new(&self.goldens.prompts[case.prompt], slot, scored)
    }

    /// The largest difference of a case's log-probabilities from PEFT's; its tokens must be PEFT's.
    pub(crate) fn compare(&self, how: &str, case: &Case, sequence: &Sequence) -> f32 {
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

pub(crate) fn kind(case: &Case) -> String {
    case.adapter.clone().unwrap()
}

/// The largest differences of each kind of a base: alone, and in a mixed batch.
type Measured = Vec<(String, [f32; 2])>;

/// All kinds of a base.
fn measure(name: &'static str) -> Measured {
    let base = Base::new(name);
    let adapters = base.adapters();
    run(&base, Driver::new(DType::F32, &base.model(), &adapters)).0
}

/// All kinds of a base with a driver of [`Base::adapters`]: each alone, then all in one batch with plain adapters and rows
/// of the base. Returns all that was computed, too.
fn run(base: &Base, mut driver: Driver) -> (Measured, Vec<Sequence>) {
    let name = base.name.as_str();
    let kinds = base.kinds();
    let plain = Goldens::of(name, "goldens.json");
    let kind_sequences =
        || kinds.iter().zip(0..).map(|(case, slot)| base.sequence(case, Some(slot))).collect::<Vec<_>>();
    let mut alone = kind_sequences();
    driver.alone(&mut alone);
    let mut worst = Vec::new();
    for (case, sequence) in kinds.iter().copied().zip(&alone) {
        assert!(case.moves.unwrap() >= SENSITIVE && case.ignored.is_none_or(|ignored| ignored >= SENSITIVE));
        worst.push((kind(case), [base.compare("alone", case, sequence), 0.0]));
    }
    // Short prompts of the base, and of a plain adapter.
    let last = kinds.len() as u32;
    let others = plain.cases.iter().filter(|case| plain.prompts[case.prompt].len() <= 64);
    let others = others.filter_map(|case| match case.adapter.as_deref() {
        None => Some((case, None)),
        Some("linear") => Some((case, Some(last))),
        Some(_) => None,
    });
    let others: Vec<_> = others.collect();
    let more = Base { goldens: plain.clone(), folder: tempfile::tempdir().unwrap(), name: name.into() };
    let mut mixed = kind_sequences();
    mixed.extend(others.iter().map(|(case, slot)| more.sequence(case, *slot)));
    driver.mixed(&mut mixed, STEP.1, STEP.0);
    let (of_kinds, others_mixed) = mixed.split_at(kinds.len());
    for ((case, sequence), (_, worst)) in kinds.iter().zip(of_kinds).zip(&mut worst) {
        worst[1] = base.compare("mixed", case, sequence);
    }
    for ((case, _), sequence) in others.iter().zip(others_mixed) {
        base.compare("mixed", case, sequence);
    }
    (worst, alone.into_iter().chain(mixed).collect())
}

/// Every kind on two ranks, and on four where a model has as many heads: also magnitudes of projections whose columns are
/// divided, and rows of an output projection whose rows are.
#[test]
fn every_kind_is_divided() {
    for (name, ranks) in
        [("llama", 2), ("llama", 4), ("gemma2", 2), ("phi3", 2), ("gpt2", 4), ("gpt-neox", 2)]
    {
        let base = Base::new(name);
        let adapters = base.adapters();
        let computed = ranks::on_ranks(ranks, |ops| {
            let model = Model::load(&ops, &base.model(), &mut |_| {}).unwrap();
            ranks::bits(&run(&base, Driver::of(ops, model, &base.model(), &adapters)).1)
        });
        ranks::assert_same(name, &computed);
    }
}

/// What was measured of the base of that index in [`NAMES`]; measured once.
fn measured(index: usize) -> &'static Measured {
    static BASES: [OnceLock<Measured>; NAMES.len()] = [const { OnceLock::new() }; NAMES.len()];
    BASES[index].get_or_init(|| measure(NAMES[index]))
}

#[test]
fn the_page_says_what_was_measured() {
    let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
    for (index, name) in NAMES.iter().enumerate() {
        for (kind, worst) in measured(index) {
            let new = || Row { name: kind.clone(), features: Vec::new(), measured: vec![None; 2] };
            let row = rows.entry(kind).or_insert_with(new);
            row.features.push((*name).into());
            for (known, worst) in row.measured.iter_mut().zip(worst) {
                *known = Some(known.unwrap_or(0.0).max(*worst));
            }
        }
    }
    page::check(&page::KINDS, &rows.values().collect::<Vec<_>>());
}

macro_rules! kinds {
    ($($test:ident: $name:literal;)*) => {$(
        #[test]
        fn $test() {
            measured(NAMES.iter().position(|name| *name == $name).unwrap());
        }
    )*

    const NAMES: &[&str] = &[$($name),*];
    };
}

kinds! {
    llama: "llama";
    gemma2: "gemma2";
    phi3: "phi3";
    gpt2: "gpt2";
    gpt_neox: "gpt-neox";
}

fn bytes(part: &LoraPart) -> usize {
    let LoraPart { low_rank, magnitude, bias, rows, .. } = part;
    let matrices = low_rank.iter().flat_map(|low_rank| [&low_rank.a, &low_rank.b]);
    let matrices = matrices.chain(rows.iter().map(|rows| &rows.values));
    let vectors = magnitude.iter().chain(bias).map(|vector| 4 * vector.len());
    matrices.map(|matrix| matrix.data.len()).sum::<usize>() + vectors.sum::<usize>()
}

/// Expects parts whose matrices are read a few rows at a time, from the last to the first, to be these.
fn expect_same(parts: &[LoraPart<Matrix<'_>>], expected: &[LoraPart], dtype: DType) {
    assert_eq!(parts.len(), expected.len());
    let expect_matrix = |matrix: &Matrix<'_>, expected: &HostTensor<'_>| {
        let [rows, cols] = matrix.shape();
        assert_eq!([rows, cols], [expected.rows, expected.cols]);
        let width = cols * dtype.size();
        for first in (0..rows).step_by(3).rev() {
            let mut read = vec![0xaa; rows.min(first + 3).saturating_sub(first) * width];
            matrix.read(first..rows.min(first + 3), dtype, &mut read).unwrap();
            assert_eq!(read, expected.data[first * width..][..read.len()]);
        }
    };
    for (part, expected) in parts.iter().zip(expected) {
        assert_eq!(part.shape(), expected.shape());
        assert_eq!((&part.magnitude, &part.bias), (&expected.magnitude, &expected.bias));
        if let (Some(own), Some(expected)) = (&part.low_rank, &expected.low_rank) {
            assert_eq!(own.scale, expected.scale);
            expect_matrix(&own.a, &expected.a);
            expect_matrix(&own.b, &expected.b);
        }
        if let (Some(own), Some(expected)) = (&part.rows, &expected.rows) {
            assert_eq!(own.ids, expected.ids);
            expect_matrix(&own.values, &expected.values);
        }
    }
}

/// The shapes of a kind are known before it is read, in every type, and what is read depends on the numbers alone.
#[test]
fn memory_and_identity_are_known() {
    for name in ["llama", "gemma2", "gpt-neox"] {
        let base = Base::new(name);
        let decoder = Decoder::from_folder(&base.model()).unwrap();
        let mut seen = BTreeMap::new();
        for kind in base.goldens.cases.iter().map(|case| case.adapter.as_deref().unwrap()) {
            if kind == UNREPEATED {
                continue;
            }
            let folder = base.write(&format!("kinds/{kind}.json"), kind);
            for dtype in [DType::F32, DType::Bf16, DType::F16] {
                let model = BaseModel {
                    merged: None,
                    decoder: decoder.clone(),
                    path: base.model(),
                    dtype,
                    share: model::Share::WHOLE,
                };
                let opened = AdapterFolder::open(&folder, &model).unwrap();
                let adapter = opened.read().unwrap();
                let shapes: Vec<_> = adapter.parts.iter().map(LoraPart::shape).collect();
                assert_eq!(opened.shapes(), shapes, "{name}, {kind}");
                let taken = adapter.parts.iter().map(bytes).sum::<usize>();
                for rank in 0..2 {
                    let share = Share::of(&decoder, rank, 2).unwrap();
                    let at = BaseModel { share, ..model.clone() };
                    let there = AdapterFolder::open(&folder, &at).unwrap();
                    let cut = there.read().unwrap();
                    let shapes: Vec<_> = cut.parts.iter().map(LoraPart::shape).collect();
                    assert_eq!(there.shapes(), shapes, "{name}, {kind} of rank {rank}");
                    expect_same(&there.parts(&|| false).unwrap(), &cut.parts, dtype);
                    let share = cut.parts.iter().map(bytes).sum::<usize>();
                    assert!(share <= taken, "{name}, {kind}: {share} of {taken} bytes");
                }
                let other = seen.insert(testing::identity(&adapter), (kind, dtype));
                let is_same = other.is_none_or(|(other, at)| {
                    at == dtype && SAME.iter().any(|same| same.contains(&kind) && same.contains(&other))
                });
                assert!(is_same, "{kind} and {other:?} are not the same");
            }
        }
    }
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let base = Base::new("llama");
    let (decoder, path) = (Decoder::from_folder(&base.model()).unwrap(), base.model());
    let model = BaseModel { merged: None, decoder, path, dtype: DType::F32, share: model::Share::WHOLE };
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
