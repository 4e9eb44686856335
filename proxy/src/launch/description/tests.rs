#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, os::unix::net::UnixListener, process::Command};

use super::{super::*, *};

/// A folder with the files that descriptions name.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        for name in ["vmlinux", "initrd", "bios", "code", "vars", "disk.img", "b,ase.qcow2", "overlay.qcow2", "x.iso"] {
            fs::write(folder.path(name), "x").unwrap();
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, text: &str) -> Result<Description, DescriptionError> {
        let path = self.path("web1.toml");
        fs::write(&path, text).unwrap();
        Description::read(&path)
    }

    fn plan(&self, text: &str, host: &HostVsock) -> Result<Planned, LaunchError> {
        let description = self.read(text)?;
        Launch::described(&description, None, "/run/o/vms".into(), host.clone())?.plan()
    }

    /// The words after QEMU's name, with the folder's name left out of paths.
    fn words(&self, text: &str) -> Vec<String> {
        let planned = self.plan(text, &without_vsock()).unwrap();
        let folder = format!("{}/", self.0.path().display());
        planned.command.iter().skip(1).map(|w| w.to_str().unwrap().replace(&folder, "")).collect()
    }

    fn error(&self, text: &str) -> String {
        let error = self.plan(text, &without_vsock()).expect_err(text).to_string();
        assert!(error.contains("web1.toml"), "{error}");
        error
    }
}

fn without_vsock() -> HostVsock {
    HostVsock { device: false, taken: Ok(TakenCids::new()) }
}

const LEAST: &str = "memory = \"64M\"\naccelerator = \"tcg\"\n";

fn after<'a>(words: &'a [String], option: &str) -> Vec<&'a str> {
    words.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
}

#[test]
fn the_least_there_can_be() {
    let folder = Folder::new();
    assert_eq!(
        folder.words(LEAST).join(" "),
        "-machine q35,accel=tcg,graphics=off -cpu max -smp 1 -m 64M -nodefaults -no-user-config -display none \
         -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -S \
         -qmp unix:/run/o/vms/web1.qmp,server=on,wait=off -name web1"
    );
}

#[test]
fn everything_there_is() {
    let folder = Folder::new();
    let socket = folder.path("vhost.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let words = folder.words(
        r#"
name = "web"
uuid = "6f0c3a52-93ad-4e4c-8f3e-55ad1e3cbb10"
memory = "2G"
cpus = 4
machine = "q35"
accelerator = "tcg"
cpu = "Nehalem"
qemu = "./qemu"
kernel = "vmlinux"
initrd = "./initrd"
cmdline = "console=ttyS0 a=b,c  d"
sandbox = false
arguments = ["-device", "virtio-rng-pci"]

[firmware]
code = "code"
vars = "vars"

[[disk]]
id = "root"
path = "overlay.qcow2"
format = "qcow2"
backing = { path = "b,ase.qcow2", format = "raw" }

[[disk]]
path = "disk.img"
format = "raw"
read_only = true
bus = "virtio-scsi"

[[disk]]
path = "x.iso"
format = "raw"
cdrom = true

[[disk]]
path = "initrd"
format = "raw"
bus = "nvme"

[[network]]
type = "user"
forward = ["tcp:127.0.0.1:2222-:22"]

[[network]]
type = "tap"
tap = "tap0"
mac = "52:54:00:00:00:01"

[vsock]
type = "vhost-user"
socket = "vhost.sock"

[console]
type = "socket"
path = "console.sock"
log = "console.log"
"#,
    );
    assert_eq!(words[0..2], ["-machine", "q35,accel=tcg,graphics=off,memory-backend=mem0"]);
    assert_eq!(after(&words, "-object"), ["memory-backend-memfd,id=mem0,size=2G,share=on"]);
    for (option, value) in [
        ("-cpu", "Nehalem"),
        ("-smp", "4"),
        ("-m", "2G"),
        ("-uuid", "6f0c3a52-93ad-4e4c-8f3e-55ad1e3cbb10"),
        ("-kernel", "vmlinux"),
        ("-initrd", "initrd"),
        ("-append", "console=ttyS0 a=b,c  d"),
        ("-serial", "chardev:console"),
        ("-name", "web"),
    ] {
        assert_eq!(after(&words, option), [value]);
    }
    assert_eq!(
        after(&words, "-drive"),
        [
            "if=pflash,unit=0,id=firmware,format=raw,readonly=on,file.driver=file,file.filename=code",
            "if=pflash,unit=1,id=vars,format=raw,file.driver=file,file.filename=vars",
            "if=none,id=root,format=qcow2,file.driver=file,file.filename=overlay.qcow2,backing.driver=raw,\
             backing.file.driver=file,backing.file.filename=b,,ase.qcow2",
            "if=none,id=disk1,format=raw,readonly=on,file.driver=file,file.filename=disk.img",
            "if=none,id=disk2,format=raw,readonly=on,file.driver=file,file.filename=x.iso",
            "if=none,id=disk3,format=raw,file.driver=file,file.filename=initrd",
        ]
    );
    let devices = after(&words, "-device");
    assert_eq!(
        devices[..5],
        [
            "virtio-scsi-pci,id=scsi0",
            "virtio-blk-pci,id=root,drive=root,bootindex=1",
            "scsi-hd,bus=scsi0.0,id=disk1,drive=disk1,bootindex=2",
            "ide-cd,bus=ide.0,id=disk2,drive=disk2,bootindex=3",
            "nvme,serial=disk3,id=disk3,drive=disk3,bootindex=4",
        ]
    );
    assert!(devices[5].starts_with("virtio-net-pci,id=net0,netdev=net0,mac=52:54:00:"), "{devices:?}");
    assert_eq!(
        devices[6..],
        [
            "virtio-net-pci,id=net1,netdev=net1,mac=52:54:00:00:00:01,romfile=",
            "vhost-user-vsock-pci,id=vsock0,chardev=vsock0",
            "virtio-rng-pci",
        ]
    );
    let taps = ["user,id=net0,hostfwd=tcp:127.0.0.1:2222-:22", "tap,id=net1,ifname=tap0,script=no,downscript=no"];
    assert_eq!(after(&words, "-netdev"), taps);
    assert_eq!(
        after(&words, "-chardev"),
        [
            "socket,id=vsock0,path=vhost.sock",
            "socket,id=console,path=console.sock,server=on,wait=off,logfile=console.log,logappend=on",
        ]
    );
    assert!(!words.contains(&"-sandbox".to_owned()));
}

#[test]
fn a_microvm_has_devices_of_its_own() {
    let folder = Folder::new();
    let text = format!(
        "{LEAST}machine = \"microvm\"\n[firmware]\nbios = \"bios\"\n[[disk]]\npath = \"disk.img\"\nformat = \"raw\"\n\
         [[network]]\ntype = \"user\"\nmac = \"52:54:00:00:00:01\"\n[vsock]\ncid = 77\n"
    );
    let host = HostVsock { device: true, taken: Ok(TakenCids::new()) };
    let planned = folder.plan(&text, &host).unwrap();
    let line = planned.command_line();
    for part in [
        "-machine microvm,accel=tcg,acpi=on",
        "-device virtio-blk-device,id=disk0,drive=disk0,bootindex=1",
        "-device virtio-net-device,id=net0,netdev=net0,mac=52:54:00:00:00:01 ",
        "-device vhost-vsock-device,guest-cid=77",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let folder_name = folder.0.path().display().to_string();
    assert!(line.starts_with(&format!("cd {folder_name} && qemu-system-x86_64 ")), "{line}");
    assert!(line.contains(&format!("-bios {folder_name}/bios ")), "{line}");
}

#[test]
fn a_shell_reads_the_line_as_it_is_meant() {
    let folder = Folder::new();
    let odd = r#"a 'b' "c" $HOME `d` \ !x *? ~ # ;&|<>(){}[] =é"#;
    let at = format!("it's $HOME, {}", "{a,b}*");
    fs::create_dir(folder.path(&at)).unwrap();
    fs::write(folder.path(&at).join("vmlinux"), "x").unwrap();
    let path = folder.path(&at).join("web.toml");
    let text = format!("{LEAST}kernel = \"vmlinux\"\ncmdline = '''{odd}'''\narguments = [\"\", \"~\", \"a\\nb\"]\n");
    fs::write(&path, text).unwrap();
    let description = Description::read(&path).unwrap();
    let launch = Launch::described(&description, None, "/run/o/vms".into(), without_vsock()).unwrap();
    let mut planned = launch.plan().unwrap();
    // The shell shows where it is and what it was given.
    let show = folder.path("show");
    fs::write(&show, "#!/bin/sh\npwd; for word; do printf '%s\\0' \"$word\"; done\n").unwrap();
    let meant = planned.command.split_off(1);
    planned.command = vec!["sh".into(), show.into()];
    planned.command.extend(meant.clone());
    let done = Command::new("sh").arg("-c").arg(planned.command_line()).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    let said = String::from_utf8(done.stdout).unwrap();
    let (dir, words) = said.split_once('\n').unwrap();
    assert_eq!(dir, folder.path(&at).to_str().unwrap());
    let words: Vec<_> = words.strip_suffix('\0').unwrap().split('\0').collect();
    assert_eq!(words, meant.iter().map(|w| w.to_str().unwrap()).collect::<Vec<_>>());
    assert!(words.contains(&odd) && words.contains(&""));
}

#[test]
fn what_is_wrong_is_named_with_file_line_and_key() {
    let folder = Folder::new();
    let disk = "[[disk]]\npath = \"disk.img\"\nformat = \"raw\"\n";
    for (text, words) in [
        ("memroy = \"1G\"\n".to_owned(), vec!["line 1", "memroy", "memory"]),
        ("cpus = 1\n".to_owned(), vec!["memory"]),
        (format!("{LEAST}[firmware]\nbois = 1\n"), vec!["line 4", "bois"]),
        (format!("{LEAST}machine = \"pc\"\n"), vec!["line 3", "pc", "microvm"]),
        (format!("{LEAST}[[disk]]\npath = \"x\"\n"), vec!["format"]),
        (format!("{LEAST}{disk}size = 1\n"), vec!["line 6", "size"]),
        ("memory = \"64\"\n".to_owned(), vec!["line 1", "memory", "64", "512M"]),
        ("memory = \"0M\"\n".to_owned(), vec!["line 1", "memory"]),
        ("memory = \"99999999999999T\"\n".to_owned(), vec!["line 1", "memory"]),
        (format!("{LEAST}name = \"a/b\"\n"), vec!["line 3", "name", "a/b"]),
        (format!("{LEAST}uuid = \"web\"\n"), vec!["line 3", "uuid", "web"]),
        (format!("{LEAST}cpus = 0\n"), vec!["line 3", "cpus"]),
        (format!("{LEAST}kernel = \"nowhere\"\n"), vec!["line 3", "kernel", "nowhere", "not there"]),
        (format!("{LEAST}kernel = \".\"\n"), vec!["line 3", "kernel", "no file"]),
        (format!("{LEAST}initrd = \"initrd\"\n"), vec!["line 3", "initrd", "kernel"]),
        (format!("{LEAST}cmdline = \"x\"\n"), vec!["line 3", "cmdline", "kernel"]),
        (format!("{LEAST}[firmware]\ncode = \"code\"\n"), vec!["line 4", "firmware.code", "vars"]),
        (format!("{LEAST}[firmware]\nbios = \"bios\"\nvars = \"vars\"\n"), vec!["line 4", "firmware.bios"]),
        (format!("{LEAST}\n{disk}{disk}"), vec!["line 8", "disk.path", "two disks write"]),
        (
            format!("{LEAST}{disk}id = \"a\"\n[[disk]]\npath = \"x.iso\"\nformat = \"raw\"\nid = \"a\"\n"),
            vec!["line 10", "disk.id", "\"a\"", "two disks"],
        ),
        (format!("{LEAST}{disk}id = \"0\"\n"), vec!["line 6", "disk.id"]),
        (format!("{LEAST}{disk}id = \"vars\"\n"), vec!["line 6", "disk.id", "vars"]),
        (format!("{LEAST}{disk}id = \"net0\"\n"), vec!["line 6", "disk.id", "net0"]),
        (format!("{LEAST}{disk}backing = {{ path = \"x.iso\", format = \"raw\" }}\n"), vec!["line 6", "disk.backing"]),
        (format!("{LEAST}machine = \"microvm\"\n{disk}bus = \"sata\"\n"), vec!["line 7", "disk.bus", "microvm"]),
        (format!("{LEAST}{disk}bus = \"virtio-blk\"\ncdrom = true\n"), vec!["line 6", "disk.bus", "CD-ROM"]),
        (format!("{LEAST}[[network]]\ntype = \"tap\"\n"), vec!["line 3", "network.tap"]),
        (format!("{LEAST}[[network]]\ntype = \"tap\"\ntap = \"a/b\"\n"), vec!["line 5", "network.tap", "a/b"]),
        (format!("{LEAST}[[network]]\ntype = \"user\"\nmac = \"01:00:00:00:00:00\"\n"), vec!["line 5", "network.mac"]),
        (format!("{LEAST}[vsock]\ncid = 2\n"), vec!["line 4", "vsock.cid"]),
        (format!("{LEAST}[vsock]\ntype = \"vhost-user\"\n"), vec!["line 3", "vsock.socket"]),
        (
            format!("{LEAST}[vsock]\ntype = \"vhost-user\"\nsocket = \"s\"\n"),
            vec!["line 5", "vsock.socket", "not there", "back end"],
        ),
        (format!("{LEAST}[console]\ntype = \"file\"\n"), vec!["line 3", "console.path"]),
        (
            format!("{LEAST}[console]\ntype = \"file\"\npath = \"no/such/c\"\n"),
            vec!["line 5", "console.path", "no/such"],
        ),
    ] {
        let error = folder.error(&text);
        for word in words {
            assert!(error.contains(word), "no {word:?} in {error:?} for\n{text}");
        }
    }
    let missing = Description::read(&folder.path("none.toml")).unwrap_err().to_string();
    assert!(missing.contains("none.toml"), "{missing}");
    fs::write(folder.path(" .toml"), LEAST).unwrap();
    let nameless = Description::read(&folder.path(" .toml")).unwrap_err().to_string();
    assert!(nameless.contains("name") && nameless.contains("\" \""), "{nameless}");
    fs::write(folder.path("long.toml"), "#".repeat(2 * 1024 * 1024)).unwrap();
    let long = Description::read(&folder.path("long.toml")).unwrap_err().to_string();
    assert!(long.contains("long.toml") && long.contains("1048576"), "{long}");
}

#[test]
fn names_are_taken_from_the_file_or_given_once() {
    let folder = Folder::new();
    let name = |text: &str, given: Option<&str>| {
        let description = folder.read(text).unwrap();
        let launch = Launch::described(&description, given.map(str::to_owned), "/r".into(), without_vsock());
        launch.and_then(|l| l.plan()).map(|p| p.name)
    };
    assert_eq!(name(LEAST, None).unwrap(), "web1");
    assert_eq!(name(LEAST, Some("db")).unwrap(), "db");
    let named = format!("{LEAST}name = \"web\"\n");
    assert_eq!(name(&named, Some("web")).unwrap(), "web");
    assert!(matches!(name(&named, Some("db")), Err(LaunchError::TwoNames(..))));
}

#[test]
fn arguments_that_hinder_measuring_are_refused() {
    let folder = Folder::new();
    let error = folder.plan(&format!("{LEAST}arguments = [\"-incoming\", \"defer\"]\n"), &without_vsock()).unwrap_err();
    assert!(matches!(error, LaunchError::Conflict(..)), "{error}");
}

#[test]
fn kvm_is_taken_where_it_works() {
    let folder = Folder::new();
    let works = try_accelerator("qemu-system-x86_64".as_ref(), "q35", "kvm", "host");
    let planned = folder.plan("memory = \"64M\"\n", &without_vsock()).unwrap();
    let kvm = folder.plan("memory = \"64M\"\naccelerator = \"kvm\"\n", &without_vsock());
    match works {
        Ok(()) => {
            assert!(planned.command_line().contains("accel=kvm") && planned.command_line().contains("-cpu host"));
            assert_eq!(planned, kvm.unwrap());
        }
        Err(why) => {
            assert!(planned.command_line().contains("accel=tcg"), "{}", planned.command_line());
            assert!(planned.notes[0].contains(&why), "{:?}", planned.notes);
            let error = kvm.unwrap_err().to_string();
            assert!(error.contains(&why) && error.contains("accelerator"), "{error}");
        }
    }
}
