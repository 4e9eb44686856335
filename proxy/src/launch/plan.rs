//! QEMU's command line: what the user gave, and what launching adds.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use onequote_evidence::digest::sha256;

use super::{LaunchError, exec::VHOST_VSOCK};
use crate::{measure::quoted, vm::is_valid_name};

/// What to launch.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The VM's name; none to take it from QEMU's `-name`.
    pub name: Option<String>,
    /// The folder in which the proxy looks for monitors.
    pub dir: PathBuf,
    /// QEMU's program and arguments.
    pub command: Vec<OsString>,
    /// Whether the host's kernel offers vsock to guests. [`super::host_has_vsock`] tells.
    pub host_vsock: bool,
}

/// A command line ready to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// The VM's name.
    pub name: String,
    /// The monitor's socket.
    pub socket: PathBuf,
    /// QEMU's program and arguments.
    pub command: Vec<OsString>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Launch {
    /// Makes the command line.
    ///
    /// # Errors
    /// [`LaunchError`] when something is missing or does not go together.
    pub fn plan(&self) -> Result<Planned, LaunchError> {
        let (program, args) = self.command.split_first().ok_or(LaunchError::Empty)?;
        let given = Given::read(args)?;
        let name = match (&self.name, given.name) {
            (Some(ours), Some(theirs)) if *ours != theirs => {
                return Err(LaunchError::TwoNames(ours.clone(), theirs));
            }
            (Some(name), _) => name.clone(),
            (None, Some(name)) => name,
            (None, None) => return Err(LaunchError::NoName),
        };
        if !is_valid_name(&name) {
            return Err(LaunchError::BadName(name));
        }
        let socket = self.dir.join(format!("{name}.qmp"));
        if args.iter().any(|a| contains(a.as_bytes(), socket.as_os_str().as_bytes())) {
            let why = "the monitor in the watched folder is added by launch";
            return Err(LaunchError::Conflict(socket.display().to_string(), why));
        }

        let mut command = vec![program.clone()];
        command.extend_from_slice(args);
        let mut notes = Vec::new();
        if !given.stopped {
            command.push("-S".into());
        }
        command.push("-qmp".into());
        command.push(monitor(&socket));
        if !given.named {
            command.extend(["-name".into(), OsString::from(&name)]);
        }
        if !given.vsock {
            if self.host_vsock {
                let bus = if given.microvm { "device" } else { "pci" };
                command.extend(["-device".into(), format!("vhost-vsock-{bus},guest-cid={}", cid(&name)).into()]);
            } else {
                notes.push(format!(
                    "{VHOST_VSOCK} is not to be had and the arguments have no vsock device: the VM is measured at its \
                     start, but the programs that run in it will not be; see vhost-user-vsock in the operations manual"
                ));
            }
        }
        notes.push(format!("{name} waits until the proxy has measured it; `onequote-proxy status` shows it"));
        Ok(Planned { name, socket, command, notes })
    }
}

impl Planned {
    /// The command line as a shell reads it.
    #[must_use]
    pub fn command_line(&self) -> String {
        self.command.iter().map(|a| quoted(&a.to_string_lossy())).collect::<Vec<_>>().join(" ")
    }
}

/// What the user's arguments say already.
#[derive(Debug, Default)]
struct Given {
    stopped: bool,
    named: bool,
    name: Option<String>,
    vsock: bool,
    microvm: bool,
}

impl Given {
    fn read(args: &[OsString]) -> Result<Self, LaunchError> {
        let mut given = Self::default();
        let mut rest = args.iter();
        let mut previous = OsStr::new("");
        while let Some(arg) = rest.next() {
            let value = rest.as_slice().first().map_or(OsStr::new(""), OsString::as_os_str);
            // The kernel's command line may look like anything.
            if previous != "-append" {
                given.take(arg, value)?;
            }
            previous = arg;
        }
        Ok(given)
    }

    fn take(&mut self, arg: &OsStr, value: &OsStr) -> Result<(), LaunchError> {
        let Some(option) = arg.to_str().and_then(|a| a.strip_prefix('-')) else { return Ok(()) };
        let option = option.strip_prefix('-').unwrap_or(option);
        let conflict = |why| Err(LaunchError::Conflict(format!("-{option}"), why));
        match option {
            "S" => self.stopped = true,
            "name" => {
                self.named = true;
                self.name = name_of(&value.to_string_lossy());
            }
            "device" => self.vsock |= is_vsock(value.as_bytes()),
            "M" | "machine" => self.microvm |= contains(value.as_bytes(), b"microvm"),
            "readconfig" => {
                let path = Path::new(value);
                let text = fs::read(path).map_err(|source| LaunchError::Io { path: path.to_owned(), source })?;
                self.vsock |= is_vsock(&text);
                self.microvm |= contains(&text, b"\"microvm\"");
            }
            "incoming" => return conflict("a VM that migrates in brings state that nobody measured"),
            "preconfig" => return conflict("its monitor answers too little to measure the VM"),
            _ => {}
        }
        Ok(())
    }
}

/// The name in `-name`'s value: `NAME,…` or `…,guest=NAME,…`.
fn name_of(value: &str) -> Option<String> {
    let mut parts = value.split(',');
    let first = parts.clone().next().filter(|p| !p.is_empty() && !p.contains('='));
    first.or_else(|| parts.find_map(|p| p.strip_prefix("guest="))).map(str::to_owned)
}

fn is_vsock(text: &[u8]) -> bool {
    contains(text, b"vhost-vsock-") || contains(text, b"vhost-user-vsock-")
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len().max(1)).any(|w| w == part)
}

/// The monitor's option, with commas in the path doubled.
fn monitor(socket: &Path) -> OsString {
    let mut option = b"unix:".to_vec();
    for &byte in socket.as_os_str().as_bytes() {
        option.push(byte);
        if byte == b',' {
            option.push(byte);
        }
    }
    option.extend_from_slice(b",server=on,wait=off");
    OsString::from_vec(option)
}

/// A CID for a VM: the same one each time, above those that people choose by hand. If another VM has it, QEMU says so.
fn cid(name: &str) -> u32 {
    let hash = sha256(&[b"onequote.cid.v1", name.as_bytes()]);
    let [a, b, c, d, ..] = hash.0;
    0x1000 + (u32::from_le_bytes([a, b, c, d]) & 0x3fff_ffff)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn launch(name: Option<&str>, host_vsock: bool, args: &[&str]) -> Launch {
        let command = std::iter::once("qemu-system-x86_64").chain(args.iter().copied()).map(OsString::from).collect();
        Launch { name: name.map(str::to_owned), dir: "/run/o/vms".into(), command, host_vsock }
    }

    #[test]
    fn adds_what_is_missing() {
        let planned = launch(Some("web"), true, &["-M", "q35", "-append", "a -S b"]).plan().unwrap();
        assert_eq!(
            planned.command_line(),
            format!(
                "qemu-system-x86_64 -M q35 -append 'a -S b' -S -qmp unix:/run/o/vms/web.qmp,server=on,wait=off \
                 -name web -device vhost-vsock-pci,guest-cid={}",
                cid("web")
            )
        );
        assert_eq!(planned.notes.len(), 1);
    }

    #[test]
    fn keeps_what_is_there() {
        let user = [
            "-S",
            "-name",
            "debug-threads=on,guest=db",
            "-M",
            "microvm",
            "-device",
            "vhost-user-vsock-device,chardev=c",
        ];
        let planned = launch(None, true, &user).plan().unwrap();
        assert_eq!(planned.name, "db");
        assert_eq!(planned.command.len(), 1 + user.len() + 2);

        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("c.cfg");
        fs::write(&config, "[machine]\n  type = \"microvm\"\n").unwrap();
        let args = ["-readconfig", config.to_str().unwrap()];
        let line = launch(Some("x"), true, &args).plan().unwrap().command_line();
        assert!(line.contains("-device vhost-vsock-device,guest-cid="), "{line}");
        fs::write(&config, "[device]\n  driver = \"vhost-vsock-pci\"\n").unwrap();
        assert!(!launch(Some("x"), true, &args).plan().unwrap().command_line().contains("guest-cid"));
    }

    #[test]
    fn says_what_it_cannot_do() {
        let planned = launch(Some("x"), false, &[]).plan().unwrap();
        assert!(planned.notes[0].contains("/dev/vhost-vsock"), "{:?}", planned.notes);
        assert!(!planned.command_line().contains("vsock"));
        let error = |name, args: &[&str]| launch(name, true, args).plan().unwrap_err().to_string();
        assert!(error(None, &[]).contains("no name"));
        assert!(error(Some("a/b"), &[]).contains("a/b"));
        assert!(error(Some("a"), &["-name", "b"]).contains("leave one out"));
        assert!(error(Some("a"), &["-incoming", "defer"]).contains("-incoming"));
        assert!(error(Some("a"), &["--preconfig"]).contains("-preconfig"));
        assert!(error(Some("a"), &["-qmp", "unix:/run/o/vms/a.qmp,server=on"]).contains("added by launch"));
        assert!(error(Some("a"), &["-readconfig", "/nowhere"]).contains("/nowhere"));
        let empty = Launch { command: Vec::new(), ..launch(None, true, &[]) };
        assert!(matches!(empty.plan().unwrap_err(), LaunchError::Empty));
    }
}
