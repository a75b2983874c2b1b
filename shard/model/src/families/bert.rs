//! BERT: an encoder whose layers norm their sums, with learned positions and types of tokens, and biases everywhere.

use kernels::{Activation, NormKind, Span};

use super::{
    Family,
    fields::Fields,
    llama,
    outline::Outline,
    task::{self, Classifiers},
};
use crate::{
    Decoder, Result,
    decoder::{Names, Part, Positions, Wiring},
};

pub(super) const FAMILY: Family = Family {
    model_type: "bert",
    architectures: &[
        "BertModel",
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertForTokenClassification",
        "BertForSequenceClassification",
    ],
    aliases: &[],
    page,
};

const NAMES: Names = Names {
    base: "bert",
    layers: "bert.encoder.layer",
    outer: &[
        (Part::Embed, "bert.embeddings.word_embeddings"),
        (Part::Positions, "bert.embeddings.position_embeddings"),
        (Part::TokenTypes, "bert.embeddings.token_type_embeddings"),
        (Part::EmbedNorm, "bert.embeddings.LayerNorm"),
        (Part::Dense, "bert.pooler.dense"),
        (Part::Classifier, "classifier"),
    ],
    inner: INNER,
    others: (
        &[
            "bert",
            "bert.embeddings",
            "bert.embeddings.dropout",
            "bert.encoder",
            "bert.encoder.layer",
            "bert.pooler",
            "bert.pooler.activation",
            "dropout",
        ],
        OTHERS,
    ),
    targets: &["query", "value"],
    eps: "layer_norm_eps",
    ..llama::NAMES
};

/// Names of a layer's parts.
pub(super) const INNER: &[(Part, &str)] = &[
    (Part::Q, "attention.self.query"),
    (Part::K, "attention.self.key"),
    (Part::V, "attention.self.value"),
    (Part::Out, "attention.output.dense"),
    (Part::MlpNorm, "attention.output.LayerNorm"),
    (Part::Up, "intermediate.dense"),
    (Part::Down, "output.dense"),
    (Part::OutputNorm, "output.LayerNorm"),
];

/// Modules of a layer without weights.
pub(super) const OTHERS: &[&str] = &[
    "",
    "attention",
    "attention.self",
    "attention.self.dropout",
    "attention.output",
    "attention.output.dropout",
    "intermediate",
    "intermediate.intermediate_act_fn",
    "output",
    "output.dropout",
];

pub(super) const OUTLINE: Outline = Outline {
    names: NAMES,
    hidden: 768,
    vocab: 30_522,
    layers: 12,
    query: 12,
    ffn: Some(3_072),
    gated: false,
    activation: ("hidden_act", Activation::Gelu),
    norm: NormKind::Layer,
    eps: 1e-12,
    max_positions: 512,
    rope: None,
    tied: true,
    eos: None,
    ..llama::OUTLINE
};

const CLASSIFIERS: Classifiers = Classifiers { dense: Activation::Tanh, names: &[] };

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = OUTLINE.decoder(fields)?;
    decoder.embedding.positions = Some(Positions { rows: decoder.max_positions, first: 0 });
    decoder.embedding.token_types = Some(fields.size("type_vocab_size", 2)?);
    task::set(fields, &CLASSIFIERS, &mut decoder)?;
    encode(fields, &mut decoder)?;
    Ok(decoder)
}

/// Makes an encoder of a decoder: every row attends to all of its sequence, and layers norm their sums.
pub(super) fn encode(fields: &Fields, decoder: &mut Decoder) -> Result<()> {
    fields.expect("position_embedding_type", "absolute")?;
    fields.expect_off("is_decoder")?;
    decoder.embedding.norm = Some(decoder.norm);
    for layer in &mut decoder.layers {
        layer.wiring = Wiring::PostNorm;
        layer.attention.shape.span = Span::Bidirectional;
        (layer.attention.qkv_bias, layer.attention.out_bias, layer.mlp.bias) = (true, true, true);
    }
    Ok(())
}
