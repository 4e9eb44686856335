//! The rule for the host itself.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer};

use onequote_evidence::{
    event::GapReason,
    id::Sha256,
    pcr::{DEFAULT_PCR_GUEST, DEFAULT_PCR_VM},
};

use super::{
    Allowed, Consent, FirmwareRule, ImaRule, OneOrMore, Pcr,
    part::{self, Whole},
};

/// What is demanded of the host.
#[derive(Debug, Clone, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
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
    /// Whether the log may begin with a later segment, where its beginning was dropped before this verifier had it.
    #[serde(default)]
    pub dropped_records: Consent,
    /// What the firmware's event log must show; with it the log is demanded.
    pub firmware: Option<FirmwareRule>,
    /// The proxy's binary.
    #[serde(default = "Allowed::any")]
    pub proxy: Allowed,
    /// Whether the proxy's and QEMU's programs may be missing in the host's IMA list.
    #[serde(default)]
    pub unlisted_programs: Consent,
    /// What the host's IMA list may hold; with an allow list the list is demanded.
    #[serde(skip)]
    pub ima: ImaRule,
}

impl Whole<ImaRule> for HostRule {
    fn own<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        // The function that serde has made for the fields above, not the one below.
        Self::deserialize(d)
    }
}

impl<'de> Deserialize<'de> for HostRule {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let (rule, ima) = part::deserialize::<Self, _, D>(d)?;
        Ok(Self { ima, ..rule })
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
            dropped_records: Consent::Refused,
            firmware: None,
            proxy: Allowed::Any,
            unlisted_programs: Consent::Refused,
            ima: ImaRule::default(),
        }
    }
}

fn default_pcr_vm() -> u8 {
    DEFAULT_PCR_VM
}

fn default_pcr_guest() -> u8 {
    DEFAULT_PCR_GUEST
}
