//! The form in which a model writes its answers, as its chat template shows it.

/// The form of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallFormat {
    /// Llama 3: an object, alone or behind `<|python_tag|>`.
    Llama,
    /// Mistral: behind `[TOOL_CALLS]` a list of objects, or `name[ARGS]{…}`.
    Mistral,
    /// Hermes, Qwen: within `<tool_call>` an object, or Qwen3-Coder's `<function=…>`.
    Tagged,
    /// gpt-oss: a message with a recipient.
    Harmony,
    /// An object, or a list of objects.
    Json,
}

/// The form of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerFormat {
    /// How calls are written.
    pub calls: CallFormat,
    /// The marks between which the model thinks.
    pub thinking: Option<(&'static str, &'static str)>,
    /// Whether the template tells the model of tools.
    pub knows_tools: bool,
}

/// Marks of thinking.
const THINKING: [(&str, &str); 3] =
    [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thought>", "</thought>")];

/// Marks that may be special tokens, whose text is not shown otherwise.
const LLAMA: &[&str] = &["<|python_tag|>"];
const MISTRAL: &[&str] = &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"];
const TAGGED: &[&str] = &["<tool_call>", "</tool_call>"];
const HARMONY: &[&str] =
    &["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"];

impl AnswerFormat {
    /// The form that a chat template shows.
    pub fn of(template: &str) -> AnswerFormat {
        let has = |mark: &str| template.contains(mark);
        let thinking = THINKING.into_iter().find(|(_, end)| has(end));
        let calls = if has("<|channel|>") && has("<|message|>") {
            CallFormat::Harmony
        } else if has("[TOOL_CALLS]") {
            CallFormat::Mistral
        } else if has("<tool_call>") {
            CallFormat::Tagged
        } else if has("<|python_tag|>") || (has("<|start_header_id|>") && has("tools")) {
            CallFormat::Llama
        } else {
            CallFormat::Json
        };
        AnswerFormat { calls, thinking, knows_tools: has("tools") }
    }

    pub(super) fn is_harmony(&self) -> bool {
        self.calls == CallFormat::Harmony
    }

    /// Marks that an answer is taken apart by.
    pub fn marks(&self, has_tools: bool) -> Vec<&'static str> {
        let calls = match self.calls {
            CallFormat::Harmony => return HARMONY.to_vec(),
            _ if !has_tools => &[],
            CallFormat::Llama => LLAMA,
            CallFormat::Mistral => MISTRAL,
            CallFormat::Tagged => TAGGED,
            CallFormat::Json => &[],
        };
        calls.iter().copied().chain(self.thinking.into_iter().flat_map(|(begin, end)| [begin, end])).collect()
    }
}
