//! Entities: consecutive tokens of the same class, as transformers' pipeline for token classification puts them together
//! with the strategy `simple` (`pipelines/token_classification.py`).

use serde::Serialize;

use crate::{api::pooled::Output, tokenizer::ModelTokenizer};

/// The class of tokens that are no part of an entity.
const OUTSIDE: &str = "O";

/// A part of a text, or a whole text, and its class.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Entity {
    /// The class, without the prefix by which tokens say where in an entity they are.
    entity_group: String,
    /// The mean of the scores of its tokens.
    score: f32,
    /// Its text, as the tokenizer's decoder puts its tokens together.
    word: String,
    /// Its first character in the text, and the one behind its last.
    start: usize,
    end: usize,
}

/// The most probable class of a token, and the token.
struct Tagged {
    /// Whether an entity begins with it, whatever is in front.
    begins: bool,
    class: String,
    score: f32,
    entry: String,
    place: (usize, usize),
}

/// The entities of a text whose tokens have these scores.
pub(super) fn entities(
    tokenizer: &ModelTokenizer,
    text: &str,
    output: &Output,
    labels: &[String],
) -> Vec<Entity> {
    let mut groups: Vec<Vec<Tagged>> = Vec::new();
    for token in tagged(tokenizer, text, output, labels) {
        match groups.last_mut() {
            Some(group) if !token.begins && group[0].class == token.class => group.push(token),
            _ => groups.push(vec![token]),
        }
    }
    groups.retain(|group| group[0].class != OUTSIDE);
    let entity = |group: Vec<Tagged>| {
        let (first, last) = (&group[0], &group[group.len() - 1]);
        let score = group.iter().map(|token| token.score).sum::<f32>() / group.len() as f32;
        Entity {
            entity_group: first.class.clone(),
            score,
            start: first.place.0,
            end: last.place.1,
            word: tokenizer.join(group.into_iter().map(|token| token.entry).collect()),
        }
    };
    groups.into_iter().map(entity).collect()
}

/// The tokens of the text itself, with their classes.
fn tagged(tokenizer: &ModelTokenizer, text: &str, output: &Output, labels: &[String]) -> Vec<Tagged> {
    let Some(encoding) = &output.encoding else { return Vec::new() };
    let unknown = tokenizer.special_tokens.get("unk_token");
    let rows = output.values.chunks_exact(labels.len());
    let special = encoding.get_special_tokens_mask();
    let tokens = encoding.get_tokens().iter().zip(encoding.get_offsets()).zip(special).zip(rows);
    let own = tokens.filter(|((_, special), _)| **special == 0);
    own.map(|(((entry, &place), _), row)| {
        let (best, score) = best(row);
        let (begins, class) = match labels[best].split_at_checked(2) {
            Some(("B-", class)) => (true, class),
            Some(("I-", class)) => (false, class),
            _ => (false, labels[best].as_str()),
        };
        let entry = match unknown {
            Some(unknown) if unknown == entry => text.chars().skip(place.0).take(place.1 - place.0).collect(),
            _ => entry.clone(),
        };
        Tagged { begins, class: class.to_owned(), score, entry, place }
    })
    .collect()
}

/// The largest element of a row, and its index; of equal ones the first.
fn best(row: &[f32]) -> (usize, f32) {
    let later = |best: (usize, f32), next: (usize, f32)| if next.1 > best.1 { next } else { best };
    row.iter().copied().enumerate().reduce(later).unwrap_or_default()
}

/// All classes of a whole text, the most probable first.
pub(super) fn classes_of_text(text: &str, scores: &[f32], labels: &[String]) -> Vec<Entity> {
    let end = text.chars().count();
    let class = |(label, score): (&String, &f32)| Entity {
        entity_group: label.clone(),
        score: *score,
        word: text.to_owned(),
        start: 0,
        end,
    };
    let mut classes: Vec<Entity> = labels.iter().zip(scores).map(class).collect();
    classes.sort_by(|a, b| b.score.total_cmp(&a.score));
    classes
}
