//! Rotary frequencies that depend on the length of a sequence.

/// How the model's rotary frequencies follow the number of tokens that a sequence has. A row goes by the tokens with
/// which its sequence was added, or by those up to itself where that is more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RopeScaling {
    /// They do not.
    #[default]
    Fixed,
    /// LongRoPE: sequences of more than `context` tokens have other frequencies, for their first tokens, too. One that
    /// grows past this length is computed again from its start.
    Switch {
        /// The original context.
        context: u32,
    },
    /// Dynamic NTK scaling: beyond `context` tokens, every length has frequencies of its own. Keys that have been
    /// stored keep those that they were rotated by.
    Dynamic {
        /// The original context.
        context: u32,
    },
}

/// The frequencies by which the known tokens of a sequence are rotated when it is added. KV blocks are shared within
/// one regime alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Regime {
    Original,
    Long,
    /// Those of sequences that are added with so many tokens.
    Length(usize),
}

impl RopeScaling {
    /// The regime of a sequence that is added with so many tokens.
    pub(crate) fn regime(self, tokens: usize) -> Regime {
        match self {
            Self::Switch { context } if tokens > context as usize => Regime::Long,
            Self::Dynamic { context } if tokens > context as usize => Regime::Length(tokens),
            _ => Regime::Original,
        }
    }

    /// The first position that a sequence added with so many tokens cannot have before it is added again.
    pub(crate) fn last_position(self, added: usize) -> Option<usize> {
        match self {
            Self::Switch { context } if added <= context as usize => Some(context as usize),
            _ => None,
        }
    }

    /// Positions, from the start, of which the regime of a sequence added with so many tokens says how they are
    /// rotated.
    pub(crate) fn shared_positions(self, added: usize) -> usize {
        match self {
            Self::Dynamic { context } => added.max(context as usize),
            _ => usize::MAX,
        }
    }
}
