//! Which commands change nothing, which let a VM run, and which arguments are secrets. Reviewed with the schemas of QEMU 7.2
//! and 10.0.

use serde_json::{Map, Value};

use super::door::Hands;

/// Commands that change nothing and whose names do not begin with `query-` or `x-query-`.
const READ_ONLY: [&str; 9] = [
    "device-list-properties",
    "qom-get",
    "qom-list",
    "qom-list-get",
    "qom-list-properties",
    "qom-list-types",
    "trace-event-get-state",
    "x-debug-block-dirty-bitmap-sha256",
    "x-debug-query-block-graph",
];

/// Commands whose names begin with `query-` and that do more than tell. `query-rx-filter` has QEMU raise
/// NIC_RX_FILTER_CHANGED again, which changes no VM; the attestation reports are made, not kept.
const NOT_READ_ONLY: [&str; 0] = [];

/// Commands that can let a VM run that waits under `-S`, the human monitor among them: it has them all.
const LETS_RUN: [&str; 4] = ["cont", "human-monitor-command", "replay-break", "replay-seek"];

/// Commands that may change something and leave alone what a dirty bitmap tells of images: the files' lengths, the nodes, the
/// bitmaps; nor do they have QEMU write files past its block layer, as `pmemsave` and some objects do. What a device or a
/// guest then writes is told. Any other command may do what is not.
const LEAVE_IMAGES: [&str; 27] = [
    "add-fd",
    "balloon",
    "block_set_io_throttle",
    "change-vnc-password",
    "client_migrate_info",
    "closefd",
    "cont",
    "device_add",
    "device_del",
    "expire_password",
    "getfd",
    "inject-nmi",
    "input-send-event",
    "netdev_del",
    "object-del",
    "quit",
    "remove-fd",
    "rtc-reset-reinjection",
    "send-key",
    "set-action",
    "set_link",
    "set_password",
    "stop",
    "system_powerdown",
    "system_reset",
    "system_wakeup",
    "watchdog-set-action",
];

/// Commands and the members of their arguments that are secrets, and stand in the log as [`SECRET`].
const SECRETS: [(&str, &str); 5] = [
    ("block_passwd", "password"),
    ("change-vnc-password", "password"),
    ("object-add", "data"),
    ("set_password", "password"),
    ("sev-inject-launch-secret", "secret"),
];

/// What stands in the log in place of a secret: even its digest would help to guess it.
pub(super) const SECRET: &str = "(secret)";

/// Whether the command is known to change nothing. QEMU's developers name commands that only tell `query-…`
/// (`docs/devel/qapi-code-gen`, "naming rules and reserved names"); of the others only those in our table count.
pub(super) fn is_read_only(command: &str) -> bool {
    let query = command.strip_prefix("x-").unwrap_or(command).starts_with("query-");
    (query && !NOT_READ_ONLY.contains(&command)) || READ_ONLY.contains(&command)
}

/// Whether the command can let a VM run.
pub(super) fn lets_run(command: &str) -> bool {
    LETS_RUN.contains(&command)
}

/// What a command that may change something takes into its client's own hands.
pub(super) fn hands(command: &str, arguments: &Map<String, Value>) -> Vec<Hands> {
    if command == "set-action" {
        let taken = [("shutdown", Hands::Shutdown), ("panic", Hands::Panic)];
        return taken
            .into_iter()
            .filter(|(member, _)| arguments.contains_key(*member))
            .map(|(_, hands)| hands)
            .collect();
    }
    if LEAVE_IMAGES.contains(&command) { Vec::new() } else { vec![Hands::Images(command.to_owned())] }
}

/// The command and, if it is a transaction, the commands that it is made of.
pub(super) fn parts<'a>(command: &'a str, arguments: &'a Map<String, Value>) -> Vec<(&'a str, &'a Map<String, Value>)> {
    let mut parts = vec![(command, arguments)];
    if command == "transaction" {
        let actions = arguments.get("actions").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        parts.extend(actions.iter().filter_map(|a| Some((a.get("type")?.as_str()?, a.get("data")?.as_object()?))));
    }
    parts
}

/// The arguments without secrets.
pub(super) fn without_secrets(command: &str, arguments: &Map<String, Value>) -> Map<String, Value> {
    let mut arguments = arguments.clone();
    for (_, member) in SECRETS.iter().filter(|(name, _)| *name == command) {
        if let Some(value) = arguments.get_mut(*member) {
            *value = SECRET.into();
        }
    }
    arguments
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_not_known_changes_something() {
        for (command, read_only) in [
            ("query-block", true),
            ("x-query-roms", true),
            ("qom-get", true),
            ("qom-set", false),
            ("blockdev-add", false),
            ("future-command", false),
            ("x-future", false),
            ("requery-x", false),
            ("screendump", false),
            ("ringbuf-read", false),
            ("human-monitor-command", false),
        ] {
            assert_eq!(is_read_only(command), read_only, "{command}");
        }
    }

    #[test]
    fn secrets_stay_out() {
        let arguments = |v: Value| v.as_object().unwrap().clone();
        let given = arguments(json!({"qom-type": "secret", "id": "s", "data": "hunter2"}));
        let shown = Value::Object(without_secrets("object-add", &given)).to_string();
        assert!(!shown.contains("hunter2") && shown.contains(SECRET), "{shown}");
        assert_eq!(without_secrets("object-del", &given), given);
    }

    #[test]
    fn what_a_bitmap_may_not_tell_is_in_the_clients_hands() {
        let nothing = Map::new();
        for command in ["cont", "stop", "device_add", "quit"] {
            assert_eq!(hands(command, &nothing), [], "{command}");
        }
        for command in [
            "block_resize",
            "block-dirty-bitmap-remove",
            "pmemsave",
            "object-add",
            "transaction",
            "human-monitor-command",
            "future",
        ] {
            assert_eq!(hands(command, &nothing), [Hands::Images(command.to_owned())]);
        }
        let actions = json!({"shutdown": "pause", "panic": "none", "reboot": "reset"}).as_object().unwrap().clone();
        assert_eq!(hands("set-action", &actions), [Hands::Shutdown, Hands::Panic]);
        assert_eq!(hands("set-action", &nothing), []);
    }

    #[test]
    fn a_transaction_is_its_actions() {
        let arguments =
            json!({"actions": [{"type": "blockdev-snapshot-sync", "data": {"device": "d"}}, {"type": 5}, 7]});
        let arguments = arguments.as_object().unwrap().clone();
        let names: Vec<_> = parts("transaction", &arguments).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["transaction", "blockdev-snapshot-sync"]);
        assert_eq!(parts("stop", &arguments).len(), 1);
    }
}
