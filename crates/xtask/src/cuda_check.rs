//! Compiles the workspace for CUDA on a machine without a GPU.
//!
//! The compiler and the libraries come from NVIDIA's packages on PyPI. Everything is compiled and every kernel is built;
//! only the driver library is missing, which comes with a GPU, so nothing is linked into a program.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::{call, root};

/// The toolkit: `cudarc` knows 13.0.
const PACKAGES: [&str; 8] = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cuda-nvrtc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cublas==13.0.*",
    "nvidia-curand",
];

/// Fetches the toolkit into `.cache/cuda` and checks the workspace with `--features cuda`.
pub(crate) fn run() -> anyhow::Result<()> {
    let site = root().join(".cache/cuda");
    if !site.join("complete").exists() {
        let mut install = Command::new("python3");
        install.args(["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]).arg(&site).args(PACKAGES);
        call(&mut install)?;
        fs::write(site.join("complete"), "")?;
    }
    let toolkit = toolkit(&site)?;
    link_libraries(&toolkit)?;
    let path = format!("{}:{}", toolkit.join("bin").display(), std::env::var("PATH").unwrap_or_default());
    let mut check = Command::new("cargo");
    check
        .args(["check", "--release", "--workspace", "--features", "trommel/cuda", "--target-dir", "target/cuda"])
        .current_dir(root())
        .env("CUDA_COMPUTE_CAP", "80")
        .env("CUDA_HOME", &toolkit)
        .env("CUDA_PATH", &toolkit)
        .env("CUDA_TOOLKIT_ROOT_DIR", &toolkit)
        .env("PATH", path);
    call(&mut check)
}

/// The folder that the packages share.
fn toolkit(site: &Path) -> anyhow::Result<PathBuf> {
    let folders = fs::read_dir(site.join("nvidia"))?.flatten().map(|e| e.path());
    folders.into_iter().find(|f| f.join("bin/nvcc").exists()).context("the packages hold no `nvcc`")
}

/// Gives the libraries the places and names that build scripts look for.
fn link_libraries(toolkit: &Path) -> anyhow::Result<()> {
    if !toolkit.join("lib64").exists() {
        symlink("lib", toolkit.join("lib64"))?;
    }
    for library in fs::read_dir(toolkit.join("lib"))?.flatten() {
        let name = library.file_name().to_string_lossy().into_owned();
        if let Some((stem, _)) = name.split_once(".so.") {
            let plain = toolkit.join("lib").join(format!("{stem}.so"));
            if !plain.exists() {
                symlink(&name, plain)?;
            }
        }
    }
    Ok(())
}
