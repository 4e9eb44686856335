//! What must hold of a description beyond its form.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
};

use onequote_evidence::id::VmId;
use toml::Spanned;

use super::{
    Bus, Console, ConsoleKind, Description, Disk, Firmware, Format, Machine, Network, NetworkKind, Vsock, VsockKind,
    Wrong,
};
use crate::vm::is_valid_name;

/// A Unix socket's path has at most 107 bytes (Linux `struct sockaddr_un`).
const MAX_SOCKET_PATH: usize = 107;

/// A network interface's name has at most 15 bytes (Linux `IFNAMSIZ`).
const MAX_INTERFACE: usize = 15;

/// SATA ports of q35 (QEMU `hw/ide/ahci.h`: ICH9 has six).
pub(super) const SATA_PORTS: usize = 6;

/// Ids that arguments use themselves.
const RESERVED: [&str; 7] = ["firmware", "vars", "console", "vsock0", "mem0", "scsi0", "monitor"];

fn wrong<T>(value: &Spanned<T>, key: &str, why: impl Into<String>) -> Wrong {
    Wrong { at: value.span(), key: key.to_owned(), why: why.into() }
}

pub(super) fn check(d: &Description) -> Result<(), Wrong> {
    let keys = &d.keys;
    match &keys.name {
        Some(name) if !is_valid_name(name.get_ref()) => {
            let why = format!("{:?} is no name for a VM: {NAME_RULE}", name.get_ref());
            return Err(wrong(name, "name", why));
        }
        None if !is_valid_name(&d.name()) => {
            let why = format!("left out, and the file's name, {:?}, is no name for a VM: {NAME_RULE}", d.name());
            return Err(Wrong { at: 0..0, key: "name".to_owned(), why });
        }
        _ => {}
    }
    if let Some(uuid) = &keys.uuid
        && let Err(why) = uuid.get_ref().parse::<VmId>()
    {
        return Err(wrong(uuid, "uuid", format!("{:?} is {why}", uuid.get_ref())));
    }
    if memory_bytes(keys.memory.get_ref()).is_none() {
        let why = format!("{:?} is no size: a number above 0 and K, M, G or T, as in \"512M\"", keys.memory.get_ref());
        return Err(wrong(&keys.memory, "memory", why));
    }
    if *keys.cpus.get_ref() == 0 {
        return Err(wrong(&keys.cpus, "cpus", "must be 1 or more"));
    }
    for (key, value) in [("cpu", &keys.cpu), ("qemu", &keys.qemu)] {
        if let Some(value) = value.as_ref().filter(|v| v.get_ref().is_empty()) {
            return Err(wrong(value, key, "is empty"));
        }
    }
    match (&keys.kernel, &keys.initrd, &keys.cmdline) {
        (Some(kernel), initrd, _) => {
            d.file(kernel, "kernel", Is::File)?;
            initrd.as_ref().map_or(Ok(()), |initrd| d.file(initrd, "initrd", Is::File))?;
        }
        (None, Some(initrd), _) => return Err(wrong(initrd, "initrd", "needs a kernel")),
        (None, None, Some(cmdline)) => return Err(wrong(cmdline, "cmdline", "needs a kernel")),
        (None, None, None) => {}
    }
    if let Some(firmware) = &keys.firmware {
        check_firmware(d, firmware)?;
    }
    check_disks(d)?;
    for (n, network) in keys.network.iter().enumerate() {
        check_network(network, n, keys.network.len())?;
    }
    keys.vsock.as_ref().map_or(Ok(()), |vsock| check_vsock(d, vsock))?;
    keys.console.as_ref().map_or(Ok(()), |console| check_console(d, console))
}

const NAME_RULE: &str = "1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first";

/// What a path must lead to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Is {
    File,
    /// A file or a block device.
    Disk,
    Socket,
}

impl Description {
    fn file(&self, path: &Spanned<PathBuf>, key: &str, is: Is) -> Result<(), Wrong> {
        let full = self.absolute(path.get_ref());
        let kind = match fs::metadata(&full) {
            Ok(data) => data.file_type(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(wrong(path, key, format!("{} is not there", full.display())));
            }
            Err(e) => return Err(wrong(path, key, format!("{}: {e}", full.display()))),
        };
        let (fits, what) = match is {
            Is::File => (kind.is_file(), "file"),
            Is::Disk => (kind.is_file() || kind.is_block_device(), "file or block device"),
            Is::Socket => (kind.is_socket(), "socket"),
        };
        if fits { Ok(()) } else { Err(wrong(path, key, format!("{} is no {what}", full.display()))) }
    }

    /// A file that QEMU makes: its folder must be there.
    fn new_file(&self, path: &Spanned<PathBuf>, key: &str) -> Result<(), Wrong> {
        let full = self.absolute(path.get_ref());
        match full.parent().filter(|dir| dir.is_dir()) {
            Some(_) => Ok(()),
            None => Err(wrong(path, key, format!("the folder of {} is not there", full.display()))),
        }
    }

    fn socket_path(&self, path: &Spanned<PathBuf>, key: &str) -> Result<(), Wrong> {
        let full = self.absolute(path.get_ref());
        let length = full.as_os_str().len();
        if length <= MAX_SOCKET_PATH {
            return Ok(());
        }
        let why = format!("{} has {length} bytes, and a socket's path at most {MAX_SOCKET_PATH}", full.display());
        Err(wrong(path, key, why))
    }
}

/// `512M`, in bytes.
pub(super) fn memory_bytes(text: &str) -> Option<u64> {
    let unit = text.chars().last()?;
    let shift = match unit {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => return None,
    };
    let number = text.strip_suffix(unit)?;
    if !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

fn check_firmware(d: &Description, firmware: &Spanned<Firmware>) -> Result<(), Wrong> {
    let Firmware { bios, code, vars } = firmware.get_ref();
    match (bios, code, vars) {
        (Some(bios), None, None) => d.file(bios, "firmware.bios", Is::File),
        (None, Some(code), Some(vars)) => {
            if d.keys.machine == Machine::Microvm {
                return Err(wrong(code, "firmware.code", "a microvm has no flash: give firmware.bios"));
            }
            d.file(code, "firmware.code", Is::File)?;
            d.file(vars, "firmware.vars", Is::File)
        }
        (None, Some(code), None) => Err(wrong(code, "firmware.code", "needs firmware.vars, a variable store")),
        (None, None, Some(vars)) => Err(wrong(vars, "firmware.vars", "needs firmware.code")),
        (Some(bios), _, _) => Err(wrong(bios, "firmware.bios", "give bios, or code and vars, not both")),
        (None, None, None) => Err(wrong(firmware, "firmware", "give bios, or code and vars")),
    }
}

fn check_disks(d: &Description) -> Result<(), Wrong> {
    let (mut ids, mut writable, mut sata) = (BTreeSet::new(), BTreeSet::new(), 0);
    for (n, disk) in d.keys.disk.iter().enumerate() {
        let Disk { id, path, format, cdrom, bus, backing, .. } = disk.get_ref();
        let id_now = disk.get_ref().id(n);
        let at = |key: &str, why: String| match id {
            Some(id) => wrong(id, key, why),
            None => wrong(disk, key, why),
        };
        if !is_qemu_id(&id_now) {
            let why = format!("{id_now:?} is no id: at most 64 of A-Z a-z 0-9 . _ -, a letter first");
            return Err(at("disk.id", why));
        }
        if RESERVED.contains(&id_now.as_str()) || id_now.strip_prefix("net").is_some_and(is_number) {
            return Err(at("disk.id", format!("{id_now:?} is the id of another part of the VM")));
        }
        if !ids.insert(id_now.clone()) {
            return Err(at("disk.id", format!("{id_now:?} is the id of two disks")));
        }
        d.file(path, "disk.path", Is::Disk)?;
        if !disk.get_ref().is_read_only() && !writable.insert(d.absolute(path.get_ref())) {
            return Err(wrong(path, "disk.path", "two disks write to it"));
        }
        if let Some(backing) = backing {
            if *format != Format::Qcow2 {
                return Err(wrong(backing, "disk.backing", "only a qcow2 image can have one"));
            }
            d.file(&backing.get_ref().path, "disk.backing.path", Is::Disk)?;
        }
        let bus_now = disk.get_ref().bus();
        let at = |why: &str| match bus {
            Some(bus) => wrong(bus, "disk.bus", why),
            None => wrong(disk, "disk.bus", why),
        };
        if d.keys.machine == Machine::Microvm && matches!(bus_now, Bus::Sata | Bus::Nvme) {
            return Err(at("a microvm has virtio-blk and virtio-scsi only"));
        }
        if *cdrom && !matches!(bus_now, Bus::Sata | Bus::VirtioScsi) {
            return Err(at("a CD-ROM is on sata or virtio-scsi"));
        }
        sata += usize::from(bus_now == Bus::Sata);
        if sata > SATA_PORTS {
            return Err(at("q35 has six sata ports"));
        }
    }
    Ok(())
}

fn check_network(network: &Spanned<Network>, n: usize, of: usize) -> Result<(), Wrong> {
    let Network { kind, mac, tap, forward } = network.get_ref();
    if let Some(mac) = mac
        && !is_mac(mac.get_ref())
    {
        let why = format!("{:?} is no unicast MAC address, as in \"52:54:00:12:34:56\"", mac.get_ref());
        return Err(wrong(mac, "network.mac", why));
    }
    match (kind, tap) {
        (NetworkKind::Tap, None) => return Err(wrong(network, "network.tap", "type = \"tap\" needs it")),
        (NetworkKind::User | NetworkKind::None, Some(tap)) => {
            return Err(wrong(tap, "network.tap", "goes with type = \"tap\" only"));
        }
        (NetworkKind::Tap, Some(tap)) if !is_interface(tap.get_ref()) => {
            let why = format!("{:?} is no network interface's name", tap.get_ref());
            return Err(wrong(tap, "network.tap", why));
        }
        _ => {}
    }
    if let Some(first) = forward.first().filter(|_| *kind != NetworkKind::User) {
        return Err(wrong(first, "network.forward", "goes with type = \"user\" only"));
    }
    if *kind == NetworkKind::None && of > 1 {
        return Err(wrong(network, "network.type", format!("network {} of {of} is none: leave it out", n + 1)));
    }
    Ok(())
}

fn check_vsock(d: &Description, vsock: &Spanned<Vsock>) -> Result<(), Wrong> {
    let Vsock { kind, cid, socket } = vsock.get_ref();
    if let Some(cid) = cid {
        // 0 to 2 are hypervisor, loopback and host; the last is "any" (Linux `include/uapi/linux/vm_sockets.h`).
        if !(3..u32::MAX).contains(cid.get_ref()) {
            return Err(wrong(cid, "vsock.cid", "must be from 3 to 4294967294"));
        }
        match kind {
            VsockKind::Off => return Err(wrong(cid, "vsock.cid", "does not go with type = \"off\"")),
            VsockKind::VhostUser => {
                return Err(wrong(cid, "vsock.cid", "is the back end's own with type = \"vhost-user\""));
            }
            VsockKind::Auto | VsockKind::Vhost => {}
        }
    }
    match (kind, socket) {
        (VsockKind::VhostUser, Some(socket)) => {
            d.socket_path(socket, "vsock.socket")?;
            d.file(socket, "vsock.socket", Is::Socket)
                .map_err(|w| Wrong { why: format!("{}; start the back end before the VM", w.why), ..w })
        }
        (VsockKind::VhostUser, None) => Err(wrong(vsock, "vsock.socket", "type = \"vhost-user\" needs it")),
        (_, Some(socket)) => Err(wrong(socket, "vsock.socket", "goes with type = \"vhost-user\" only")),
        (_, None) => Ok(()),
    }
}

fn check_console(d: &Description, console: &Spanned<Console>) -> Result<(), Wrong> {
    let Console { kind, path, log } = console.get_ref();
    match (kind, path) {
        (ConsoleKind::File | ConsoleKind::Socket, None) => {
            return Err(wrong(console, "console.path", "this type needs it"));
        }
        (ConsoleKind::None | ConsoleKind::Stdio, Some(path)) => {
            return Err(wrong(path, "console.path", "goes with type = \"file\" or \"socket\" only"));
        }
        (kind, Some(path)) => {
            d.new_file(path, "console.path")?;
            if *kind == ConsoleKind::Socket {
                d.socket_path(path, "console.path")?;
            }
        }
        (_, None) => {}
    }
    match log {
        Some(log) if !matches!(kind, ConsoleKind::Socket | ConsoleKind::Stdio) => {
            Err(wrong(log, "console.log", "goes with type = \"socket\" or \"stdio\" only"))
        }
        Some(log) => d.new_file(log, "console.log"),
        None => Ok(()),
    }
}

/// QEMU's own rule (QEMU `util/id.c`), and a bound.
fn is_qemu_id(id: &str) -> bool {
    let bytes = id.as_bytes();
    (1..=64).contains(&bytes.len())
        && bytes[0].is_ascii_alphabetic()
        && bytes.iter().all(|&b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<_> = text.split(':').collect();
    let byte = |part: &str| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten();
    // The lowest bit of the first byte says multicast.
    parts.len() == 6 && parts.iter().all(|p| byte(p).is_some()) && byte(parts[0]).is_some_and(|first| first & 1 == 0)
}

/// Linux `dev_valid_name`.
fn is_interface(name: &str) -> bool {
    (1..=MAX_INTERFACE).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
}

/// Whether the path is a block device, for which QEMU has a driver of its own.
pub(super) fn is_block_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|data| data.file_type().is_block_device())
}
