//! A description in QEMU's own words.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::Path,
};

use onequote_evidence::digest::sha256;

use super::{
    super::{LaunchError, accel::try_accelerator, plan::VsockWish},
    Accelerator, Bus, Console, ConsoleKind, Description, Disk, Machine, Network, NetworkKind, VsockKind,
    check::is_block_device,
};

/// What a description says of QEMU.
#[derive(Debug, Clone)]
pub(crate) struct Wording {
    /// QEMU's program and arguments.
    pub(crate) command: Vec<OsString>,
    /// The vsock device that is not among them.
    pub(crate) vsock: VsockWish,
    /// What the user should know.
    pub(crate) notes: Vec<String>,
}

/// The value of an option: `first,key=value,…`, commas in values doubled (QEMU `util/qemu-option.c`, `util/keyval.c`).
struct Value(Vec<u8>);

impl Value {
    fn new(first: impl AsRef<OsStr>) -> Self {
        let mut value = Self(Vec::new());
        value.push(first.as_ref());
        value
    }

    fn set(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        if !self.0.is_empty() {
            self.0.push(b',');
        }
        self.0.extend_from_slice(key.as_bytes());
        self.0.push(b'=');
        self.push(value.as_ref());
        self
    }

    fn push(&mut self, text: &OsStr) {
        for &byte in text.as_bytes() {
            self.0.push(byte);
            if byte == b',' {
                self.0.push(byte);
            }
        }
    }
}

/// Arguments as they come.
#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, option: &str) {
        self.0.push(option.into());
    }

    fn text(&mut self, option: &str, value: impl Into<OsString>) {
        self.0.extend([option.into(), value.into()]);
    }

    fn value(&mut self, option: &str, value: Value) {
        self.0.extend([option.into(), OsString::from_vec(value.0)]);
    }
}

impl Description {
    /// QEMU's command line but for what launching adds. Tries KVM where the description leaves the accelerator open.
    ///
    /// # Errors
    /// [`LaunchError::Kvm`] when KVM was asked for and does not work.
    pub(crate) fn wording(&self, name: &str) -> Result<Wording, LaunchError> {
        let keys = &self.keys;
        let mut notes = Vec::new();
        let qemu = self.program();
        let (accelerator, cpu) = self.accelerator(&qemu, &mut notes)?;
        let vhost_user = keys.vsock.as_ref().and_then(|v| v.get_ref().socket.as_ref());
        let mut args = Arguments(vec![qemu]);
        args.value("-machine", self.machine(accelerator, vhost_user.is_some()));
        args.text("-cpu", cpu);
        args.text("-smp", keys.cpus.get_ref().to_string());
        args.text("-m", keys.memory.get_ref());
        if vhost_user.is_some() {
            // The back end works in the guest's memory.
            let object = Value::new("memory-backend-memfd").set("id", "mem0").set("size", keys.memory.get_ref());
            args.value("-object", object.set("share", "on"));
        }
        args.flag("-nodefaults");
        args.flag("-no-user-config");
        args.text("-display", "none");
        if let Some(uuid) = &keys.uuid {
            args.text("-uuid", uuid.get_ref());
        }
        if keys.sandbox {
            let deny = ["obsolete", "elevateprivileges", "spawn", "resourcecontrol"];
            args.value("-sandbox", deny.iter().fold(Value::new("on"), |value, what| value.set(what, "deny")));
        }
        self.boot(&mut args);
        self.disks(&mut args);
        self.networks(&mut args, name);
        if let Some(socket) = vhost_user {
            let socket = Value::new("socket").set("id", "vsock0").set("path", self.absolute(socket.get_ref()));
            args.value("-chardev", socket);
            let device = format!("vhost-user-vsock-{}", keys.machine.bus());
            args.value("-device", Value::new(device).set("id", "vsock0").set("chardev", "vsock0"));
        }
        if let Some(console) = &keys.console {
            self.console(&mut args, console.get_ref());
        }
        args.0.extend(keys.arguments.iter().map(OsString::from));
        Ok(Wording { command: args.0, vsock: self.vsock(), notes })
    }

    /// A program in the path, or a path relative to the folder.
    fn program(&self) -> OsString {
        match self.keys.qemu.as_ref().map(|qemu| qemu.get_ref().as_str()) {
            None => "qemu-system-x86_64".into(),
            Some(path) if path.contains('/') => self.absolute(Path::new(path)).into(),
            Some(name) => name.into(),
        }
    }

    fn accelerator(&self, qemu: &OsStr, notes: &mut Vec<String>) -> Result<(&'static str, String), LaunchError> {
        let cpu = |default: &str| self.keys.cpu.as_ref().map_or(default, |cpu| cpu.get_ref()).to_owned();
        if self.keys.accelerator == Accelerator::Tcg {
            return Ok(("tcg", cpu("max")));
        }
        match (try_accelerator(qemu, self.keys.machine.word(), "kvm", &cpu("host")), self.keys.accelerator) {
            (Ok(()), _) => Ok(("kvm", cpu("host"))),
            (Err(why), Accelerator::Kvm) => Err(LaunchError::Kvm { file: self.file.clone(), why }),
            (Err(why), _) => {
                notes.push(format!("KVM does not work here, so the VM runs under TCG, slowly: {why}"));
                Ok(("tcg", cpu("max")))
            }
        }
    }

    fn machine(&self, accelerator: &str, shared: bool) -> Value {
        let machine = Value::new(self.keys.machine.word()).set("accel", accelerator);
        let machine = match self.keys.machine {
            // No picture: firmware, too, talks on the serial line.
            Machine::Q35 => machine.set("graphics", "off"),
            // Devices are found, and the VM is powered down, by ACPI.
            Machine::Microvm => machine.set("acpi", "on"),
        };
        if shared { machine.set("memory-backend", "mem0") } else { machine }
    }

    fn boot(&self, args: &mut Arguments) {
        let keys = &self.keys;
        if let Some(firmware) = keys.firmware.as_ref().map(toml::Spanned::get_ref) {
            if let Some(bios) = &firmware.bios {
                args.text("-bios", self.absolute(bios.get_ref()));
            }
            for (unit, id, file) in [("0", "firmware", &firmware.code), ("1", "vars", &firmware.vars)] {
                let Some(file) = file else { continue };
                let drive = Value::new("").set("if", "pflash").set("unit", unit).set("id", id).set("format", "raw");
                let drive = if id == "firmware" { drive.set("readonly", "on") } else { drive };
                args.value(
                    "-drive",
                    drive.set("file.driver", "file").set("file.filename", self.absolute(file.get_ref())),
                );
            }
        }
        for (option, file) in [("-kernel", &keys.kernel), ("-initrd", &keys.initrd)] {
            if let Some(file) = file {
                args.text(option, self.absolute(file.get_ref()));
            }
        }
        if let Some(cmdline) = &keys.cmdline {
            args.text("-append", cmdline.get_ref());
        }
    }

    fn disks(&self, args: &mut Arguments) {
        let bus = self.keys.machine.bus();
        if self.keys.disk.iter().any(|d| d.get_ref().bus() == Bus::VirtioScsi) {
            args.value("-device", Value::new(format!("virtio-scsi-{bus}")).set("id", "scsi0"));
        }
        let mut port = 0;
        for (n, disk) in self.keys.disk.iter().enumerate() {
            let disk = disk.get_ref();
            let id = disk.id(n);
            args.value("-drive", self.drive(disk, &id));
            let cdrom = disk.cdrom;
            let device = match disk.bus() {
                Bus::VirtioBlk => Value::new(format!("virtio-blk-{bus}")),
                Bus::VirtioScsi => Value::new(if cdrom { "scsi-cd" } else { "scsi-hd" }).set("bus", "scsi0.0"),
                Bus::Sata => {
                    port += 1;
                    let kind = if cdrom { "ide-cd" } else { "ide-hd" };
                    Value::new(kind).set("bus", format!("ide.{}", port - 1))
                }
                // The device has no default for its serial number.
                Bus::Nvme => Value::new("nvme").set("serial", &id),
            };
            args.value("-device", device.set("id", &id).set("drive", &id).set("bootindex", (n + 1).to_string()));
        }
    }

    fn drive(&self, disk: &Disk, id: &str) -> Value {
        let driver = |path: &Path| if is_block_device(path) { "host_device" } else { "file" };
        let path = self.absolute(disk.path.get_ref());
        let mut drive = Value::new("").set("if", "none").set("id", id).set("format", disk.format.word());
        if disk.is_read_only() {
            drive = drive.set("readonly", "on");
        }
        drive = drive.set("file.driver", driver(&path)).set("file.filename", &path);
        if let Some(backing) = &disk.backing {
            let backing = backing.get_ref();
            let path = self.absolute(backing.path.get_ref());
            drive = drive.set("backing.driver", backing.format.word());
            drive = drive.set("backing.file.driver", driver(&path)).set("backing.file.filename", &path);
        }
        drive
    }

    fn networks(&self, args: &mut Arguments, name: &str) {
        for (n, network) in self.keys.network.iter().enumerate() {
            let Network { kind, mac, tap, forward } = network.get_ref();
            let id = format!("net{n}");
            let backend = match (kind, tap) {
                (NetworkKind::User, _) => {
                    let user = Value::new("user").set("id", &id);
                    forward.iter().fold(user, |user, forward| user.set("hostfwd", forward.get_ref()))
                }
                (NetworkKind::Tap, Some(tap)) => {
                    let tap = Value::new("tap").set("id", &id).set("ifname", tap.get_ref());
                    tap.set("script", "no").set("downscript", "no")
                }
                (NetworkKind::Tap | NetworkKind::None, _) => continue,
            };
            args.value("-netdev", backend);
            let mac = mac.as_ref().map_or_else(|| own_mac(name, n), |mac| mac.get_ref().clone());
            let device = Value::new(format!("virtio-net-{}", self.keys.machine.bus())).set("id", &id);
            let device = device.set("netdev", &id).set("mac", mac);
            args.value(
                "-device",
                match self.keys.machine {
                    // No ROM: nothing is started from the network.
                    Machine::Q35 => device.set("romfile", ""),
                    Machine::Microvm => device,
                },
            );
        }
    }

    fn console(&self, args: &mut Arguments, console: &Console) {
        let mut chardev = match console.kind {
            ConsoleKind::None => return,
            ConsoleKind::Stdio => Value::new("stdio"),
            ConsoleKind::File => Value::new("file"),
            ConsoleKind::Socket => Value::new("socket"),
        };
        chardev = chardev.set("id", "console");
        if let Some(path) = &console.path {
            chardev = chardev.set("path", self.absolute(path.get_ref()));
        }
        chardev = match console.kind {
            ConsoleKind::File => chardev.set("append", "on"),
            ConsoleKind::Socket => chardev.set("server", "on").set("wait", "off"),
            ConsoleKind::None | ConsoleKind::Stdio => chardev,
        };
        if let Some(log) = &console.log {
            chardev = chardev.set("logfile", self.absolute(log.get_ref())).set("logappend", "on");
        }
        args.value("-chardev", chardev);
        args.text("-serial", "chardev:console");
    }

    fn vsock(&self) -> VsockWish {
        let Some(vsock) = self.keys.vsock.as_ref().map(toml::Spanned::get_ref) else { return VsockWish::default() };
        let cid = vsock.cid.as_ref().map(|cid| *cid.get_ref());
        match vsock.kind {
            VsockKind::Auto => VsockWish::Where { cid },
            VsockKind::Vhost => VsockWish::Must { cid },
            VsockKind::VhostUser | VsockKind::Off => VsockWish::Off,
        }
    }
}

impl Disk {
    /// Its id: by its place where it has none.
    pub(super) fn id(&self, place: usize) -> String {
        self.id.as_ref().map_or_else(|| format!("disk{place}"), |id| id.get_ref().clone())
    }

    pub(super) fn bus(&self) -> Bus {
        let default = if self.cdrom { Bus::Sata } else { Bus::VirtioBlk };
        self.bus.as_ref().map_or(default, |bus| *bus.get_ref())
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only || self.cdrom
    }
}

/// A MAC address for a VM: the same each time, and another one for each VM.
fn own_mac(name: &str, n: usize) -> String {
    let hash = sha256(&[b"onequote.mac.v1", name.as_bytes(), &[0], &n.to_le_bytes()]);
    let [a, b, c, ..] = hash.0;
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}
