//! The CPUs that a rank runs on: those near its GPU, or without one its part of the machine.
//!
//! A thread that launches kernels from the other socket, or that computes in turn on caches of two of them, is slower
//! for no reason that a profile of the program shows.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The CPUs on which the calling thread may run.
///
/// # Errors
/// If the system does not say, as on a machine with more of them than a [`CpuSet`] holds.
pub fn allowed() -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect())
}

/// From now on the calling thread, and the threads that it starts, run on these CPUs alone.
///
/// # Errors
/// If the system refuses.
pub fn pin(cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus.iter().filter(|&&cpu| cpu < CpuSet::MAX_CPU) {
        set.set(cpu);
    }
    Ok(sched_setaffinity(None, &set)?)
}

/// What the system tells of the CPUs of a machine.
pub struct Machine {
    sys: PathBuf,
}

impl Machine {
    /// The machine whose sysfs is mounted at `sys`: `/sys`, outside of tests.
    pub fn new(sys: &Path) -> Machine {
        Machine { sys: sys.into() }
    }

    /// The `allowed` CPUs that are near the PCI device at an address such as `0000:3B:00.0`; none if the machine does
    /// not tell, or if none of those near it are allowed.
    pub fn near(&self, address: &str, allowed: &[usize]) -> Vec<usize> {
        let device = self.sys.join("bus/pci/devices").join(address.to_ascii_lowercase());
        let near = list(&device.join("local_cpulist")).or_else(|| {
            // Negative where the machine has one node, or does not know.
            let node: usize = fs::read_to_string(device.join("numa_node")).ok()?.trim().parse().ok()?;
            list(&self.sys.join(format!("devices/system/node/node{node}/cpulist")))
        });
        let near = near.unwrap_or_default();
        allowed.iter().copied().filter(|cpu| near.contains(cpu)).collect()
    }

    /// The part of the `allowed` CPUs that is for `rank` of `ranks`. Whole cores are divided, in the order of NUMA nodes,
    /// so that ranks share neither a core nor, where the numbers allow it, a node. None if there are fewer CPUs than
    /// ranks.
    pub fn part(&self, (rank, ranks): (usize, usize), allowed: &[usize]) -> Vec<usize> {
        let nodes = self.nodes();
        let mut cores = BTreeMap::<_, Vec<usize>>::new();
        for &cpu in allowed {
            let node = nodes.iter().position(|cpus| cpus.contains(&cpu));
            cores.entry((node, self.core(cpu))).or_default().push(cpu);
        }
        let cores: Vec<_> = cores.into_values().collect();
        if cores.len() >= ranks {
            return cores[of(rank, ranks, cores.len())].concat();
        }
        let cpus = cores.concat();
        if cpus.len() >= ranks { cpus[of(rank, ranks, cpus.len())].to_vec() } else { Vec::new() }
    }

    /// The CPUs of each NUMA node.
    fn nodes(&self) -> Vec<Vec<usize>> {
        let folder = self.sys.join("devices/system/node");
        let nodes = list(&folder.join("online")).unwrap_or_default();
        nodes.iter().filter_map(|node| list(&folder.join(format!("node{node}/cpulist")))).collect()
    }

    /// The first of the CPUs that are threads of the same core.
    fn core(&self, cpu: usize) -> usize {
        let path = format!("devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        let siblings = list(&self.sys.join(path)).unwrap_or_default();
        siblings.first().copied().unwrap_or(cpu)
    }
}

/// The part of `count` things that is for `rank` of `ranks`.
fn of(rank: usize, ranks: usize, count: usize) -> std::ops::Range<usize> {
    rank * count / ranks..(rank + 1) * count / ranks
}

/// A file with a list of numbers, such as `0-3,8,10-11`; `None` if it is not there, is empty, or is something else.
fn list(path: &Path) -> Option<Vec<usize>> {
    let text = fs::read_to_string(path).ok()?;
    let mut numbers = Vec::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        numbers.extend(first..=last.min(CpuSet::MAX_CPU));
    }
    Some(numbers)
}

/// Spells CPUs as the system does.
pub fn spell(cpus: &[usize]) -> String {
    let mut ranges = Vec::<(usize, usize)>::new();
    for &cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let spell = |&(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    ranges.iter().map(spell).collect::<Vec<_>>().join(",")
}
