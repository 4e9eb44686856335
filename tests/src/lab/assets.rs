//! All that guests are made of, ready to use.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, anyhow};

use super::cache::Cache;
use super::image::{disk, initrd, kernel, uefi};
use super::machine::{Machine, template_append};
use super::vsock::Transport;
use super::{command, process};

const SHIM_TARGET: &str = "x86_64-unknown-linux-gnu";

/// As in `xtask/src/steps.rs`. Static; relocations packed, which takes 46 kB off.
const SHIM_FLAGS: &str = "-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs";

/// Guest parts and programs, in the cache folder and the target folder.
#[derive(Debug, Clone)]
pub struct Assets {
    /// Version of the guests' kernel package.
    pub kernel_version: String,
    /// The uncompressed kernel.
    pub vmlinux: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The ext4 disk of the direct configurations.
    pub disk: PathBuf,
    /// The qcow2 base image of the UEFI configuration.
    pub uefi: PathBuf,
    /// The shim that is in the initramfs.
    pub shim: PathBuf,
    /// onequote-proxy.
    pub proxy: PathBuf,
    /// onequote-verifier.
    pub verifier: PathBuf,
    /// How vsock is done here.
    pub(crate) transport: Transport,
}

impl Assets {
    /// Whether guests' connections arrive at AF_VSOCK sockets of the host's kernel.
    #[must_use]
    pub fn kernel_vsock(&self) -> bool {
        matches!(self.transport, Transport::Kernel)
    }

    /// Builds what is missing, once in a process; says on standard error what takes long.
    ///
    /// # Errors
    /// A package or program is missing, or a build fails.
    pub fn prepare() -> Result<&'static Self> {
        static ASSETS: OnceLock<Result<Assets, String>> = OnceLock::new();
        ASSETS
            .get_or_init(|| Self::build().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow!("{error}"))
    }

    fn build() -> Result<Self> {
        let programs = program_folder()?;
        let shim = build_programs(&programs)?;
        let cache = Cache::open()?;
        let kernel = kernel::Kernel::prepare(&cache)?;
        let busybox = kernel::busybox(&cache)?;
        let initrd = initrd::prepare(&cache, &kernel, &busybox, &shim)?;
        let disk = disk::prepare(&cache)?;
        // The same words as for direct boot, but for the disk, which has partitions.
        let cmdline = template_append(Machine::Q35)?.replace("/dev/vda", "/dev/vda2");
        let uefi = uefi::prepare(&cache, &kernel, &initrd, &disk, &cmdline)?;
        Ok(Self {
            transport: Transport::choose(&cache)?,
            kernel_version: kernel.version,
            vmlinux: kernel.vmlinux,
            initrd,
            disk,
            uefi,
            shim,
            proxy: programs.join("onequote-proxy"),
            verifier: programs.join("onequote-verifier"),
        })
    }
}

/// The verifier's program as it is now, for those who need no guests.
///
/// # Errors
/// It cannot be built.
pub fn verifier_program() -> Result<PathBuf> {
    let programs = program_folder()?;
    let target = programs.parent().context("this program is in no target folder")?;
    let program = programs.join("onequote-verifier");
    if std::env::var_os("ONEQUOTE_BUILT").is_none() || !program.exists() {
        build_own(&programs, target, &["onequote-verifier"])?;
    }
    Ok(program)
}

/// The folder of this program, without `deps`: that of the profile in the target folder.
fn program_folder() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().context("this program is in no folder")?;
    Ok(match folder.ends_with("deps") {
        true => folder.parent().unwrap_or(folder).to_owned(),
        false => folder.to_owned(),
    })
}

/// Builds proxy, verifier and shim as they are now, unless `ONEQUOTE_BUILT` says that somebody just did. Returns the
/// shim's path.
fn build_programs(programs: &Path) -> Result<PathBuf> {
    let target = programs.parent().context("this program is in no target folder")?;
    let shim = target.join(SHIM_TARGET).join("shim/onequote-shim");
    if std::env::var_os("ONEQUOTE_BUILT").is_some() && shim.exists() {
        return Ok(shim);
    }
    build_own(programs, target, &["onequote-proxy", "onequote-verifier"])?;
    let mut static_shim = cargo(target);
    static_shim
        .args(["--package", "onequote-shim", "--profile", "shim", "--target", SHIM_TARGET])
        .env("RUSTFLAGS", SHIM_FLAGS);
    command::output(&mut static_shim).map_err(shorten)?;
    Ok(shim)
}

fn cargo(target: &Path) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.arg("build").arg("--target-dir").arg(target).current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo
}

fn build_own(programs: &Path, target: &Path, packages: &[&str]) -> Result<()> {
    let mut own = cargo(target);
    own.args(packages.iter().flat_map(|package| ["--package", package]));
    if programs.ends_with("release") {
        own.arg("--release");
    }
    command::output(&mut own).map_err(shorten)?;
    Ok(())
}

/// The compiler's messages are long; their end is what matters.
fn shorten(error: anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    match text.len() {
        0..4000 => error,
        _ => anyhow!("{}", process::last_lines(&text, 60)),
    }
}
