//! What has to be on the machine, how it is found, and the Debian package that has it.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

/// How a need is found.
#[derive(Debug, Clone, Copy)]
enum Probe {
    /// A program in `PATH` or a system folder.
    Program(&'static str),
    /// A file.
    File(&'static str),
    /// A library that `pkg-config` knows.
    Library(&'static str),
    /// A shared object that the dynamic linker's usual folders have.
    Shared(&'static str),
    /// The server programs of PostgreSQL, of any version, where Debian and Ubuntu put them, or in `PATH`.
    PostgreSql,
    /// A package that apt can download.
    Downloadable(&'static str),
}

/// Needs in the order of their installation. QEMU comes first and in a call of its own: apt then takes a `qemu-utils` of
/// another version away instead of giving up.
const NEEDS: &[(Probe, &str)] = &[
    (Probe::Program("qemu-system-x86_64"), "qemu-system-x86"),
    (Probe::File("/usr/share/qemu/qboot.rom"), "qemu-system-data"),
    (Probe::Program("qemu-img"), "qemu-utils"),
    (Probe::File("/usr/share/OVMF/OVMF_CODE_4M.fd"), "ovmf"),
    (Probe::Program("swtpm"), "swtpm"),
    (Probe::Program("swtpm_setup"), "swtpm-tools"),
    (Probe::Shared("libtss2-tcti-swtpm.so.0"), "libtss2-tcti-swtpm0"),
    (Probe::Program("pkg-config"), "pkg-config"),
    (Probe::Library("tss2-esys"), "libtss2-dev"),
    (Probe::Program("cc"), "build-essential"),
    (Probe::Program("objcopy"), "binutils"),
    (Probe::Program("mke2fs"), "e2fsprogs"),
    (Probe::Program("mmdebstrap"), "mmdebstrap"),
    (Probe::Program("dpkg-deb"), "dpkg"),
    (Probe::Program("mformat"), "mtools"),
    (Probe::Program("setpriv"), "util-linux"),
    (Probe::File("/usr/lib/systemd/boot/efi/linuxx64.efi.stub"), "systemd-boot-efi"),
    (Probe::Program("tpm2_checkquote"), "tpm2-tools"),
    (Probe::Program("evmctl"), "ima-evm-utils"),
    (Probe::Program("fsverity"), "fsverity"),
    (Probe::Program("openssl"), "openssl"),
    (Probe::PostgreSql, POSTGRESQL),
    (Probe::Downloadable("linux-image-cloud-amd64"), ""),
    (Probe::Downloadable("busybox-static"), ""),
];

const FIRST_ALONE: &str = "qemu-system-x86";

const POSTGRESQL: &str = "postgresql";

/// Where Debian's packages of PostgreSQL are told whether to make and start a server of their own. The tests start theirs.
const NO_CLUSTER: (&str, &str) = ("/etc/postgresql-common/createcluster.conf", "create_main_cluster = false\n");

/// Looks for every need; as root installs what is missing.
///
/// # Errors
/// Something is missing and cannot be installed; the text says what to do.
pub(crate) fn ensure() -> Result<()> {
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64")),
        "onequote is built and tested on Linux on x86-64 only, so far"
    );
    let missing = missing();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).filter(|name| !name.is_empty()).collect();
    for (probe, package) in &missing {
        println!("setup: missing {probe:?} {package}");
    }
    if !is_root()? {
        let mut advice = "apt-get update".to_owned();
        if packages.contains(&FIRST_ALONE) {
            advice += &format!(" && apt-get install -y {FIRST_ALONE}");
        }
        if !packages.is_empty() {
            advice += &format!(" && apt-get install -y {}", packages.join(" "));
        }
        bail!("run this as root, then try again:\n\n    {advice}\n");
    }
    apt(&["update"])?;
    if packages.contains(&FIRST_ALONE) {
        apt(&["install", "-y", "--no-install-recommends", FIRST_ALONE])?;
    }
    if packages.contains(&POSTGRESQL) {
        no_cluster(Path::new(NO_CLUSTER.0)).with_context(|| format!("cannot write {}", NO_CLUSTER.0))?;
    }
    if !packages.is_empty() {
        // A configuration that is there stays: dpkg would ask.
        let mut words = vec!["install", "-y", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold"];
        words.extend(&packages);
        apt(&words)?;
    }
    match self::missing().first() {
        None => Ok(()),
        Some((probe, package)) => bail!("{probe:?} is still missing although package {package} is installed"),
    }
}

/// Keeps Debian's packages from making a server, unless somebody has said what they should do.
fn no_cluster(path: &Path) -> std::io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    std::fs::write(path, NO_CLUSTER.1)
}

fn missing() -> Vec<(Probe, &'static str)> {
    NEEDS.iter().filter(|(probe, _)| !found(*probe)).copied().collect()
}

fn found(probe: Probe) -> bool {
    match probe {
        Probe::File(path) => Path::new(path).exists(),
        Probe::Program(name) => in_path(name),
        Probe::PostgreSql => {
            let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
            versions.map(|version| version.path().join("bin")).any(|bin| is_server(&bin)) || in_path("initdb")
        }
        Probe::Library(name) => quietly(Command::new("pkg-config").args(["--exists", name])),
        Probe::Shared(name) => ["/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib", "/usr/local/lib"]
            .iter()
            .any(|folder| Path::new(folder).join(name).exists()),
        Probe::Downloadable(name) => quietly(Command::new("apt-cache").args(["show", "--no-all-versions", name])),
    }
}

/// Whether this folder has what the tests start; a version's folder can have clients only.
fn is_server(bin: &Path) -> bool {
    bin.join("initdb").is_file() && bin.join("postgres").is_file()
}

fn in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
        || ["/usr/sbin", "/sbin"].iter().any(|folder| Path::new(folder).join(name).is_file())
}

fn quietly(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

fn is_root() -> Result<bool> {
    let output = Command::new("id").arg("-u").output().context("cannot run `id`")?;
    Ok(output.stdout.trim_ascii() == b"0")
}

fn apt(words: &[&str]) -> Result<()> {
    println!("setup: apt-get {}", words.join(" "));
    let status = Command::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-q", "-o", "Dpkg::Use-Pty=0"])
        .args(words)
        .status()
        .context("cannot run apt-get: is this Debian? Install by hand what is named above")?;
    ensure!(status.success(), "apt-get {} failed", words.join(" "));
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn probes_tell_what_is_there() {
        assert!(found(Probe::Program("sh")));
        assert!(!found(Probe::Program("no-such-program-at-all")));
        assert!(found(Probe::File("/proc/self")));
        assert!(!found(Probe::Shared("libnone-such.so")));
    }

    #[test]
    fn a_word_on_clusters_stays() {
        let dir = std::env::temp_dir().join(format!("onequote-setup-{}", std::process::id()));
        let path = dir.join("common/createcluster.conf");
        no_cluster(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), NO_CLUSTER.1);
        std::fs::write(&path, "own").unwrap();
        no_cluster(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "own");
        std::fs::remove_dir_all(dir).unwrap();
    }
}
