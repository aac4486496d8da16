//! With the `cuda` feature: compiles each `kernels/*.cu` to a fatbin of the same name in `OUT_DIR`,
//! with machine code for A100 (sm_80), L20/L40S/RTX 40xx (sm_89) and H100/H200 (sm_90a), and PTX
//! for the driver to compile on anything newer; and the loader of the driver library. Without it:
//! nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

const HOPPER: &str = "arch=compute_90a,code=sm_90a";
const TARGETS: [&str; 3] = [
    "arch=compute_80,code=[sm_80,compute_80]",
    "arch=compute_89,code=sm_89",
    HOPPER,
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=src/cuda/driver.c");
    for variable in ["CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let nvcc = find_nvcc();
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        link_driver_loader(&nvcc, &out_dir);
    }
    let sources: Vec<PathBuf> = fs::read_dir("kernels")
        .expect("the crate has a kernels directory")
        .map(|entry| entry.expect("kernels is readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    let next = AtomicUsize::new(0);
    let compile_the_next = || {
        while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            let name = source.file_stem().expect("a .cu file has a name");
            compile(&nvcc, source, &out_dir.join(name).with_extension("fatbin"));
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(compile_the_next);
        }
    });
}

fn find_nvcc() -> PathBuf {
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os)
        .map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    homes
        .chain(env::split_paths(&path))
        .map(|directory| {
            directory
                .join("nvcc")
                .with_extension(env::consts::EXE_EXTENSION)
        })
        .find(|nvcc| nvcc.is_file())
        .unwrap_or_else(|| {
            panic!(
                "the `cuda` feature needs the CUDA toolkit, and nvcc is neither in $CUDA_HOME/bin, \
                 $CUDA_PATH/bin nor on PATH: install CUDA 12.4 or newer from \
                 https://developer.nvidia.com/cuda-downloads and set CUDA_HOME, \
                 or build without `--features cuda`"
            )
        })
}

fn compile(nvcc: &Path, source: &Path, fatbin: &Path) {
    // Kernels of one architecture's own instructions are named after it.
    let name = source.file_stem().unwrap_or_default().to_string_lossy();
    let targets = match name.ends_with("_hopper") {
        true => &[HOPPER][..],
        false => &TARGETS,
    };
    run(Command::new(nvcc)
        .args(["-fatbin", "-O3", "-std=c++17", "-Werror", "all-warnings"])
        .args(targets.iter().flat_map(|target| ["-gencode", target]))
        .arg("-o")
        .args([fatbin, source]));
}

/// Links `src/cuda/driver.c` whole, so that it stands before libcuda.
fn link_driver_loader(nvcc: &Path, out_dir: &Path) {
    let library = out_dir.join("libcuda_driver_loader.a");
    run(Command::new(nvcc)
        .args(["-lib", "-O2", "-Xcompiler", "-fPIC", "-o"])
        .arg(&library)
        .arg("src/cuda/driver.c"));
    println!("cargo::rustc-link-search=native={}", out_dir.display());
    println!("cargo::rustc-link-lib=static:+whole-archive=cuda_driver_loader");
}

fn run(command: &mut Command) {
    let status = command
        .status()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(status.success(), "failed: {command:?}");
}
