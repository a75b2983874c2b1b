//! What an encoder is for, which its architecture says, and the classes of its classifier.

use kernels::Activation;
use serde_json::Value;

use super::fields::{Fields, unsupported};
use crate::{
    Decoder, LoadError, Result,
    decoder::{Classes, Classifier, Part, Scores, Task},
};

/// The most classes that are accepted.
const MAX_LABELS: usize = 1 << 12;

/// The classifiers of a family.
pub(super) struct Classifiers {
    /// The activation of the projection in front of the classifier of sequences.
    pub(super) dense: Activation,
    /// The names of modules outside of the layers where sequences are classified; empty if they are the family's.
    pub(super) names: &'static [(Part, &'static str)],
}

/// Endings of architectures, and what they are for. transformers ignores the heads that others have.
const OF_TOKENS: &str = "ForTokenClassification";
const OF_SEQUENCES: &str = "ForSequenceClassification";
const BARE: [&str; 3] = ["Model", "ForMaskedLM", "ForPreTraining"];

/// Sets the task of an encoder.
pub(super) fn set(fields: &Fields, family: &Classifiers, decoder: &mut Decoder) -> Result<()> {
    let architecture = &fields.json()["architectures"][0];
    let name = architecture.as_str().unwrap_or("Model");
    let classifier = |classes, dense| -> Result<Task> {
        let labels = labels(fields)?;
        let scores = scores(fields, classes, labels.len())?;
        Ok(Task::Classify(Classifier { labels, classes, dense, scores }))
    };
    decoder.task = if name.ends_with(OF_TOKENS) {
        classifier(Classes::OfTokens, None)?
    } else if name.ends_with(OF_SEQUENCES) {
        if !family.names.is_empty() {
            decoder.names.outer = family.names;
        }
        classifier(Classes::OfSequences, Some(family.dense))?
    } else if BARE.iter().any(|ending| name.ends_with(ending)) {
        Task::Embed
    } else {
        let known = BARE.into_iter().chain([OF_TOKENS, OF_SEQUENCES]).collect::<Vec<_>>().join(", ");
        return Err(unsupported("architectures", architecture, format!("those that end in {known}")));
    };
    Ok(())
}

/// The names of classes: `id2label`, or as many as `num_labels` says, of which there are two if nothing is said.
fn labels(fields: &Fields) -> Result<Vec<String>> {
    let field = "id2label";
    let wrong = || LoadError::Field { field, expected: "an object of names by the numbers from 0 on" };
    let count = fields.optional_size("num_labels")?;
    let labels = match fields.get(field) {
        None => {
            let count = count.unwrap_or(2).min(MAX_LABELS + 1);
            (0..count).map(|id| format!("LABEL_{id}")).collect::<Vec<_>>()
        }
        Some(value) => {
            let names = value.as_object().ok_or_else(wrong)?;
            let name = |id: usize| names.get(&id.to_string()).and_then(Value::as_str).map(str::to_owned);
            (0..names.len()).map(|id| name(id).ok_or_else(wrong)).collect::<Result<_>>()?
        }
    };
    match labels.len() {
        1..=MAX_LABELS => Ok(labels),
        _ => Err(LoadError::Field { field, expected: "1 to 4096 names" }),
    }
}

/// transformers' pipelines: a softmax over the classes of a token; of a sequence by `problem_type`, or by the number of
/// classes.
fn scores(fields: &Fields, classes: Classes, labels: usize) -> Result<Scores> {
    let problem = fields.get("problem_type");
    if classes == Classes::OfTokens {
        return Ok(Scores::Softmax);
    }
    match problem.map(|problem| (problem, problem.as_str())) {
        None if labels == 1 => Ok(Scores::Sigmoid),
        None | Some((_, Some("single_label_classification"))) => Ok(Scores::Softmax),
        Some((_, Some("multi_label_classification"))) => Ok(Scores::Sigmoid),
        Some((_, Some("regression"))) => Ok(Scores::Plain),
        Some((problem, _)) => {
            let known = "single_label_classification, multi_label_classification, regression";
            Err(unsupported("problem_type", problem, known))
        }
    }
}
