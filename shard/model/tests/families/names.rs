//! Names of tensors as published files have them: with and without the module in front, with buffers of older versions, and
//! with a head under either name.

use kernels::DType;
use model::testing::seeded::{Manifest, Seeded};

use crate::{
    driver::{Driver, Sequence},
    goldens::{self, Goldens},
};

/// Tokens that a fixture's model generates when its tensors have other names, and others lie beside them.
fn tokens(fixture: &str, renamed: impl Fn(&str) -> String, others: &[(&str, &[usize])]) -> Vec<u32> {
    let folder = tempfile::tempdir().unwrap();
    let mut manifest = Manifest::read(&goldens::folder(fixture).join("model.json")).unwrap();
    manifest.rename(renamed);
    manifest.tensors.extend(others.iter().map(|(name, shape)| Seeded {
        name: (*name).into(),
        shape: shape.to_vec(),
        offset: 1.0,
        m: 0,
        s: 0,
        key: None,
    }));
    manifest.write(folder.path(), DType::F32).unwrap();
    let prompt = &Goldens::read(fixture).prompts[2];
    let mut sequences = [Sequence::new(prompt, None, Default::default())];
    Driver::new(DType::F32, folder.path(), &[]).alone(&mut sequences);
    sequences[0].tokens[prompt.len()..].to_vec()
}

fn expected(fixture: &str) -> Vec<u32> {
    let goldens = Goldens::read(fixture);
    goldens.cases.into_iter().find(|case| case.adapter.is_none() && case.prompt == 2).unwrap().tokens
}

#[test]
fn names_of_published_files_are_understood() {
    let same = |name: &str| name.to_owned();
    let mask: (&str, &[usize]) = ("h.0.attn.bias", &[1, 1, 4, 4]);
    let masked: (&str, &[usize]) = ("transformer.h.0.attn.masked_bias", &[1]);
    // The original files of GPT-2.
    let bare = |name: &str| name.replacen("transformer.", "", 1);
    assert_eq!(tokens("gpt2", bare, &[mask]), expected("gpt2"));
    assert_eq!(tokens("gpt2", same, &[masked]), expected("gpt2"));
    let buffers: [(&str, &[usize]); 2] = [
        ("gpt_neox.layers.0.attention.bias", &[1, 1, 4, 4]),
        ("gpt_neox.layers.0.attention.rotary_emb.inv_freq", &[4]),
    ];
    assert_eq!(tokens("gpt-neox", same, &buffers), expected("gpt-neox"));
    let newer = |name: &str| name.replace("embed_out", "lm_head");
    assert_eq!(tokens("gpt-neox", newer, &[]), expected("gpt-neox"));
    let bare = |name: &str| name.replacen("gpt_neox.", "", 1);
    assert_eq!(tokens("gpt-neox", bare, &[]), expected("gpt-neox"));
    for family in ["qwen3", "gemma2", "phi", "phi3"] {
        let bare = |name: &str| name.replacen("model.", "", 1);
        assert_eq!(tokens(family, bare, &[]), expected(family), "{family}");
    }
}
