//! How a device's memory is shared out.

use std::{fs, path::Path};

/// Why memory could not be shared out.
#[derive(Debug, thiserror::Error)]
pub enum TooSmall {
    /// Not one block fits.
    #[error("{given} bytes of KV memory hold no block of {block} bytes")]
    Block {
        /// What there is for keys and values.
        given: u64,
        /// A block of all layers.
        block: u64,
    },
    /// More was asked for than there is.
    #[error(
        "{asked} bytes of KV memory do not fit (--kv-memory): {left} are left beside weights, a step, and adapters"
    )]
    Kv {
        /// What was asked for.
        asked: u64,
        /// What there is.
        left: u64,
    },
    /// The weights have left too little.
    #[error(
        "out of memory: {free} of {total} bytes are free beside the weights and a step; {reserved} of them are \
         reserved (--cuda-memory-fraction) and recordings take {RECORDINGS}"
    )]
    Device {
        /// What is free.
        free: u64,
        /// What the device has.
        total: u64,
        /// What stays free.
        reserved: u64,
    },
}

/// Set aside for recorded steps and what the driver takes while adapters come and go.
const RECORDINGS: u64 = 1 << 30;

/// Positions of the largest tile in which attention kernels read keys and values. A tile begins at a multiple of its
/// size, so a kernel may read almost a whole tile of positions before the window, whose scores it masks.
const ATTENTION_TILE: u32 = 128;

/// Positions whose blocks a row needs if no layer attends to more than `window` of them; 0, for all, if one does.
pub fn kv_window(window: Option<u32>) -> u32 {
    window.map_or(0, |window| window.saturating_add(ATTENTION_TILE))
}

/// Memory for what grows and shrinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes of keys and values.
    pub kv_bytes: u64,
    /// Bytes of adapters in slots; 0 for no bound but the slots.
    pub adapter_bytes: u64,
}

impl Room {
    /// What was asked for, or by default this rank's part of a [`quarter`] of the memory that is available.
    pub fn on_host(kv: Option<u64>, adapters: Option<u64>, ranks: usize) -> Room {
        Room { kv_bytes: kv.unwrap_or_else(|| quarter(ranks)), adapter_bytes: adapters.unwrap_or(0) }
    }

    /// Shares out what is `free` of `total` bytes: `used` of the total may be in use, and of what that leaves the
    /// fraction `adapters` is theirs.
    pub fn on_device(
        (free, total): (u64, u64),
        (used, adapters): (f32, f32),
        kv: Option<u64>,
    ) -> Result<Room, TooSmall> {
        let reserved = (total as f64 * (1.0 - f64::from(used))) as u64;
        let left = free.saturating_sub(reserved).saturating_sub(RECORDINGS);
        if left == 0 {
            return Err(TooSmall::Device { free, total, reserved });
        }
        // None at all would be no bound; in one byte no adapter fits either.
        let adapter_bytes = ((left as f64 * f64::from(adapters)) as u64).max(1);
        let left = left - adapter_bytes;
        match kv {
            Some(asked) if asked > left => Err(TooSmall::Kv { asked, left }),
            kv => Ok(Room { kv_bytes: kv.unwrap_or(left), adapter_bytes }),
        }
    }
}

/// Blocks that fit into `budget` bytes, but no more than `most` (all sequences at their full length).
pub fn blocks(budget: u64, block_bytes: usize, most: usize) -> Result<usize, TooSmall> {
    let block = block_bytes as u64;
    match (budget / block) as usize {
        0 => Err(TooSmall::Block { given: budget, block }),
        fit => Ok(fit.min(most)),
    }
}

/// A quarter of the memory that is available, shared out among so many ranks on this machine. Bytes.
pub fn quarter(ranks: usize) -> u64 {
    share(available(Path::new("/")), ranks)
}

fn share(available: u64, ranks: usize) -> u64 {
    available / 4 / ranks.max(1) as u64
}

/// Bytes that the system below `root` could give without swapping: to this machine, 4 GiB where it does not say, and to
/// the control groups that this process is in.
fn available(root: &Path) -> u64 {
    let machine = field(&root.join("proc/meminfo"), "MemAvailable:").map_or(4 << 30, |kib| kib * 1024);
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    groups.lines().filter_map(|group| group_room(root, group)).fold(machine, u64::min)
}

/// The least room of a control group and those above it; none if they have no limit. `group` is what a process is told
/// of it, "id:controllers:path".
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
    // A container may see its own group at the mount's root, and the path that the machine has for it.
    let rooms = Path::new(path.trim_start_matches('/')).ancestors().filter_map(|path| {
        let folder = root.join(mount).join(path);
        let number = |name| number(&fs::read_to_string(folder.join(name)).ok()?);
        // Pages of files, such as the model's, count as used, but give way.
        let pages = |name| field(&folder.join("memory.stat"), name).unwrap_or(0);
        let used = number(used)?.saturating_sub(pages(inactive) + pages(active));
        Some(number(limit)?.saturating_sub(used))
    });
    rooms.min()
}

/// The number after a name at the beginning of a line.
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
    fn a_device_is_shared_out() {
        let gib = |n: u64| n << 30;
        let share = |kv| Room::on_device((gib(60), gib(80)), (0.75, 0.25), kv);
        // 20 GiB stay free, 1 is for recordings, and a quarter of 39 is for adapters.
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

    /// Memory below a root of these files, in bytes.
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
            // The container's own group is the root of what it sees.
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
