//! The hash of an adapter's bytes.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
};

use blake3::{
    Hasher,
    hazmat::{
        ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
    },
};

/// Bytes that a thread reads and hashes at once. A power of two, so that a piece is a whole subtree of BLAKE3; small
/// enough to stay in a core's own cache between the two.
const PIECE: u64 = 256 << 10;
/// Files below this are hashed by the calling thread alone, because starting others takes longer.
const WORTH_THREADS: u64 = 4 << 20;
/// Separates these hashes from all others. A change to what is hashed needs another name.
const CONTEXT: &str = "lorax 2026-11-30 content of an adapter, files sorted by name";

/// How much the threads that hash give way to others: tokens must not wait until a core is free.
const NICENESS: i32 = 10;

/// Threads that hash for the callers of [`content_of`] now. All callers together have a quarter of the cores, and each
/// has one thread at least: a file that cannot be read holds up nobody else.
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// The hash of an adapter: BLAKE3 over the names, sizes and bytes of its files, in the order of their names.
///
/// Large files are read by several threads. The answer does not depend on their number: the hash of a file is that of
/// plain BLAKE3, whose tree allows parts to be hashed apart
/// (<https://github.com/BLAKE3-team/BLAKE3-specs/blob/master/blake3.pdf>, section 2.1). Files are read at positions of
/// their own, so that the cursors of the handles stay where they are, and never mapped, so that one that gets shorter
/// meanwhile is an error and not a signal.
///
/// # Errors
///
/// If a file cannot be read, if its size changes meanwhile, or if two have the same name.
pub fn content_of(files: &[(&str, &File)]) -> io::Result<[u8; 32]> {
    let mut sorted = files.to_vec();
    sorted.sort_by_key(|(name, _)| *name);
    let names: BTreeSet<&str> = sorted.iter().map(|(name, _)| *name).collect();
    if names.len() != sorted.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "two files have the same name"));
    }
    let mut hasher = Hasher::new_derive_key(CONTEXT);
    hasher.update(&(sorted.len() as u64).to_le_bytes());
    for (name, file) in sorted {
        let bytes = file.metadata()?.len();
        let hash = hash_file(file, bytes)?;
        if file.metadata()?.len() != bytes {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{name} has grown while it was read"),
            ));
        }
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(&bytes.to_le_bytes());
        hasher.update(&hash);
    }
    Ok(hasher.finalize().into())
}

/// Plain BLAKE3 of a file that has `bytes` bytes.
fn hash_file(file: &File, bytes: u64) -> io::Result<[u8; 32]> {
    let pieces = bytes.div_ceil(PIECE);
    if pieces <= 1 {
        let mut whole = vec![0; usize::try_from(bytes).unwrap_or(0)];
        file.read_exact_at(&mut whole, 0)?;
        return Ok(blake3::hash(&whole).into());
    }
    let next = AtomicU64::new(0);
    let work = || hash_pieces(file, bytes, &next);
    let found = if bytes < WORTH_THREADS { work()? } else { on_threads(&Threads::take(pieces), work)? };
    let mut values = vec![[0; 32]; usize::try_from(pieces).unwrap_or(0)];
    for (piece, value) in found {
        values[usize::try_from(piece).unwrap_or(0)] = value;
    }
    let (left, right) = values.split_at(left_pieces(pieces));
    let (left, right) = (subtree(left), subtree(right));
    Ok(merge_subtrees_root(&left, &right, Mode::Hash).into())
}

/// The values of pieces, and which pieces these are.
type Hashed = Vec<(u64, ChainingValue)>;

/// Does the work on threads that give way to others.
fn on_threads(threads: &Threads, work: impl Fn() -> io::Result<Hashed> + Sync) -> io::Result<Hashed> {
    let in_the_background = || {
        // Without this the work is done all the same.
        let _ = rustix::process::nice(NICENESS);
        work()
    };
    thread::scope(|scope| {
        let start = |_| thread::Builder::new().name("hash".into()).spawn_scoped(scope, in_the_background);
        let started: Vec<_> = (0..threads.0).map(start).collect();
        // A thread that could not be started leaves its pieces to the others.
        let mut all = if started.iter().all(Result::is_err) { work()? } else { Vec::new() };
        for thread in started.into_iter().flatten() {
            let panicked = |_| Err(io::Error::other("a thread that hashes panicked"));
            all.append(&mut thread.join().unwrap_or_else(panicked)?);
        }
        Ok(all)
    })
}

/// Hashes pieces until none is left, as one of several threads.
fn hash_pieces(file: &File, bytes: u64, next: &AtomicU64) -> io::Result<Hashed> {
    let mut buffer = vec![0; PIECE as usize];
    let mut values = Vec::new();
    loop {
        let piece = next.fetch_add(1, Ordering::Relaxed);
        let start = piece.saturating_mul(PIECE);
        if start >= bytes {
            return Ok(values);
        }
        let part = &mut buffer[..PIECE.min(bytes - start) as usize];
        if let Err(error) = file.read_exact_at(part, start) {
            next.store(bytes.div_ceil(PIECE), Ordering::Relaxed);
            return Err(error);
        }
        values.push((piece, Hasher::new().set_input_offset(start).update(part).finalize_non_root()));
    }
}

/// Of so many pieces, those in the left subtree: the last piece may be short, but the left subtree is never.
fn left_pieces(pieces: u64) -> usize {
    usize::try_from(left_subtree_len(pieces * PIECE) / PIECE).unwrap_or(0)
}

fn subtree(values: &[ChainingValue]) -> ChainingValue {
    if let [value] = values {
        return *value;
    }
    let (left, right) = values.split_at(left_pieces(values.len() as u64));
    merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
}

/// Threads that were taken from the bound of all callers.
struct Threads(usize);

impl Threads {
    /// At most so many; one if others have the rest.
    fn take(wanted: u64) -> Self {
        let most = thread::available_parallelism().map_or(1, usize::from).div_ceil(4);
        let wanted = usize::try_from(wanted).unwrap_or(most);
        let mut taken = 1;
        let _ = THREADS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |busy| {
            taken = wanted.min(most.saturating_sub(busy)).max(1);
            Some(busy + taken)
        });
        Self(taken)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        THREADS.fetch_sub(self.0, Ordering::Relaxed);
    }
}
