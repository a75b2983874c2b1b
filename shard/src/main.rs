//! `lorax-shard`: one rank of a model.

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Parser;
use config::{Config, Device, Devices, Division, Dtype};
use indicatif::{ProgressBar, ProgressStyle};
use kernels::{Backend, DType, Group, RopeSpec, Stretch, cpu::CpuBackend};
use lifecycle::{EX_UNAVAILABLE, EX_USAGE, Parent, Supervisor, fail};
#[cfg(feature = "cuda")]
use lorax_shard::choices::ChoiceFile;
use lorax_shard::{
    adapters::Adapters,
    agreement,
    cpus::{self, Machine},
    engine::{Engine, Limits},
    memory::{self, Room},
    server::{self, Rank},
    step::{Info, Task},
};
use model::{
    Decoder, LoadProgress, Model, Share,
    adapter::BaseModel,
    decoder::{Classes, Classifier},
};
use tokio::{
    net::UnixListener,
    runtime::{Builder, Runtime},
};
use tokio_stream::wrappers::UnixListenerStream;

/// One rank of a model behind gRPC. Started by lorax-launcher.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The run configuration.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Tensor-parallel rank.
    #[arg(long, default_value_t = 0)]
    rank: usize,
    /// Print the GPUs that this build can use, as JSON, and exit.
    #[arg(long, required_unless_present_any = ["config", "divides"], conflicts_with_all = ["config", "divides"])]
    devices: bool,
    /// With --devices: the type of weights that they must be able to compute with.
    #[arg(long, requires = "devices", default_value = "bfloat16")]
    dtype: Dtype,
    /// Print among how many ranks a model can be divided, as JSON, and exit.
    #[arg(long, value_name = "MODEL", conflicts_with = "config")]
    divides: Option<PathBuf>,
    /// With --divides: the most ranks.
    #[arg(long, requires = "divides", default_value_t = 8)]
    at_most: usize,
}

fn main() {
    let args = Args::parse();
    let Some(config) = &args.config else {
        let printed = match &args.divides {
            Some(model) => print_division(model, args.at_most),
            None => print_devices(args.dtype),
        };
        printed.unwrap_or_else(|error| fail(1, &*error));
        return;
    };
    let config = Config::read(config).unwrap_or_else(|error| fail(EX_USAGE, &error));
    let log = telemetry::start(config.log.json_output)
        .unwrap_or_else(|error| fail(if error.is_usage() { EX_USAGE } else { 1 }, &error));
    lifecycle::before_exit(telemetry::flush);
    let ended = Parent::link().and_then(|parent| parent.never_outlive().map(|()| parent));
    let ended = ended.map_err(anyhow::Error::from).and_then(|parent| run(&config, args.rank, &parent));
    if let Err(error) = ended {
        let mut causes = error.chain().filter_map(|cause| cause.downcast_ref());
        let lost = causes.any(kernels::Error::is_loss_of_a_peer);
        fail(if lost { EX_UNAVAILABLE } else { 1 }, &*error);
    }
    drop(log);
}

/// The reason that a build without the CUDA backend has no GPUs.
const NO_CUDA: &str = "this build has no CUDA backend: build it with make cuda, or use --device cpu";

/// Prints the GPUs that this build can use.
fn print_devices(dtype: Dtype) -> anyhow::Result<()> {
    #[cfg(feature = "cuda")]
    let devices = {
        let (gpus, missing) = kernels::cuda::gpus(kernels_dtype(dtype));
        let gpus = gpus.into_iter().map(|gpu| config::Gpu { name: gpu.name, pci: gpu.pci }).collect();
        Devices { gpus, missing: missing.map(|error| error.to_string()) }
    };
    #[cfg(not(feature = "cuda"))]
    let devices = {
        let _ = dtype;
        Devices { gpus: Vec::new(), missing: Some(NO_CUDA.into()) }
    };
    Ok(writeln!(io::stdout(), "{}", serde_json::to_string(&devices)?)?)
}

/// Prints among how many ranks a model can be divided.
fn print_division(path: &Path, at_most: usize) -> anyhow::Result<()> {
    let decoder = model::describe(path).with_context(|| format!("reading {}", path.display()))?;
    let (ranks, refused) = Share::most(&decoder, at_most);
    let division = Division { ranks, refused: refused.map(|error| error.to_string()) };
    Ok(writeln!(io::stdout(), "{}", serde_json::to_string(&division)?)?)
}

fn run(config: &Config, rank: usize, parent: &Parent) -> anyhow::Result<()> {
    let shard = &config.shard;
    let dtype = shard.dtype.map_or(DType::Bf16, kernels_dtype);
    let group = meet(config, rank)?;
    #[cfg(feature = "cuda")]
    if shard.device != Device::Cpu {
        // Before the GPU is opened: the driver's threads and its memory on the host stay where they begin.
        let (gpus, _) = kernels::cuda::gpus(dtype);
        if let Some(gpu) = gpus.get(rank) {
            pin(config, |machine, allowed| machine.near(&gpu.pci, allowed));
        }
        match kernels::cuda::CudaBackend::new(dtype, rank) {
            Ok(ops) => return serve_cuda(ops.with_group(group)?, config, rank, parent),
            Err(error) if shard.device == Device::Cuda || group.ranks() > 1 => return Err(error.into()),
            Err(error) => tracing::warn!("no GPU is used: {error}"),
        }
    }
    anyhow::ensure!(shard.device != Device::Cuda, NO_CUDA);
    let ranks = group.ranks();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    pin(config, |machine, allowed| machine.part((rank, ranks), allowed));
    let dtype = if shard.dtype.is_none() && is_encoder(&config.model.path) { DType::F32 } else { dtype };
    let ops = CpuBackend::new(dtype, shard.threads.unwrap_or((cores / ranks).max(1)))?.with_group(group)?;
    tracing::info!(dtype = name_of(dtype), tier = ?ops.tier(), threads = ops.threads(), "computing on the CPU");
    let room = |_: &CpuBackend| Ok(Room::on_host(shard.kv_memory, None, ranks));
    let target = Target { name: "cpu", max_rows: 512, warms_up: false, room: &room, ready: &|_| () };
    serve(Arc::new(ops), &target, config, rank, parent)
}

/// Whether the model attends to both sides. The CPU computes it in f32 unless the configuration says otherwise: its weights
/// are small, they are read once for hundreds of rows, and vectors are compared with those that other programs compute.
fn is_encoder(model: &Path) -> bool {
    // A model that cannot be read is reported when it is loaded.
    model::describe(model).is_ok_and(|decoder| decoder.is_bidirectional())
}

/// Time for all ranks to start, which they do at the same time.
const MEETING: Duration = Duration::from_secs(60);
/// The least time that ranks wait for each other in a step, and the time for which those that have read the model wait
/// for the others. A rank whose process ends is not waited for.
const PATIENCE: Duration = Duration::from_secs(30);
const LOADING: Duration = Duration::from_secs(3600);

/// Meets the other ranks of the model.
fn meet(config: &Config, rank: usize) -> anyhow::Result<Arc<Group>> {
    if config.ranks() == 1 {
        return Ok(Arc::new(Group::alone()));
    }
    tracing::info!(rank, ranks = config.ranks(), "meeting the other ranks");
    let group = Group::join(&config.shards.rendezvous, rank, config.ranks(), MEETING)?;
    let patience = config.router.step_timeout.unwrap_or_default().max(PATIENCE);
    Ok(Arc::new(group.with_patience(patience)))
}

/// Has this thread and all that it starts run on some of the CPUs on which it may: the result of `choose`, unless that is
/// empty or the configuration says otherwise. Without this the process is only slower.
fn pin(config: &Config, choose: impl FnOnce(&Machine, &[usize]) -> Vec<usize>) {
    if !config.shard.pin_cpus {
        return;
    }
    let pinned = cpus::allowed().and_then(|allowed| {
        let chosen = choose(&Machine::new(Path::new("/sys")), &allowed);
        if !chosen.is_empty() && chosen.len() < allowed.len() {
            cpus::pin(&chosen)?;
            tracing::info!(cpus = cpus::spell(&chosen), of = allowed.len(), "running on some of the CPUs");
        }
        Ok(())
    });
    if let Err(error) = pinned {
        tracing::warn!("running on all CPUs: {error}");
    }
}

/// Converts the configuration's type.
fn kernels_dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::Float32 => DType::F32,
        Dtype::Bfloat16 => DType::Bf16,
        Dtype::Float16 => DType::F16,
    }
}

/// The name of a type, as flags spell it.
fn name_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
    }
}

/// Serves from a GPU. Its memory is divided when the weights are loaded and the largest step has run.
#[cfg(feature = "cuda")]
fn serve_cuda(
    ops: kernels::cuda::CudaBackend,
    config: &Config,
    rank: usize,
    parent: &Parent,
) -> anyhow::Result<()> {
    let shard = &config.shard;
    ops.capture_steps(!shard.eager);
    let name = ops.name()?;
    tracing::info!(dtype = name_of(kernels::Memory::dtype(&ops)), "computing on {name}");
    if config.ranks() > 1 {
        tracing::info!(rank, "sums over ranks: {}", ops.describe_transport());
    }
    let room = |ops: &kernels::cuda::CudaBackend| {
        let memory = ops.memory()?;
        let fractions = (shard.cuda_memory_fraction, shard.adapter_memory_fraction);
        let room = Room::on_device((memory.free as u64, memory.total as u64), fractions, shard.kv_memory)?;
        tracing::info!(kv_bytes = room.kv_bytes, adapter_bytes = room.adapter_bytes, "memory is divided");
        Ok(room)
    };
    let choices = ChoiceFile::of(&ops.product_choices_of()?);
    let known = choices.as_ref().map(ChoiceFile::read).unwrap_or_default();
    ops.time_products(&known)?;
    let ready = |ops: &kernels::cuda::CudaBackend| {
        let text = ops.product_choices();
        if let Some(Err(error)) = choices.as_ref().filter(|_| text != known).map(|file| file.write(&text)) {
            tracing::warn!("the next start will time matrix products again: {error}");
        }
    };
    let target = Target { name: &name, max_rows: 2048, warms_up: true, room: &room, ready: &ready };
    serve(Arc::new(ops), &target, config, rank, parent)
}

/// Properties of a device, and what is done at points of the start that differ between devices.
struct Target<'a, B> {
    name: &'a str,
    /// The rows of the largest step, unless the configuration says otherwise.
    max_rows: usize,
    /// Whether the largest step runs before memory is divided, because only then it shows what the device needs itself.
    warms_up: bool,
    /// Divides the memory that is left then.
    room: &'a dyn Fn(&B) -> anyhow::Result<Room>,
    /// Called once the warm-up has ended.
    ready: &'a dyn Fn(&B),
}

/// Loads the model and serves it until told to stop, which ends the process.
fn serve<B: Backend>(
    ops: Arc<B>,
    target: &Target<'_, B>,
    config: &Config,
    rank: usize,
    parent: &Parent,
) -> anyhow::Result<()> {
    let shard = &config.shard;
    let (host_bytes, world) = (shard.adapter_host_memory as usize, config.shards.uds.len() as u32);
    let model = Arc::new(load(&*ops, config)?);
    // Steps of the warm-up wait for the other ranks no longer than later ones do.
    ops.group().barrier(LOADING)?;
    let description = model.decoder().clone();
    let limits = limits(config, target.max_rows, &description);
    let base = BaseModel {
        merged: config.model.merged_adapter.clone(),
        decoder: description.clone(),
        path: config.model.path.clone(),
        dtype: ops.dtype(),
        share: model.share(),
    };
    let runtime = runtime()?;
    let (sites, read_timeout) = (model.sites().to_vec(), config.router.prepare_timeout);
    let adapters = Arc::new(Adapters::new(ops.clone(), base, sites, read_timeout));
    let mut engine = Engine::new(ops.clone(), model.clone(), adapters.clone(), limits)?;
    if target.warms_up {
        engine.warm_up()?;
    }
    let room = (target.room)(&ops)?;
    let most = memory::most_blocks(&description, &limits);
    let num_blocks = memory::blocks(room.kv_bytes, model.kv_block_bytes(&ops), most)?;
    let num_blocks = agreement::smallest(ops.group(), num_blocks)?;
    let capture = Instant::now();
    engine.set_blocks(num_blocks)?;
    if !target.warms_up {
        engine.estimate_longest_step()?;
    }
    (target.ready)(&ops);
    tracing::info!(num_blocks, seconds = capture.elapsed().as_secs_f32(), "ready to compute");
    ops.reserve_slots(room.adapter_bytes as usize);
    // Page-locked memory is not available to other processes: no more than a quarter is locked in advance.
    ops.expect_adapters(host_bytes, memory::quarter(config.shards.uds.len()) as usize);
    let info = Info {
        dtype: name_of(ops.dtype()).into(),
        device: target.name.into(),
        rank: rank as u32,
        world,
        num_blocks: num_blocks as u32,
        adapter_bytes: room.adapter_bytes,
        longest_step_us: engine.longest_step().as_micros() as u64,
        ..info(&description, &limits)
    };
    let step_timeout = server::step_timeout(config.router.step_timeout, engine.longest_step());
    // A rank that waits for another one says so before its own step takes too long.
    ops.group().set_patience(step_timeout * 3 / 4);
    let supervisor = Supervisor::ending_the_process()?;
    runtime.block_on(async {
        let told = parent.told_to_stop()?;
        let connections = listen(config.socket(rank)?, parent)?;
        let rank = Rank { engine, adapters, info };
        server::serve(rank, connections, step_timeout, told, &supervisor).await.context("the server")
    })?;
    // Adapters may still be read, but no request waits for them any more.
    lifecycle::end_now(0)
}

/// Properties of the model and the limits of a step. Fields that only a running shard knows are left empty.
fn info(decoder: &Decoder, limits: &Limits) -> Info {
    Info {
        dtype: String::new(),
        device: String::new(),
        rank: 0,
        world: 1,
        vocab_size: decoder.vocab as u32,
        max_positions: decoder.max_positions as u32,
        eos_token_ids: decoder.eos.clone(),
        num_blocks: 0,
        block_size: kernels::BLOCK_SIZE as u32,
        num_slots: limits.num_slots as u32,
        adapter_bytes: 0,
        max_rows: limits.max_rows as u32,
        max_sequences: limits.max_sequences as u32,
        max_logit_rows: limits.max_logit_rows as u32,
        longest_step_us: 0,
        kv_window: memory::kv_window(decoder.lookback()),
        rope_switch: rope_switch(decoder),
        rope_dynamic: rope_dynamic(decoder),
        hidden_size: decoder.hidden as u32,
        task: task(decoder),
        bidirectional: decoder.is_bidirectional(),
    }
}

/// What the model is for.
fn task(decoder: &Decoder) -> Task {
    match &decoder.task {
        model::decoder::Task::Generate => Task::Generate,
        model::decoder::Task::Embed => Task::Embed,
        model::decoder::Task::Classify(Classifier { labels, classes, .. }) => {
            Task::Classify { sequences: *classes == Classes::OfSequences, labels: labels.clone() }
        }
    }
}

/// The runtime that serves gRPC and reads adapters, beside the engine's thread.
fn runtime() -> io::Result<Runtime> {
    Builder::new_multi_thread().thread_name("requests").worker_threads(2).enable_all().build()
}

/// The length beyond which LongRoPE uses other frequencies; 0 without LongRoPE.
fn rope_switch(decoder: &Decoder) -> u32 {
    let original = |rope: &RopeSpec| match rope.stretch {
        Stretch::Long { original, .. } => Some(original),
        _ => None,
    };
    decoder.ropes.iter().find_map(original).unwrap_or(0)
}

/// The length beyond which dynamic NTK scaling begins; 0 without it.
fn rope_dynamic(decoder: &Decoder) -> u32 {
    let original = |rope: &RopeSpec| match rope.stretch {
        Stretch::Dynamic { original, .. } => Some(original),
        _ => None,
    };
    decoder.ropes.iter().find_map(original).unwrap_or(0)
}

/// The limits of a step.
fn limits(config: &Config, default_rows: usize, decoder: &Decoder) -> Limits {
    let max_sequences = config.shard.max_batch_size;
    let mut max_rows = config.max_rows().unwrap_or(default_rows).max(max_sequences);
    if decoder.is_bidirectional() {
        // The longest sequence has to fit into one step.
        max_rows = max_rows.max(decoder.max_positions);
    }
    // Logits of a vocabulary take much memory. Those of classes do not, and all tokens may be classified.
    let generates = decoder.task == model::decoder::Task::Generate;
    let max_logit_rows = if generates { 256.clamp(max_sequences, max_rows) } else { max_rows };
    Limits { num_slots: config.shard.max_active_adapters, max_rows, max_sequences, max_logit_rows }
}

/// Listens on a socket, and tells the parent that this process serves.
fn listen(socket: &Path, parent: &Parent) -> anyhow::Result<UnixListenerStream> {
    // The socket of an earlier process would make `bind` fail.
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| format!("{}", socket.display()))?;
    parent.serving();
    tracing::info!("serving on {}", socket.display());
    Ok(UnixListenerStream::new(listener))
}

/// Loads the model, and shows its progress: a bar on a terminal, elsewhere a line of the log for every tenth.
fn load<B: Backend>(ops: &B, config: &Config) -> anyhow::Result<Model<B>> {
    let path = &config.model.path;
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if let Ok(style) =
        ProgressStyle::with_template("loading weights {bar:30} {bytes}/{total_bytes} {bytes_per_sec}")
    {
        bar.set_style(style);
    }
    let mut tenth = 0;
    let merged = config.model.merged_adapter.as_deref();
    let longest = config.router.max_total_tokens.unwrap_or(usize::MAX);
    let model = Model::load_for(ops, path, merged, longest, &mut |progress: LoadProgress| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
        let now = progress.done_bytes * 10 / progress.total_bytes.max(1);
        if bar.is_hidden() && now > tenth {
            tenth = now;
            tracing::info!("loading weights: {} % of {} MB", now * 10, progress.total_bytes / 1_000_000);
        }
    });
    bar.finish_and_clear();
    model.with_context(|| format!("loading {}", path.display()))
}
