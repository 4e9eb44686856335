//! Verdicts: what is said of a host and of each VM on it, and how long it may be believed.
//!
//! The states are kept apart: `untrusted` is bad news, `unmeasured`, `stale` and `unreachable` are no news, and
//! `verifier-fault` says nothing about the host at all. A VM is never better than its host. A verdict has an expiry;
//! after it every state in it that was `trusted` is `stale`, and after [`SILENCE`] times as long `unreachable`.

use serde::{Deserialize, Serialize};

use onequote_evidence::{
    id::{Epoch, HostId, SessionId, TimeMs, VmId},
    tpm::ClockInfo,
};

use crate::{
    appraise::state::StartedImage,
    finding::{Class, Code, Finding},
};

/// What no verdict claims; it stands in each.
pub const LIMITS: &str = "Not claimed: that a guest whose kernel is already compromised tells the truth afterwards. \
    What a guest's list held before cannot be taken back. Physical attacks on the TPM are out of scope.";

/// How far clocks of those who make and show verdicts may be apart, in milliseconds.
const CLOCK_SLACK: u64 = 5_000;

/// After how many times the life of a verdict without a newer one its host counts as unreachable.
pub const SILENCE: u64 = 3;

/// The most findings that are kept for the host or for one VM.
pub const MAX_FINDINGS: usize = 200;

/// The most notes that are kept: the newest.
pub const MAX_NOTES: usize = 500;

/// The state of a host or of a VM, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Everything that the policy demands was shown.
    Trusted,
    /// There is no rule to judge it by, or nothing was measured yet.
    Unmeasured,
    /// What is known is too old.
    Stale,
    /// There is no answer.
    Unreachable,
    /// The verifier itself failed.
    VerifierFault,
    /// Something is not as it must be.
    Untrusted,
}

impl State {
    /// The word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Trusted => "trusted",
            Self::Unmeasured => "unmeasured",
            Self::Stale => "stale",
            Self::Unreachable => "unreachable",
            Self::VerifierFault => "verifier-fault",
            Self::Untrusted => "untrusted",
        }
    }

    /// The state that findings lead to: the worst one that any of them asks for.
    #[must_use]
    pub fn of(findings: &[Finding]) -> Self {
        findings.iter().map(|f| Self::after(f.code)).max().unwrap_or(Self::Trusted)
    }

    /// The state that a finding of this code leads to.
    pub(crate) fn after(code: Code) -> Self {
        match (code, code.class()) {
            (Code::RuntimeStale | Code::VerdictExpired, _) => Self::Stale,
            (Code::HostSilent | Code::Unreachable | Code::TlsRefused | Code::ProxyError, _) => Self::Unreachable,
            (Code::VerifierFault, _) => Self::VerifierFault,
            (_, Class::Absence) => Self::Unmeasured,
            _ => Self::Untrusted,
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

/// How evidence came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// The verifier connected with the proxy and asked.
    #[default]
    Asked,
    /// The host reported, over the connection that it holds.
    Reported,
}

/// A verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// On the host.
    pub host: HostVerdict,
    /// On each of its VMs, by UUID.
    pub vms: Vec<VmVerdict>,
    /// The quote it rests on; none when there was no authentic one.
    pub quote: Option<QuoteInfo>,
    /// Checks that were left out, and why.
    pub skipped: Vec<Skipped>,
    /// What the operator should know although it changes no state.
    pub notes: Vec<String>,
    /// How the evidence came.
    #[serde(default)]
    pub way: Way,
    /// When it was made, by the verifier's clock.
    pub time: TimeMs,
    /// When it stops to hold.
    pub expires: TimeMs,
    /// [`LIMITS`].
    pub limits: String,
}

/// On the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostVerdict {
    /// Its id.
    pub id: HostId,
    /// Its state.
    pub state: State,
    /// Whether its TPM is software, and so no root of trust.
    pub software_tpm: bool,
    /// The policy's version that it was judged by, counted by the verifier; none without a policy.
    pub policy: Option<u64>,
    /// What was found wrong.
    pub findings: Vec<Finding>,
    /// Findings that were left out because there were more than [`MAX_FINDINGS`].
    pub findings_omitted: u64,
}

/// On a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmVerdict {
    /// Its name on the host.
    pub name: String,
    /// Its UUID.
    pub uuid: VmId,
    /// Its QEMU process.
    pub session: SessionId,
    /// Its state; never better than the host's.
    pub state: State,
    /// QEMU's run state, as the host states it; empty when it states none.
    pub run_state: String,
    /// Boots of the guest in this session that sent a measurement list.
    pub boots: u64,
    /// Entries of the guest's lists, over all boots of this session.
    pub entries: u64,
    /// Milliseconds since the guest's last word when the quote was made.
    pub last_contact: Option<u64>,
    /// Images of this QEMU process' start, each with whose word it was held against.
    #[serde(default)]
    pub images: Vec<ImageLine>,
    /// What was found wrong.
    pub findings: Vec<Finding>,
    /// Findings that were left out because there were more than [`MAX_FINDINGS`].
    pub findings_omitted: u64,
}

/// An image that a VM was started from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLine {
    /// Where it is used.
    pub slot: String,
    /// The file's path on the host, its digest at the start, and where its expectation came from.
    #[serde(flatten)]
    pub started: StartedImage,
}

/// The quote that a verdict rests on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuoteInfo {
    /// The TPM's clock and counters.
    #[serde(flatten)]
    pub clock: ClockInfo,
    /// The TPM's firmware version.
    pub firmware_version: u64,
    /// The log's epoch.
    pub epoch: Epoch,
    /// Records in the log.
    pub records: u64,
    /// The host's clock when the guests' state was collected.
    pub collected: TimeMs,
}

/// A check that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Which.
    pub check: String,
    /// Why.
    pub reason: String,
}

impl Skipped {
    /// The check with its reason.
    #[must_use]
    pub fn new(check: &str, reason: impl Into<String>) -> Self {
        Self { check: check.to_owned(), reason: reason.into() }
    }
}

impl Verdict {
    /// A verdict without any evidence: `finding` says why there is none. What was known of the VMs stays named.
    #[must_use]
    pub fn without_evidence(id: HostId, finding: Finding, last: Option<&Self>, now: TimeMs) -> Self {
        let state = State::of(std::slice::from_ref(&finding));
        let mut vms = last.map(|v| v.vms.clone()).unwrap_or_default();
        for vm in &mut vms {
            vm.state = vm.state.max(state);
        }
        Self {
            host: HostVerdict {
                id,
                state,
                software_tpm: last.is_some_and(|v| v.host.software_tpm),
                policy: last.and_then(|v| v.host.policy),
                findings: vec![finding],
                findings_omitted: 0,
            },
            vms,
            quote: None,
            skipped: Vec::new(),
            notes: Vec::new(),
            way: Way::Asked,
            time: now,
            expires: now,
            limits: LIMITS.to_owned(),
        }
    }

    /// The verdict as it may be shown at `now`: after its expiry nothing in it is trusted any more, and when it is
    /// [`SILENCE`] times as old as it was to become, nothing is known of the host.
    #[must_use]
    pub fn at(mut self, now: TimeMs) -> Self {
        if self.quote.is_none() {
            return self;
        }
        // A clock that was set back says nothing about the age.
        let set_back = now.0.saturating_add(CLOCK_SLACK) < self.time.0;
        let age = now.0.saturating_sub(self.time.0);
        let lifetime = self.expires.0.saturating_sub(self.time.0);
        let (code, state) = match () {
            () if !set_back && age >= lifetime.saturating_mul(SILENCE) => (Code::HostSilent, State::Unreachable),
            () if set_back || now >= self.expires => (Code::VerdictExpired, State::Stale),
            () => return self,
        };
        self.host.state = self.host.state.max(state);
        self.host.findings.push(Finding::new(code, "verdict").actual(format!("{} s old", age / 1000)));
        for vm in &mut self.vms {
            vm.state = vm.state.max(state);
        }
        self
    }

    /// Whether the host and every VM on it is trusted.
    #[must_use]
    pub fn all_trusted(&self) -> bool {
        self.host.state == State::Trusted && self.vms.iter().all(|vm| vm.state == State::Trusted)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn with(code: Code) -> State {
        State::of(&[Finding::new(code, "x")])
    }

    #[test]
    fn each_kind_of_finding_has_its_state() {
        assert_eq!(State::of(&[]), State::Trusted);
        assert_eq!(with(Code::SignatureInvalid), State::Untrusted);
        assert_eq!(with(Code::ImaUnknownFile), State::Untrusted);
        assert_eq!(with(Code::VmWithoutPolicy), State::Unmeasured);
        assert_eq!(with(Code::RuntimeStale), State::Stale);
        assert_eq!(with(Code::TlsRefused), State::Unreachable);
        assert_eq!(with(Code::VerifierFault), State::VerifierFault);
    }

    #[test]
    fn no_news_is_not_good_news() {
        let id: HostId = "h".parse().unwrap();
        let mut verdict = Verdict::without_evidence(id, Finding::new(Code::Unreachable, "h"), None, TimeMs(5));
        assert_eq!(verdict.host.state, State::Unreachable);
        verdict.host.state = State::Trusted;
        verdict.quote = Some(QuoteInfo {
            clock: ClockInfo { clock: 1, reset_count: 1, restart_count: 1, safe: true },
            firmware_version: 1,
            epoch: Epoch { number: 1, id: onequote_evidence::id::EpochId::ZERO },
            records: 1,
            collected: TimeMs(1),
        });
        (verdict.time, verdict.expires) = (TimeMs(5), TimeMs(10));
        assert!(verdict.clone().at(TimeMs(9)).all_trusted());
        for (now, state, code) in [
            (10, State::Stale, Code::VerdictExpired),
            (19, State::Stale, Code::VerdictExpired),
            (20, State::Unreachable, Code::HostSilent),
            (u64::MAX, State::Unreachable, Code::HostSilent),
        ] {
            let shown = verdict.clone().at(TimeMs(now));
            assert_eq!((shown.host.state, shown.host.findings.last().unwrap().code), (state, code), "at {now}");
        }
        // What was worse stays worse.
        verdict.host.state = State::Untrusted;
        assert_eq!(verdict.clone().at(TimeMs(20)).host.state, State::Untrusted);
        verdict.host.state = State::Trusted;
        // Nor does setting the clock back make an old verdict fresh.
        (verdict.time, verdict.expires) = (TimeMs(100_000), TimeMs(200_000));
        assert!(verdict.clone().at(TimeMs(96_000)).all_trusted());
        assert_eq!(verdict.at(TimeMs(90_000)).host.state, State::Stale);
    }
}
