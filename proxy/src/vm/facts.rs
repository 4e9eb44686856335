//! What QEMU tells about a VM as a whole.
//!
//! What cannot change while a process lives is asked once. The rest is one look: all commands are handed to QEMU at
//! once and answered in their order, so that a look is one round trip, and at most two where something new must be asked
//! for its details.

use std::collections::BTreeMap;

use onequote_evidence::id::VmId;
use qapi::qmp;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    measure::{BlockGraph, Content, Machine, Told, slot_name},
    qmp::{Qmp, QmpError},
};

/// Folders of QEMU's object tree that hold devices.
const DEVICES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Objects that reach out of QEMU, and the property that says where to.
const REACHING: [(&str, &str); 5] = [
    ("memory-backend-file", "mem-path"),
    ("filter-dump", "file"),
    ("rng-random", "filename"),
    ("input-linux", "evdev"),
    ("can-host-socketcan", "if"),
];

/// A VM's outline at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    /// `prelaunch`, `running`, `paused`, …
    pub(super) run_state: String,
    /// The UUID, if QEMU was given one.
    pub(super) uuid: Option<VmId>,
    /// The name that it was given; empty when there is none.
    pub(super) name: String,
    /// The machine, and what it says it loaded.
    pub(super) machine: Machine,
    /// Bytes, hot-plugged memory included.
    pub(super) memory: u64,
    pub(super) cpus: u32,
    /// Whether they are x86.
    pub(super) x86: bool,
    pub(super) accelerator: String,
    pub(super) guest_cid: Option<u64>,
    /// A vsock device whose back end is another process, which alone knows the CID.
    pub(super) vhost_user_vsock: bool,
    /// `id:type`, in ascending order.
    pub(super) devices: Vec<String>,
    /// `id:type`, and behind it the file of those that have one, in ascending order.
    pub(super) objects: Vec<String>,
    /// `id:type`, in ascending order.
    pub(super) chardevs: Vec<String>,
    /// `id:type`, in ascending order.
    pub(super) netdevs: Vec<String>,
    /// Block nodes that others can reach: `id:type node`, in ascending order.
    pub(super) exports: Vec<String>,
    /// Drives whose medium can be changed, by their backends' names.
    pub(super) drives: BTreeMap<String, Drive>,
    /// What is in each slot, as the guest sees it. Empty when the block graph is not understood.
    pub(super) contents: BTreeMap<String, Content>,
}

/// A drive whose medium can be changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Drive {
    /// Its slot, which is that of its medium.
    pub(super) slot: String,
    pub(super) tray_open: bool,
}

impl Facts {
    /// Asks for everything but the accelerator; and for the block graph, which belongs to the same look.
    pub(super) async fn ask(qmp: &Qmp) -> Result<(Self, BlockGraph), QmpError> {
        let uuid = qmp.execute(qmp::query_uuid {});
        let name = qmp.call::<Value>("query-name", json!({}));
        let nothing = Self::nothing();
        let look = nothing.look(qmp, Machine::ask(qmp));
        let (uuid, name, (look, graph)) = tokio::try_join!(uuid, name, look)?;
        let uuid = uuid.UUID.parse().ok().filter(|id: &VmId| !id.0.is_nil());
        let name = name["name"].as_str().unwrap_or_default().to_owned();
        Ok((Self { uuid, name, ..look }, graph))
    }

    /// A VM of which nothing is known.
    pub(super) fn nothing() -> Self {
        Self {
            run_state: String::new(),
            uuid: None,
            name: String::new(),
            machine: Machine::default(),
            memory: 0,
            cpus: 0,
            x86: false,
            accelerator: String::new(),
            guest_cid: None,
            vhost_user_vsock: false,
            devices: Vec::new(),
            objects: Vec::new(),
            chardevs: Vec::new(),
            netdevs: Vec::new(),
            exports: Vec::new(),
            drives: BTreeMap::new(),
            contents: BTreeMap::new(),
        }
    }

    /// Asks again for what can change; and for the block graph, which belongs to the same look.
    pub(super) async fn again(&self, qmp: &Qmp) -> Result<(Self, BlockGraph), QmpError> {
        self.look(qmp, self.machine.again(qmp)).await
    }

    /// What QEMU said of itself, for what is measured.
    pub(super) fn told(&self) -> Told {
        let Self { machine, uuid, name, x86, .. } = self.clone();
        Told { machine, uuid, name, x86 }
    }

    async fn look(
        &self,
        qmp: &Qmp,
        machine: impl Future<Output = Result<Machine, QmpError>>,
    ) -> Result<(Self, BlockGraph), QmpError> {
        let list = async |path: &'static str| match qmp.execute(qmp::qom_list { path: path.to_owned() }).await {
            // A folder of QEMU's object tree comes with the first object in it.
            Err(e) if e.is_not_found() => Ok(Vec::new()),
            other => other,
        };
        let exports = async { optional(qmp.call::<Vec<Export>>("query-block-exports", json!({})).await) };
        let (run_state, memory, cpus, graph, drives, exports, netdevs, devices, anonymous, objects, chardevs, machine) =
            tokio::try_join!(
                run_state(qmp),
                qmp.execute(qmp::query_memory_size_summary {}),
                qmp.call::<Vec<Cpu>>("query-cpus-fast", json!({})),
                BlockGraph::ask(qmp),
                qmp.call::<Vec<Block>>("query-block", json!({})),
                exports,
                netdevs(qmp),
                list(DEVICES[0]),
                list(DEVICES[1]),
                list("/objects"),
                list("/chardevs"),
                machine,
            )?;
        let mut facts = Self {
            run_state,
            memory: memory.base_memory.saturating_add(memory.plugged_memory.unwrap_or(0)),
            cpus: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
            x86: cpus.iter().any(|cpu| matches!(cpu.target.as_str(), "x86_64" | "i386")),
            machine,
            devices: Vec::new(),
            objects: Vec::new(),
            chardevs: children(&chardevs).map(|(name, kind)| format!("{name}:{kind}")).collect(),
            netdevs,
            exports: exports.into_iter().map(|e| format!("{}:{} {}", e.id, e.kind, e.node)).collect(),
            drives: drives.into_iter().filter_map(Block::drive).collect(),
            contents: graph.contents().unwrap_or_default(),
            guest_cid: None,
            vhost_user_vsock: false,
            ..self.clone()
        };
        for (folder, list) in DEVICES.into_iter().zip([&devices, &anonymous]) {
            for (name, kind) in children(list) {
                facts.add_device(qmp, self, folder, name, kind).await?;
            }
        }
        for (name, kind) in children(&objects) {
            let object = facts.object(qmp, self, name, kind).await?;
            facts.objects.push(object);
        }
        for list in
            [&mut facts.devices, &mut facts.objects, &mut facts.chardevs, &mut facts.netdevs, &mut facts.exports]
        {
            list.sort();
        }
        Ok((facts, graph))
    }

    async fn add_device(
        &mut self,
        qmp: &Qmp,
        before: &Self,
        folder: &str,
        name: &str,
        kind: &str,
    ) -> Result<(), QmpError> {
        let device = format!("{name}:{kind}");
        if kind.starts_with("vhost-vsock-") {
            // A device's CID cannot be changed.
            self.guest_cid = match before.guest_cid.filter(|_| before.devices.contains(&device)) {
                Some(cid) => Some(cid),
                None => {
                    let (path, property) = (format!("{folder}/{name}"), "guest-cid".to_owned());
                    qmp.execute(qmp::qom_get { path, property }).await?.as_u64()
                }
            };
        }
        self.vhost_user_vsock |= kind.starts_with("vhost-user-vsock-");
        self.devices.push(device);
        Ok(())
    }

    /// An object in words. What it reaches cannot be changed once it is there.
    async fn object(&self, qmp: &Qmp, before: &Self, name: &str, kind: &str) -> Result<String, QmpError> {
        let short = format!("{name}:{kind}");
        let Some((_, property)) = REACHING.into_iter().find(|(reaching, _)| *reaching == kind) else {
            return Ok(short);
        };
        let same = |object: &&String| object.strip_prefix(&short).is_some_and(|rest| rest.starts_with(' '));
        if let Some(known) = before.objects.iter().find(same) {
            return Ok(known.clone());
        }
        let get = qmp::qom_get { path: format!("/objects/{name}"), property: property.to_owned() };
        match qmp.execute(get).await {
            Ok(Value::String(where_to)) => Ok(format!("{short} {where_to}")),
            Ok(_) | Err(QmpError::Refused { .. }) => Ok(short),
            Err(e) => Err(e),
        }
    }

    /// What the machine says it loaded, under the word for a change of it.
    pub(super) fn loaded(&self) -> [(&'static str, &str); 4] {
        let Machine { kernel, initrd, append, firmware, .. } = &self.machine;
        [("kernel", kernel), ("initrd", initrd), ("kernel-cmdline", append), ("firmware", firmware)]
    }

    /// The tags of snapshots from which the VM could be put back, each once.
    pub(super) fn states_saved(&self) -> Vec<&str> {
        let all = self.contents.values().flat_map(|c| &c.snapshots).filter(|s| s.vm_state > 0);
        let mut tags: Vec<&str> = all.map(|s| s.name.as_str()).collect();
        tags.sort_unstable();
        tags.dedup();
        tags
    }
}

/// Names and types of an object's children.
fn children(list: &[qmp::ObjectPropertyInfo]) -> impl Iterator<Item = (&str, &str)> {
    list.iter().filter_map(|child| {
        let kind = child.type_.strip_prefix("child<").and_then(|k| k.strip_suffix('>'))?;
        Some((child.name.as_str(), kind))
    })
}

/// QEMU's run state. Not by `qapi`'s type: newer versions may know more states.
pub(super) async fn run_state(qmp: &Qmp) -> Result<String, QmpError> {
    #[derive(Deserialize)]
    struct Status {
        status: String,
    }
    Ok(qmp.call::<Status>("query-status", json!({})).await?.status)
}

/// An answer, or nothing where QEMU was built without the command.
fn optional<T: Default>(answer: Result<T, QmpError>) -> Result<T, QmpError> {
    match answer {
        Err(e) if e.is_unknown_command() => Ok(T::default()),
        other => other,
    }
}

/// Network back ends. No QMP command of QEMU 7.2 lists them; the human monitor's `info network` does.
async fn netdevs(qmp: &Qmp) -> Result<Vec<String>, QmpError> {
    let command = json!({"command-line": "info network"});
    let text: String = optional(qmp.call("human-monitor-command", command).await)?;
    Ok(parse_netdevs(&text))
}

/// Lines `NAME: index=N,type=TYPE,…`, those of a NIC's peer indented behind a backslash; and below a line `hub N` its ports,
/// ` \\ NAME`, with a peer's line behind `: ` (QEMU `net/net.c`, `hmp_info_network`; `net/hub.c`, `net_hub_info`).
fn parse_netdevs(text: &str) -> Vec<String> {
    let mut netdevs = Vec::new();
    let mut in_hub = false;
    for line in text.lines() {
        let port = line.strip_prefix(" \\ ");
        in_hub = if port.is_some() { in_hub } else { line.starts_with("hub ") };
        let mut client = port.unwrap_or(line);
        if in_hub && let Some(port) = port {
            let (name, peer) = port.split_once(": ").unwrap_or((port.trim_end(), ""));
            netdevs.push(format!("{name}:hubport"));
            client = peer;
        }
        let Some((name, rest)) = client.split_once(": index=") else { continue };
        let kind = rest.split_once("type=").and_then(|(_, kind)| kind.split(',').next()).unwrap_or_default().trim();
        if kind != "nic" {
            netdevs.push(format!("{name}:{kind}"));
        }
    }
    netdevs
}

/// What is needed of `query-cpus-fast`. `qapi`'s type knows the architectures of one version.
#[derive(Deserialize)]
struct Cpu {
    #[serde(default)]
    target: String,
}

#[derive(Deserialize)]
struct Export {
    id: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(rename = "node-name")]
    node: String,
}

/// What is needed of `query-block`.
#[derive(Deserialize)]
struct Block {
    device: String,
    #[serde(default)]
    qdev: String,
    removable: bool,
    #[serde(default)]
    tray_open: bool,
    inserted: Option<Inserted>,
}

#[derive(Deserialize)]
struct Inserted {
    #[serde(rename = "node-name", default)]
    node: String,
}

impl Block {
    fn drive(self) -> Option<(String, Drive)> {
        let backend = if self.device.is_empty() { self.qdev } else { self.device };
        let root = self.inserted.map(|medium| medium.node).unwrap_or_default();
        let slot = slot_name(&backend, &root);
        self.removable.then_some((backend, Drive { slot, tray_open: self.tray_open }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn netdevs_are_read_from_the_human_monitors_words() {
        let text = "hub 0\r\n \\ port: nic: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:57\r\n \\ alone\r\n \\ \
                    other: tap1: index=0,type=tap,ifname=tap1\r\nnic: \
                    index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \\ n0: \
                    index=0,type=user,net=10.0.2.0,restrict=off\r\nn1: index=0,type=tap,ifname=tap0\r\n";
        let netdevs = ["port:hubport", "alone:hubport", "other:hubport", "tap1:tap", "n0:user", "n1:tap"];
        assert_eq!(parse_netdevs(text), netdevs);
        for strange in ["", "x", ": index=", "a: index=0,typo=b", "\\\\\\", "type=: index=type="] {
            assert!(parse_netdevs(strange).len() <= 1, "{strange}");
        }
    }
}
