//! Other ways to command a QEMU than the monitor that the proxy holds: monitors, debuggers, test interfaces.
//!
//! QEMU tells its character devices. A monitor given by `-qmp`, `-monitor` or by default has one labelled
//! `compat_monitorN`, the debugger's is `gdb` (also when the human monitor's `gdbserver` opened it later); for others the
//! arguments say that a monitor sits on them (`-mon`, `-serial mon:…`, `-nographic`).

use std::{collections::BTreeSet, os::unix::fs::MetadataExt as _, path::Path};

use serde::Deserialize;
use serde_json::json;

use crate::{
    measure::Arguments,
    qmp::{Qmp, QmpError},
};

/// The most that are named, and the longest name in bytes.
const MAX_COUNT: usize = 64;
const MAX_WORDS: usize = 512;

#[derive(Debug, Clone, Deserialize)]
struct Chardev {
    label: String,
    filename: String,
}

/// All of them in words, in ascending order. `own` is the path of the monitor that the proxy holds, `dir` QEMU's working
/// directory.
pub(super) async fn ask(qmp: &Qmp, given: &Arguments, own: &Path, dir: &Path) -> Result<Vec<String>, QmpError> {
    let chardevs: Vec<Chardev> = qmp.call("query-chardev", json!({})).await?;
    let id = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let own = id(own);
    let is_own = |path: &str| own.is_some() && id(&dir.join(path)) == own;
    let mut words = in_words(&chardevs, given, is_own);
    if let Err(why) = qmp.peer_socket() {
        words.insert(format!("unknown: who holds the proxy's own connection is not told by the kernel: {why}"));
    }
    Ok(words.into_iter().take(MAX_COUNT).collect())
}

/// Whether a character device in the words of [`super::facts::Facts`] (`label:type`) commands QEMU.
pub(super) fn is_commander(chardev: &str) -> bool {
    let label = chardev.split(':').next().unwrap_or_default();
    kind(label).is_some()
}

/// What a label says of itself.
fn kind(label: &str) -> Option<&'static str> {
    match label {
        "gdb" => Some("debugger"),
        "qtest" => Some("test interface"),
        _ if label.starts_with("compat_monitor") => Some("monitor"),
        _ => None,
    }
}

fn in_words(chardevs: &[Chardev], given: &Arguments, is_own: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let monitors: Vec<String> =
        given.given.iter().filter(|g| g.name == "mon").filter_map(|g| g.get("chardev")).collect();
    // A console and a monitor share one, and somebody can switch between them.
    let shared = given.names.contains("nographic") || given.given.iter().any(|g| g.value.starts_with(b"mon:"));
    let mut words = BTreeSet::new();
    for Chardev { label, filename } in chardevs {
        // The debugger's own ear inside of QEMU.
        if filename == "gdb" && label.starts_with('#') {
            continue;
        }
        let kind = match kind(label) {
            Some(kind) => kind,
            None if monitors.contains(label) => "monitor",
            None if filename == "mux" && shared => "monitor on a console",
            None => continue,
        };
        let address = filename.strip_prefix("disconnected:").unwrap_or(filename);
        let address = address.split(" <-> ").next().unwrap_or(address);
        let path = address.strip_prefix("unix:").map(|rest| rest.split(",server").next().unwrap_or(rest));
        if kind != "monitor" || !path.is_some_and(&is_own) {
            words.insert(cut(format!("{kind} {label}: {address}")));
        }
    }
    words
}

fn cut(mut words: String) -> String {
    if words.len() > MAX_WORDS {
        let end = (0..=MAX_WORDS).rev().find(|&at| words.is_char_boundary(at)).unwrap_or(0);
        words.truncate(end);
    }
    words
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn words(args: &[&str], chardevs: &[(&str, &str)]) -> Vec<String> {
        let chardev =
            |(label, filename): &(&str, &str)| Chardev { label: (*label).into(), filename: (*filename).into() };
        let chardevs: Vec<_> = chardevs.iter().map(chardev).collect();
        in_words(&chardevs, &Arguments::parse(args), |path| path == "own.qmp").into_iter().collect()
    }

    #[test]
    fn all_ways_to_command_a_qemu() {
        let chardevs = [
            ("#chr022", "gdb"),
            ("compat_monitor1", "disconnected:unix:two.qmp,server=on"),
            ("gdb", "disconnected:tcp:0.0.0.0:1234,server=on"),
            ("serial0", "mux"),
            ("compat_monitor0", "unix:own.qmp,server=on"),
            ("serial0-base", "disconnected:unix:ser.sock,server=on"),
            ("m", "disconnected:tcp:127.0.0.1:4444,server=on <-> 127.0.0.1:9"),
            ("vs0", "unix:vhost.sock"),
            ("qtest", "unix:q"),
        ];
        assert_eq!(
            words(&["qemu", "-serial", "mon:unix:ser.sock", "-mon", "m,mode=control"], &chardevs),
            [
                "debugger gdb: tcp:0.0.0.0:1234,server=on",
                "monitor compat_monitor1: unix:two.qmp,server=on",
                "monitor m: tcp:127.0.0.1:4444,server=on",
                "monitor on a console serial0: mux",
                "test interface qtest: unix:q",
            ]
        );
        // A console alone is none.
        assert_eq!(words(&["qemu"], &[("serial0", "mux"), ("m", "x")]), [""; 0]);
        assert_eq!(words(&["qemu", "-nographic"], &[("serial0", "mux")]), ["monitor on a console serial0: mux"]);
    }

    #[test]
    fn labels_of_commanders() {
        for (chardev, is) in [
            ("gdb:chardev-socket", true),
            ("compat_monitor3:chardev-vc", true),
            ("gdbx:chardev-file", false),
            ("", false),
        ] {
            assert_eq!(is_commander(chardev), is, "{chardev}");
        }
    }

    #[test]
    fn long_words_are_cut() {
        assert_eq!(cut("ä".repeat(400)).len(), MAX_WORDS);
    }
}
