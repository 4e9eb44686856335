//! Our description of a VM: one TOML file, for people who do not use libvirt.
//!
//! It says what a VM is made of in a few words and leaves out how QEMU wants to be told. Nothing is there that the file
//! does not name: QEMU runs with `-nodefaults`. Relative paths are relative to the file's folder. Unknown keys are
//! refused by name; every error has file, line and key. `docs/operations.md` has every key.

mod arguments;
mod check;

use std::{
    fs::File,
    io::{self, Read as _},
    ops::Range,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use toml::Spanned;

pub(super) use arguments::Wording;

/// The longest description that is read.
const MAX_SIZE: u64 = 1024 * 1024;

/// A VM's description, read and checked.
#[derive(Debug, Clone)]
pub struct Description {
    /// The file, as an absolute path.
    file: PathBuf,
    /// The folder that relative paths are relative to.
    folder: PathBuf,
    keys: Keys,
}

/// Why a description cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// The file cannot be read.
    #[error("cannot read the description {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong kind. The message has line and key.
    #[error("{path}: {error}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where.
        error: Box<toml::de::Error>,
    },
    /// A value that cannot be.
    #[error("{path}, line {line}: {key}: {why}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// Why.
        why: String,
    },
}

/// The file's keys.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    name: Option<Spanned<String>>,
    uuid: Option<Spanned<String>>,
    memory: Spanned<String>,
    #[serde(default = "one")]
    cpus: Spanned<u32>,
    #[serde(default)]
    machine: Machine,
    #[serde(default)]
    accelerator: Accelerator,
    cpu: Option<Spanned<String>>,
    qemu: Option<Spanned<String>>,
    kernel: Option<Spanned<PathBuf>>,
    initrd: Option<Spanned<PathBuf>>,
    cmdline: Option<Spanned<String>>,
    firmware: Option<Spanned<Firmware>>,
    #[serde(default)]
    disk: Vec<Spanned<Disk>>,
    #[serde(default)]
    network: Vec<Spanned<Network>>,
    vsock: Option<Spanned<Vsock>>,
    console: Option<Spanned<Console>>,
    #[serde(default = "yes")]
    sandbox: bool,
    #[serde(default)]
    arguments: Vec<String>,
}

fn one() -> Spanned<u32> {
    Spanned::new(0..0, 1)
}

fn yes() -> bool {
    true
}

/// QEMU's machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Machine {
    #[default]
    Q35,
    Microvm,
}

impl Machine {
    fn word(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        }
    }

    /// How names of virtio devices end on its bus.
    fn bus(self) -> &'static str {
        match self {
            Self::Q35 => "pci",
            Self::Microvm => "device",
        }
    }
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Accelerator {
    /// KVM where it works, TCG elsewhere.
    #[default]
    Auto,
    Kvm,
    Tcg,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Firmware {
    /// A firmware in one file, `-bios`.
    bios: Option<Spanned<PathBuf>>,
    /// Firmware in flash: its code, read-only.
    code: Option<Spanned<PathBuf>>,
    /// Its variable store, this VM's own.
    vars: Option<Spanned<PathBuf>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Disk {
    id: Option<Spanned<String>>,
    path: Spanned<PathBuf>,
    format: Format,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    cdrom: bool,
    bus: Option<Spanned<Bus>>,
    backing: Option<Spanned<Backing>>,
}

/// The file below an overlay, instead of the one that the overlay names.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Backing {
    path: Spanned<PathBuf>,
    format: Format,
}

/// An image's format. QEMU is never left to guess it: a guest that can write a raw image could make it look like another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    Raw,
    Qcow2,
}

impl Format {
    fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Bus {
    VirtioBlk,
    VirtioScsi,
    Sata,
    Nvme,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Network {
    #[serde(rename = "type")]
    kind: NetworkKind,
    mac: Option<Spanned<String>>,
    /// Of `tap`: the interface.
    tap: Option<Spanned<String>>,
    /// Of `user`: QEMU's `hostfwd`.
    #[serde(default)]
    forward: Vec<Spanned<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum NetworkKind {
    User,
    Tap,
    None,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Vsock {
    #[serde(rename = "type")]
    kind: VsockKind,
    cid: Option<Spanned<u32>>,
    /// Of `vhost-user`: the back end's socket.
    socket: Option<Spanned<PathBuf>>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum VsockKind {
    /// The kernel's where the host has it, none elsewhere.
    #[default]
    Auto,
    Vhost,
    VhostUser,
    Off,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Console {
    #[serde(rename = "type")]
    kind: ConsoleKind,
    /// The file or socket.
    path: Option<Spanned<PathBuf>>,
    /// Of `socket`: a file that has all that was said.
    log: Option<Spanned<PathBuf>>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ConsoleKind {
    #[default]
    None,
    Stdio,
    File,
    Socket,
}

impl Description {
    /// Reads and checks a description. The files that it names must be there.
    ///
    /// # Errors
    /// [`DescriptionError`], naming file, line and key.
    pub fn read(path: &Path) -> Result<Self, DescriptionError> {
        let unreadable = |error| DescriptionError::Read { path: path.to_owned(), error };
        let mut text = String::new();
        let file = File::open(path).map_err(unreadable)?;
        file.take(MAX_SIZE + 1).read_to_string(&mut text).map_err(unreadable)?;
        if text.len() as u64 > MAX_SIZE {
            return Err(unreadable(io::Error::other(format!("it is longer than {MAX_SIZE} bytes"))));
        }
        Self::parse(&text, path)
    }

    /// Checks a description's text. `path` is where it stands: errors name it, and relative paths begin at its folder.
    ///
    /// # Errors
    /// [`DescriptionError`], naming file, line and key.
    pub fn parse(text: &str, path: &Path) -> Result<Self, DescriptionError> {
        let file =
            std::path::absolute(path).map_err(|error| DescriptionError::Read { path: path.to_owned(), error })?;
        let keys = toml::from_str(text)
            .map_err(|error| DescriptionError::Parse { path: path.to_owned(), error: Box::new(error) })?;
        let folder = file.parent().unwrap_or(Path::new("/")).to_owned();
        let description = Self { file, folder, keys };
        check::check(&description).map_err(|Wrong { at, key, why }| {
            let before = text.as_bytes().get(..at.start).unwrap_or_default();
            let line = before.iter().filter(|b| **b == b'\n').count() + 1;
            DescriptionError::Value { path: path.to_owned(), line, key, why }
        })?;
        Ok(description)
    }

    /// The VM's name: the file's own, without its ending, where it says no other.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.keys.name {
            Some(name) => name.get_ref().clone(),
            None => self.file.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        }
    }

    /// Whether it says a name itself.
    #[must_use]
    pub fn has_name(&self) -> bool {
        self.keys.name.is_some()
    }

    /// The folder that its relative paths are relative to.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn absolute(&self, path: &Path) -> PathBuf {
        self.folder.join(path).components().collect()
    }
}

/// A value that cannot be, and where it stands in the text.
struct Wrong {
    at: Range<usize>,
    key: String,
    why: String,
}

#[cfg(test)]
mod tests;
