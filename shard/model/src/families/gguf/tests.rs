use std::io::Write;

use super::*;

/// Numbers of an architecture, and the decoder that they describe. The file has an embedding table of one token, and no
/// other tensor.
fn decoder(architecture: &str, sizes: &[(&str, u32)], numbers: &[(&str, f32)]) -> Result<Decoder> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let key =
        |key: &str, kind: u32| [text(&format!("{architecture}.{key}")), kind.to_le_bytes().into()].concat();
    let pairs = 1 + (sizes.len() + numbers.len()) as u64;
    let mut bytes = [b"GGUF", &3_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &pairs.to_le_bytes()].concat();
    bytes.extend([text("general.architecture"), 8_u32.to_le_bytes().into(), text(architecture)].concat());
    sizes.iter().for_each(|(name, x)| bytes.extend([key(name, 4), x.to_le_bytes().into()].concat()));
    numbers.iter().for_each(|(name, x)| bytes.extend([key(name, 6), x.to_le_bytes().into()].concat()));
    let hidden = sizes.iter().find(|(name, _)| *name == "embedding_length").unwrap().1;
    bytes.extend([text("token_embd.weight"), 2_u32.to_le_bytes().into()].concat());
    bytes.extend([u64::from(hidden), 1].map(u64::to_le_bytes).concat());
    // f32, at the beginning of the data.
    bytes.extend([0_u32.to_le_bytes().as_slice(), &0_u64.to_le_bytes()].concat());
    bytes.resize(bytes.len().next_multiple_of(32) + 4 * hidden as usize, 0);
    file.write_all(&bytes).unwrap();
    Decoder::from_gguf(&Gguf::open(file.path()).unwrap())
}

/// A Gemma of that architecture with the largest models' sizes of heads.
fn gemma(architecture: &str, layers: u32, hidden: u32) -> Decoder {
    let sizes = [
        ("embedding_length", hidden),
        ("block_count", layers),
        ("context_length", 8192),
        ("feed_forward_length", 64),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 16),
        ("attention.key_length", 128),
        ("attention.sliding_window", 1024),
    ];
    decoder(architecture, &sizes, &[("attention.layer_norm_rms_epsilon", 1e-6)]).unwrap()
}

/// `query_pre_attn_scalar` of the models of 27 billion parameters is 144 and 168, of all others the size of a head.
#[test]
fn scores_of_the_largest_gemmas_have_another_scale() {
    for (architecture, layers, hidden, scalar) in [
        ("gemma2", 46, 4608, 144.0),
        ("gemma2", 42, 4608, 128.0),
        ("gemma3", 62, 5376, 168.0),
        ("gemma3", 48, 5376, 128.0),
    ] {
        let scale = gemma(architecture, layers, hidden).layers[0].attention.shape.scale;
        assert!((scale.powi(-2) - scalar).abs() < 1e-3, "{architecture}: {scale}, of {scalar}");
    }
}
