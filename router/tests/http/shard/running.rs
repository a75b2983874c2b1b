//! A sequence that the scripted shard runs.

use proto::{
    HiddenStates, NewSequence, PooledVector, PromptLogprobs, Sampled, ScoredToken, SequenceRows, StepResult,
    Token, pooling::Kind,
};

use super::{EOS, Script, token};

pub(super) struct Running {
    pub(super) new: NewSequence,
    pub(super) answer: Vec<u32>,
    pub(super) alternatives: fn(u32, u32) -> Vec<u32>,
}

impl Running {
    pub(super) fn sample(&mut self) -> Sampled {
        let generated = self.new.tokens.len() - self.new.prompt_len as usize;
        let id = self.answer.get(generated).copied().unwrap_or(EOS);
        self.new.tokens.push(id);
        Sampled { sequence: self.new.sequence, token: Some(token(id)), top: self.top(id) }
    }

    pub(super) fn top(&self, id: u32) -> Vec<Token> {
        let num_top = self.new.sampling.as_ref().map_or(0, |sampling| sampling.num_top);
        (self.alternatives)(id, num_top).into_iter().map(token).collect()
    }

    pub(super) fn prompt(&self, rows: &SequenceRows) -> Option<PromptLogprobs> {
        let end = (rows.position + rows.rows).min(self.new.prompt_len - 1);
        let ids = (rows.position..end).map(|at| self.new.tokens[at as usize + 1]);
        let tokens: Vec<ScoredToken> =
            ids.map(|id| ScoredToken { token: Some(token(id)), top: self.top(id) }).collect();
        (self.new.prompt_logprobs && !tokens.is_empty()).then_some(PromptLogprobs {
            sequence: rows.sequence,
            position: rows.position + 1,
            tokens,
        })
    }

    /// Returns whether the sequence is pooled, and answers it once all its rows have run. A token has the class of its
    /// id with a score of 3/4. The elements of a vector are the first token, the last one, their number, and 1 if it is
    /// to be normalized. All values are NaN if the first token is one of `script.not_numbers`.
    pub(super) fn pool(&self, rows: &SequenceRows, script: &Script, result: &mut StepResult) -> bool {
        let Some(pooling) = self.new.pooling else { return false };
        let (sequence, tokens) = (self.new.sequence, &self.new.tokens);
        if (rows.position + rows.rows) as usize != tokens.len() {
            return true;
        }
        let number = if script.not_numbers.contains(&tokens[0]) { f32::NAN } else { 1.0 };
        let labels = script.info.labels.len();
        let scores = |token: &u32| {
            let own = *token as usize % labels;
            let other = 0.25 / (labels - 1).max(1) as f32;
            (0..labels).map(move |label| number * if label == own { 0.75 } else { other })
        };
        match (pooling.classes, pooling.kind()) {
            (true, Kind::None) => {
                let values = tokens.iter().flat_map(scores).collect();
                result.hidden.push(HiddenStates { sequence, position: 0, values });
            }
            (true, _) => {
                let values = scores(&tokens[0]).collect();
                result.pooled.push(PooledVector { sequence, values });
            }
            (false, _) => {
                let ends = [tokens[0], tokens[tokens.len() - 1], tokens.len() as u32];
                let ends = ends.into_iter().chain([pooling.normalize.into()]);
                let values = ends.map(|x| number * x as f32).collect();
                result.pooled.push(PooledVector { sequence, values });
            }
        }
        true
    }
}
