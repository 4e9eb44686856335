//! A VM without a guest: a real QEMU whose firmware halts at its first instruction. It starts in a moment, costs no time
//! while it runs, and has all that the proxy measures: binary, arguments, firmware, a disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use onequote_evidence::guest_frame::DEFAULT_PORT;

use super::process::Process;
use super::qmp::Qmp;
use super::wait;
use super::world::World;

/// A QEMU process without a guest.
#[derive(Debug)]
pub struct Bare {
    name: String,
    folder: PathBuf,
    monitor: PathBuf,
    /// The process.
    pub qemu: Process,
}

impl Bare {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its folder: `halt.bin` (firmware), `disk.img`.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A connection to its second monitor, which nobody else uses.
    ///
    /// # Errors
    /// QEMU does not answer within ten seconds.
    pub fn monitor(&self) -> Result<Qmp> {
        wait::for_true("QEMU's own monitor", Duration::from_secs(10), || wait::listens(&self.monitor))?;
        Qmp::connect(&self.monitor)
    }

    /// What QEMU says of its run state.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn run_state(&self) -> Result<String> {
        let status = self.monitor()?.execute("query-status", &json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }
}

impl World {
    /// Puts the files of a bare VM in place: a firmware that halts, a small disk.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn prepare_bare(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder().join("vm").join(name);
        fs::create_dir_all(&folder)?;
        // The processor starts 16 bytes below the end: cli; hlt; and back to hlt when something wakes it.
        let mut firmware = vec![0xf4; 64 * 1024];
        firmware[0xfff0..0xfff4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
        fs::write(folder.join("halt.bin"), firmware)?;
        fs::write(folder.join("disk.img"), vec![0x5a; 256 * 1024])?;
        Ok(folder)
    }

    /// Starts a gated VM without a guest, with its monitor where the proxy looks for it, and another one for tests.
    /// `more` are further arguments.
    ///
    /// # Errors
    /// QEMU does not start.
    pub fn start_bare(&self, name: &str, more: &[&str]) -> Result<Bare> {
        let folder = self.prepare_bare(name)?;
        let (watched, own) = (self.monitors().join(format!("{name}.qmp")), folder.join("own.qmp"));
        let _ = fs::remove_file(&watched);
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-machine", "q35,accel=tcg", "-m", "32", "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-name", name, "-bios", "halt.bin", "-S"])
            .args(["-drive", "file=disk.img,if=none,format=raw,id=disk", "-device", "virtio-blk-pci,drive=disk"])
            .args(more)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", own.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", watched.display()))
            .current_dir(&folder);
        let qemu = Process::spawn(&format!("QEMU of {name}"), &command, &folder.join("qemu.log"), false)?;
        Ok(Bare { name: name.to_owned(), folder, monitor: own, qemu })
    }

    /// Puts the files of a bare VM in place, and its description, `NAME.toml`. `keys` are further keys before the tables,
    /// `tables` further tables.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn describe_bare(&self, name: &str, keys: &str, tables: &str) -> Result<PathBuf> {
        let folder = self.prepare_bare(name)?;
        let path = folder.join(name).with_extension("toml");
        let text = format!(
            "memory = \"32M\"\naccelerator = \"tcg\"\n\
             arguments = [\"-qmp\", \"unix:{}/own.qmp,server=on,wait=off\"]\n{keys}\n\
             [firmware]\nbios = \"halt.bin\"\n[[disk]]\npath = \"disk.img\"\nformat = \"raw\"\n{tables}\n",
            folder.display()
        );
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Launches a VM by its description.
    ///
    /// # Errors
    /// The launch cannot be started. That QEMU does not start shows in [`Bare::qemu`].
    pub fn launch_bare(&self, description: &Path) -> Result<Bare> {
        let name = description.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let folder = description.parent().unwrap_or(Path::new("/")).to_owned();
        let mut command = Command::new(&self.assets().proxy);
        command.arg("--config").arg(self.proxy_config()).arg("launch").arg(description);
        let qemu = Process::spawn(&format!("QEMU of {name}"), &command, &folder.join("qemu.log"), false)?;
        let monitor = folder.join("own.qmp");
        Ok(Bare { name, folder, monitor, qemu })
    }

    /// Where the proxy listens for the shim of the VM called `name`, if it listens on Unix sockets.
    #[must_use]
    pub fn guest_socket(&self, name: &str) -> PathBuf {
        self.monitors().join(format!("{name}.vsock_{DEFAULT_PORT}"))
    }
}
