//! The bound of the folder, and the order of use.

use std::{
    fs::{self, File},
    io::{self, Write},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};
use store::{Store, StoreError};

use crate::support::*;

#[test]
fn reservations_and_contents_of_all_servers_count() {
    let root = tempfile::tempdir().unwrap();
    let [here, there] = [(); 2].map(|()| Store::open(root.path(), 1000).unwrap());
    publish(&here, 1, 398).unwrap();
    let reserved = there.reserve(500).unwrap();
    for (store, bytes) in [(&here, 101), (&there, 101), (&here, 1000), (&there, u64::MAX)] {
        match store.reserve(bytes) {
            Err(StoreError::Full { bytes: asked, used: 900, limit: 1000 }) => assert_eq!(asked, bytes),
            other => panic!("{other:?}"),
        }
    }
    let last = here.reserve(100).unwrap();
    assert!(matches!(here.reserve(1), Err(StoreError::Full { used: 1000, .. })));
    drop(here.reserve(0).unwrap());
    drop(reserved);
    drop(last);
    assert_eq!(here.used().unwrap(), 400);
    // An adapter that is smaller than its reservation takes what it has.
    let partial = there.reserve(600).unwrap();
    write(partial.folder(), 2, 50);
    partial.publish(version(2), reference(2)).unwrap();
    assert_eq!(here.used().unwrap(), 452);
    assert_clean(root.path());
}

#[test]
fn more_than_was_reserved_is_not_published() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path(), 1000).unwrap();
    for (reserved, bytes) in [(0, 1), (1, 2), (99, 100), (100, 101), (100, 5000)] {
        let partial = store.reserve(reserved).unwrap();
        fs::write(partial.folder().join(WEIGHTS), vec![0; bytes]).unwrap();
        match partial.publish(version(1), reference(1)) {
            Err(StoreError::TooLarge { bytes: found, reserved: had }) => {
                assert_eq!((found, had), (bytes as u64, reserved));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(store.used().unwrap(), 0);
        assert_clean(root.path());
    }
}

/// A writer that fails as one does on a full disk.
#[test]
fn a_download_that_fails_gives_its_room_back() {
    struct Disk {
        file: File,
        left: usize,
    }
    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let room = bytes.len().min(self.left);
            if room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.left -= room;
            self.file.write(&bytes[..room])
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path(), 1000).unwrap();
    for left in [0, 1, 10, 499, 500, 999] {
        let partial = store.reserve(1000).unwrap();
        let file = File::create(partial.folder().join(WEIGHTS)).unwrap();
        let error = Disk { file, left }.write_all(&[1; 1000]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(store.reserve(1).is_err(), "counts while it is there");
        drop(partial);
        assert_eq!(store.used().unwrap(), 0, "{left}");
        assert_clean(root.path());
    }
}

/// Servers publish and delete without end while another one counts the bytes in the folder, as they lie there.
#[test]
fn the_bound_holds_at_every_moment() {
    const LIMIT: u64 = 20_000;
    let root = tempfile::tempdir().unwrap();
    let stores: Vec<Store> = (0..4).map(|_| Store::open(root.path(), LIMIT).unwrap()).collect();
    let done = AtomicBool::new(false);
    // What is moved meanwhile may be missed, and is then counted in its new place: first that which moves away.
    let lengths = || {
        let mut sum = 0;
        let mut folders =
            vec![root.path().join("removing"), root.path().join("contents"), root.path().join("partial")];
        while let Some(folder) = folders.pop() {
            for item in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let Ok(found) = item.metadata() else { continue };
                match item.file_name().to_str() {
                    _ if found.is_dir() => folders.push(item.path()),
                    Some(CONFIG | WEIGHTS) => sum += found.len(),
                    _ => {}
                }
            }
        }
        sum
    };
    thread::scope(|scope| {
        let servers: Vec<_> = stores
            .iter()
            .enumerate()
            .map(|(server, store)| {
                scope.spawn(move || {
                    let mut full = 0;
                    for round in 0..80 {
                        let n = (round * 4 + server as u64) % 24;
                        match publish(store, n, 1000 + 200 * n as usize) {
                            Ok(_) => {}
                            Err(StoreError::Full { bytes, .. }) => {
                                full += 1;
                                store.make_room(bytes).unwrap();
                            }
                            Err(other) => panic!("{other}"),
                        }
                        assert!(store.used().unwrap() <= LIMIT);
                    }
                    full
                })
            })
            .collect();
        let watch = scope.spawn(|| {
            let mut most = 0;
            while !done.load(Ordering::Relaxed) {
                most = most.max(lengths());
            }
            most
        });
        let ended: Vec<_> = servers.into_iter().map(|server| server.join()).collect();
        done.store(true, Ordering::Relaxed);
        let full: u64 = ended.into_iter().map(|full| full.unwrap()).sum();
        assert!(full > 10, "there was no room {full} times");
        // Somebody who does not take the lock can see a rename on both sides: once for each server.
        let most = watch.join().unwrap();
        assert!((LIMIT / 2..=LIMIT + 4 * 6000).contains(&most), "{most}");
    });
    assert_clean(root.path());
    assert_eq!(stores[0].used().unwrap(), lengths());
}

#[test]
fn the_order_of_use_survives_a_restart_and_is_shared() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path(), 1 << 20).unwrap();
    let made: Vec<[u8; 32]> = (0..6).map(|n| publish(&store, n, 100).unwrap().content).collect();
    assert_eq!(contents(&store), made);
    let other = Store::open(root.path(), 1 << 20).unwrap();
    drop(store.hold(made[0]).unwrap());
    other.find(version(2)).unwrap();
    drop(other.hold(made[1]).unwrap());
    publish(&store, 4, 100).unwrap();
    let order = [made[3], made[5], made[0], made[2], made[1], made[4]];
    drop(store);
    assert_eq!(contents(&other), order);
    let next = Store::open(root.path(), 1 << 20).unwrap();
    assert_eq!(contents(&next), order);
    // Room is made in that order, around what is held, and no more of it than is needed.
    let held = next.hold(made[5]).unwrap().unwrap();
    let next = Store::open(root.path(), 700).unwrap();
    assert_eq!(next.make_room(290).unwrap(), [made[3], made[0]]);
    assert_eq!(next.used().unwrap(), 408);
    drop(held);
    assert_eq!(next.make_room(0).unwrap(), Vec::<[u8; 32]>::new());
    assert_eq!(contents(&next), [made[2], made[1], made[4], made[5]]);
    assert_eq!(next.make_room(u64::MAX).unwrap().len(), 4);
}

#[test]
fn ten_thousand_adapters_are_scanned_in_a_second() {
    // In memory, where there is a folder for that: making and removing 20,000 folders would be all of this test.
    let memory = std::path::PathBuf::from("/dev/shm");
    let base = if memory.is_dir() { memory } else { std::env::temp_dir() };
    let root = tempfile::tempdir_in(base).unwrap();
    let store = Store::open(root.path(), u64::MAX).unwrap();
    let first = publish(&store, 0, 8).unwrap();
    // Publishing writes through to the disk, which would take most of the time of this test.
    let template = root.path().join("contents").join(hex(&first.content));
    for n in 1..10_000_u64 {
        let mut content = [3; 32];
        content[..8].copy_from_slice(&n.to_le_bytes());
        let entry = root.path().join("contents").join(hex(&content));
        fs::create_dir_all(entry.join("files")).unwrap();
        for file in ["lock", "entry.json", "files/adapter_config.json", "files/adapter_model.safetensors"] {
            fs::hard_link(template.join(file), entry.join(file)).unwrap();
        }
    }
    // Time of a core, because other tests run at the same time. The folder is in memory by now.
    let time = |work: &dyn Fn()| {
        let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
        let start = now();
        work();
        now() - start
    };
    let scan = time(&|| assert_eq!(store.scan().unwrap().len(), 10_000));
    let count = time(&|| assert_eq!(store.used().unwrap(), 100_000));
    let again = time(&|| drop(store.reserve(1).unwrap()));
    println!("scan {scan:?}, count {count:?}, a reservation {again:?}");
    assert!(scan < Duration::from_secs(1), "{scan:?}");
    assert!(again < Duration::from_millis(20), "{again:?}");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
