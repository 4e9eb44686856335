//! The bodies of events, one type a kind.

use minicbor::{Decode, Encode};

use crate::{
    digest::FileDigest,
    id::{BootId, Epoch, HostId, Sha256},
    pcr::RegisterValue,
};

macro_rules! bodies {
    ($($(#[$meta:meta])* pub struct $name:ident { $($fields:tt)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
            #[cfg_attr(feature = "json", derive(serde::Serialize))]
            #[cbor(map)]
            pub struct $name { $($fields)* }
        )*
    };
}

macro_rules! words {
    ($($(#[$meta:meta])* pub enum $name:ident { $($(#[$vdoc:meta])* $variant:ident = $n:literal $word:literal,)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
            #[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize))]
            #[cbor(index_only)]
            pub enum $name {
                $($(#[$vdoc])* #[n($n)] #[cfg_attr(feature = "json", serde(rename = $word))] $variant,)*
            }

            impl $name {
                /// The word for it, as in logs, policies and APIs.
                #[must_use]
                pub fn word(self) -> &'static str {
                    match self { $(Self::$variant => $word,)* }
                }
            }

            impl std::fmt::Display for $name {
                fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str(self.word())
                }
            }
        )*
    };
}

words! {
    /// How deep the proxy stands between people and a VM.
    pub enum Depth {
        /// Measured before it ran; the proxy let it run.
        Gate = 0 "gate",
        /// Already running when the proxy first saw it.
        Observe = 1 "observe",
    }

    /// What a measured part of a VM's start is for.
    pub enum Role {
        /// The program that runs the VM.
        QemuBinary = 0 "qemu-binary",
        /// QEMU's argument vector; the digest is SHA-256 of the arguments, each ended by NUL.
        Arguments = 1 "arguments",
        /// A file that the argument vector names and that is none of the other roles.
        ArgumentFile = 2 "argument-file",
        /// The kernel QEMU loads.
        Kernel = 3 "kernel",
        /// The initial RAM disk QEMU loads.
        Initrd = 4 "initrd",
        /// The kernel's command line; the digest is SHA-256 of its bytes without NUL.
        KernelCmdline = 5 "kernel-cmdline",
        /// Firmware given by `-bios` or the machine's default.
        Firmware = 6 "firmware",
    }

    /// Why a QEMU process ended.
    pub enum StopCause {
        /// The guest powered off.
        GuestShutdown = 0 "guest-shutdown",
        /// Somebody told QEMU to end.
        HostShutdown = 1 "host-shutdown",
        /// The monitor ended without a word: killed or crashed.
        Lost = 2 "lost",
        /// The process was found gone after the proxy had not been watching.
        Unwatched = 3 "unwatched",
    }

    /// Why the log does not cover everything.
    pub enum GapReason {
        /// The registers hold what no part of the log explains: somebody else extended them.
        ForeignExtend = 0 "foreign-extend",
        /// The log on disk is damaged before the registers' values.
        LogDamaged = 1 "log-damaged",
        /// The proxy was not running while VMs were.
        ProxyDown = 2 "proxy-down",
        /// A VM's monitor connection was lost and found again.
        MonitorLost = 3 "monitor-lost",
    }
}

bodies! {
    /// The proxy began to write: always the first event of an epoch, and again at each start of the proxy.
    pub struct ProxyStart {
        /// The host.
        #[n(0)] pub host: HostId,
        /// The epoch that this record belongs to.
        #[n(1)] pub epoch: Epoch,
        /// The host kernel's boot id.
        #[n(2)] pub boot_id: BootId,
        /// The proxy's version.
        #[n(3)] pub version: String,
        /// The proxy's own binary, as it found it on disk. The host's IMA list is what proves it.
        #[n(4)] pub binary: Option<FileDigest>,
        /// *History*: the values of both registers in every active bank before this record.
        #[n(5)] pub history: Vec<RegisterValue>,
        /// The register for VM life cycle.
        #[n(6)] pub pcr_vm: u8,
        /// The register for guest run time.
        #[n(7)] pub pcr_guest: u8,
        /// The TPM's count of resets when this was written. It stays the same in an epoch: registers begin anew with
        /// each reset, and the log with them.
        #[n(8)] pub reset_count: u32,
        /// The TPM's count of restarts and resumes since then. It may grow in an epoch: registers outlive a suspend.
        #[n(9)] pub restart_count: u32,
    }

    /// A VM was found or launched.
    pub struct VmCreate {
        /// The VM's name on this host.
        #[n(0)] pub name: String,
        /// QEMU's process id.
        #[n(1)] pub pid: u32,
        /// How it is watched.
        #[n(2)] pub depth: Depth,
        /// Whether the UUID is QEMU's own; otherwise it was derived from host id and name.
        #[n(3)] pub uuid_given: bool,
        /// QEMU's version, `major.minor.micro`.
        #[n(4)] pub qemu: String,
        /// The machine type as QEMU names it.
        #[n(5)] pub machine: String,
        /// Main memory in bytes.
        #[n(6)] pub memory: u64,
        /// Virtual processors.
        #[n(7)] pub cpus: u32,
        /// The accelerator: `kvm` or `tcg`.
        #[n(8)] pub accelerator: String,
        /// The guest's vsock CID, where QEMU knows it.
        #[n(9)] pub guest_cid: Option<u64>,
        /// Devices, as `id:type`, in ascending order.
        #[n(10)] pub devices: Vec<String>,
    }

    /// One measured part of a VM's start that is not a disk image.
    pub struct Component {
        /// What it is for.
        #[n(0)] pub role: Role,
        /// The file's absolute path, or empty.
        #[n(1)] pub path: String,
        /// Size in bytes.
        #[n(2)] pub size: u64,
        /// Its digest.
        #[n(3)] pub digest: FileDigest,
        /// The measured text itself, where it is text: command line and arguments.
        #[n(4)] pub text: Option<String>,
    }

    /// One block node that is a file.
    pub struct Image {
        /// Where it is used, the same at each start: the name of the drive or device and its place in the chain,
        /// `disk0` for the top, `disk0/1` for its backing file, and so on. `data` files end in `+data`.
        #[n(0)] pub slot: String,
        /// The file's absolute path.
        #[n(1)] pub path: String,
        /// QEMU's format driver: `raw`, `qcow2`, …
        #[n(2)] pub format: String,
        /// Whether QEMU may not write it.
        #[n(3)] pub read_only: bool,
        /// Size of the file in bytes.
        #[n(4)] pub size: u64,
        /// Its digest.
        #[n(5)] pub digest: FileDigest,
    }

    /// Everything that a VM starts from, measured before it ran.
    pub struct VmStart {
        /// Parts that are not disk images.
        #[n(0)] pub components: Vec<Component>,
        /// Every file of every block chain.
        #[n(1)] pub images: Vec<Image>,
    }

    /// The same, measured while the VM already ran: it may have run from something else.
    pub struct VmAttach {
        /// Parts that are not disk images.
        #[n(0)] pub components: Vec<Component>,
        /// Every file of every block chain.
        #[n(1)] pub images: Vec<Image>,
        /// Whether this session was measured before (the proxy restarted, or its monitor was lost and found).
        #[n(2)] pub again: bool,
    }

    /// A VM was not let run.
    pub struct VmRefuse {
        /// Why, for people.
        #[n(0)] pub reason: String,
        /// The part that was missing or wrong: a role or an image's slot. Empty when it is neither.
        #[n(1)] pub item: String,
    }

    /// The VM's processors stopped.
    pub struct VmPause {
        /// QEMU's run state.
        #[n(0)] pub run_state: String,
    }

    /// The VM's processors run (again).
    pub struct VmResume {
        /// QEMU's run state.
        #[n(0)] pub run_state: String,
    }

    /// The VM was reset; its guest begins a new boot.
    pub struct VmReset {
        /// Whether the guest asked for it.
        #[n(0)] pub by_guest: bool,
        /// QEMU's reason.
        #[n(1)] pub reason: String,
    }

    /// The QEMU process ended. The digests are what the next start is held against.
    pub struct VmStop {
        /// Why.
        #[n(0)] pub cause: StopCause,
        /// Every writable image as it was left.
        #[n(1)] pub images: Vec<Image>,
        /// Writable images that could not be measured: slot and error.
        #[n(2)] pub unmeasured: Vec<String>,
    }

    /// Something about a VM is not as it was measured.
    pub struct ConfigChange {
        /// What: `image`, `device`, …
        #[n(0)] pub what: String,
        /// As it was, for people; empty when it is new.
        #[n(1)] pub before: String,
        /// As it is, for people; empty when it is gone.
        #[n(2)] pub after: String,
        /// Images that are new or other than they were.
        #[n(3)] pub images: Vec<Image>,
    }

    /// A QEMU process that the proxy does not manage.
    pub struct UnmanagedVm {
        /// Its process id.
        #[n(0)] pub pid: u32,
        /// Its program's path.
        #[n(1)] pub program: String,
        /// Its arguments, joined by spaces, cut at 1,024 bytes.
        #[n(2)] pub arguments: String,
    }

    /// The log does not cover everything.
    pub struct LogGap {
        /// Why.
        #[n(0)] pub reason: GapReason,
        /// For people: what was found, what was measured again, where the old log is.
        #[n(1)] pub detail: String,
    }

    /// A guest's shim connected.
    pub struct GuestHello {
        /// Which boot of this session, from 0.
        #[n(0)] pub boot: u32,
        /// The boot id that the guest claims.
        #[n(1)] pub boot_id: BootId,
        /// Size of the template hash in the guest's list, in bytes.
        #[n(2)] pub hash_size: u32,
        /// Entries that the host held before.
        #[n(3)] pub count: u64,
    }

    /// Entries of a guest's IMA list arrived.
    pub struct GuestEntries {
        /// Which boot of this session, from 0.
        #[n(0)] pub boot: u32,
        /// Index of the first of them.
        #[n(1)] pub first: u64,
        /// How many.
        #[n(2)] pub count: u64,
        /// The virtual PCR 10 after them.
        #[n(3)] pub aggregate: Sha256,
    }

    /// A guest's connection was lost.
    pub struct GuestLost {
        /// Which boot of this session, from 0.
        #[n(0)] pub boot: u32,
        /// Why, for people.
        #[n(1)] pub reason: String,
        /// Entries that the host holds.
        #[n(2)] pub count: u64,
    }

    /// A guest claimed another past than the one it had told. Nothing more is taken in that boot.
    pub struct GuestRewind {
        /// Which boot of this session, from 0.
        #[n(0)] pub boot: u32,
        /// Entries that the host holds.
        #[n(1)] pub count: u64,
        /// Their aggregate.
        #[n(2)] pub aggregate: Sha256,
        /// Entries that the guest claims, at most `count`.
        #[n(3)] pub claimed_count: u64,
        /// The aggregate that the guest claims.
        #[n(4)] pub claimed: Sha256,
        /// The boot id that the guest claims.
        #[n(5)] pub boot_id: BootId,
    }

    /// A guest went over a limit. Nothing more is taken in that boot.
    pub struct GuestOverflow {
        /// Which boot of this session, from 0.
        #[n(0)] pub boot: u32,
        /// Entries that the host holds.
        #[n(1)] pub count: u64,
        /// The limit, for people.
        #[n(2)] pub limit: String,
    }
}
