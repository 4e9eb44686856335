//! What QEMU tells about a VM as a whole.

use onequote_evidence::id::VmId;
use qapi::qmp;
use serde::Deserialize;
use serde_json::json;

use crate::{
    measure::Machine,
    qmp::{Qmp, QmpError},
};

/// A VM's outline at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    /// `prelaunch`, `running`, `paused`, …
    pub(super) run_state: String,
    /// The UUID, if QEMU was given one.
    pub(super) uuid: Option<VmId>,
    pub(super) machine: String,
    /// Bytes, hot-plugged memory included.
    pub(super) memory: u64,
    pub(super) cpus: u32,
    pub(super) accelerator: String,
    pub(super) guest_cid: Option<u64>,
    /// A vsock device whose back end is another process, which alone knows the CID.
    pub(super) vhost_user_vsock: bool,
    /// `id:type`, in ascending order.
    pub(super) devices: Vec<String>,
}

impl Facts {
    pub(super) async fn ask(qmp: &Qmp) -> Result<Self, QmpError> {
        let uuid = qmp.execute(qmp::query_uuid {}).await?;
        let memory = qmp.execute(qmp::query_memory_size_summary {}).await?;
        let cpus: Vec<serde::de::IgnoredAny> = qmp.call("query-cpus-fast", json!({})).await?;
        let kvm = qmp.execute(qmp::query_kvm {}).await?;
        let mut facts = Self {
            run_state: run_state(qmp).await?,
            uuid: uuid.UUID.parse().ok().filter(|id: &VmId| !id.0.is_nil()),
            machine: Machine::ask(qmp).await?.machine,
            memory: memory.base_memory.saturating_add(memory.plugged_memory.unwrap_or(0)),
            cpus: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
            accelerator: if kvm.enabled { "kvm" } else { "tcg" }.to_owned(),
            guest_cid: None,
            vhost_user_vsock: false,
            devices: Vec::new(),
        };
        facts.ask_devices(qmp).await?;
        Ok(facts)
    }

    async fn ask_devices(&mut self, qmp: &Qmp) -> Result<(), QmpError> {
        for folder in ["/machine/peripheral", "/machine/peripheral-anon"] {
            for child in qmp.execute(qmp::qom_list { path: folder.to_owned() }).await? {
                let kind = child.type_.strip_prefix("child<").and_then(|k| k.strip_suffix('>'));
                let Some(kind) = kind else { continue };
                self.devices.push(format!("{}:{kind}", child.name));
                if kind.starts_with("vhost-vsock-") {
                    let path = format!("{folder}/{}", child.name);
                    let cid = qmp.execute(qmp::qom_get { path, property: "guest-cid".to_owned() }).await?;
                    self.guest_cid = cid.as_u64();
                }
                self.vhost_user_vsock |= kind.starts_with("vhost-user-vsock-");
            }
        }
        self.devices.sort();
        Ok(())
    }
}

/// QEMU's run state. Not by `qapi`'s type: newer versions may know more states.
pub(super) async fn run_state(qmp: &Qmp) -> Result<String, QmpError> {
    #[derive(Deserialize)]
    struct Status {
        status: String,
    }
    Ok(qmp.call::<Status>("query-status", json!({})).await?.status)
}
