//! What the proxy tells people of itself.

use onequote_evidence::{
    event::Depth,
    id::{Epoch, HostId, SessionId, VmId},
    statement::Unmanaged,
};
use serde::Serialize;

/// The proxy's state, for `status` and `GET /v1/status`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The host.
    pub host: HostId,
    /// The proxy's version.
    pub version: &'static str,
    /// The log's epoch.
    pub epoch: Option<Epoch>,
    /// Records in the log.
    pub log_len: u64,
    /// The TPM, for people.
    pub tpm: String,
    /// Whether the TPM is software: no root of trust.
    pub software_tpm: bool,
    /// Managed VMs.
    pub vms: Vec<VmStatus>,
    /// QEMU processes that are not managed.
    pub unmanaged: Vec<Unmanaged>,
}

/// One VM.
#[derive(Debug, Serialize)]
pub struct VmStatus {
    /// Its name.
    pub name: String,
    /// Its UUID; none before its monitor answered.
    pub uuid: Option<VmId>,
    /// Its QEMU process.
    pub session: Option<SessionId>,
    /// QEMU's process id.
    pub pid: Option<u32>,
    /// QEMU's run state, or what the proxy is doing with it.
    pub run_state: String,
    /// How it is watched.
    pub depth: Option<Depth>,
    /// Guest boots in this session.
    pub boots: usize,
    /// Entries of the current boot that are in the log.
    pub entries: u64,
    /// Milliseconds since the guest's last frame.
    pub last_contact_ms: Option<u64>,
    /// What went wrong last.
    pub error: Option<String>,
}

/// Who knows the state.
pub trait StatusSource: Send + Sync + 'static {
    /// The state now.
    fn status(&self) -> Status;
}
