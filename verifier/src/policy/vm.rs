//! Rules for VMs.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

use onequote_evidence::{digest::FileDigest, event::Role, id::VmId};

use super::{
    Allowed, Consent, ImaRule, Pattern,
    part::{self, Whole},
};

/// What is demanded of a VM.
#[derive(Debug, Clone, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
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
    /// What the guest's IMA list may hold; without allow list and keys its files are not judged.
    #[serde(skip)]
    pub ima: ImaRule,
}

impl Whole<ImaRule> for VmRule {
    fn own<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        // The function that serde has made for the fields above, not the one below.
        Self::deserialize(d)
    }
}

impl<'de> Deserialize<'de> for VmRule {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let (rule, ima) = part::deserialize::<Self, _, D>(d)?;
        Ok(Self { ima, ..rule })
    }
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

fn default_silence() -> u64 {
    60
}
