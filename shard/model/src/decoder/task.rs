//! What is computed from the last hidden states.

use kernels::Activation;

/// What a model is for.
#[derive(Debug, Clone, PartialEq)]
pub enum Task {
    /// The logits of the next token are computed.
    Generate,
    /// Nothing is: the hidden states are the result.
    Embed,
    /// The scores of classes are computed.
    Classify(Classifier),
}

impl Task {
    /// The classifier, if there is one.
    pub fn classifier(&self) -> Option<&Classifier> {
        match self {
            Task::Classify(classifier) => Some(classifier),
            Task::Generate | Task::Embed => None,
        }
    }
}

/// A projection of hidden states to the scores of classes.
#[derive(Debug, Clone, PartialEq)]
pub struct Classifier {
    /// The names of the classes.
    pub labels: Vec<String>,
    /// What is classified.
    pub classes: Classes,
    /// The activation of the projection in front of the classifier, if there is one. It has as many outputs as inputs.
    pub dense: Option<Activation>,
    /// How scores are made of the classifier's outputs.
    pub scores: Scores,
}

/// What a [`Classifier`] classifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Classes {
    /// Each token.
    OfTokens,
    /// The whole sequence, by its first token.
    OfSequences,
}

/// How scores are made of a classifier's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    /// By a softmax: the classes exclude each other.
    Softmax,
    /// By a logistic function of each: several classes may hold.
    Sigmoid,
    /// The outputs are the scores: a regression.
    Plain,
}

impl Scores {
    /// Turns a row of outputs into scores.
    pub fn apply(self, row: &mut [f32]) {
        match self {
            Scores::Plain => {}
            Scores::Sigmoid => row.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
            Scores::Softmax => {
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                row.iter_mut().for_each(|x| *x = (*x - max).exp());
                let sum: f32 = row.iter().sum();
                row.iter_mut().for_each(|x| *x /= sum);
            }
        }
    }
}
