//! Which CPUs a rank gets on machines of many kinds.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, thread};

use lorax_shard::cpus::{self, Machine};
use tempfile::TempDir;

/// The sysfs of a machine with these files.
fn sysfs(files: &[(String, String)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }
    root
}

fn file(path: &str, text: &str) -> (String, String) {
    (path.to_owned(), text.to_owned())
}

/// Files of `nodes` NUMA nodes with `cores` cores each. The second threads of all cores are numbered after all first
/// ones, if there are two.
fn machine(nodes: usize, cores: usize, threads: usize) -> Vec<(String, String)> {
    let first = nodes * cores;
    let mut files = vec![file("devices/system/node/online", &format!("0-{}", nodes - 1))];
    for node in 0..nodes {
        let of = |thread: usize| {
            let start = thread * first + node * cores;
            format!("{start}-{}", start + cores - 1)
        };
        let cpus: Vec<_> = (0..threads).map(of).collect();
        files.push(file(&format!("devices/system/node/node{node}/cpulist"), &cpus.join(",")));
    }
    for cpu in 0..first * threads {
        let siblings: Vec<_> =
            (0..threads).map(|thread| (cpu % first + thread * first).to_string()).collect();
        let path = format!("devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        files.push(file(&path, &siblings.join(",")));
    }
    files
}

#[test]
fn the_cpus_near_a_gpu_are_those_that_the_machine_tells() {
    let all: Vec<usize> = (0..16).collect();
    let few = [1, 3, 9];
    for (files, allowed, near) in [
        (vec![file("bus/pci/devices/0000:3b:00.0/local_cpulist", "0-3,8-11")], &all[..], "0-3,8-11"),
        (vec![file("bus/pci/devices/0000:3b:00.0/local_cpulist", "8-15")], &all, "8-15"),
        (vec![file("bus/pci/devices/0000:3b:00.0/local_cpulist", "5")], &all, "5"),
        // A container may have only some of them, or none.
        (vec![file("bus/pci/devices/0000:3b:00.0/local_cpulist", "0-7")], &few, "1,3"),
        (vec![file("bus/pci/devices/0000:3b:00.0/local_cpulist", "12-15")], &few, ""),
        // The machine does not tell.
        (Vec::new(), &all, ""),
        (vec![file("bus/pci/devices/0000:3c:00.0/local_cpulist", "0-7")], &all, ""),
        (vec![file("bus/pci/devices/0000:3b:00.0/local_cpulist", "")], &all, ""),
        (vec![file("bus/pci/devices/0000:3b:00.0/local_cpulist", "nonsense")], &all, ""),
        (vec![file("bus/pci/devices/0000:3b:00.0/numa_node", "-1")], &all, ""),
        // It tells the node alone.
        (
            vec![
                file("bus/pci/devices/0000:3b:00.0/numa_node", "1"),
                file("devices/system/node/node1/cpulist", "4-7,12-15"),
            ],
            &all,
            "4-7,12-15",
        ),
        (vec![file("bus/pci/devices/0000:3b:00.0/local_cpulist", "0-4294967295")], &all, "0-15"),
    ] {
        let root = sysfs(&files);
        // The driver spells addresses in capitals, the system does not.
        let found = Machine::new(root.path()).near("0000:3B:00.0", allowed);
        assert_eq!(cpus::spell(&found), near, "{files:?}");
    }
}

#[test]
fn the_cores_of_a_machine_are_divided_among_the_ranks() {
    for ((nodes, cores, threads), ranks, parts) in [
        ((1, 2, 1), 1, &["0-1"][..]),
        ((1, 2, 1), 2, &["0", "1"]),
        ((1, 8, 1), 2, &["0-3", "4-7"]),
        ((1, 8, 1), 4, &["0-1", "2-3", "4-5", "6-7"]),
        ((1, 6, 1), 4, &["0", "1-2", "3", "4-5"]),
        // Both threads of a core are one rank's.
        ((1, 4, 2), 2, &["0,4,1,5", "2,6,3,7"]),
        ((1, 2, 2), 2, &["0,2", "1,3"]),
        // Unless there are fewer cores than ranks.
        ((1, 2, 2), 4, &["0", "2", "1", "3"]),
        // A node for each rank.
        ((2, 4, 2), 2, &["0,8,1,9,2,10,3,11", "4,12,5,13,6,14,7,15"]),
        ((2, 2, 1), 4, &["0", "1", "2", "3"]),
        // Fewer CPUs than ranks: the scheduler of the system shares them.
        ((1, 2, 1), 4, &["", "", "", ""]),
        ((1, 1, 1), 8, &["", "", "", "", "", "", "", ""]),
    ] {
        let root = sysfs(&machine(nodes, cores, threads));
        let all: Vec<usize> = (0..nodes * cores * threads).collect();
        let machine = Machine::new(root.path());
        let divided: Vec<_> = (0..ranks).map(|rank| machine.part((rank, ranks), &all)).collect();
        let spelled: Vec<_> = divided.iter().map(|part| cpus::spell(part)).collect();
        assert_eq!(spelled, parts, "{nodes} nodes of {cores} cores with {threads} threads");
        let mut together = divided.concat();
        together.sort_unstable();
        assert!(together.is_empty() || together == all, "every CPU is some rank's");
    }
}

#[test]
fn a_machine_that_tells_nothing_is_divided_by_number() {
    let root = sysfs(&[]);
    let machine = Machine::new(root.path());
    let parts: Vec<_> =
        (0..4).map(|rank| cpus::spell(&machine.part((rank, 4), &[2, 3, 5, 7, 8, 9, 10, 11]))).collect();
    assert_eq!(parts, ["2-3", "5,7", "8-9", "10-11"]);
}

#[test]
fn a_pinned_thread_and_those_that_it_starts_run_nowhere_else() {
    let pinned = thread::spawn(|| {
        let all = cpus::allowed().unwrap();
        let last = [*all.last().unwrap()];
        cpus::pin(&last).unwrap();
        assert_eq!(cpus::allowed().unwrap(), last);
        assert_eq!(thread::available_parallelism().unwrap().get(), 1);
        let child = thread::spawn(move || assert_eq!(cpus::allowed().unwrap(), last));
        child.join().unwrap();
        assert!(cpus::pin(&[]).is_err(), "no CPU at all");
    });
    pinned.join().unwrap();
    assert!(!cpus::allowed().unwrap().is_empty());
}
