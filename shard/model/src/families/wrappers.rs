//! Models that hold a decoder beside other parts, such as a vision tower. Of these, the decoder is served: what
//! transformers computes from texts alone. A wrapper whose decoder sees texts otherwise than a decoder of its own would
//! (other positions, attention across layers) is not among them, and is refused by its `model_type`.

use serde_json::Value;

use super::fields::{Fields, unsupported};
use crate::{Decoder, LoadError, Result, decoder::Head};

/// A model around a decoder (transformers' `models/*/configuration_*.py`).
struct Wrapper {
    model_type: &'static str,
    architecture: &'static str,
    /// The decoder's `model_type` where `text_config` has none.
    text: &'static str,
    /// Whether it has no other decoder.
    only: bool,
    /// Whether the output projection is the embedding table where the field is absent.
    tied: bool,
    /// Whether `text_config` can say that it is, too.
    ties_inside: bool,
}

const LLAVA: Wrapper = Wrapper {
    model_type: "llava",
    architecture: "LlavaForConditionalGeneration",
    text: "llama",
    only: false,
    tied: false,
    ties_inside: true,
};

const WRAPPERS: [Wrapper; 11] = [
    Wrapper {
        model_type: "gemma3",
        architecture: "Gemma3ForConditionalGeneration",
        text: "gemma3_text",
        only: true,
        tied: true,
        ties_inside: false,
    },
    Wrapper {
        model_type: "mistral3",
        architecture: "Mistral3ForConditionalGeneration",
        text: "mistral",
        tied: true,
        ties_inside: false,
        ..LLAVA
    },
    LLAVA,
    Wrapper {
        model_type: "llava_next",
        architecture: "LlavaNextForConditionalGeneration",
        ties_inside: false,
        ..LLAVA
    },
    Wrapper {
        model_type: "llava_next_video",
        architecture: "LlavaNextVideoForConditionalGeneration",
        ..LLAVA
    },
    Wrapper {
        model_type: "llava_onevision",
        architecture: "LlavaOnevisionForConditionalGeneration",
        text: "qwen2",
        ..LLAVA
    },
    Wrapper {
        model_type: "vipllava",
        architecture: "VipLlavaForConditionalGeneration",
        ties_inside: false,
        ..LLAVA
    },
    Wrapper {
        model_type: "video_llava",
        architecture: "VideoLlavaForConditionalGeneration",
        ties_inside: false,
        ..LLAVA
    },
    Wrapper {
        model_type: "internvl",
        architecture: "InternVLForConditionalGeneration",
        text: "qwen2",
        tied: true,
        ties_inside: false,
        ..LLAVA
    },
    Wrapper {
        model_type: "idefics3",
        architecture: "Idefics3ForConditionalGeneration",
        ties_inside: false,
        ..LLAVA
    },
    Wrapper {
        model_type: "smolvlm",
        architecture: "SmolVLMForConditionalGeneration",
        ties_inside: false,
        ..LLAVA
    },
];

/// The `model_type` of every wrapper.
pub(super) fn model_types() -> impl Iterator<Item = &'static str> {
    WRAPPERS.iter().map(|wrapper| wrapper.model_type)
}

/// The configuration of the decoder in a wrapper's; none if the model is no wrapper.
pub(super) fn text_config(json: &Value) -> Result<Option<Value>> {
    let kind = json.get("model_type").filter(|kind| !kind.is_null());
    let is = |wrapper: &&Wrapper| match kind {
        Some(kind) => *kind == wrapper.model_type,
        None => json["architectures"][0] == wrapper.architecture,
    };
    let Some(wrapper) = WRAPPERS.iter().find(is) else { return Ok(None) };
    let field = "text_config";
    let Some(text) = json.get(field).and_then(Value::as_object) else {
        return Err(LoadError::Field { field, expected: "an object" });
    };
    let outer = Fields::new(json.clone(), &[]);
    outer.check_off()?;
    let mut text = text.clone();
    let kind = text.entry("model_type").or_insert_with(|| wrapper.text.into());
    if wrapper.only && *kind != wrapper.text {
        return Err(unsupported("text_config.model_type", kind, wrapper.text));
    }
    let tied = outer.flag("tie_word_embeddings", wrapper.tied)?;
    if tied || !wrapper.ties_inside {
        text.insert("tie_word_embeddings".into(), tied.into());
    }
    if let Some(ends) = outer.get("eos_token_id") {
        text.insert("eos_token_id".into(), ends.clone());
    }
    Ok(Some(text.into()))
}

/// Refuses a decoder whose own output projection does more than a wrapper's, which is a matrix alone.
pub(super) fn check(decoder: &Decoder, text: &Value) -> Result<()> {
    if decoder.head == Head::plain(decoder.head.tied) {
        return Ok(());
    }
    Err(unsupported(
        "text_config.model_type",
        &text["model_type"],
        "decoders without biases or caps of logits",
    ))
}
