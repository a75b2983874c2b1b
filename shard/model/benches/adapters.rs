//! What staging an adapter costs, of the shape of a model of 8 billion parameters and of rank 16 on all projections, with
//! its file in the page cache: milliseconds, and bytes per second beside those of a copy and of a plain read. One JSON
//! line for each figure. `cargo bench -p model --bench adapters`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench prints and fails by panicking")]

use std::{
    fs::{self, File},
    hint::black_box,
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

use kernels::{DType, cpu::CpuBackend, testing::Stage};
use model::{
    Decoder, Share,
    adapter::{AdapterFolder, BaseModel},
};
use serde_json::{Value, json};

const LAYERS: usize = 32;
const RANK: usize = 16;
/// The projections, with their inputs and outputs.
const PROJECTIONS: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 4096, 4096),
    ("self_attn.k_proj", 4096, 1024),
    ("self_attn.v_proj", 4096, 1024),
    ("self_attn.o_proj", 4096, 4096),
    ("mlp.gate_proj", 4096, 14336),
    ("mlp.up_proj", 4096, 14336),
    ("mlp.down_proj", 14336, 4096),
];
/// Bytes of one read, and of one piece of the memory that is read into.
const CHUNK: usize = 64 << 10;
const PIECE: usize = 2 << 20;
/// Runs, of which the fastest counts.
const RUNS: usize = 7;

/// Writes an adapter of bf16 or f32 into a folder.
fn write_adapter(folder: &Path, dtype: DType) {
    let (size, name) = if dtype == DType::F32 { (4, "F32") } else { (2, "BF16") };
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for layer in 0..LAYERS {
        for (projection, inputs, outputs) in PROJECTIONS {
            for (part, shape) in [("lora_A", [RANK, inputs]), ("lora_B", [outputs, RANK])] {
                let name_of = format!("base_model.model.model.layers.{layer}.{projection}.{part}.weight");
                let bytes = shape[0] * shape[1] * size;
                let place = json!({"dtype": name, "shape": shape, "data_offsets": [end, end + bytes]});
                header.insert(name_of, place);
                end += bytes;
            }
        }
    }
    let header = Value::Object(header).to_string();
    fs::create_dir_all(folder).unwrap();
    let mut file = File::create(folder.join("adapter_model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut word = 1_u32;
    let data: Vec<u8> = (0..end / 4)
        .flat_map(|_| {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Two bf16, or one f32, of magnitudes from 0.25 to 2.
            (word & 0x80ff_80ff | 0x3f00_3f00).to_le_bytes()
        })
        .collect();
    file.write_all(&data).unwrap();
    let names: Vec<&str> = PROJECTIONS.iter().map(|(name, ..)| name.split_once('.').unwrap().1).collect();
    let config = json!({"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": names});
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
}

fn decoder(folder: &Path) -> Decoder {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": false,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    Decoder::from_folder(folder).unwrap()
}

fn fastest(mut run: impl FnMut()) -> Duration {
    let once = |_| {
        let start = Instant::now();
        run();
        start.elapsed()
    };
    (0..RUNS).map(once).min().unwrap()
}

fn report(what: &str, bytes: usize, took: Duration) {
    let seconds = took.as_secs_f64();
    let rate = bytes as f64 / seconds / 1e9;
    println!("{{\"what\":\"{what}\",\"ms\":{:.3},\"gb_per_s\":{rate:.2}}}", seconds * 1e3);
}

fn main() {
    let folder = tempfile::tempdir().unwrap();
    let decoder = decoder(folder.path());
    for (dtype, kept) in [(DType::Bf16, DType::Bf16), (DType::F32, DType::Bf16), (DType::F32, DType::F16)] {
        let at = folder.path().join(format!("{dtype:?}"));
        if !at.exists() {
            write_adapter(&at, dtype);
        }
        let model = BaseModel {
            merged: None,
            decoder: decoder.clone(),
            path: folder.path().into(),
            dtype: kept,
            share: Share::WHOLE,
        };
        let of = format!("{dtype:?} kept as {kept:?}");
        adapter(&at, &model, &of);
    }
}

fn adapter(at: &Path, model: &BaseModel, of: &str) {
    let path = at.join("adapter_model.safetensors");
    let bytes = fs::metadata(&path).unwrap().len() as usize;
    let file = File::open(&path).unwrap();
    let mut whole = vec![0; bytes];
    file.read_exact_at(&mut whole, 0).unwrap();
    let mut other = vec![1; bytes];
    report("copy", bytes, fastest(|| black_box(&mut other).copy_from_slice(black_box(&whole))));
    let read = fastest(|| {
        for (i, chunk) in other.chunks_mut(CHUNK).enumerate() {
            file.read_exact_at(chunk, (i * CHUNK) as u64).unwrap();
        }
    });
    report("read", bytes, read);
    drop((whole, other));
    report(&format!("open, {of}"), bytes, fastest(|| drop(AdapterFolder::open(at, model).unwrap())));
    let opened = AdapterFolder::open(at, model).unwrap();
    let mut stage = Stage::new(2 * bytes, PIECE);
    for threads in [1, 2, 4, 8] {
        stage.allow(threads);
        let took = fastest(|| stage.fill(model.dtype, &opened.parts(&|| false).unwrap()).unwrap());
        report(&format!("read into blocks on {threads} threads, {of}"), bytes, took);
    }
    if model.dtype != DType::F16 {
        let ops = CpuBackend::new(model.dtype, 1).unwrap();
        let sites = model.decoder.sites();
        let took = fastest(|| drop(opened.stage(&ops, &sites, 0, &|| false).unwrap()));
        report(&format!("stage on the CPU, {of}"), bytes, took);
    }
}
