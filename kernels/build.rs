//! Under the feature `cuda`, compiles `csrc/*.cu` with nvcc into a static library.
//!
//! `LORAX_CUDA_ARCHS` names the architectures (default `80;86;89;90a`; PTX of the newest that has no letter comes
//! with them), `CUDA_HOME` an installed toolkit to use in place of `.cuda/` (`make cuda-toolchain`).

#[path = "build/report.rs"]
mod report;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// nvcc takes about 1 GB a process for the larger templates.
const MAX_JOBS: usize = 8;

fn main() -> Result<()> {
    for file in ["build.rs", "build/report.rs"] {
        println!("cargo:rerun-if-changed={file}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    for variable in ["LORAX_CUDA_ARCHS", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=csrc");

    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let toolkit = toolkit()?;
    let archs = env::var("LORAX_CUDA_ARCHS").unwrap_or_else(|_| "80;86;89;90a".to_owned());
    let objects = compile(&toolkit, &code_options(&archs), &sources()?, &out)?;

    let library = out.join("liblorax_cuda.a");
    if library.exists() {
        fs::remove_file(&library)?;
    }
    run(Command::new("ar").arg("crs").arg(&library).args(&objects))?;
    println!("cargo:rustc-link-search=native={}", out.display());
    for folder in ["lib", "lib64"] {
        println!("cargo:rustc-link-search=native={}", toolkit.join(folder).display());
    }
    println!("cargo:rustc-link-lib=static=lorax_cuda");
    println!("cargo:rustc-link-lib=static=cudart_static");
    for library in ["dl", "rt", "pthread"] {
        println!("cargo:rustc-link-lib={library}");
    }
    Ok(())
}

/// The folder of a CUDA toolkit.
fn toolkit() -> Result<PathBuf> {
    if let Some(home) = env::var_os("CUDA_HOME") {
        return Ok(home.into());
    }
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?);
    let wheels = manifest.join("../.cuda/site/nvidia/cu13");
    if wheels.join("bin/nvcc").exists() {
        return Ok(wheels);
    }
    Err("the feature `cuda` needs nvcc: run `make cuda-toolchain`, or set CUDA_HOME".into())
}

fn sources() -> Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir("csrc")? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "cu") {
            sources.push(path);
        }
    }
    sources.sort();
    Ok(sources)
}

/// nvcc's options for machine code of every architecture and PTX of the last one without a letter. The host's code
/// learns whether the GPU's own code of Hopper, which no other GPU runs, is among them.
fn code_options(archs: &str) -> Vec<String> {
    let archs: Vec<&str> = archs.split(';').filter(|a| !a.is_empty()).collect();
    let mut options: Vec<String> =
        archs.iter().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}")).collect();
    if let Some(a) = archs.iter().rfind(|a| a.bytes().all(|b| b.is_ascii_digit())) {
        options.push(format!("-gencode=arch=compute_{a},code=compute_{a}"));
    }
    if archs.contains(&"90a") {
        options.push("-DLORAX_SM_90A".to_owned());
    }
    options
}

/// Compiles the sources, a few at a time.
fn compile(toolkit: &Path, code: &[String], sources: &[PathBuf], out: &Path) -> Result<Vec<PathBuf>> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1).clamp(1, MAX_JOBS);
    let mut objects = Vec::new();
    for group in sources.chunks(jobs) {
        let done: Vec<Result<PathBuf>> = thread::scope(|scope| {
            let threads: Vec<_> =
                group.iter().map(|s| scope.spawn(|| compile_one(toolkit, code, s, out))).collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|_| Err("a compile thread died".into())))
                .collect()
        });
        for object in done {
            objects.push(object?);
        }
    }
    Ok(objects)
}

/// Compiles one source, unless its object is newer than all that it was made from.
fn compile_one(toolkit: &Path, code: &[String], source: &Path, out: &Path) -> Result<PathBuf> {
    let object = out.join(source.with_extension("o").file_name().ok_or("a source has no name")?);
    let made_from = object.with_extension("d");
    let options = object.with_extension("options");
    let wanted = format!("{} {}", toolkit.display(), code.join(" "));
    if fs::read_to_string(&options).is_ok_and(|made_with| made_with == wanted)
        && is_newer(&object, &made_from).unwrap_or(false)
    {
        return Ok(object);
    }
    let report = run(Command::new(toolkit.join("bin/nvcc"))
        .args(["-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fno-threadsafe-statics", "-c"])
        .args(code)
        .arg("-MMD")
        .arg("-MF")
        .arg(&made_from)
        .arg(source)
        .arg("-o")
        .arg(&object))?;
    if let Err(slow) = report::check(&fs::read_to_string(source)?, &report) {
        fs::remove_file(&object)?;
        return Err(format!("{}: {slow}", source.display()).into());
    }
    fs::write(options, wanted)?;
    Ok(object)
}

/// Whether an object is newer than the files in its list of dependencies (`object: file file \ file`).
fn is_newer(object: &Path, made_from: &Path) -> std::io::Result<bool> {
    let made = fs::metadata(object)?.modified()?;
    let list = fs::read_to_string(made_from)?;
    let files = list.split_once(": ").map_or("", |(_, files)| files);
    for file in files.split_whitespace().filter(|&file| file != "\\") {
        if fs::metadata(file)?.modified()? > made {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Runs a command and returns what it wrote to stderr.
fn run(command: &mut Command) -> Result<String> {
    let done = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let report = String::from_utf8_lossy(&done.stderr).into_owned();
    if done.status.success() { Ok(report) } else { Err(format!("{command:?} failed:\n{report}").into()) }
}
