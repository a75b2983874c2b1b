//! The number of ranks that a model is split over: what the flags say, and the GPUs that there are.

use std::{ffi::OsStr, io, path::Path, process::Stdio, time::Duration};

use clap::ValueEnum;
use config::{Device, Devices, Division};
use serde::de::DeserializeOwned;
use tokio::{process::Command, time::timeout};

use crate::{args::Args, child};

/// The most ranks: as many as there are GPUs in one machine that reach each other directly.
const MOST_RANKS: usize = 8;
/// Time for the shard's program to answer. A driver needs some seconds to start on a large machine.
const ANSWER: Duration = Duration::from_secs(60);

/// Why a model cannot be split as it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RanksError {
    /// No such number of ranks.
    #[error("--num-shard {0}: it must be between 1 and {MOST_RANKS}")]
    Number(usize),
    /// Flags that contradict each other.
    #[error("--sharded true, but --num-shard {0}: a sharded model has at least 2 shards")]
    NotSharded(usize),
    /// The number of ranks cannot be told from the GPUs.
    #[error("--sharded true with --device cpu needs --num-shard")]
    NoNumber,
    /// There are fewer GPUs than ranks, or none at all.
    #[error("{flags}: {visible} of the {least} GPUs that it needs are visible{limit}{}", because(missing))]
    TooFew {
        /// The flags that ask for more.
        flags: String,
        /// The number of GPUs that can be used.
        visible: usize,
        /// The number of GPUs that it takes.
        least: usize,
        /// The variable that bounds which GPUs are visible.
        limit: String,
        /// What the shard says is missing.
        missing: Option<String>,
    },
    /// The model cannot be divided at all.
    #[error("--sharded true: {0}")]
    Undivided(String),
    /// The shard's program does not answer.
    #[error("{program} {question}: {cause}")]
    NoAnswer {
        /// The program.
        program: String,
        /// The flag that it was asked with.
        question: &'static str,
        /// What happened.
        cause: String,
    },
}

impl RanksError {
    /// Returns whether the flags ask for what cannot be.
    pub(crate) fn is_usage(&self) -> bool {
        !matches!(self, RanksError::NoAnswer { .. })
    }
}

fn because(missing: &Option<String>) -> String {
    missing.as_ref().map_or_else(String::new, |missing| format!(": {missing}"))
}

/// The number of ranks, and where they compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ranks {
    pub(crate) number: usize,
    pub(crate) device: Device,
}

/// Refuses flags that contradict each other.
pub(crate) fn check(args: &Args) -> Result<(), RanksError> {
    match (args.sharded, args.num_shard) {
        (_, Some(number)) if !(1..=MOST_RANKS).contains(&number) => Err(RanksError::Number(number)),
        (Some(true), Some(number @ 1)) => Err(RanksError::NotSharded(number)),
        (Some(true), None) if args.shard.device == Device::Cpu => Err(RanksError::NoNumber),
        _ => Ok(()),
    }
}

/// Finds out how many ranks there are to be, by asking the shard's program for its GPUs where they matter.
pub(crate) async fn find(args: &Args, programs: &Path) -> Result<Ranks, RanksError> {
    let device = args.shard.device;
    let number = match (args.num_shard, args.sharded) {
        (None, Some(false)) => Some(1),
        (number, _) => number,
    };
    if number == Some(1) || device == Device::Cpu {
        // One rank takes what it finds, and the processor is always there.
        return Ok(Ranks { number: number.unwrap_or(1), device });
    }
    let dtype = args.shard.dtype.as_ref().and_then(ValueEnum::to_possible_value);
    let dtype = dtype.iter().flat_map(|dtype| ["--dtype", dtype.get_name()]);
    let devices: Devices = ask(programs, "--devices", dtype).await?;
    let visible = Visible::new(devices, |name| std::env::var(name).ok());
    for gpu in &visible.devices.gpus {
        tracing::debug!(name = gpu.name, pci = gpu.pci, "visible GPU");
    }
    let ranks = decide(args.sharded, number, device, &visible)?;
    if let Ranks { number, device: Device::Cpu } = ranks {
        let because = because(&visible.devices.missing);
        tracing::warn!("no GPU is visible{because}; {number} ranks share the CPU");
    }
    Ok(ranks)
}

/// Leaves out some of the ranks if nobody has asked for a number of them, and the model cannot be divided among as many as
/// there are GPUs.
pub(crate) async fn divide(
    args: &Args,
    programs: &Path,
    model: &Path,
    ranks: Ranks,
) -> Result<Ranks, RanksError> {
    if args.num_shard.is_some() || ranks.number == 1 {
        return Ok(ranks);
    }
    let at_most = ranks.number.to_string();
    let question = [model.as_os_str(), "--at-most".as_ref(), at_most.as_ref()];
    let Division { ranks: number, refused } = ask(programs, "--divides", question).await?;
    let Some(refused) = refused.filter(|_| number < ranks.number) else { return Ok(ranks) };
    if number == 1 && args.sharded == Some(true) {
        return Err(RanksError::Undivided(refused));
    }
    tracing::warn!("{number} of the {at_most} GPUs are used (see --num-shard): {refused}");
    let device = if number == 1 { args.shard.device } else { ranks.device };
    Ok(Ranks { number, device })
}

/// The GPUs that ranks may use.
struct Visible {
    devices: Devices,
    /// The variable that bounds them, as part of a message.
    limit: String,
}

impl Visible {
    /// The driver itself hides those that `CUDA_VISIBLE_DEVICES` leaves out. `NVIDIA_VISIBLE_DEVICES` is for the runtime
    /// of containers and has the numbers of the host, of which a container sees nothing: only how many it names counts.
    fn new(mut devices: Devices, variable: impl Fn(&str) -> Option<String>) -> Visible {
        if let Some(named) = variable("CUDA_VISIBLE_DEVICES") {
            return Visible { devices, limit: format!(" (CUDA_VISIBLE_DEVICES={named})") };
        }
        let named = variable("NVIDIA_VISIBLE_DEVICES").unwrap_or_default();
        let most = match named.trim() {
            "" | "all" | "void" => return Visible { devices, limit: String::new() },
            "none" => 0,
            list => list.split(',').filter(|gpu| !gpu.trim().is_empty()).count(),
        };
        devices.gpus.truncate(most);
        Visible { devices, limit: format!(" (NVIDIA_VISIBLE_DEVICES={named})") }
    }
}

fn decide(
    sharded: Option<bool>,
    number: Option<usize>,
    device: Device,
    visible: &Visible,
) -> Result<Ranks, RanksError> {
    let count = visible.devices.gpus.len();
    let too_few = |flags: String, least: usize| RanksError::TooFew {
        flags,
        visible: count,
        least,
        limit: visible.limit.clone(),
        missing: visible.devices.missing.clone(),
    };
    match number {
        Some(number) if count >= number => Ok(Ranks { number, device: Device::Cuda }),
        Some(number) if count == 0 && device == Device::Auto => Ok(Ranks { number, device: Device::Cpu }),
        Some(number) => Err(too_few(format!("--num-shard {number}"), number)),
        None if sharded == Some(true) && count < 2 => Err(too_few("--sharded true".into(), 2)),
        None if device == Device::Cuda && count == 0 => Err(too_few("--device cuda".into(), 1)),
        // A single rank that finds no use for a GPU may go on without, but of several none must do so alone.
        None if count > 1 => Ok(Ranks { number: count.min(MOST_RANKS), device: Device::Cuda }),
        None => Ok(Ranks { number: 1, device }),
    }
}

/// Asks the shard's program, which answers in JSON.
async fn ask<T: DeserializeOwned, Word: AsRef<OsStr>>(
    programs: &Path,
    question: &'static str,
    more: impl IntoIterator<Item = Word>,
) -> Result<T, RanksError> {
    let program = programs.join("lorax-shard");
    let failed =
        |cause: String| RanksError::NoAnswer { program: program.display().to_string(), question, cause };
    let mut command = Command::new(&program);
    command.arg(question).args(more);
    child::SECRETS.iter().for_each(|name| _ = command.env_remove(name));
    let run = command.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true).output();
    let output = timeout(ANSWER, run).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let output = output.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!("{} {}", output.status, said.trim()).trim_end().into()));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visible(count: usize, variables: &[(&str, &str)]) -> Visible {
        let gpu = |index| config::Gpu { name: "a GPU".into(), pci: format!("0000:{index:02}:00.0") };
        let missing = (count == 0).then(|| "no driver".to_owned());
        let devices = Devices { gpus: (0..count).map(gpu).collect(), missing };
        let of = |name: &str| variables.iter().find(|(known, _)| *known == name);
        Visible::new(devices, |name| of(name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn variables_bound_the_gpus() {
        for (variables, left) in [
            (&[][..], 4),
            // The driver has left others out before.
            (&[("CUDA_VISIBLE_DEVICES", "0")], 4),
            (&[("CUDA_VISIBLE_DEVICES", "3,1"), ("NVIDIA_VISIBLE_DEVICES", "0")], 4),
            (&[("NVIDIA_VISIBLE_DEVICES", "all")], 4),
            (&[("NVIDIA_VISIBLE_DEVICES", "void")], 4),
            (&[("NVIDIA_VISIBLE_DEVICES", "")], 4),
            (&[("NVIDIA_VISIBLE_DEVICES", "none")], 0),
            (&[("NVIDIA_VISIBLE_DEVICES", "6")], 1),
            (&[("NVIDIA_VISIBLE_DEVICES", "6,7")], 2),
            (&[("NVIDIA_VISIBLE_DEVICES", "6, 7,")], 2),
            (&[("NVIDIA_VISIBLE_DEVICES", "GPU-1a2b,GPU-3c4d,GPU-5e6f")], 3),
            (&[("NVIDIA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")], 4),
        ] {
            assert_eq!(visible(4, variables).devices.gpus.len(), left, "{variables:?}");
        }
    }

    #[test]
    fn ranks_are_as_many_as_asked_for_or_as_there_are_gpus() {
        use Device::{Auto, Cpu, Cuda};
        for ((sharded, number, device, gpus), expected) in [
            ((None, None, Auto, 0), (1, Auto)),
            ((None, None, Auto, 1), (1, Auto)),
            ((None, None, Auto, 2), (2, Cuda)),
            ((None, None, Cuda, 1), (1, Cuda)),
            ((None, None, Cuda, 4), (4, Cuda)),
            ((None, None, Auto, 16), (8, Cuda)),
            ((Some(true), None, Auto, 2), (2, Cuda)),
            ((Some(true), None, Cuda, 8), (8, Cuda)),
            ((Some(true), Some(2), Auto, 8), (2, Cuda)),
            ((Some(false), Some(2), Auto, 2), (2, Cuda)),
            ((None, Some(4), Auto, 4), (4, Cuda)),
            ((None, Some(4), Auto, 0), (4, Cpu)),
            ((Some(true), Some(8), Auto, 0), (8, Cpu)),
        ] {
            let ranks = decide(sharded, number, device, &visible(gpus, &[])).unwrap();
            assert_eq!((ranks.number, ranks.device), expected, "{sharded:?} {number:?} {device:?} {gpus}");
        }
    }

    #[test]
    fn too_few_gpus_are_refused_with_the_numbers() {
        use Device::{Auto, Cuda};
        for ((sharded, number, device, gpus), cause) in [
            ((None, Some(2), Auto, 1), "--num-shard 2: 1 of the 2 GPUs that it needs are visible"),
            ((None, Some(8), Cuda, 4), "--num-shard 8: 4 of the 8 GPUs"),
            ((Some(true), Some(4), Auto, 3), "--num-shard 4: 3 of the 4 GPUs"),
            ((Some(false), Some(2), Cuda, 1), "--num-shard 2: 1 of the 2 GPUs"),
            ((None, Some(2), Cuda, 0), "--num-shard 2: 0 of the 2 GPUs that it needs are visible: no driver"),
            ((Some(true), None, Auto, 0), "--sharded true: 0 of the 2 GPUs"),
            ((Some(true), None, Auto, 1), "--sharded true: 1 of the 2 GPUs"),
            ((Some(true), None, Cuda, 1), "--sharded true: 1 of the 2 GPUs"),
            ((None, None, Cuda, 0), "--device cuda: 0 of the 1 GPUs that it needs are visible: no driver"),
        ] {
            let refused = decide(sharded, number, device, &visible(gpus, &[])).unwrap_err().to_string();
            assert!(refused.starts_with(cause), "{refused:?}");
        }
        let bounded = visible(8, &[("NVIDIA_VISIBLE_DEVICES", "4,5")]);
        let refused = decide(None, Some(4), Auto, &bounded).unwrap_err().to_string();
        assert_eq!(
            refused,
            "--num-shard 4: 2 of the 4 GPUs that it needs are visible (NVIDIA_VISIBLE_DEVICES=4,5)"
        );
    }
}
