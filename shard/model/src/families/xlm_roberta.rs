//! RoBERTa and XLM-RoBERTa: BERTs whose positions begin behind that of the padding token.

use kernels::Activation;

use super::{
    Family, bert,
    fields::Fields,
    outline::Outline,
    task::{self, Classifiers},
};
use crate::{
    Decoder, LoadError, Result,
    decoder::{Names, Part, Positions},
};

pub(super) const FAMILY: Family = Family {
    model_type: "xlm-roberta",
    architectures: &[
        "XLMRobertaModel",
        "XLMRobertaForMaskedLM",
        "XLMRobertaForTokenClassification",
        "XLMRobertaForSequenceClassification",
    ],
    aliases: &[],
    page,
};

pub(super) const ROBERTA: Family = Family {
    model_type: "roberta",
    architectures: &[
        "RobertaModel",
        "RobertaForMaskedLM",
        "RobertaForTokenClassification",
        "RobertaForSequenceClassification",
    ],
    ..FAMILY
};

const NAMES: Names = Names {
    base: "roberta",
    layers: "roberta.encoder.layer",
    outer: OUTER,
    others: (
        &[
            "roberta",
            "roberta.embeddings",
            "roberta.embeddings.dropout",
            "roberta.encoder",
            "roberta.encoder.layer",
            "dropout",
        ],
        bert::OTHERS,
    ),
    ..bert::OUTLINE.names
};

const OUTER: &[(Part, &str)] = &[
    (Part::Embed, "roberta.embeddings.word_embeddings"),
    (Part::Positions, "roberta.embeddings.position_embeddings"),
    (Part::TokenTypes, "roberta.embeddings.token_type_embeddings"),
    (Part::EmbedNorm, "roberta.embeddings.LayerNorm"),
    (Part::Classifier, "classifier"),
];

/// The classifier of sequences is a module of two projections.
const OF_SEQUENCES: &[(Part, &str)] = &[
    (Part::Embed, "roberta.embeddings.word_embeddings"),
    (Part::Positions, "roberta.embeddings.position_embeddings"),
    (Part::TokenTypes, "roberta.embeddings.token_type_embeddings"),
    (Part::EmbedNorm, "roberta.embeddings.LayerNorm"),
    (Part::Dense, "classifier.dense"),
    (Part::Classifier, "classifier.out_proj"),
];

const OUTLINE: Outline = Outline { names: NAMES, ..bert::OUTLINE };

const CLASSIFIERS: Classifiers = Classifiers { dense: Activation::Tanh, names: OF_SEQUENCES };

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = OUTLINE.decoder(fields)?;
    let first = fields.count("pad_token_id", 1)? + 1;
    let rows = decoder.max_positions;
    if rows <= first {
        let expected = "an integer above pad_token_id + 1";
        return Err(LoadError::Field { field: "max_position_embeddings", expected });
    }
    decoder.embedding.positions = Some(Positions { rows, first });
    decoder.max_positions = rows - first;
    decoder.embedding.token_types = Some(fields.size("type_vocab_size", 2)?);
    task::set(fields, &CLASSIFIERS, &mut decoder)?;
    bert::encode(fields, &mut decoder)?;
    Ok(decoder)
}
