//! The rule for the host itself.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use onequote_evidence::{
    event::GapReason,
    id::Sha256,
    pcr::{DEFAULT_PCR_GUEST, DEFAULT_PCR_VM},
};

use super::{AllowList, Allowed, Consent, Content, Excludes, FirmwareRule, KeyEntry, OneOrMore, Pattern, Pcr};

/// What is demanded of the host.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostRule {
    /// Allowed SHA-256 values by register.
    #[serde(default)]
    pub registers: BTreeMap<Pcr, OneOrMore<Sha256>>,
    /// What the log's registers may hold before the log begins, where it is not zeros.
    #[serde(default)]
    pub history: BTreeMap<Pcr, OneOrMore<Sha256>>,
    /// Whether a software TPM may be used; none leaves it to the enrolment.
    pub software_tpm: Option<bool>,
    /// The register for VM life cycle.
    #[serde(default = "default_pcr_vm")]
    pub pcr_vm: u8,
    /// The register for guest run time.
    #[serde(default = "default_pcr_guest")]
    pub pcr_guest: u8,
    /// Reasons of log gaps that are harmless here.
    #[serde(default)]
    pub accept_gaps: BTreeSet<GapReason>,
    /// Whether QEMU processes that the proxy does not manage may run.
    #[serde(default)]
    pub unmanaged: Consent,
    /// What the firmware's event log must show; with it the log is demanded.
    pub firmware: Option<FirmwareRule>,
    /// The proxy's binary.
    #[serde(default = "Allowed::any")]
    pub proxy: Allowed,
    /// Whether the proxy's and QEMU's programs may be missing in the host's IMA list.
    #[serde(default)]
    pub unlisted_programs: Consent,
    /// Files that the host's IMA list may hold; with it the list is demanded.
    pub ima: Option<AllowList>,
    /// The same, in files of their own, relative to the policy's.
    pub ima_file: Option<OneOrMore<String>>,
    /// Path patterns that are not judged.
    #[serde(default)]
    pub ima_ignore: Vec<Pattern>,
    /// The same as regular expressions, each of which must fit a path's beginning.
    #[serde(default)]
    pub ima_exclude: Excludes,
    /// Keys that may sign files; a file with a good signature is allowed.
    #[serde(default)]
    pub ima_keys: Vec<KeyEntry>,
    /// Patterns of paths that must have a good signature.
    #[serde(default)]
    pub ima_signed: Vec<Pattern>,
    /// What the kernel may measure beside files, by name: `kexec-cmdline`, …
    #[serde(default)]
    pub ima_buf: BTreeMap<String, Vec<Content>>,
    /// Keys that may be put on keyrings, by keyring.
    #[serde(default)]
    pub ima_keyrings: BTreeMap<String, Vec<Content>>,
    /// Keyrings whose keys are not judged.
    #[serde(default)]
    pub ima_ignored_keyrings: Vec<Pattern>,
}

impl Default for HostRule {
    fn default() -> Self {
        Self {
            registers: BTreeMap::new(),
            history: BTreeMap::new(),
            software_tpm: None,
            pcr_vm: DEFAULT_PCR_VM,
            pcr_guest: DEFAULT_PCR_GUEST,
            accept_gaps: BTreeSet::new(),
            unmanaged: Consent::Refused,
            firmware: None,
            proxy: Allowed::Any,
            unlisted_programs: Consent::Refused,
            ima: None,
            ima_file: None,
            ima_ignore: Vec::new(),
            ima_exclude: Excludes::default(),
            ima_keys: Vec::new(),
            ima_signed: Vec::new(),
            ima_buf: BTreeMap::new(),
            ima_keyrings: BTreeMap::new(),
            ima_ignored_keyrings: Vec::new(),
        }
    }
}

fn default_pcr_vm() -> u8 {
    DEFAULT_PCR_VM
}

fn default_pcr_guest() -> u8 {
    DEFAULT_PCR_GUEST
}
