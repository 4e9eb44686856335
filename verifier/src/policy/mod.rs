//! Policies: what a host and its VMs should be, as the operator wrote it in TOML.
//!
//! ```toml
//! [host]
//! registers = { "0" = "5f…", "7" = ["aa…", "bb…"] }   # SHA-256 register values; what is not named is not judged
//! software_tpm = true            # false refuses a software TPM although it was enrolled as one
//! accept_gaps = ["proxy-down"]   # reasons of log gaps that are harmless here
//!
//! [host.firmware]
//! secure_boot = true             # what the firmware's event log must show of the boot
//! kernel = ["sha256:…"]
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
mod firmware;
mod host;
mod ima;
pub mod keylime;
pub mod keys;
pub mod learn;
mod load;
mod part;
mod text;
pub mod tree;
mod value;
mod vm;

use serde::Deserialize;

use onequote_evidence::id::{Sha256, VmId};

pub use allow::{AllowList, FileHash, Judgement, VERITY};
pub use firmware::{DatabaseRule, Digests, FirmwareRule, PlainDigest, StubDigest};
pub use host::HostRule;
pub use ima::{Content, Excludes, ImaRule, is_keyring};
pub use keys::{KeyEntry, SigningKey};
pub use load::{PolicyError, read};
pub use value::{Allowed, Consent, OneOrMore, Pattern, Pcr, Reference};
pub use vm::{Changes, ImageRule, Runtime, VmRule};

/// A policy: one host rule and the rules for its VMs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// SHA-256 of the text that it was read from; zeros for none at all.
    #[serde(skip, default = "no_text")]
    pub id: Sha256,
    /// For the host.
    #[serde(default)]
    pub host: HostRule,
    /// For VMs; the first that fits counts.
    #[serde(default, rename = "vm")]
    pub vms: Vec<VmRule>,
}

impl Default for Policy {
    fn default() -> Self {
        Self { id: no_text(), host: HostRule::default(), vms: Vec::new() }
    }
}

fn no_text() -> Sha256 {
    Sha256::ZERO
}

impl Policy {
    /// The rule for a VM.
    #[must_use]
    pub fn rule(&self, name: &str, id: VmId) -> Option<(usize, &VmRule)> {
        let fits = |rule: &VmRule| rule.uuid == Some(id) || rule.name.as_ref().is_some_and(|p| p.fits(name));
        self.vms.iter().enumerate().find(|(_, rule)| fits(rule))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
