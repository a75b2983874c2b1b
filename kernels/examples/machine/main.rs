//! Prints what this machine can do at best, as JSON: read bandwidth and peak arithmetic of all its cores.
#![allow(clippy::print_stdout, reason = "printing is its purpose")]

mod ceiling;

fn main() -> std::io::Result<()> {
    let threads = std::thread::available_parallelism()?.get();
    let ceiling::Ceiling { read_gb_s, f32_gflops } = ceiling::Ceiling::measure(threads);
    println!(r#"{{"threads": {threads}, "read_gb_s": {read_gb_s:.1}, "f32_gflops": {f32_gflops:.0}}}"#);
    Ok(())
}
