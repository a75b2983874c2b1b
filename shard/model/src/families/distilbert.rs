//! DistilBERT: a BERT of half the layers, without types of tokens.

use kernels::Activation;

use super::{
    Family, bert,
    fields::Fields,
    outline::Outline,
    task::{self, Classifiers},
};
use crate::{
    Decoder, Result,
    decoder::{Names, Part, Positions},
};

pub(super) const FAMILY: Family = Family {
    model_type: "distilbert",
    architectures: &[
        "DistilBertModel",
        "DistilBertForMaskedLM",
        "DistilBertForTokenClassification",
        "DistilBertForSequenceClassification",
    ],
    aliases: &[
        ("hidden_size", "dim"),
        ("num_hidden_layers", "n_layers"),
        ("num_attention_heads", "n_heads"),
        ("intermediate_size", "hidden_dim"),
    ],
    page,
};

const NAMES: Names = Names {
    base: "distilbert",
    layers: "distilbert.transformer.layer",
    outer: &[
        (Part::Embed, "distilbert.embeddings.word_embeddings"),
        (Part::Positions, "distilbert.embeddings.position_embeddings"),
        (Part::EmbedNorm, "distilbert.embeddings.LayerNorm"),
        (Part::Dense, "pre_classifier"),
        (Part::Classifier, "classifier"),
    ],
    inner: &[
        (Part::Q, "attention.q_lin"),
        (Part::K, "attention.k_lin"),
        (Part::V, "attention.v_lin"),
        (Part::Out, "attention.out_lin"),
        (Part::MlpNorm, "sa_layer_norm"),
        (Part::Up, "ffn.lin1"),
        (Part::Down, "ffn.lin2"),
        (Part::OutputNorm, "output_layer_norm"),
    ],
    others: (
        &[
            "distilbert",
            "distilbert.embeddings",
            "distilbert.embeddings.dropout",
            "distilbert.transformer",
            "distilbert.transformer.layer",
            "dropout",
        ],
        &["", "attention", "attention.dropout", "ffn", "ffn.dropout", "ffn.activation"],
    ),
    targets: &["q_lin", "v_lin"],
    ..bert::OUTLINE.names
};

const OUTLINE: Outline =
    Outline { names: NAMES, layers: 6, activation: ("activation", Activation::Gelu), ..bert::OUTLINE };

const CLASSIFIERS: Classifiers = Classifiers { dense: Activation::Relu, names: &[] };

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = OUTLINE.decoder(fields)?;
    // The field of BERT has no effect here.
    decoder.norm.eps = OUTLINE.eps;
    decoder.layers.iter_mut().for_each(|layer| layer.norm.eps = OUTLINE.eps);
    decoder.embedding.positions = Some(Positions { rows: decoder.max_positions, first: 0 });
    task::set(fields, &CLASSIFIERS, &mut decoder)?;
    bert::encode(fields, &mut decoder)?;
    Ok(decoder)
}
