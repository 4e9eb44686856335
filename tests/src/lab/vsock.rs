//! How a guest's vsock reaches the host: by the host's kernel where it has `/dev/vhost-vsock`, else by one
//! vhost-device-vsock process for each VM.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::fcntl::{Flock, FlockArg};

use super::cache::{Cache, Key};
use super::machine::Machine;
use super::{command, process::Process, wait};

const BACK_END: &str = "vhost-device-vsock";
const BACK_END_VERSION: &str = "0.3.0";

/// The way taken on this machine.
#[derive(Debug, Clone)]
pub(crate) enum Transport {
    /// `/dev/vhost-vsock`: the guest's connections arrive at AF_VSOCK sockets.
    Kernel,
    /// A vhost-user back end (the program's path): they arrive at Unix sockets.
    BackEnd(PathBuf),
}

impl Transport {
    /// The kernel's where it can be opened (and `ONEQUOTE_VSOCK` is not `user`); else the back end, which is built
    /// on first use: about three minutes.
    pub(crate) fn choose(cache: &Cache) -> Result<Self> {
        let wants_user = std::env::var_os("ONEQUOTE_VSOCK").is_some_and(|value| value == "user");
        let kernel = File::options().read(true).write(true).open("/dev/vhost-vsock");
        if kernel.is_ok() && !wants_user {
            return Ok(Self::Kernel);
        }
        Ok(Self::BackEnd(back_end(cache)?))
    }
}

fn back_end(cache: &Cache) -> Result<PathBuf> {
    let key = Key::new(1).text(BACK_END_VERSION).text(std::env::consts::ARCH);
    let place = cache.entry(BACK_END, &key, |folder| {
        eprintln!("lab: building {BACK_END} {BACK_END_VERSION}, once (about three minutes)");
        let scratch = folder.join("scratch");
        command::output(
            Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
                .args(["install", "--locked", "--quiet", "--version", BACK_END_VERSION, "--root"])
                .arg(&scratch)
                .arg("--target-dir")
                .arg(scratch.join("target"))
                .arg(BACK_END)
                // The wishes for our own build are not for this one.
                .env_remove("RUSTFLAGS")
                .env_remove("CARGO_TARGET_DIR")
                .current_dir(folder),
        )?;
        fs::rename(scratch.join("bin").join(BACK_END), folder.join(BACK_END))?;
        fs::remove_dir_all(scratch)?;
        Ok(())
    })?;
    Ok(place.join(BACK_END))
}

/// The right to be the one world on this machine that uses the kernel's vsock, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    _lock: Flock<File>,
}

impl Turn {
    /// Waits for it.
    pub(crate) fn take() -> Result<Self> {
        let file = File::create(std::env::temp_dir().join("onequote-lab-vsock.lock"))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        Ok(Self { _lock: lock })
    }
}

/// A guest CID that no other VM on this machine is likely to have: CIDs are one space for the whole host.
pub(crate) fn fresh_cid() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let pid = std::process::id();
    // 3 is the first CID for guests; 22 bits of pid, 9 bits of count.
    3 + ((pid & 0x3f_ffff) << 9 | NEXT.fetch_add(1, Ordering::Relaxed) & 0x1ff)
}

/// QEMU's arguments for a vsock device, and the back end that has to run before QEMU does.
pub(crate) fn attach(
    transport: &Transport,
    machine: Machine,
    cid: u32,
    folder: &Path,
    uds: &Path,
    detached: bool,
) -> Result<(Vec<String>, Option<Process>)> {
    let bus = match machine {
        Machine::Microvm => "device",
        Machine::Q35 | Machine::Uefi => "pci",
    };
    match transport {
        Transport::Kernel => {
            let device = format!("vhost-vsock-{bus},guest-cid={cid}");
            Ok((vec!["-device".to_owned(), device], None))
        }
        Transport::BackEnd(program) => {
            ensure!(
                uds.as_os_str().len() < 90,
                "{} is too long for a Unix socket with a port behind it",
                uds.display()
            );
            let socket = folder.join("vhost.sock");
            for old in [socket.as_path(), uds] {
                let _ = fs::remove_file(old);
            }
            let mut back_end = Command::new(program);
            back_end.arg("--vm").arg(format!("guest-cid={cid},socket={},uds-path={}", socket.display(), uds.display()));
            let log = folder.join("vsock.log");
            let mut process = Process::spawn(BACK_END, &back_end, &log, detached)?;
            wait::for_true("the vsock back end's socket", Duration::from_secs(10), || {
                process.check_alive()?;
                wait::listens(&socket)
            })?;
            let arguments = [
                "-chardev".to_owned(),
                // Relative: QEMU runs in the VM's folder, and a second start has the same words.
                "socket,id=vsock0,path=vhost.sock".to_owned(),
                "-device".to_owned(),
                format!("vhost-user-vsock-{bus},chardev=vsock0"),
            ];
            Ok((arguments.to_vec(), Some(process)))
        }
    }
}
