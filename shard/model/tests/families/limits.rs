//! Texts beyond `max_position_embeddings`, as far as the scaling of the rotary embedding reaches.

use kernels::DType;
use model::testing::seeded::Manifest;

use crate::{
    BAR,
    driver::{Driver, Sequence},
    goldens::{self, Goldens},
};

/// The prompt of 3,000 tokens and 64 tokens after it, where the field has the length of the training before. The reference
/// computes the same whatever the field says, because the parameters give the factor and the original context.
#[test]
fn texts_beyond_max_position_embeddings_are_those_of_transformers() {
    for (name, max_positions) in [("rope-linear", 800), ("rope-yarn", 256), ("rope-yarn-mscale", 2000)] {
        let folder = tempfile::tempdir().unwrap();
        let mut manifest = Manifest::read(&goldens::folder(name).join("model.json")).unwrap();
        manifest.config["max_position_embeddings"] = max_positions.into();
        manifest.write(folder.path(), DType::F32).unwrap();
        let goldens = Goldens::read(name);
        let longest = |case: &&goldens::Case| goldens.prompts[case.prompt].len();
        let case = goldens.cases.iter().max_by_key(longest).unwrap();
        let prompt = &goldens.prompts[case.prompt];
        assert!(prompt.len() > max_positions);
        let scored = case.positions.iter().copied().collect();
        let mut sequences = [Sequence::new(prompt, None, scored)];
        Driver::new(DType::F32, folder.path(), &[]).alone(&mut sequences);
        for (at, expected) in case.positions.iter().zip(&case.logprobs) {
            let got = sequences[0].scores[at].logprob;
            assert!((got - expected).abs() <= BAR, "{name}: {got} at {at}, transformers has {expected}");
        }
        assert_eq!(sequences[0].tokens[prompt.len()..], case.tokens, "{name}");
    }
}
