//! A VM without a guest: a real QEMU whose firmware halts at its first instruction, or does one thing and halts then
//! ([`Act`]). It starts in a moment, costs no time while it runs, and has all that the proxy measures: binary, arguments,
//! firmware, a disk.

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

/// What a firmware does before it halts.
#[derive(Debug, Clone, Copy)]
pub enum Act {
    /// Resets the machine by the keyboard controller, once: the second time it finds its mark in memory.
    ResetOnce,
    /// Powers off by ACPI (q35's ICH9: PM base in PCI 0:1f.0 at 0x40, PM1a control 4 above it).
    PowerOff,
    /// Suspends to RAM in the same way.
    Suspend,
    /// Tells QEMU that its kernel panicked (device `pvpanic`).
    Panic,
    /// Starts the watchdog (device `ib700`) with no time left, and does not serve it.
    Watchdog,
}

impl Act {
    /// Its code, 16-bit.
    fn code(self) -> Vec<u8> {
        match self {
            // mov ax, cs of RAM 0; mov ds, ax; cmp byte [0x500], 0x5a; je over; mov byte [0x500], 0x5a; reset; hlt
            Self::ResetOnce => {
                let mut code = vec![0x31, 0xc0, 0x8e, 0xd8, 0x80, 0x3e, 0x00, 0x05, 0x5a];
                let mut reset = vec![0xc6, 0x06, 0x00, 0x05, 0x5a];
                reset.extend(out8(0x64, 0xfe));
                reset.extend(HALT);
                code.extend([0x74, u8::try_from(reset.len()).unwrap_or(u8::MAX)]);
                code.extend(reset);
                code
            }
            Self::PowerOff => [pm_base(), out16(0x604, 0x2000)].concat(),
            Self::Suspend => [pm_base(), out16(0x604, 0x2400)].concat(),
            Self::Panic => out8(0x505, 1),
            Self::Watchdog => out8(0x443, 0x0f),
        }
    }
}

/// cli; hlt; and back to hlt when something wakes it.
const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

/// mov dx, port; mov al, value; out dx, al
fn out8(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0xba, low, high, 0xb0, value, 0xee]
}

/// The same with ax.
fn out16(port: u16, value: u16) -> Vec<u8> {
    let ([low, high], [a, b]) = (port.to_le_bytes(), value.to_le_bytes());
    vec![0xba, low, high, 0xb8, a, b, 0xef]
}

/// mov edx, port; mov eax, value; out dx, eax
fn out32(port: u32, value: u32) -> Vec<u8> {
    [&[0x66, 0xba][..], &port.to_le_bytes(), &[0x66, 0xb8], &value.to_le_bytes(), &[0x66, 0xef]].concat()
}

/// Puts the ICH9's PM registers at 0x600 and switches them on.
fn pm_base() -> Vec<u8> {
    let register = |at: u32, value| [out32(0xcf8, 0x8000_0000 | (0x1f << 11) | at), out32(0xcfc, value)].concat();
    [register(0x40, 0x601), register(0x44, 0x80)].concat()
}

/// 64 KiB of firmware. The processor starts 16 bytes below its end.
fn firmware(acts: &[Act]) -> Vec<u8> {
    let mut image = vec![0xf4; 64 * 1024];
    let mut code: Vec<u8> = acts.iter().flat_map(|act| act.code()).collect();
    code.extend(HALT);
    image[0xf000..0xf000 + code.len()].copy_from_slice(&code);
    // jmp 0xf000, from 0xfff3
    image[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0xf0]);
    image
}

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
        fs::write(folder.join("halt.bin"), firmware(&[]))?;
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
        self.spawn_bare(name, folder, &[&["-S"], more].concat())
    }

    /// The same with a firmware that does something as soon as it runs.
    ///
    /// # Errors
    /// QEMU does not start.
    pub fn start_acting(&self, name: &str, acts: &[Act], more: &[&str]) -> Result<Bare> {
        let folder = self.prepare_bare(name)?;
        fs::write(folder.join("halt.bin"), firmware(acts))?;
        self.spawn_bare(name, folder, &[&["-S"], more].concat())
    }

    /// A VM that nothing holds back (without `-S`).
    ///
    /// # Errors
    /// QEMU does not start.
    pub fn start_free(&self, name: &str, more: &[&str]) -> Result<Bare> {
        let folder = self.prepare_bare(name)?;
        self.spawn_bare(name, folder, more)
    }

    /// As [`Self::start_free`], with another drive `disk` than the usual one.
    ///
    /// # Errors
    /// QEMU does not start.
    pub fn start_given(&self, name: &str, more: &[&str], disk: &str) -> Result<Bare> {
        let folder = self.prepare_bare(name)?;
        self.spawn_with(name, folder, more, disk)
    }

    fn spawn_bare(&self, name: &str, folder: PathBuf, more: &[&str]) -> Result<Bare> {
        self.spawn_with(name, folder, more, "file=disk.img,if=none,format=raw,id=disk")
    }

    fn spawn_with(&self, name: &str, folder: PathBuf, more: &[&str], disk: &str) -> Result<Bare> {
        let (watched, own) = (self.monitors().join(format!("{name}.qmp")), folder.join("own.qmp"));
        let _ = fs::remove_file(&watched);
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-machine", "q35,accel=tcg", "-m", "32", "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-name", name, "-bios", "halt.bin"])
            .args(["-drive", disk, "-device", "virtio-blk-pci,drive=disk"])
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
