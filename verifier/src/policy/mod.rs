//! Policies: what a host and its VMs should be, as the operator wrote it in TOML.
//!
//! ```toml
//! [host]
//! registers = { "0" = "5f…", "7" = ["aa…", "bb…"] }   # SHA-256 register values; what is not named is not judged
//! software_tpm = true            # false refuses a software TPM although it was enrolled as one
//! accept_gaps = ["proxy-down"]   # reasons of log gaps that are harmless here
//!
//! [[vm]]
//! name = "web-*"                 # or uuid = "…"; the first rule that fits a VM is its rule
//! kernel = ["sha256:…"]          # each part: a list, or "any"
//! kernel_cmdline = ["root=/dev/vda ro"]
//! runtime = "required"           # the guest must send its measurement list
//!
//! [vm.images]
//! disk0 = { continuity = true }
//! "disk0/1" = { digests = ["fs-verity:…"] }
//!
//! [vm.ima]
//! "/usr/bin/httpd" = ["sha256:…"]
//! ```
//!
//! A part that a rule does not name must not be there, except `qemu` and `arguments`, which are then not judged. An
//! unknown key is refused with its name, file and line: a rule that is misspelt must not look like one in force.

mod allow;
pub mod learn;
mod load;

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use onequote_evidence::{
    digest::{FileDigest, sha256},
    event::{GapReason, Role},
    id::{Sha256, VmId},
    pcr::{DEFAULT_PCR_GUEST, DEFAULT_PCR_VM},
};

pub use allow::{AllowList, FileHash, Judgement};
pub use load::PolicyError;

/// A policy: one host rule and the rules for its VMs.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// For the host.
    #[serde(default)]
    pub host: HostRule,
    /// For VMs; the first that fits counts.
    #[serde(default, rename = "vm")]
    pub vms: Vec<VmRule>,
}

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
    /// Files that the host's IMA list may hold; with it the list is demanded.
    pub ima: Option<AllowList>,
    /// The same, in a file of its own, relative to the policy's.
    pub ima_file: Option<String>,
    /// Path patterns that are not judged.
    #[serde(default)]
    pub ima_ignore: Vec<Pattern>,
}

/// What is demanded of a VM.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRule {
    /// Pattern of the name: `*` stands for any characters, `?` for one.
    pub name: Option<Pattern>,
    /// Or the UUID.
    pub uuid: Option<VmId>,
    /// Program that runs the VM.
    #[serde(default = "Allowed::any")]
    pub qemu: Allowed,
    /// Its argument vector.
    #[serde(default = "Allowed::any")]
    pub arguments: Allowed,
    /// Files that the arguments name.
    #[serde(default)]
    pub argument_files: Allowed,
    /// Kernel.
    #[serde(default)]
    pub kernel: Allowed,
    /// Initial RAM disk.
    #[serde(default)]
    pub initrd: Allowed,
    /// Kernel command line, as text or digest.
    #[serde(default)]
    pub kernel_cmdline: Allowed,
    /// Firmware.
    #[serde(default)]
    pub firmware: Allowed,
    /// Disk images by slot.
    #[serde(default)]
    pub images: BTreeMap<String, ImageRule>,
    /// Whether a VM that ran before it was measured is judged by what was measured then.
    #[serde(default)]
    pub attach: Consent,
    /// Whether the VM may be changed while it runs, or in which ways.
    #[serde(default)]
    pub changes: Changes,
    /// Whether the VM may go back to a state saved before.
    #[serde(default)]
    pub rollback: Consent,
    /// Whether the VM's state may come from, and go to, another QEMU or a file.
    #[serde(default)]
    pub migration: Consent,
    /// Whether QEMU may have other monitors, or a debugger.
    #[serde(default)]
    pub monitors: Consent,
    /// Patterns of commands that management tools may give to the VM's monitor.
    #[serde(default = "harmless_commands")]
    pub commands: Vec<Pattern>,
    /// Whether the guest must send its measurement list.
    #[serde(default)]
    pub runtime: Runtime,
    /// Seconds that a running guest may be silent.
    #[serde(default = "default_silence")]
    pub max_silence: u64,
    /// Files that the guest's list may hold; none leaves the list unjudged.
    pub ima: Option<AllowList>,
    /// The same, in a file of its own, relative to the policy's.
    pub ima_file: Option<String>,
    /// Path patterns that are not judged.
    #[serde(default)]
    pub ima_ignore: Vec<Pattern>,
}

/// What is demanded of a disk image.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRule {
    /// Allowed digests; with `continuity`, those of its first start.
    #[serde(default)]
    pub digests: Vec<FileDigest>,
    /// Whether the image must be as the VM's last run left it.
    #[serde(default)]
    pub continuity: bool,
}

/// Whether something is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consent {
    /// It is a finding.
    #[default]
    Refused,
    /// It is noted only.
    Allowed,
}

/// Which changes to a running VM are allowed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Changes {
    /// All or none.
    All(Consent),
    /// Those whose word (`device`, `image`, `medium-change`, …) fits one of these patterns.
    Some(Vec<Pattern>),
}

impl Changes {
    /// Whether a change is allowed.
    #[must_use]
    pub fn allow(&self, word: &str) -> bool {
        match self {
            Self::All(consent) => *consent == Consent::Allowed,
            Self::Some(patterns) => patterns.iter().any(|pattern| pattern.fits(word)),
        }
    }
}

impl Default for Changes {
    fn default() -> Self {
        Self::All(Consent::Refused)
    }
}

/// Commands whose effect is an event of its own, or none.
const HARMLESS: [&str; 7] =
    ["cont", "stop", "quit", "system_powerdown", "system_reset", "system_wakeup", "block-dirty-bitmap-*"];

/// What `commands` is unless it is given.
fn harmless_commands() -> Vec<Pattern> {
    HARMLESS.iter().map(|name| Pattern((*name).to_owned())).collect()
}

/// Whether a guest's list is demanded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Runtime {
    /// It is judged when it comes.
    #[default]
    Optional,
    /// It must come.
    Required,
}

/// The digests that a part may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// It is not judged.
    Any,
    /// One of these; none at all means that the part must not be there.
    Digests(Vec<Reference>),
}

/// One allowed digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The digest.
    pub digest: FileDigest,
    /// The text it was computed from, where the policy gave that.
    pub text: Option<String>,
}

/// One value or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum OneOrMore<T> {
    /// One.
    One(T),
    /// Several.
    More(Vec<T>),
}

/// A register's index as a TOML key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Pcr(pub u8);

/// A pattern with `*` and `?`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Pattern(pub String);

impl Policy {
    /// The rule for a VM.
    #[must_use]
    pub fn rule(&self, name: &str, id: VmId) -> Option<(usize, &VmRule)> {
        let fits = |rule: &VmRule| rule.uuid == Some(id) || rule.name.as_ref().is_some_and(|p| p.fits(name));
        self.vms.iter().enumerate().find(|(_, rule)| fits(rule))
    }
}

impl VmRule {
    /// What a part may be.
    #[must_use]
    pub fn allowed(&self, role: Role) -> &Allowed {
        match role {
            Role::QemuBinary => &self.qemu,
            Role::Arguments => &self.arguments,
            Role::ArgumentFile => &self.argument_files,
            Role::Kernel => &self.kernel,
            Role::Initrd => &self.initrd,
            Role::KernelCmdline => &self.kernel_cmdline,
            Role::Firmware => &self.firmware,
        }
    }
}

impl Allowed {
    fn any() -> Self {
        Self::Any
    }
}

impl Default for Allowed {
    fn default() -> Self {
        Self::Digests(Vec::new())
    }
}

impl std::fmt::Display for Allowed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Digests(none) if none.is_empty() => f.write_str("none"),
            Self::Digests(list) => {
                let one = |r: &Reference| r.text.clone().unwrap_or_else(|| r.digest.to_string());
                f.write_str(&list.iter().map(one).collect::<Vec<_>>().join(" or "))
            }
        }
    }
}

impl Reference {
    /// A digest, or else the text whose SHA-256 is meant.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.parse() {
            Ok(digest) => Self { digest, text: None },
            Err(_) => {
                let digest = FileDigest::sha256(sha256(&[text.as_bytes()]));
                Self { digest, text: Some(text.to_owned()) }
            }
        }
    }
}

impl<T> OneOrMore<T> {
    /// The values.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::More(more) => more,
        }
    }
}

impl Pattern {
    /// Whether the whole of `text` fits.
    #[must_use]
    pub fn fits(&self, text: &str) -> bool {
        // Two positions to go back to at most: linear in practice, quadratic at worst.
        let (pattern, text): (Vec<char>, Vec<char>) = (self.0.chars().collect(), text.chars().collect());
        let (mut p, mut t) = (0, 0);
        let mut star: Option<(usize, usize)> = None;
        while t < text.len() {
            match pattern.get(p) {
                Some('*') => {
                    star = Some((p, t));
                    p += 1;
                }
                Some(&c) if c == '?' || c == text[t] => {
                    p += 1;
                    t += 1;
                }
                _ => {
                    let Some((at, from)) = star else { return false };
                    star = Some((at, from + 1));
                    p = at + 1;
                    t = from + 1;
                }
            }
        }
        pattern[p..].iter().all(|&c| c == '*')
    }
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
            ima: None,
            ima_file: None,
            ima_ignore: Vec::new(),
        }
    }
}

fn default_pcr_vm() -> u8 {
    DEFAULT_PCR_VM
}

fn default_pcr_guest() -> u8 {
    DEFAULT_PCR_GUEST
}

fn default_silence() -> u64 {
    60
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
