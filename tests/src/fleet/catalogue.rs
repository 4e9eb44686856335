//! What runs in the fleet: a few kinds of VMs with their parts and images, the programs that their guests run, and the
//! policy that allows all of this and nothing else.

use std::{fmt::Write as _, sync::Arc};

use onequote_evidence::{
    digest::{FileDigest, HashAlg, sha256},
    event::{Component, Image, Role},
    id::Sha256,
    ima::{Aggregate, Entry},
};

/// Size of the template hash in the guests' lists: SHA-1, as kernels write it.
pub const HASH_SIZE: u32 = 20;

/// Kinds of VMs by name.
pub const KINDS: [&str; 4] = ["web", "db", "cache", "batch"];

/// Entries that a guest of any kind has when it is up.
const BOOT_ENTRIES: usize = 24;

/// An entry of an IMA list.
#[derive(Debug, Clone)]
pub struct Listed {
    /// As a kernel lists it.
    pub raw: Arc<[u8]>,
    /// What it extends a list's aggregate with.
    pub digest: Sha256,
}

/// Everything that there is.
pub struct Catalogue {
    /// Entries by number: first those that every guest begins with, then programs that guests may run, last programs
    /// that none may.
    pub entries: Vec<Listed>,
    /// How many of them may be run.
    pub allowed: usize,
    /// The list of every host's own kernel, PCR 10: its boot aggregate, then files.
    pub host: Vec<Listed>,
}

/// A number for this name that no other name has.
fn digest(name: &str) -> FileDigest {
    FileDigest::sha256(sha256(&[b"fleet ", name.as_bytes()]))
}

/// An `ima-ng` entry for a file with this SHA-256.
pub fn entry(path: &str, digest: &Sha256) -> Listed {
    let block = |bytes: &[u8]| [&(bytes.len() as u32).to_le_bytes(), bytes].concat();
    let data =
        [block(&[b"sha256:\0".as_slice(), digest.as_bytes()].concat()), block(&[path.as_bytes(), &[0]].concat())]
            .concat();
    let raw = [&10_u32.to_le_bytes(), HashAlg::Sha1.hash(&data).as_slice(), &block(b"ima-ng"), &block(&data)].concat();
    let digest = Entry::parse(&raw, HASH_SIZE as usize).map(|entry| Aggregate::digest(&entry)).unwrap_or(Sha256::ZERO);
    Listed { raw: raw.into(), digest }
}

fn program(n: usize) -> String {
    format!("/usr/bin/program-{n:05}")
}

impl Catalogue {
    /// A catalogue with so many programs that guests may run beyond those that they begin with.
    #[must_use]
    pub fn new(programs: usize) -> Self {
        let allowed = BOOT_ENTRIES + programs;
        let listed = |n: usize| entry(&program(n), &sha256(&[program(n).as_bytes()]));
        let forbidden = |n: usize| entry(&format!("/tmp/.x{n}"), &sha256(&[b"forbidden", &n.to_le_bytes()]));
        let host = |n: usize| entry(&host_program(n), &host_file(n).value);
        Self {
            entries: (0..allowed).map(listed).chain((0..64).map(forbidden)).collect(),
            allowed,
            host: std::iter::once(boot_aggregate()).chain((0..HOST_ENTRIES).map(host)).collect(),
        }
    }

    /// Numbers of the entries that every guest begins with.
    #[must_use]
    pub fn boot(&self) -> std::ops::Range<usize> {
        0..BOOT_ENTRIES.min(self.allowed)
    }

    /// The policy for every host.
    #[must_use]
    pub fn policy(&self) -> String {
        let mut text =
            format!("[host]\nsoftware_tpm = true\nproxy = [\"{}\"]\naccept_gaps = [\"proxy-down\"]\n", host_file(0));
        // The hosts have no firmware that measures.
        let _ = write!(text, "registers = {{ \"0\" = \"{}\" }}\n[host.ima]\n", Sha256::ZERO);
        for n in 0..HOST_ENTRIES {
            let _ = writeln!(text, "\"{}\" = [\"{}\"]", host_program(n), host_file(n));
        }
        for kind in KINDS {
            let _ = write!(
                text,
                "\n[[vm]]\nname = \"{kind}-*\"\nruntime = \"required\"\nmax_silence = 86400\n\
                 qemu = [\"{}\"]\nkernel = [\"{}\"]\ninitrd = [\"{}\"]\nkernel_cmdline = [\"{}\"]\n\
                 [vm.images]\ndisk0 = {{ digests = [\"{}\"], continuity = true }}\n[vm.ima]\n",
                host_file(1),
                digest("kernel"),
                digest(&format!("initrd {kind}")),
                command_line(kind),
                digest(&format!("disk {kind}")),
            );
            for n in 0..self.allowed {
                let _ = writeln!(text, "\"{}\" = [\"sha256:{}\"]", program(n), sha256(&[program(n).as_bytes()]));
            }
        }
        text
    }
}

/// Files in a host's own list: the proxy, QEMU, others.
const HOST_ENTRIES: usize = 64;

/// The proxy's program.
pub const PROXY: &str = "/usr/bin/onequote-proxy";
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

fn host_program(n: usize) -> String {
    match n {
        0 => PROXY.to_owned(),
        1 => QEMU.to_owned(),
        n => format!("/usr/sbin/host-{n:04}"),
    }
}

/// The digest of the n-th file in a host's list.
#[must_use]
pub fn host_file(n: usize) -> FileDigest {
    digest(&host_program(n))
}

/// Of registers that nobody extended: SHA-256 over PCR 0 to 9.
fn boot_aggregate() -> Listed {
    entry("boot_aggregate", &sha256(&[&[0; 320]]))
}

fn command_line(kind: &str) -> String {
    format!("console=ttyS0 kind={kind}")
}

/// What a VM of this kind starts from.
#[must_use]
pub fn components(kind: usize) -> Vec<Component> {
    let kind = KINDS[kind % KINDS.len()];
    let part = |role, path: &str, digest| Component {
        role,
        path: path.to_owned(),
        size: 1 << 20,
        digest,
        text: None,
        memory: None,
    };
    let line = command_line(kind);
    vec![
        part(Role::QemuBinary, QEMU, host_file(1)),
        part(Role::Kernel, "/var/lib/vm/vmlinuz", digest("kernel")),
        part(Role::Initrd, "/var/lib/vm/initrd", digest(&format!("initrd {kind}"))),
        Component {
            text: Some(line.clone()),
            ..part(Role::KernelCmdline, "", FileDigest::sha256(sha256(&[line.as_bytes()])))
        },
    ]
}

/// The image of a VM of this kind after so many changes.
#[must_use]
pub fn image(kind: usize, vm: &str, changes: u64) -> Image {
    let kind = KINDS[kind % KINDS.len()];
    let name = if changes == 0 { format!("disk {kind}") } else { format!("disk {kind} {vm} {changes}") };
    Image {
        slot: "disk0".to_owned(),
        path: format!("/var/lib/vm/{vm}.img"),
        format: "raw".to_owned(),
        read_only: false,
        size: 1 << 30,
        digest: digest(&name),
    }
}
