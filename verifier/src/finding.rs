//! Findings: what an appraisal found wrong, where, and what it means.
//!
//! Codes are stable: programs may rely on them. Each has one meaning, said here once for pages, tables and JSON.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($variant:ident = $code:literal, $class:ident, $meaning:literal, $advice:literal;)*) => {
        /// Everything that can be found wrong.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $(#[doc = $meaning] $variant,)*
        }

        impl Code {
            /// Every code, in the order in which appraisal can find them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The stable word for it.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $code,)* }
            }

            /// What it means, in a sentence.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }

            /// What to do about it, in a sentence.
            #[must_use]
            pub fn advice(self) -> &'static str {
                match self { $(Self::$variant => $advice,)* }
            }

            /// What it puts in question.
            #[must_use]
            pub fn class(self) -> Class {
                match self { $(Self::$variant => Class::$class,)* }
            }
        }
    };
}

/// What a finding puts in question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Whether the evidence is the host's, fresh and whole: nothing is learned from such evidence.
    Evidence,
    /// What really happened, although the evidence is the host's: it is whole, but shows that something was not seen.
    History,
    /// Whether what was measured is what the operator wants.
    Policy,
    /// Nothing: there is no newer evidence, or no rule to judge it by.
    Absence,
}

codes! {
    EvidenceMalformed = "evidence-malformed", Evidence,
        "The evidence does not have the form that it must have.",
        "Check that proxy and verifier are of the same release; otherwise treat the host as hostile.";
    HostMismatch = "host-mismatch", Evidence,
        "The evidence is that of another host.",
        "Check the URL of this host and the host_id in its proxy's configuration.";
    AkAttributes = "ak-attributes", Evidence,
        "The enrolled attestation key is not a restricted signing key that its TPM made and keeps.",
        "Make the key with the proxy's init command and enrol the host again.";
    SignatureMalformed = "signature-malformed", Evidence,
        "The quote's signature does not have the form of a TPM signature.",
        "Treat the host as hostile until its proxy has been looked at.";
    SignatureAlgorithm = "signature-algorithm", Evidence,
        "The signature claims another scheme or hash than the enrolled attestation key has.",
        "Treat the host as hostile: a TPM signs with the scheme of the key.";
    SignatureInvalid = "signature-invalid", Evidence,
        "The quote is not signed by the attestation key enrolled for this host.",
        "If the TPM was replaced or cleared, enrol the host again after a look at it; otherwise treat it as hostile.";
    AttestMagic = "attest-magic", Evidence,
        "The signed structure was not made by a TPM.",
        "Treat the host as hostile.";
    AttestType = "attest-type", Evidence,
        "The signed structure is not a quote.",
        "Treat the host as hostile.";
    AttestMalformed = "attest-malformed", Evidence,
        "The signed structure cannot be read.",
        "Treat the host as hostile.";
    NonceOther = "nonce-other", Evidence,
        "The evidence answers a nonce that was not the one asked.",
        "Ask again; if it comes back, something between proxy and verifier stores answers.";
    NonceReused = "nonce-reused", Evidence,
        "The evidence answers a nonce that was answered before: it is old evidence played again.",
        "Treat the host, or whoever is between, as hostile.";
    NonceExpired = "nonce-expired", Evidence,
        "The answer came after the challenge had expired.",
        "Ask again; look at the load of the host's TPM if it comes back.";
    ChannelBinding = "channel-binding", Evidence,
        "The quote was made for another connection than the one it came over.",
        "Treat whoever ends the connection as a man in the middle.";
    QualifyingData = "qualifying-data", Evidence,
        "The quote was not made for this challenge and this statement.",
        "Treat the host as hostile: statement or nonce path were changed after the quote.";
    StatementMalformed = "statement-malformed", Evidence,
        "The host's statement does not have the form that it must have.",
        "Check that proxy and verifier are of the same release; otherwise treat the host as hostile.";
    ClockRegression = "clock-regression", Evidence,
        "The TPM's clock runs behind what it was when the last evidence was accepted, and no reset that lost its time explains it.",
        "Old evidence is played again, or a software TPM's files or the host's VM snapshot were put back; after TPM2_Clear or a new TPM enrol the host again.";
    ResetCountRegression = "reset-count-regression", Evidence,
        "The TPM's reset counter is lower than it was: counters only grow.",
        "Old evidence is played again, or a software TPM's files or the host's VM snapshot were put back; after TPM2_Clear or a new TPM enrol the host again.";
    RestartCountRegression = "restart-count-regression", Evidence,
        "The TPM's restart counter is lower than it was, without a reset in between: only a reset sets it back.",
        "Old evidence is played again, or a software TPM's files or the host's VM snapshot were put back; after TPM2_Clear or a new TPM enrol the host again.";
    PcrSelection = "pcr-selection", Evidence,
        "The TPM quoted other registers than those asked for.",
        "Check pcr_vm and pcr_guest in proxy and policy; otherwise treat the host as hostile.";
    PcrValues = "pcr-values", Evidence,
        "The register values that came with the quote are not those that the TPM signed.",
        "Treat the host as hostile.";
    FirmwareLogMissing = "firmware-log-missing", Policy,
        "The host's firmware has extended its registers, or must have, but no event log of it came.",
        "Let the proxy read binary_bios_measurements (firmware_log), or write log = \"optional\" under host.firmware.";
    FirmwareLogMalformed = "firmware-log-malformed", History,
        "The firmware's event log cannot be read.",
        "Look at the log with tpm2_eventlog; firmware that writes it wrongly can be allowed with log = \"optional\".";
    FirmwareLogBank = "firmware-log-bank", History,
        "The firmware's event log does not have every digest of a quoted bank: it explains nothing there.",
        "Switch the bank on in the firmware's settings, or update the firmware.";
    FirmwareLogReplay = "firmware-log-replay", History,
        "The firmware's event log does not give the quoted value of a register: an event is missing, added or changed.",
        "Treat the host as hostile, unless its firmware is known to omit events: then name the register in unexplained.";
    FirmwareLogRegister = "firmware-log-register", History,
        "The firmware's event log extends a register that is not the firmware's.",
        "Treat the host as hostile, or look which boot loader extends that register.";
    FirmwareNotShown = "firmware-not-shown", Policy,
        "The firmware's event log does not show what a rule demands.",
        "Read what is missing; a rule that this firmware can never show must be left out of host.firmware.";
    FirmwareEventData = "firmware-event-data", Policy,
        "An event that a rule needs has data other than those that were measured: they prove nothing.",
        "Treat the host as hostile: somebody edited the log where the registers do not show it.";
    SecureBoot = "secure-boot", Policy,
        "Secure Boot is not as the policy demands.",
        "Switch it on in the firmware's settings, and let shim verify (mokutil --enable-validation).";
    SecureBootDatabase = "secure-boot-database", Policy,
        "A database of Secure Boot (PK, KEK, db, dbx) does not hold what the policy demands.",
        "If it was updated on purpose, compare the entries and change the rule; otherwise find out who could write it.";
    BootSeparator = "boot-separator", Policy,
        "The firmware did not end its measurements as it must, or ended them after an error.",
        "Look at the firmware's settings and messages; update it, or leave separators out of the policy.";
    BootImage = "boot-image", Policy,
        "The host started an image (boot loader, driver, kernel) that the policy does not name.",
        "If it was updated on purpose, add its digest to images, or to kernel.";
    BootFile = "boot-file", Policy,
        "The boot loader read a file that the policy does not name.",
        "If it was changed on purpose, add its digest to files; GRUB's grubenv changes at each boot on some hosts.";
    BootKernel = "boot-kernel", Policy,
        "None of the kernels that the policy names was started.",
        "If the host was updated on purpose, add the new kernel's digest; otherwise find out what it booted.";
    HostImaMissing = "host-ima-missing", Policy,
        "The host measures files with IMA, or must, but sent no measurement list.",
        "Let the proxy read binary_runtime_measurements, or take the host's IMA list out of the policy.";
    HostImaMalformed = "host-ima-malformed", Evidence,
        "The host's IMA list cannot be read.",
        "Look at the host's list with evmctl ima_measurement.";
    HostImaReplay = "host-ima-replay", Evidence,
        "No part of the host's IMA list gives the quoted PCR 10.",
        "Treat the host as hostile, or look whether its kernel takes entries out of the list, or was started by kexec or woken from hibernation, over which Debian's kernels carry no list.";
    HostImaBootAggregate = "host-ima-boot-aggregate", Evidence,
        "The boot aggregate in the host's IMA list is not that of the quoted registers.",
        "Treat the host as hostile: the list belongs to another boot or another TPM.";
    ProxyBinary = "proxy-binary", Policy,
        "The proxy's program is not one that the policy allows.",
        "If the proxy was updated on purpose, add its digest to the policy; otherwise treat the host as hostile.";
    ProxyUnlisted = "proxy-unlisted", Policy,
        "The host measures files with IMA, but its list has no entry for the proxy's program as the proxy names it.",
        "If the host's IMA policy measures what is executed, treat the host as hostile; otherwise have it measure that, or set unlisted_programs.";
    ProxyReplaced = "proxy-replaced", Policy,
        "Another program was run or read in the proxy's place since the host was booted.",
        "After an update on purpose, allow both programs with proxy or host.ima in the policy, or reboot; otherwise treat the host as hostile.";
    QemuUnlisted = "qemu-unlisted", Policy,
        "The host measures files with IMA, but its list has no entry for the program that runs the VM.",
        "If the host's IMA policy measures what is executed, treat the host as hostile; otherwise have it measure that, or set unlisted_programs.";
    LogMalformed = "log-malformed", Evidence,
        "A record of the measurement log cannot be read.",
        "The log file was damaged or edited; look at the named record on the host.";
    LogTruncated = "log-truncated", Evidence,
        "The measurement log ends inside a record.",
        "The log file was cut; look at the named record on the host.";
    LogOrder = "log-order", Evidence,
        "A record of the measurement log is missing, doubled or out of order.",
        "The log file was edited; look at the named record on the host.";
    LogDigest = "log-digest", Evidence,
        "A record's content is not what was hashed for the TPM.",
        "The record was edited; look at the named record on the host.";
    LogRegister = "log-register", Evidence,
        "A record extends a register or banks that are not the log's.",
        "Check pcr_vm and pcr_guest in proxy and policy; otherwise the log was edited.";
    LogStart = "log-start", Evidence,
        "The measurement log does not begin with this host's, this epoch's proxy-start.",
        "The log is another one, or was edited; look at its first record on the host.";
    LogLength = "log-length", Evidence,
        "The measurement log has not as many records as the host states.",
        "Records were dropped or added; look at the named record on the host.";
    LogReplay = "log-replay", Evidence,
        "The measurement log does not replay to the quoted registers.",
        "The log was edited after it was extended; treat the host as hostile.";
    ForeignExtend = "foreign-extend", History,
        "Somebody other than the proxy extended the log's registers.",
        "Find out which program on the host does so, or choose other registers with pcr_vm and pcr_guest.";
    LogHistory = "log-history", History,
        "The log's registers were not empty when the log began, and nothing that the policy knows explains what they held.",
        "If a boot stub extends them, put what it measured into stub under host.firmware, or their values into history.";
    LogSegmentStart = "log-segment-start", History,
        "The log's beginning was dropped before this verifier had it: what it said cannot be appraised here.",
        "Expected of a verifier that is new, or has lost its state: reboot the host, or allow it with dropped_records in the policy.";
    LogDropped = "log-dropped", Evidence,
        "Records are gone that this verifier had not accepted yet, and for which the proxy should have waited.",
        "If nobody released this verifier at the proxy, treat the host as hostile. A new epoch, after a reboot, ends it.";
    EpochRollback = "epoch-rollback", Evidence,
        "The log's epoch is older than the one last accepted.",
        "Somebody put back an old log; treat the host as hostile.";
    EpochReused = "epoch-reused", Evidence,
        "The TPM was reset, but the log goes on as if it had not been.",
        "Somebody extended the old log again after a reboot; treat the host as hostile.";
    LogRollback = "log-rollback", Evidence,
        "The log is shorter than, or other than, the part of it that was accepted before.",
        "Somebody put back or rewrote the log; treat the host as hostile.";
    LogGap = "log-gap", History,
        "The log does not cover everything: the proxy says so itself.",
        "Read the gap's reason; accept_gaps in the policy says which reasons are harmless here.";
    TpmReset = "tpm-reset", History,
        "The TPM's registers began anew while the host's kernel went on: what they held of it before is gone.",
        "Reboot the host and find out who reset its TPM. A hibernation does so too, and a software TPM that is started again.";
    HostKexec = "host-kexec", History,
        "Another kernel was started by kexec: the registers still show the boot of the one before.",
        "Reboot the host through its firmware, or allow it with accept_gaps if the host's IMA list shows what was loaded.";
    UnknownEvent = "unknown-event", History,
        "The log has an event that this verifier does not know.",
        "Bring the verifier to the proxy's release.";
    GuestListMissing = "guest-list-missing", Evidence,
        "The host states a guest's list, but did not send it.",
        "Look at the proxy's log on the host.";
    GuestListUnexpected = "guest-list-unexpected", Evidence,
        "The host sent a guest's list that its statement does not speak of.",
        "Look at the proxy's log on the host.";
    GuestListReference = "guest-list-reference", Evidence,
        "A guest's list refers to an entry that was not sent.",
        "The list kept by the proxy was damaged or edited.";
    GuestListAggregate = "guest-list-aggregate", Evidence,
        "A guest's list is not the one that was recorded in the measurement log.",
        "The list kept by the proxy was edited; look at the named record.";
    GuestListCount = "guest-list-count", Evidence,
        "The numbers of entries in a guest's list, in the log and in the statement differ.",
        "Entries were dropped or added; look at the named record.";
    GuestListRollback = "guest-list-rollback", Evidence,
        "A guest's list is shorter than, or other than, the part of it that was accepted before.",
        "The list kept by the proxy was put back or edited.";
    GuestRewind = "guest-rewind", History,
        "The guest claimed another past than the one that it had told.",
        "Treat the guest as compromised: stop it and look at it from outside.";
    GuestOverflow = "guest-overflow", History,
        "The guest sent more than it may; the rest of its list was not taken.",
        "Look for a program in the guest that floods IMA, or raise the limit on the host.";
    VmNotInLog = "vm-not-in-log", Evidence,
        "The host states a VM that its log does not know, or knows as stopped.",
        "Treat the host as hostile: its statement and its log disagree.";
    VmMissing = "vm-missing", Evidence,
        "By the log a VM runs, but the host's statement leaves it out.",
        "Treat the host as hostile: it hides a VM.";
    UnmanagedVm = "unmanaged-vm", Policy,
        "A QEMU process runs on the host that the proxy does not manage.",
        "Give that VM a monitor socket in the watched folder, stop it, or allow it with unmanaged in the policy.";
    HostWithoutPolicy = "host-without-policy", Absence,
        "There is no policy for this host.",
        "Propose one with policy learn, read it, and put it in force with policy set.";
    SoftwareTpm = "software-tpm", Policy,
        "The host's TPM is software, which its policy does not allow.",
        "Use a real TPM; a software TPM is no root of trust.";
    HostRegister = "host-register", Policy,
        "A register of the host does not hold a value that the policy allows.",
        "If firmware, boot loader or kernel were updated on purpose, add the new value to the policy.";
    VmWithoutPolicy = "vm-without-policy", Absence,
        "No rule of the policy is for this VM.",
        "Add a rule with its name or UUID to the policy.";
    VmNotStarted = "vm-not-started", Absence,
        "The VM has not been started yet.",
        "Wait, or start it.";
    VmUnmeasured = "vm-unmeasured", History,
        "The VM runs, but nothing that it started from was measured.",
        "Stop the VM and start it through the proxy.";
    AttachedWhileRunning = "attached-while-running", History,
        "The VM ran before it was measured: it may have started from something else.",
        "Start the VM with -S or through the proxy's launch command, or allow it with attach in the policy.";
    VmRefused = "vm-refused", Policy,
        "The proxy did not let the VM run.",
        "Read the reason; repair the named part or the host's references.";
    VmContinued = "vm-continued", History,
        "Somebody let the VM run before it was measured and logged.",
        "Find out who reached its monitor; stop the VM and start it again with no other monitor than the proxy's.";
    LoadedDiffers = "loaded-differs", History,
        "What lay in the VM's memory before it ran was not what the measured file holds.",
        "Somebody exchanged the file while QEMU read it, or altered QEMU; look at the host before you start the VM again.";
    MonitorImpostor = "monitor-impostor", History,
        "Who answers at the VM's monitor is not the QEMU process that it claims to be.",
        "Treat the host as hostile: somebody stands between QEMU and the proxy.";
    SecondMonitor = "second-monitor", Policy,
        "QEMU can be commanded past the proxy: it has another monitor or a debugger.",
        "Take it off QEMU's arguments and use the intercept mode for tools, or allow it with monitors in the VM's rule.";
    ComponentQemuBinary = "component-qemu-binary", Policy,
        "The program that runs the VM is not one that the policy allows.",
        "If QEMU was updated on purpose, add its digest to the policy.";
    ComponentArguments = "component-arguments", Policy,
        "QEMU's arguments are not those that the policy allows.",
        "Compare the arguments; if they were changed on purpose, add their digest to the policy.";
    ComponentArgumentFile = "component-argument-file", Policy,
        "A file named in QEMU's arguments is not one that the policy allows.",
        "If the file was changed on purpose, add its digest to the policy.";
    ComponentKernel = "component-kernel", Policy,
        "The VM's kernel is not one that the policy allows.",
        "If the kernel was updated on purpose, add its digest to the policy.";
    ComponentInitrd = "component-initrd", Policy,
        "The VM's initial RAM disk is not one that the policy allows.",
        "If the initrd was updated on purpose, add its digest to the policy.";
    ComponentKernelCmdline = "component-kernel-cmdline", Policy,
        "The VM's kernel command line is not one that the policy allows.",
        "Compare the command lines; if it was changed on purpose, add it to the policy.";
    ComponentFirmware = "component-firmware", Policy,
        "The VM's firmware is not one that the policy allows.",
        "If the firmware was updated on purpose, add its digest to the policy.";
    ComponentChanged = "component-changed", History,
        "A part that the VM started from was another one when it was measured again.",
        "Somebody changed the file under a running VM; start the VM anew from the right one.";
    ImageMismatch = "image-mismatch", Policy,
        "A disk image is not one that the policy allows.",
        "If the image was changed on purpose, add its digest to the policy; otherwise restore it.";
    ImageUnlisted = "image-unlisted", Policy,
        "The VM has a disk image that the policy does not speak of.",
        "Remove the image from the VM, or add its slot to the policy.";
    ImageMissing = "image-missing", Policy,
        "The VM lacks a disk image that the policy demands.",
        "Give the VM the image, or take its slot out of the policy.";
    ImageDiscontinuity = "image-discontinuity", History,
        "A disk image was changed while its VM was off.",
        "Restore the image; if it was changed on purpose, say so with policy accept-image.";
    ImageUnwatched = "image-unwatched", History,
        "Nobody saw how a disk image was left by its VM's last run, so that its past is not proven.",
        "Look at the image; if it is as it should be, say so with policy accept-image.";
    ConfigChange = "config-change", Policy,
        "The VM was changed after it had been measured.",
        "If the change was made on purpose, allow changes in the VM's rule or start the VM anew.";
    MediumChange = "medium-change", Policy,
        "A removable medium was changed after the VM had been measured.",
        "If that was on purpose, allow medium-change among the changes in the VM's rule.";
    MonitorCommand = "monitor-command", Policy,
        "A management tool gave the VM's monitor a command that the policy does not allow.",
        "Find out who gave it; if it belongs there, name it among the commands in the VM's rule.";
    SnapshotLoad = "snapshot-load", History,
        "The VM was put back to a state saved before: what it did since is undone, and it may run what was not measured.",
        "Start the VM anew, or allow rollback in the VM's rule.";
    MigratedIn = "migrated-in", History,
        "The VM's state came from elsewhere: what it runs was not started on this host.",
        "Look at the verdict of the host that it came from; start the VM anew, or allow migration in the VM's rule.";
    RuntimeMissing = "runtime-missing", Policy,
        "The policy demands the guest's measurement list, but the guest never sent one.",
        "See whether the shim runs in the guest and its vsock device is there.";
    RuntimeStale = "runtime-stale", Absence,
        "The guest has been silent for too long.",
        "See whether the guest hangs or its shim was stopped.";
    ImaMalformed = "ima-malformed", Policy,
        "An entry of the measurement list cannot be read, or contradicts itself.",
        "Look at the entry; a compromised kernel may have made it.";
    ImaViolation = "ima-violation", Policy,
        "A file was written while it was measured, so that what was read from it is not known.",
        "If the file is a log or the like, name it in ima_ignore.";
    ImaUnknownFile = "ima-unknown-file", Policy,
        "A file was run or read that the policy does not know.",
        "Find out who brought it; if it belongs there, add it to the policy.";
    ImaWrongDigest = "ima-wrong-digest", Policy,
        "A file was run or read that is not what the policy knows under its name.",
        "If the file was updated on purpose, add its digest to the policy.";
    ImaSignatureMissing = "ima-signature-missing", Policy,
        "A file was run or read that must be signed and is not.",
        "Find out who brought it; sign it, or take its path out of ima_signed.";
    ImaSignatureKey = "ima-signature-key", Policy,
        "A file was run or read that is signed by a key that the policy does not name, and is not allowed otherwise.",
        "Find out whose key it is; if files may be signed with it, add it to ima_keys.";
    ImaSignatureBad = "ima-signature-bad", Policy,
        "A file was run or read whose signature is not good: the file is not what was signed.",
        "Treat the file as altered; install it anew, and find out who changed it.";
    ImaBufferUnknown = "ima-buffer-unknown", Policy,
        "The kernel measured data of a name that the policy does not know.",
        "Read what it is; if it belongs there, add it to ima_buf.";
    ImaBufferDigest = "ima-buffer-digest", Policy,
        "The kernel measured data that are not what the policy knows under their name, such as another command line for kexec.",
        "Find out who gave them to the kernel; if they were changed on purpose, add them to ima_buf.";
    ImaKey = "ima-key", Policy,
        "A key was put on a keyring on which the policy does not allow it.",
        "Find out whose key it is; what is signed with it may pass the kernel's own checks. If it belongs there, add it to ima_keyrings.";
    VerdictExpired = "verdict-expired", Absence,
        "The last verdict is too old to be relied on.",
        "Ask the host again.";
    HostSilent = "host-silent", Absence,
        "Nothing was heard of the host for three times as long as a verdict holds.",
        "See whether host, proxy and network are up; the proxy's status says why it does not report.";
    Unreachable = "unreachable", Absence,
        "The host's proxy cannot be reached.",
        "See whether host, network and proxy are up, and whether the URL is right.";
    TlsRefused = "tls-refused", Absence,
        "No connection that both sides trust could be made with the host's proxy.",
        "Check that the enrolled certificate is the proxy's and that the proxy knows this verifier's.";
    ProxyError = "proxy-error", Absence,
        "The host's proxy did not answer with evidence.",
        "Read its answer and the proxy's log on the host.";
    HostWithdrawn = "host-withdrawn", Policy,
        "The host was revoked or retired by the operator: it is not asked, and nothing of it counts.",
        "If it should come back, make a token with token create --replace and let it join.";
    CertificateRevoked = "certificate-revoked", Policy,
        "The host's proxy showed a certificate that was taken back, or that was issued to another attestation key.",
        "See the audit log for who joined under this name; if it was the host, restart its proxy.";
    VerifierFault = "verifier-fault", Absence,
        "The verifier itself failed; this says nothing about the host.",
        "Read the verifier's log.";
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Code {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let known = Self::ALL.iter().copied().find(|code| code.as_str() == text);
        known.ok_or_else(|| serde::de::Error::custom(format_args!("unknown finding code {text}")))
    }
}

/// One thing found wrong.
///
/// As JSON: `{"code", "item", "meaning", "advice", "expected", "actual"}`, the last two where there is something to
/// say. Meaning and advice are those of the code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Json", from = "Json")]
pub struct Finding {
    /// Which.
    pub code: Code,
    /// What caused it: a record, a register, an image's slot, a path in a guest. May hold what a guest chose:
    /// escape it before a terminal sees it.
    pub item: String,
    /// What should have been there, for people.
    pub expected: Option<String>,
    /// What was there, for people.
    pub actual: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Json {
    code: Code,
    item: String,
    #[serde(skip_deserializing)]
    meaning: &'static str,
    #[serde(skip_deserializing)]
    advice: &'static str,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    expected: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    actual: Option<String>,
}

impl From<Finding> for Json {
    fn from(finding: Finding) -> Self {
        let Finding { code, item, expected, actual } = finding;
        Self { code, item, meaning: code.meaning(), advice: code.advice(), expected, actual }
    }
}

impl From<Json> for Finding {
    fn from(json: Json) -> Self {
        Self { code: json.code, item: json.item, expected: json.expected, actual: json.actual }
    }
}

impl Finding {
    /// A finding about `item`.
    #[must_use]
    pub fn new(code: Code, item: impl Into<String>) -> Self {
        Self { code, item: item.into(), expected: None, actual: None }
    }

    /// Adds what should have been there.
    #[must_use]
    #[allow(clippy::needless_pass_by_value, reason = "callers show values that they make for it")]
    pub fn expected(mut self, expected: impl ToString) -> Self {
        self.expected = Some(expected.to_string());
        self
    }

    /// Adds what was there.
    #[must_use]
    #[allow(clippy::needless_pass_by_value, reason = "callers show values that they make for it")]
    pub fn actual(mut self, actual: impl ToString) -> Self {
        self.actual = Some(actual.to_string());
        self
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_words_of_their_own() {
        let words: BTreeSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(words.len(), Code::ALL.len());
        for code in Code::ALL {
            assert!(code.as_str().bytes().all(|c| c.is_ascii_lowercase() || c == b'-'), "{code}");
            assert!(code.meaning().ends_with('.') && code.advice().ends_with('.'), "{code}");
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(serde_json::from_str::<Code>(&json).unwrap(), *code);
        }
    }
}
