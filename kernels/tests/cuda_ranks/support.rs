//! Ranks as threads and as processes.

use std::{
    io::{BufRead, BufReader},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use kernels::{
    DType, Group, HostTensor, Norm, NormKind, Result,
    cuda::{CudaBackend, CudaMat, CudaVector, gpus},
    prelude::*,
    reference::Table,
};

/// How a process is told which rank it is, of how many, and in which folder they meet.
const RANK: &str = "LORAX_TEST_RANK";
/// How long ranks wait for each other where nothing is wrong.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// One test at a time has the GPU: blocks of another would take the place of a rank that is waited for.
fn alone() -> MutexGuard<'static, ()> {
    static GPU: Mutex<()> = Mutex::new(());
    GPU.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The backend of a rank, on the GPU of its number if there are so many.
pub(crate) fn join(folder: &Path, rank: usize, ranks: usize, patience: Duration) -> Result<CudaBackend> {
    join_in(DType::Bf16, folder, (rank, ranks), patience)
}

/// As above, for a model of a type.
pub(crate) fn join_in(
    dtype: DType,
    folder: &Path,
    (rank, ranks): (usize, usize),
    patience: Duration,
) -> Result<CudaBackend> {
    let group = Group::join(folder, rank, ranks, PATIENCE)?.with_patience(patience);
    let count = gpus(DType::Bf16).0.len();
    CudaBackend::new(dtype, if ranks <= count { rank } else { 0 })?.with_group(Arc::new(group))
}

/// Runs two ranks as threads, on one GPU. The blocks of both must fit on it together, and `body` must not make CUDA load a
/// module, as cuBLASLt does for products of a new size: loading waits for kernels that run, and thus for a rank that
/// waits for the one that loads. Ranks that are processes may do both.
pub(crate) fn threads(body: impl Fn(&CudaBackend) + Sync) {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let rank = |rank| {
        let group = Group::join(folder.path(), rank, 2, PATIENCE).unwrap().with_patience(PATIENCE);
        let be = CudaBackend::new(DType::Bf16, 0).unwrap().with_group(Arc::new(group)).unwrap();
        let done = catch_unwind(AssertUnwindSafe(|| body(&be)));
        if done.is_ok() {
            // Memory is freed when nobody waits for a kernel any more: the driver would wait for it, too.
            be.group().barrier(PATIENCE).unwrap();
        }
        done.unwrap_or_else(|panic| resume_unwind(panic));
    };
    thread::scope(|scope| {
        let handles = [0, 1].map(|number| scope.spawn(move || rank(number)));
        for handle in handles {
            handle.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
    });
}

/// A process that is one of the ranks.
pub(crate) struct Process {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Process {
    /// The rest of the next line that begins with `rank: `.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        while self.out.read_line(&mut line).unwrap() > 0 {
            if let Some((_, said)) = line.split_once("rank: ") {
                return said.trim().to_owned();
            }
            line.clear();
        }
        panic!("the rank has ended without a word");
    }

    /// Whether it ended well.
    pub(crate) fn succeeds(&mut self) -> bool {
        self.child.wait().unwrap().success()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

/// What a rank tells the test.
#[allow(clippy::print_stdout, reason = "the test reads it")]
pub(crate) fn say(words: &str) {
    println!("rank: {words}");
}

/// In the test's process, starts the ranks and gives them to `watch`. They run the same test, in which this function
/// calls `body` with the folder, the rank and the number of ranks.
pub(crate) fn processes(
    test: &str,
    ranks: usize,
    body: impl Fn(&Path, usize, usize),
    watch: impl FnOnce(&mut [Process]),
) {
    if let Ok(told) = std::env::var(RANK) {
        let words: Vec<&str> = told.splitn(3, ' ').collect();
        return body(Path::new(words[2]), words[0].parse().unwrap(), words[1].parse().unwrap());
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let start = |rank| {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture", "--test-threads=1"])
            .env(RANK, format!("{rank} {ranks} {}", folder.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Process { child, out }
    };
    let mut started: Vec<Process> = (0..ranks).map(start).collect();
    watch(&mut started);
}

/// Starts the ranks, and expects all of them to end well.
pub(crate) fn all_succeed(test: &str, ranks: usize, body: impl Fn(&CudaBackend)) {
    all_succeed_in(DType::Bf16, test, ranks, body);
}

/// As above, for a model of a type.
pub(crate) fn all_succeed_in(dtype: DType, test: &str, ranks: usize, body: impl Fn(&CudaBackend)) {
    let run = |folder: &Path, rank, ranks| {
        let be = join_in(dtype, folder, (rank, ranks), PATIENCE).unwrap();
        body(&be);
        be.group().barrier(PATIENCE).unwrap();
        say("done");
    };
    processes(test, ranks, run, |started| {
        for (rank, process) in started.iter_mut().enumerate() {
            assert_eq!(process.line(), "done", "rank {rank}");
            assert!(process.succeeds(), "rank {rank}");
        }
    });
}

pub(crate) fn tensor(table: &Table) -> HostTensor<'static> {
    let data = table.data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    HostTensor { dtype: DType::F32, rows: table.rows(), cols: table.cols, data: data.into() }
}

pub(crate) fn filled(be: &CudaBackend, mut x: CudaMat, table: &Table) -> CudaMat {
    be.fill(&mut x, &table.data).unwrap();
    x
}

/// An RMS norm without a bias.
pub(crate) fn rms(weight: &CudaVector) -> Norm<'_, CudaBackend> {
    Norm { kind: NormKind::Rms, weight, bias: None, eps: 1e-5 }
}

/// Fails unless all ranks have the same bits.
pub(crate) fn expect_same_bits(be: &CudaBackend, what: &str, values: &[f32]) {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for value in values {
        hash = (hash ^ u64::from(value.to_bits())).wrapping_mul(0x0100_0000_01b3);
    }
    let all = be.group().exchange(&hash.to_le_bytes()).unwrap();
    assert!(all.iter().all(|other| *other == all[0]), "{what}: ranks have different bits");
}
