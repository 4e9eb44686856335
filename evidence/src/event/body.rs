//! The bodies of events, one type a kind.

use minicbor::{Decode, Encode};

use crate::{
    cbor::at_most,
    digest::FileDigest,
    id::{BootId, Epoch, HostId, Sha256},
    pcr::{MAX_REGISTERS, RegisterValue},
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
        /// Measured before it ran, and every command to its monitor passes the proxy.
        Intercept = 2 "intercept",
    }

    /// What the guest's memory, before the guest ran, says about a part that was measured as a file.
    pub enum MemoryCheck {
        /// Memory holds what the file holds.
        Equal = 0 "equal",
        /// Memory holds something else.
        Differs = 1 "differs",
        /// QEMU hands the part over only later, or where is not known, so that memory cannot show it.
        Hidden = 2 "hidden",
    }

    /// Why a VM was not let run.
    pub enum RefuseCause {
        /// A part could not be measured.
        Unmeasurable = 0 "unmeasurable",
        /// A part is not one of the host's references.
        Reference = 1 "reference",
        /// Memory holds something else than the file that was measured.
        LoadedDiffers = 2 "loaded-differs",
        /// The VM was changed between its measurement and its start.
        Changed = 3 "changed",
        /// Another VM with the same UUID is there.
        Duplicate = 4 "duplicate",
        /// The measurement could not be logged.
        Log = 5 "log",
        /// Somebody else let it run before it was measured and logged.
        Continued = 6 "continued",
        /// Who answers at the monitor is not the QEMU process that it seems to be.
        Impostor = 7 "impostor",
    }

    /// What became of a guest that did not end by itself.
    pub enum CrashCause {
        /// The guest's kernel panicked and told QEMU.
        GuestPanic = 0 "guest-panic",
        /// The guest did not serve its watchdog.
        Watchdog = 1 "watchdog",
        /// QEMU stopped the guest over an error of its own or of the accelerator.
        InternalError = 2 "internal-error",
        /// The host's memory under the guest failed.
        MemoryFailure = 3 "memory-failure",
    }

    /// How far a migration has come.
    pub enum MigrationStatus {
        /// It began.
        Started = 0 "started",
        /// All state has gone over.
        Completed = 1 "completed",
        /// It failed; the VM stays where it was.
        Failed = 2 "failed",
        /// Somebody ended it; the VM stays where it was.
        Cancelled = 3 "cancelled",
    }

    /// What became of a command to a monitor.
    pub enum CommandOutcome {
        /// It was measured and logged, and then handed to QEMU.
        Forwarded = 0 "forwarded",
        /// The configuration forbids it.
        Refused = 1 "refused",
        /// A file that it names could not be measured; it was not handed to QEMU.
        Unmeasurable = 2 "unmeasurable",
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
        /// Firmware given by `-bios` or the machine's default, and option ROMs that machine and devices bring.
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

    /// How much of an image was read for its digest.
    pub enum HowRead {
        /// All of it.
        Full = 0 "full",
        /// What QEMU said had changed since the digest before, on top of that digest's tree.
        Changed = 1 "changed",
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
        /// The TPM's registers began anew, but the host's kernel is the same.
        TpmReset = 4 "tpm-reset",
        /// The host's kernel is another one, but the TPM's registers go on.
        Kexec = 5 "kexec",
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
        #[cbor(n(5), decode_with = "at_most::<MAX_REGISTERS, _, _>")] pub history: Vec<RegisterValue>,
        /// The register for VM life cycle.
        #[n(6)] pub pcr_vm: u8,
        /// The register for guest run time.
        #[n(7)] pub pcr_guest: u8,
        /// The TPM's count of resets when this was written. It stays the same in an epoch: registers begin anew with
        /// each reset, and the log with them.
        #[n(8)] pub reset_count: u32,
        /// The TPM's count of restarts and resumes since then. It may grow in an epoch: registers outlive a suspend.
        #[n(9)] pub restart_count: u32,
        /// Where the binary is, as the host's kernel shows it: ` (deleted)` at its end when it was replaced since.
        #[n(10)] pub path: Option<String>,
    }

    /// The log goes on in a new file. Alone in its record, which is the first of that file: who has the log from there on
    /// knows whose it is and what the registers held, and replays the rest.
    pub struct LogSegment {
        /// Which segment of the epoch this is. The one that `proxy-start` begins is 0.
        #[n(0)] pub number: u64,
        /// The `proxy-start` that the epoch's log began with.
        #[n(1)] pub start: ProxyStart,
        /// The values of both registers in every active bank before this record.
        #[cbor(n(2), decode_with = "at_most::<MAX_REGISTERS, _, _>")] pub registers: Vec<RegisterValue>,
        /// SHA-256 of the proxy's own snapshot of what the records before say, kept beside the file.
        #[n(3)] pub snapshot: Sha256,
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
        /// The accelerator: `kvm`, `tcg`, or another one by QEMU's name for it.
        #[n(8)] pub accelerator: String,
        /// The guest's vsock CID, where QEMU knows it.
        #[n(9)] pub guest_cid: Option<u64>,
        /// Devices, as `id:type`, in ascending order.
        #[n(10)] pub devices: Vec<String>,
        /// Other ways to command this QEMU: monitors and debuggers, in words, in ascending order.
        #[n(11)] pub monitors: Vec<String>,
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
        /// What memory says about it; none for what QEMU does not load into the guest's memory, and when the guest ran
        /// already.
        #[n(5)] pub memory: Option<MemoryCheck>,
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
        /// The same in a word.
        #[n(2)] pub cause: RefuseCause,
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
        /// How the digests were made, of images of which QEMU was to say what the run changed. All others were read
        /// whole.
        #[n(3)] pub read: Vec<ImageRead>,
    }

    /// How the digest of one image was made at the end of a run.
    pub struct ImageRead {
        /// The image's slot.
        #[n(0)] pub slot: String,
        /// How much was read.
        #[n(1)] pub how: HowRead,
        /// Bytes that were read; with `full` the image's size.
        #[n(2)] pub bytes: u64,
        /// Why all of it was read; empty with `changed`.
        #[n(3)] pub why: String,
    }

    /// The guest did not end by itself. QEMU may live on; its end is a `vm-stop`.
    pub struct VmCrash {
        /// Why.
        #[n(0)] pub cause: CrashCause,
        /// What QEMU says of it, and what it did: `pause`, `reset`, `poweroff`, …
        #[n(1)] pub detail: String,
    }

    /// The operator says that the VM will not come back. Its session is the last one.
    pub struct VmDelete {
        /// The VM's name on this host.
        #[n(0)] pub name: String,
        /// Every image that it could write, as it is now.
        #[n(1)] pub images: Vec<Image>,
        /// Those that could not be measured: slot and error.
        #[n(2)] pub unmeasured: Vec<String>,
    }

    /// A removable medium was changed.
    pub struct MediumChange {
        /// The drive's slot.
        #[n(0)] pub slot: String,
        /// As it was, for people; empty when the drive was empty.
        #[n(1)] pub before: String,
        /// As it is, for people; empty when the drive is empty.
        #[n(2)] pub after: String,
        /// Images that came with it.
        #[n(3)] pub images: Vec<Image>,
    }

    /// The VM's state was saved inside its images.
    pub struct SnapshotSave {
        /// The snapshot's tag; empty when QEMU does not tell.
        #[n(0)] pub tag: String,
        /// Images that hold it, as they are now.
        #[n(1)] pub images: Vec<Image>,
    }

    /// The VM went back to a state saved before: guest and writable images are what they were then.
    pub struct SnapshotLoad {
        /// The snapshot's tag; empty when QEMU does not tell.
        #[n(0)] pub tag: String,
        /// Its writable images, as they are now.
        #[n(1)] pub images: Vec<Image>,
    }

    /// The VM's state goes to another QEMU, or to a file.
    pub struct MigrateOut {
        /// How far it is.
        #[n(0)] pub status: MigrationStatus,
        /// Where to, as far as it is known; else empty.
        #[n(1)] pub target: String,
        /// When it is completed: every writable image as this QEMU left it.
        #[n(2)] pub images: Vec<Image>,
        /// Writable images that could not be measured: slot and error.
        #[n(3)] pub unmeasured: Vec<String>,
    }

    /// The VM's state comes from another QEMU, or from a file: what it runs was not started here.
    pub struct MigrateIn {
        /// How far it is.
        #[n(0)] pub status: MigrationStatus,
        /// Where from, as far as it is known; else empty.
        #[n(1)] pub source: String,
    }

    /// A management tool's command to the VM's monitor that passed the proxy and was not known to be read-only.
    pub struct MonitorCommand {
        /// Who gave it: the client's number at this monitor, its process id and program.
        #[n(0)] pub client: String,
        /// The command.
        #[n(1)] pub command: String,
        /// Its arguments as JSON, passwords and other secrets left out, cut at 4,096 bytes.
        #[n(2)] pub arguments: String,
        /// SHA-256 of the same, not cut.
        #[n(3)] pub digest: Sha256,
        /// What became of it.
        #[n(4)] pub outcome: CommandOutcome,
        /// Why it was not forwarded; else empty.
        #[n(5)] pub detail: String,
        /// Files that it names, measured before it was forwarded.
        #[n(6)] pub files: Vec<Component>,
    }

    /// Something about a VM is not as it was measured.
    pub struct ConfigChange {
        /// What: `image`, `device`, …; all words are in `docs/operations.md`.
        #[n(0)] pub what: String,
        /// As it was, for people; empty when it is new.
        #[n(1)] pub before: String,
        /// As it is, for people; empty when it is gone.
        #[n(2)] pub after: String,
        /// Images that are new or other than they were; with an empty `after` those that went, as they were left.
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
