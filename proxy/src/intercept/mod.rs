//! A monitor for many: management tools connect to a socket of the proxy, which holds QEMU's only monitor itself.
//!
//! # One door
//! Each intercepted VM has a socket `NAME.sock` in the folder of monitors, a [`Door`]. What is served there is QMP as
//! QEMU serves it (QEMU `docs/interop/qmp-spec`), to several clients at a time: greeting with QEMU's own version,
//! negotiation, ids of any kind, QEMU's errors, events to all in QEMU's order, out-of-band commands, descriptors with
//! `getfd` and `add-fd`.
//!
//! # One client
//! *connected*: greeted; only `qmp_capabilities` is answered. → *negotiated*: gets events. Commands are run one after
//! the other as they come; where it enabled `oob`, those with `exec-oob` beside them. Each client has a queue of its
//! own: answers wait in it for their turn, and a client for whose events there is no room any more is ended. What is no
//! QMP is answered with an error, and the next line counts.
//!
//! # One command
//! - QEMU's schema does not have it → `CommandNotFound`.
//! - The configuration forbids it → logged as refused, `GenericError`.
//! - It is known to change nothing → passed.
//! - Else it counts as changing something. As long as the VM is being measured it waits; what would let the VM run is
//!   refused until the gate has opened. Files that it names are measured; if one cannot be, that is logged and told,
//!   and QEMU does not see the command. Then the event `monitor-command` goes to log and TPM, **and only then** the
//!   command to QEMU. When QEMU has answered, the session compares the VM with what it knows, so that what the command
//!   did is logged, too.
//!
//! A command is read once, strictly, and QEMU gets it as it was understood here, not as the client wrote it: what was
//! measured and what QEMU does cannot differ by reading.
//!
//! # Limits
//! See [`Limits`]. A client that floods is slowed down by the log: each of its commands waits for its record.

mod client;
mod commands;
mod door;
mod files;
mod frame;
#[cfg(fuzzing)]
pub mod fuzzing;
mod measured;
mod outbound;
mod pass;
mod request;
mod schema;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, time::Duration};

pub use door::{Door, DoorStatus};
pub(crate) use door::{Gate, Hands, Vm};

/// How monitors are served.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The folder of sockets.
    pub dir: PathBuf,
    /// Names of VMs that are intercepted; `*` stands for any characters.
    pub vms: Vec<String>,
    /// Commands that are refused, with the same wildcard.
    pub refuse: Vec<String>,
    /// What clients may use.
    pub limits: Limits,
}

/// What clients of one monitor may use.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Clients at a time.
    pub clients: usize,
    /// The longest command in bytes.
    pub command: usize,
    /// Brackets within one another in a command. QEMU allows 1,024; our reader 128, one of which is ours.
    pub nesting: usize,
    /// How long a client may leave a line unread before it is ended.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { clients: 16, command: 1024 * 1024, nesting: 100, stall: Duration::from_secs(60) }
    }
}

/// Members of commands' arguments in a QEMU's schema that look like files and that we have no rule for.
#[cfg(test)]
pub(crate) async fn members_without_rule(qmp: &crate::qmp::Qmp) -> Vec<String> {
    let entities: Result<Vec<schema::Entity>, _> = qmp.call("query-qmp-schema", serde_json::json!({})).await;
    let schema = schema::Schema::new(&entities.unwrap_or_default());
    let members =
        |name: &str| schema.command(name).into_iter().flat_map(|c| c.unknown_files.clone()).collect::<Vec<_>>();
    schema.names().flat_map(|name| members(name).into_iter().map(move |m| format!("{name} {m}"))).collect()
}

impl Settings {
    /// Whether a VM is intercepted.
    pub(crate) fn intercepts(&self, name: &str) -> bool {
        self.vms.iter().any(|pattern| crate::vm::name_fits(pattern, name))
    }

    /// Whether a command is refused.
    fn refuses(&self, command: &str) -> bool {
        self.refuse.iter().any(|pattern| crate::vm::name_fits(pattern, command))
    }
}
