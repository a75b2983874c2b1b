//! The classes of transformers' tokenizers, and which of them a folder has.

use serde_json::Value;

/// A class of tokenizers, by the steps that it puts around the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// tokenizer.json is taken as it is, and a sentencepiece model by its own settings.
    Backend,
    Llama,
    CodeLlama,
    Gemma,
    Qwen2,
    Gpt2,
    GptNeoX,
    Bert,
    /// A class with steps of its own, which are known only from its tokenizer.json.
    Other,
}

/// transformers' name of the class that takes every tokenizer.json as it is.
const BACKEND: &str = "TokenizersBackend";

/// Names of the classes in tokenizer_config.json, without the suffix `Fast`.
const NAMES: [(&str, Class); 13] = [
    (BACKEND, Class::Backend),
    ("PreTrainedTokenizer", Class::Backend),
    ("PythonBackend", Class::Backend),
    ("LlamaTokenizer", Class::Llama),
    ("CodeLlamaTokenizer", Class::CodeLlama),
    ("GemmaTokenizer", Class::Gemma),
    ("Qwen2Tokenizer", Class::Qwen2),
    ("GPT2Tokenizer", Class::Gpt2),
    ("CodeGenTokenizer", Class::Gpt2),
    ("GPTNeoXTokenizer", Class::GptNeoX),
    ("BertTokenizer", Class::Bert),
    ("DistilBertTokenizer", Class::Bert),
    ("ElectraTokenizer", Class::Bert),
];

/// The class that transformers registers for models of a type; `llama` has none.
const REGISTERED: [(&str, &[&str]); 6] = [
    (
        BACKEND,
        &[
            "mistral",
            "mistral3",
            "ministral",
            "ministral3",
            "mixtral",
            "pixtral",
            "voxtral",
            "phi3",
            "phimoe",
            "granite",
            "granitemoe",
            "olmo2",
            "olmo3",
            "stablelm",
            "glm",
            "glm4",
            "glm4_moe",
            "nemotron",
            "jamba",
            "gpt_bigcode",
            "minicpm3",
            "internlm2",
            "internlm3",
            "llava",
            "llava_next",
            "vipllava",
            "smolvlm",
        ],
    ),
    (
        "GemmaTokenizer",
        &["gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "recurrent_gemma"],
    ),
    (
        "Qwen2Tokenizer",
        &[
            "qwen2",
            "qwen2_moe",
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen3",
            "qwen3_moe",
            "qwen3_next",
            "qwen3_vl",
            "internvl",
        ],
    ),
    ("GPT2Tokenizer", &["gpt2", "gpt_neo", "gptj", "phi", "starcoder2", "codegen", "opt", "dbrx"]),
    ("GPTNeoXTokenizer", &["gpt_neox", "mamba", "mamba2", "falcon_mamba", "mpt", "olmo", "olmoe", "rwkv"]),
    ("BertTokenizer", &["bert", "distilbert", "electra", "ernie", "nomic_bert"]),
];

/// Types of models whose published tokenizers often name a wrong class: the registered one is taken.
const WRONGLY_NAMED: [&str; 12] = [
    "qwen2",
    "phi3",
    "phimoe",
    "nemotron",
    "jamba",
    "minicpm3",
    "internlm2",
    "internlm3",
    "llava",
    "llava_next",
    "vipllava",
    "smolvlm",
];

/// Types of models that transformers takes for Mistral's own.
const MISTRAL: [&str; 7] =
    ["mistral", "mistral3", "mixtral", "ministral", "ministral3", "pixtral", "voxtral"];

impl Class {
    /// The class of a folder with these tokenizer_config.json, config.json and tokenizer.json.
    pub(super) fn of(config: &Value, model: &Value, definition: Option<&str>) -> Class {
        let model_type = model["model_type"].as_str().unwrap_or_default();
        let registered =
            REGISTERED.iter().find(|(_, types)| types.contains(&model_type)).map(|(name, _)| *name);
        let wrongly_named = WRONGLY_NAMED.contains(&model_type);
        let name = config["tokenizer_class"].as_str().or_else(|| model["tokenizer_class"].as_str());
        let Some(name) = name.map(|name| name.strip_suffix("Fast").unwrap_or(name)) else {
            return registered.map_or(Class::Backend, Class::by_name);
        };
        let keeps_bytes = || definition.is_some_and(|text| text.contains("\"ByteLevel\""));
        // Llama 3's tokenizers are often said to be Llama 2's.
        let is_llama3 =
            name == "LlamaTokenizer" && !wrongly_named && !MISTRAL.contains(&model_type) && keeps_bytes();
        match registered {
            _ if is_llama3 => Class::Backend,
            Some(BACKEND) => Class::Backend,
            Some(registered) if wrongly_named => Class::by_name(registered),
            _ => Class::by_name(name),
        }
    }

    /// transformers' name of the class.
    pub(super) fn name(self) -> &'static str {
        NAMES.iter().find(|(_, class)| *class == self).map_or("tokenizer of its own", |(name, _)| name)
    }

    fn by_name(name: &str) -> Class {
        NAMES.iter().find(|(known, _)| *known == name).map_or(Class::Other, |(_, class)| *class)
    }

    /// Special tokens that the class has unless a file names others.
    pub(super) fn named_tokens(self) -> &'static [(&'static str, &'static str)] {
        const END_OF_TEXT: &str = "<|endoftext|>";
        match self {
            Class::Backend | Class::Other => &[],
            Class::Llama => &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")],
            Class::CodeLlama => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("prefix_token", "▁<PRE>"),
                ("middle_token", "▁<MID>"),
                ("suffix_token", "▁<SUF>"),
                ("eot_token", "▁<EOT>"),
                ("fill_token", "<FILL_ME>"),
            ],
            Class::Gemma => &[
                ("bos_token", "<bos>"),
                ("eos_token", "<eos>"),
                ("unk_token", "<unk>"),
                ("pad_token", "<pad>"),
                ("mask_token", "<mask>"),
            ],
            Class::Qwen2 => {
                &[("eos_token", END_OF_TEXT), ("unk_token", END_OF_TEXT), ("pad_token", END_OF_TEXT)]
            }
            Class::Gpt2 => {
                &[("bos_token", END_OF_TEXT), ("eos_token", END_OF_TEXT), ("unk_token", END_OF_TEXT)]
            }
            Class::GptNeoX => &[
                ("bos_token", END_OF_TEXT),
                ("eos_token", END_OF_TEXT),
                ("unk_token", END_OF_TEXT),
                ("pad_token", "<|padding|>"),
            ],
            Class::Bert => &[
                ("unk_token", "[UNK]"),
                ("sep_token", "[SEP]"),
                ("pad_token", "[PAD]"),
                ("cls_token", "[CLS]"),
                ("mask_token", "[MASK]"),
            ],
        }
    }
}
