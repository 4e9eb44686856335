//! QEMU's command line: what the user gave, and what launching adds.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use super::{
    LaunchError,
    cid::{self, TakenCids},
    description::{Description, Wording},
    exec::VHOST_VSOCK,
};
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
    /// The vsock device that is added where the arguments have none.
    pub vsock: VsockWish,
    /// What the host offers.
    pub host: HostVsock,
    /// Where QEMU is started; none for the folder of whoever launches.
    pub folder: Option<PathBuf>,
    /// What the user should know already.
    pub notes: Vec<String>,
}

/// The vsock device that a VM is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VsockWish {
    /// The kernel's, where the host has it; with this CID, or else a chosen one.
    Where {
        /// The CID.
        cid: Option<u32>,
    },
    /// The kernel's, or the VM does not start.
    Must {
        /// The CID.
        cid: Option<u32>,
    },
    /// None that launching adds.
    Off,
}

impl Default for VsockWish {
    fn default() -> Self {
        Self::Where { cid: None }
    }
}

/// What the host offers of vsock.
#[derive(Debug, Clone)]
pub struct HostVsock {
    /// Whether its kernel offers vsock to guests. [`super::host_has_vsock`] tells.
    pub device: bool,
    /// CIDs that its VMs have, or why nobody knows. [`super::taken_cids`] tells.
    pub taken: Result<TakenCids, String>,
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
    /// Where QEMU is started; none for the folder of whoever launches.
    pub folder: Option<PathBuf>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Launch {
    /// A VM by its description. `name` is a name given besides; `dir` the folder in which the proxy looks for monitors.
    ///
    /// # Errors
    /// [`LaunchError`] when names differ, or KVM was asked for and does not work.
    pub fn described(
        description: &Description,
        name: Option<String>,
        dir: PathBuf,
        host: HostVsock,
    ) -> Result<Self, LaunchError> {
        let own = description.name();
        let name = match name {
            Some(given) if description.has_name() && given != own => return Err(LaunchError::TwoNames(given, own)),
            Some(given) => given,
            None => own,
        };
        let Wording { command, vsock, notes } = description.wording(&name)?;
        let folder = Some(description.folder().to_owned());
        Ok(Self { name: Some(name), dir, command, vsock, host, folder, notes })
    }

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
        let mut notes = self.notes.clone();
        if !given.stopped {
            command.push("-S".into());
        }
        command.push("-qmp".into());
        command.push(monitor(&socket));
        if !given.named {
            command.extend(["-name".into(), OsString::from(&name)]);
        }
        if !given.vsock
            && let Some(cid) = self.cid(&name, &mut notes)?
        {
            let bus = if given.microvm { "device" } else { "pci" };
            command.extend(["-device".into(), format!("vhost-vsock-{bus},guest-cid={cid}").into()]);
        }
        notes.push(format!("{name} waits until the proxy has measured it; `onequote-proxy status` shows it"));
        Ok(Planned { name, socket, command, folder: self.folder.clone(), notes })
    }

    /// The CID of the vsock device to add; none to add no device.
    fn cid(&self, name: &str, notes: &mut Vec<String>) -> Result<Option<u32>, LaunchError> {
        let wanted = match self.vsock {
            VsockWish::Off => return Ok(None),
            VsockWish::Must { .. } if !self.host.device => return Err(LaunchError::NoVsock),
            VsockWish::Where { .. } if !self.host.device => {
                notes.push(format!(
                    "{VHOST_VSOCK} is not to be had and the arguments have no vsock device: the VM is measured at its \
                     start, but the programs that run in it will not be; see vhost-user-vsock in the operations manual"
                ));
                return Ok(None);
            }
            VsockWish::Where { cid } | VsockWish::Must { cid } => cid,
        };
        let none = TakenCids::new();
        let taken = match &self.host.taken {
            Ok(taken) => taken,
            Err(why) => {
                notes.push(format!("nobody can say whether another VM has the CID: {why}; QEMU ends if one has"));
                &none
            }
        };
        if let Some(cid) = wanted {
            return match cid::holder(taken, cid, name) {
                Some(other) => Err(LaunchError::CidTaken(cid, other.to_owned())),
                None => Ok(Some(cid)),
            };
        }
        let cid = cid::choose(name, taken).ok_or(LaunchError::NoCid)?;
        let first = cid::candidate(name, 0);
        if let Some(other) = cid::holder(taken, first, name) {
            notes.push(format!("the VM's own CID {first} is that of {other}: it gets {cid}"));
        }
        Ok(Some(cid))
    }
}

impl Planned {
    /// The command line as a shell reads it, with the way to its folder before it where it has one.
    #[must_use]
    pub fn command_line(&self) -> String {
        let words: Vec<_> = self.command.iter().map(|a| quoted(&a.to_string_lossy())).collect();
        match &self.folder {
            Some(folder) => format!("cd {} && {}", quoted(&folder.to_string_lossy()), words.join(" ")),
            None => words.join(" "),
        }
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn launch(name: Option<&str>, host_vsock: bool, args: &[&str]) -> Launch {
        let command = std::iter::once("qemu-system-x86_64").chain(args.iter().copied()).map(OsString::from).collect();
        let host = HostVsock { device: host_vsock, taken: Ok(TakenCids::new()) };
        let (vsock, folder, notes) = (VsockWish::default(), None, Vec::new());
        Launch { name: name.map(str::to_owned), dir: "/run/o/vms".into(), command, vsock, host, folder, notes }
    }

    fn cid(name: &str) -> u32 {
        cid::candidate(name, 0)
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
    #[test]
    fn a_taken_cid_is_not_used() {
        let mut launch = launch(Some("web"), true, &[]);
        launch.host.taken = Ok(TakenCids::from([(cid("web").into(), "db".to_owned()), (42, "mail".to_owned())]));
        let planned = launch.plan().unwrap();
        let second = cid::candidate("web", 1);
        assert!(planned.command_line().ends_with(&format!("guest-cid={second}")), "{}", planned.command_line());
        assert!(planned.notes[0].contains("that of db"), "{:?}", planned.notes);

        launch.vsock = VsockWish::Where { cid: Some(42) };
        let error = launch.plan().unwrap_err().to_string();
        assert!(error.contains("42") && error.contains("mail"), "{error}");
        launch.vsock = VsockWish::Must { cid: Some(43) };
        assert!(launch.plan().unwrap().command_line().ends_with("guest-cid=43"));
        launch.host.taken = Err("no proxy answers".to_owned());
        assert!(launch.plan().unwrap().notes[0].contains("no proxy answers"));
        launch.host.device = false;
        assert!(matches!(launch.plan().unwrap_err(), LaunchError::NoVsock));
        launch.vsock = VsockWish::Off;
        assert!(!launch.plan().unwrap().command_line().contains("vsock"));
    }
}
