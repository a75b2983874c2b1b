//! The flags and variables of other servers.

use super::{
    Fate::{self, NoEffect, Refused},
    Flag, Takes, Variable,
};

const GRAPHS: Fate = NoEffect("CUDA graphs are captured for all batches and ranks, unless --eager is given");
const KERNELS: Fate = NoEffect("this server has one set of kernels, and no adapter needs others");
const MIXED: Fate = NoEffect("prompts are computed in chunks, in the same steps as decode rows");
const SPECULATION: Fate = NoEffect("no tokens are guessed: the answers are the same, one token a step");
const MARKS: Fate = NoEffect("requests for watermarks are refused");
const MEETING: Fate = NoEffect("the processes meet in a private folder that the launcher makes");
const TUNNEL: Fate = NoEffect("--ngrok is refused");
const MEMORY: Fate = NoEffect(
    "--cuda-memory-fraction is the share of a GPU's memory that is used, and the KV cache is measured",
);
const SHAPES: Fate =
    Refused("a model of other rotary frequencies gives other answers; set rope_scaling in its config.json");
const LOGS: Fate = NoEffect("LOG_LEVEL says what is logged");
const TEMPLATE: Fate =
    Refused("put chat_template into a tokenizer_config.json, and name that by --tokenizer-config-path");
const TOOLS: Fate = NoEffect("what the server does with tools needs no flags");

const fn lorax(name: &'static str, variable: &'static str, takes: Takes, fate: Fate) -> Flag {
    Flag { name, takes, variable: Some(variable), fate }
}

const fn vllm(name: &'static str, takes: Takes, fate: Fate) -> Flag {
    Flag { name, takes, variable: None, fate }
}

/// All flags that only other servers have: first LoRAX's, then vLLM's.
pub(crate) const FLAGS: &[Flag] = &[
    lorax(
        "quantize",
        "QUANTIZE",
        Takes::Text,
        Refused("weights are served as they are stored; a GGUF file has quantized ones"),
    ),
    lorax("compile", "COMPILE", Takes::Switch, GRAPHS),
    lorax("compile-max-batch-size", "COMPILE_MAX_BATCH_SIZE", Takes::Number, GRAPHS),
    lorax("compile-max-rank", "COMPILE_MAX_RANK", Takes::Number, GRAPHS),
    lorax("compile-batch-size", "COMPILE_BATCH_SIZE", Takes::Number, GRAPHS),
    lorax("speculative-tokens", "SPECULATIVE_TOKENS", Takes::Number, SPECULATION),
    lorax("speculation-max-batch-size", "SPECULATION_MAX_BATCH_SIZE", Takes::Number, SPECULATION),
    lorax(
        "trust-remote-code",
        "TRUST_REMOTE_CODE",
        Takes::Switch,
        NoEffect("no code of a model's repository is ever run"),
    ),
    lorax("waiting-served-ratio", "WAITING_SERVED_RATIO", Takes::Number, MIXED),
    lorax("max-waiting-tokens", "MAX_WAITING_TOKENS", Takes::Number, MIXED),
    lorax("eager-prefill", "EAGER_PREFILL", Takes::Switch, MIXED),
    lorax("chunked-prefill", "CHUNKED_PREFILL", Takes::Switch, MIXED),
    lorax(
        "max-batch-total-tokens",
        "MAX_BATCH_TOTAL_TOKENS",
        Takes::Number,
        NoEffect("the memory of the KV cache bounds a batch; see --kv-memory"),
    ),
    lorax("shard-uds-path", "SHARD_UDS_PATH", Takes::Text, MEETING),
    lorax("master-addr", "MASTER_ADDR", Takes::Text, MEETING),
    lorax("master-port", "MASTER_PORT", Takes::Number, MEETING),
    lorax(
        "weights-cache-override",
        "WEIGHTS_CACHE_OVERRIDE",
        Takes::Text,
        Refused("name the folder of the weights by --model-id"),
    ),
    lorax("disable-custom-kernels", "DISABLE_CUSTOM_KERNELS", Takes::Switch, KERNELS),
    lorax("disable-sgmv", "DISABLE_SGMV", Takes::Switch, KERNELS),
    lorax("backend", "BACKEND", Takes::Text, KERNELS),
    lorax("memory-wiggle-room", "MEMORY_WIGGLE_ROOM", Takes::Number, MEMORY),
    lorax(
        "otlp-endpoint",
        "OTLP_ENDPOINT",
        Takes::Text,
        NoEffect("no traces are sent; the log and /metrics have the times"),
    ),
    lorax("watermark-gamma", "WATERMARK_GAMMA", Takes::Number, MARKS),
    lorax("watermark-delta", "WATERMARK_DELTA", Takes::Number, MARKS),
    lorax("ngrok", "NGROK", Takes::Switch, Refused("the server opens no tunnels")),
    lorax("ngrok-authtoken", "NGROK_AUTHTOKEN", Takes::Text, TUNNEL),
    lorax("ngrok-edge", "NGROK_EDGE", Takes::Text, TUNNEL),
    lorax(
        "embedding-dim",
        "EMBEDDING_DIM",
        Takes::Number,
        Refused("dense layers behind an embedding model are not supported"),
    ),
    vllm(
        "quantization",
        Takes::Text,
        Refused("weights are served as they are stored; a GGUF file has quantized ones"),
    ),
    vllm("kv-cache-dtype", Takes::Text, Refused("keys and values have the type of the weights")),
    vllm("tokenizer", Takes::Text, Refused("the tokenizer is the model's own")),
    vllm("chat-template", Takes::Text, TEMPLATE),
    vllm("pipeline-parallel-size", Takes::Number, Refused("a model is split by --num-shard only")),
    vllm("data-parallel-size", Takes::Number, Refused("start a server for each replica")),
    vllm("ssl-keyfile", Takes::Text, Refused("connections are not encrypted; put a proxy in front")),
    vllm("ssl-certfile", Takes::Text, Refused("connections are not encrypted; put a proxy in front")),
    vllm("root-path", Takes::Text, Refused("routes have fixed paths")),
    vllm("enable-chunked-prefill", Takes::Switch, MIXED),
    vllm("enable-auto-tool-choice", Takes::Switch, TOOLS),
    vllm("tool-call-parser", Takes::Text, TOOLS),
    vllm("swap-space", Takes::Number, NoEffect("blocks of the KV cache are computed again, not swapped")),
    vllm("block-size", Takes::Number, NoEffect("blocks of the KV cache have one size")),
    vllm("load-format", Takes::Text, NoEffect("the format of a model is told from its files")),
    vllm("seed", Takes::Number, NoEffect("requests name their own seeds")),
    vllm("disable-log-requests", Takes::Switch, LOGS),
    vllm("disable-log-stats", Takes::Switch, LOGS),
    vllm("uvicorn-log-level", Takes::Text, LOGS),
    vllm("max-log-len", Takes::Number, LOGS),
];

const fn variable(name: &'static str, fate: Fate) -> Variable {
    Variable { name, fate }
}

/// All variables that only LoRAX reads and that are no flags of its launcher.
pub(crate) const VARIABLES: &[Variable] = &[
    variable("ROPE_SCALING", SHAPES),
    variable("ROPE_FACTOR", SHAPES),
    variable(
        "REQUEST_LOGGER_URL",
        Refused("requests are not sent anywhere, and their records would be missing"),
    ),
    variable("HF_HUB_ENABLE_HF_TRANSFER", NoEffect("this server has a client for hubs of its own")),
    variable("LORAX_PUNICA_TRITON_DISABLED", KERNELS),
    variable("LORAX_PROFILER_DIR", NoEffect("no profiles are written")),
    variable("DISABLE_EXLLAMA", KERNELS),
    variable("EXLLAMA_VERSION", KERNELS),
    variable("USE_FLASH_ATTENTION", KERNELS),
    variable("FLASH_INFER", KERNELS),
    variable("DEBUG", LOGS),
];
