//! The run configuration: all that router and shards need to know, in one file.

use std::path::Path;

use serde_json::{Value, json};

use crate::{
    args::{Args, Device, Dtype},
    source::ModelFiles,
};

/// Builds the configuration. `sockets` has one path per shard.
pub(crate) fn build(args: &Args, model: &ModelFiles, sockets: &[impl AsRef<Path>]) -> Value {
    let dtype = args.dtype.map(|dtype| match dtype {
        Dtype::Float32 => "float32",
        Dtype::Bfloat16 => "bfloat16",
        Dtype::Float16 => "float16",
    });
    let device = match args.device {
        Device::Auto => "auto",
        Device::Cpu => "cpu",
        Device::Cuda => "cuda",
    };
    json!({
        "model": {
            "id": model.id,
            "path": model.path,
            "revision": model.revision,
            "sha": model.sha,
        },
        "shards": { "uds": sockets.iter().map(AsRef::as_ref).collect::<Vec<_>>() },
        "router": {
            "hostname": args.hostname,
            "port": args.port,
            "max_concurrent_requests": args.max_concurrent_requests,
            "max_stop_sequences": args.max_stop_sequences,
            "max_input_length": args.max_input_length,
            "max_total_tokens": args.max_total_tokens,
            "max_batch_prefill_tokens": args.max_batch_prefill_tokens,
            "prefix_caching": args.prefix_caching,
            "default_adapter_source": args.adapter_source,
            "validation_workers": args.validation_workers,
            "max_body_bytes": args.max_body_size,
            "shutdown_deadline_s": args.shutdown_deadline,
            "tokenizer_config_path": args.tokenizer_config_path,
            "cors_allow_origin": args.cors_allow_origin,
            "json_output": args.json_output,
        },
        "shard": {
            "dtype": dtype,
            "device": device,
            "threads": args.threads,
            "max_rows": args.max_batch_prefill_tokens.map(|tokens| tokens + args.max_batch_size),
            "max_sequences": args.max_batch_size,
            "max_logit_rows": null,
            "num_slots": args.max_active_adapters,
            "kv_memory_bytes": args.kv_memory,
            "adapter_memory_bytes": null,
            "adapter_host_bytes": args.adapter_host_memory,
            "adapter_dir": args.adapter_dir,
            "adapter_roots": args.adapter_roots,
            "eager": args.eager,
            "cuda_memory_fraction": args.cuda_memory_fraction,
            "adapter_memory_fraction": args.adapter_memory_fraction,
            "json_output": args.json_output,
        },
    })
}
