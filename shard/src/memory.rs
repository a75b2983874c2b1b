//! Divides a device's memory between the KV cache and adapters.

use std::{fs, path::Path};

use kernels::BLOCK_SIZE;
use model::Decoder;

use crate::engine::Limits;

/// Why memory could not be divided.
#[derive(Debug, thiserror::Error)]
pub enum TooSmall {
    /// Not even one block fits.
    #[error("{given} bytes of KV memory hold no block of {block} bytes")]
    Block {
        /// Bytes for the KV cache.
        given: u64,
        /// Bytes of one block, all layers together.
        block: u64,
    },
    /// More KV memory was asked for than is left.
    #[error(
        "{asked} bytes of KV memory do not fit (--kv-memory): {left} are left beside weights, a step, and adapters"
    )]
    Kv {
        /// Bytes that were asked for.
        asked: u64,
        /// Bytes that are left.
        left: u64,
    },
    /// The weights leave too little memory.
    #[error(
        "out of memory: {free} of {total} bytes are free beside the weights and a step; {reserved} of them are \
         reserved (--cuda-memory-fraction), and CUDA graphs take {GRAPHS}"
    )]
    Device {
        /// Free bytes.
        free: u64,
        /// Bytes of the device.
        total: u64,
        /// Bytes that must stay free.
        reserved: u64,
    },
}

/// Bytes reserved for CUDA graphs, and for what the driver allocates while adapters are loaded and unloaded.
const GRAPHS: u64 = 1 << 30;

/// Positions of the largest tile in which attention kernels read keys and values. A tile begins at a multiple of its
/// size, so a kernel may read almost a whole tile of positions before the window, whose scores it masks.
const ATTENTION_TILE: u32 = 128;

/// The number of last positions whose blocks a row needs, if every layer has an attention window of at most `window`. 0
/// stands for all positions: some layer has no window.
pub fn kv_window(window: Option<u32>) -> u32 {
    window.map_or(0, |window| window.saturating_add(ATTENTION_TILE))
}

/// The most KV blocks that can be in use: those of the longest sequences, as many as may run. Sequences of an encoder are
/// in one step, of which two are in flight.
pub fn most_blocks(decoder: &Decoder, limits: &Limits) -> usize {
    let Limits { max_sequences, max_rows, .. } = *limits;
    let most = max_sequences * decoder.max_positions.div_ceil(BLOCK_SIZE);
    let in_flight = 2 * (max_rows.div_ceil(BLOCK_SIZE) + max_sequences);
    if decoder.is_bidirectional() { most.min(in_flight) } else { most }
}

/// The memory of the KV cache and of adapters in slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes of the KV cache.
    pub kv_bytes: u64,
    /// Bytes of adapters in slots; 0 if only the number of slots is bounded.
    pub adapter_bytes: u64,
}

impl Room {
    /// On the CPU: the sizes that were asked for; the KV cache takes by default what [`quarter`] gives this rank.
    pub fn on_host(kv: Option<u64>, adapters: Option<u64>, ranks: usize) -> Room {
        Room { kv_bytes: kv.unwrap_or_else(|| quarter(ranks)), adapter_bytes: adapters.unwrap_or(0) }
    }

    /// On a GPU: divides the `free` of `total` bytes. The fraction `used` of the total may be in use, and of what this
    /// leaves, adapters get the fraction `adapters`.
    pub fn on_device(
        (free, total): (u64, u64),
        (used, adapters): (f32, f32),
        kv: Option<u64>,
    ) -> Result<Room, TooSmall> {
        let reserved = (total as f64 * (1.0 - f64::from(used))) as u64;
        let left = free.saturating_sub(reserved).saturating_sub(GRAPHS);
        if left == 0 {
            return Err(TooSmall::Device { free, total, reserved });
        }
        // 0 would mean that there is no bound. No adapter fits into one byte either.
        let adapter_bytes = ((left as f64 * f64::from(adapters)) as u64).max(1);
        let left = left - adapter_bytes;
        match kv {
            Some(asked) if asked > left => Err(TooSmall::Kv { asked, left }),
            kv => Ok(Room { kv_bytes: kv.unwrap_or(left), adapter_bytes }),
        }
    }
}

/// The number of blocks that fit into `budget` bytes, but at most `most`, which hold all sequences at full length.
pub fn blocks(budget: u64, block_bytes: usize, most: usize) -> Result<usize, TooSmall> {
    let block = block_bytes as u64;
    match (budget / block) as usize {
        0 => Err(TooSmall::Block { given: budget, block }),
        fit => Ok(fit.min(most)),
    }
}

/// A quarter of the bytes of available memory, divided among the ranks on this machine.
pub fn quarter(ranks: usize) -> u64 {
    share(available(Path::new("/")), ranks)
}

fn share(available: u64, ranks: usize) -> u64 {
    available / 4 / ranks.max(1) as u64
}

/// Bytes that this process can use without swapping: those available on the machine (4 GiB if it does not say), bounded
/// by the limits of the process's control groups. `root` is `/` outside of tests.
fn available(root: &Path) -> u64 {
    let machine = field(&root.join("proc/meminfo"), "MemAvailable:").map_or(4 << 30, |kib| kib * 1024);
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    groups.lines().filter_map(|group| group_room(root, group)).fold(machine, u64::min)
}

/// The bytes that are left in a control group or in one of its parents, whichever has least; `None` without a limit.
/// `group` is a line of `/proc/self/cgroup`, "id:controllers:path".
fn group_room(root: &Path, group: &str) -> Option<u64> {
    let mut fields = group.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?);
    let (mount, names) = match controllers {
        "" => ("sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file", "active_file"]),
        _ if controllers.split(',').any(|name| name == "memory") => (
            "sys/fs/cgroup/memory",
            ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"],
        ),
        _ => return None,
    };
    let [limit, used, inactive, active] = names;
    // A container may be told the machine's path of its group, but see that group at the mount's root.
    let rooms = Path::new(path.trim_start_matches('/')).ancestors().filter_map(|path| {
        let folder = root.join(mount).join(path);
        let number = |name| number(&fs::read_to_string(folder.join(name)).ok()?);
        // Cached pages of files, such as the model's, count as used, but the kernel reclaims them.
        let pages = |name| field(&folder.join("memory.stat"), name).unwrap_or(0);
        let used = number(used)?.saturating_sub(pages(inactive) + pages(active));
        Some(number(limit)?.saturating_sub(used))
    });
    rooms.min()
}

/// The number that follows `name` at the beginning of a line of `file`.
fn field(file: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let mut lines = text.lines().map(str::split_ascii_whitespace);
    lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.next())).flatten().and_then(number)
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fit_the_budget() {
        assert_eq!(blocks(1000, 64, 100).unwrap(), 15);
        assert_eq!(blocks(1000, 64, 4).unwrap(), 4);
        assert!(Room::on_host(None, None, 1).kv_bytes > 1 << 20);
        let refused = blocks(10, 64, 4).unwrap_err().to_string();
        assert_eq!(refused, "10 bytes of KV memory hold no block of 64 bytes");
    }

    #[test]
    fn a_device_is_divided() {
        let gib = |n: u64| n << 30;
        let share = |kv| Room::on_device((gib(60), gib(80)), (0.75, 0.25), kv);
        // 20 GiB stay free, 1 GiB is for CUDA graphs, and a quarter of the other 39 is for adapters.
        let adapter_bytes = gib(39) / 4;
        assert_eq!(share(None).unwrap(), Room { kv_bytes: gib(39) - adapter_bytes, adapter_bytes });
        assert_eq!(share(Some(gib(2))).unwrap().kv_bytes, gib(2));
        let greedy = share(Some(gib(30))).unwrap_err().to_string();
        assert!(
            greedy
                .starts_with("32212254720 bytes of KV memory do not fit (--kv-memory): 31406948352 are left")
        );
        let without = Room::on_device((gib(60), gib(80)), (0.75, 0.0), None).unwrap();
        assert_eq!(without, Room { kv_bytes: gib(39) - 1, adapter_bytes: 1 }, "0 would be no bound");
        let full = Room::on_device((gib(9), gib(80)), (0.9, 0.1), None).unwrap_err().to_string();
        assert!(full.contains("out of memory: 9663676416 of 85899345920 bytes are free"), "{full}");
    }

    /// The available bytes of a machine with these files.
    fn available(files: &[(&str, &str)]) -> u64 {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        super::available(root.path())
    }

    const MACHINE: (&str, &str) =
        ("proc/meminfo", "MemTotal:        9000 kB\nMemAvailable:    8000 kB\nBuffers:  1 kB\n");

    #[test]
    fn a_machine_without_groups_gives_what_it_has() {
        assert_eq!(available(&[]), 4 << 30);
        assert_eq!(available(&[MACHINE]), 8_192_000);
        let unknown = ("proc/self/cgroup", "0::/gone\n1:cpu:/x\nnonsense\n");
        assert_eq!(available(&[MACHINE, unknown]), 8_192_000);
    }

    #[test]
    fn the_tightest_group_bounds_what_is_available() {
        let files = [
            MACHINE,
            ("proc/self/cgroup", "0::/pod/container\n"),
            ("sys/fs/cgroup/pod/container/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/container/memory.current", "2000000\n"),
            ("sys/fs/cgroup/pod/memory.max", "5000000\n"),
            ("sys/fs/cgroup/pod/memory.current", "3000000\n"),
        ];
        assert_eq!(available(&files), 2_000_000);
        let pages = ("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 700000\nactive_file 300000\n");
        assert_eq!(available(&[&files[..], &[pages]].concat()), 3_000_000);
        let wide = ("sys/fs/cgroup/pod/memory.max", "50000000\n");
        assert_eq!(available(&[&files[..], &[wide]].concat()), 8_192_000);
        let full = ("sys/fs/cgroup/pod/memory.current", "6000000\n");
        assert_eq!(available(&[&files[..], &[full]].concat()), 0);
    }

    #[test]
    fn groups_of_the_first_version_count() {
        let files = [
            MACHINE,
            ("proc/self/cgroup", "5:cpu,cpuacct:/c\n4:hugetlb,memory:/docker/c\n0::/\n"),
            // The container sees its own group at the mount's root.
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "4000000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "3000000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "active_file 9\ntotal_active_file 500000\n"),
        ];
        assert_eq!(available(&files), 1_500_000);
        let unlimited = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(available(&[&files[..], &[unlimited]].concat()), 8_192_000);
    }

    #[test]
    fn ranks_share_a_machine() {
        assert_eq!((share(4000, 1), share(4000, 4), share(4000, 0)), (1000, 250, 1000));
        assert_eq!(Room::on_host(Some(7), Some(5), 4), Room { kv_bytes: 7, adapter_bytes: 5 });
    }
}
