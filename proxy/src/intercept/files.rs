//! Which files a command names: a reviewed table of commands and members, held against the schemas of QEMU
//! 7.2 and 10.0. A member that looks like a file and is not in it is measured if there is such a file.
//!
//! What a command writes (`screendump`, `pmemsave`, dumps, new images) is not there to be measured. Neither are
//! sockets, devices without content (`/dev/urandom`), folders, and files with host secrets (`secret`, `tls-creds-…`),
//! whose digests would help to guess them. Everything else that QEMU reads and that can be measured is. A node that is
//! opened and is no local file cannot be measured, as at a VM's start.

use serde_json::{Map, Value};

/// Protocols whose content is a local file (QEMU `block/file-posix.c`).
const FILE_DRIVERS: [&str; 3] = ["file", "host_cdrom", "host_device"];

/// Drivers that hold nothing themselves: formats and filters, whose content is that of the nodes below.
const UPPER_DRIVERS: [&str; 25] = [
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "bochs",
    "cloop",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "dmg",
    "luks",
    "parallels",
    "preallocate",
    "qcow",
    "qcow2",
    "qed",
    "quorum",
    "raw",
    "replication",
    "snapshot-access",
    "throttle",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
];

/// How often a name may hold another name in JSON.
const DEEPEST: u8 = 4;

/// The most files of one command.
pub(super) const MAX_FILES: usize = 256;

/// A file that a command names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Named {
    /// A disk image, or a part of one, at this path from QEMU's working directory.
    Image(String),
    /// Another file at this path.
    Path(String),
    /// The same, then in QEMU's data directories.
    Data(String),
    /// Memory: a file that is there is measured, QEMU makes one that is not, a folder has no content.
    Memory(String),
    /// At this path if there is a file: a member that we have no rule for.
    Maybe(String),
    /// The backing file of the image at this node or device, from that image's folder.
    Backing {
        /// The file.
        file: String,
        /// The node.
        node: String,
    },
    /// Something that cannot be measured, and why.
    Not(String),
}

/// Commands all of whose members are in the rules of [`named`], or are looked at there and need none.
const WHOLE_COMMANDS: [&str; 13] = [
    "blockdev-add",
    "blockdev-change-medium",
    "blockdev-reopen",
    "blockdev-snapshot-sync",
    "change-backing-file",
    "chardev-add",
    "chardev-change",
    "device_add",
    "migrate-incoming",
    "netdev_add",
    "object-add",
    "transaction",
    "xen-load-devices-state",
];

/// Members of other commands that look like files and need no rule.
const NO_RULE: [(&str, &str); 39] = [
    // Written.
    ("blockdev-create", "backing-file"),
    ("blockdev-create", "config"),
    ("blockdev-create", "data-file"),
    ("blockdev-create", "dir"),
    ("blockdev-create", "file"),
    ("blockdev-create", "filename"),
    ("blockdev-create", "log"),
    ("blockdev-create", "logfile"),
    ("blockdev-create", "path"),
    ("blockdev-create", "target"),
    ("dumpdtb", "filename"),
    ("memsave", "filename"),
    ("migrate", "filename"),
    ("migrate", "path"),
    ("migrate", "uri"),
    ("pmemsave", "filename"),
    ("screendump", "filename"),
    ("xen-save-devices-state", "filename"),
    // Measured where it is there already.
    ("drive-backup", "target"),
    ("drive-mirror", "target"),
    // Names in an image's header; nothing is opened.
    ("block-commit", "backing-file"),
    ("block-stream", "backing-file"),
    // Nodes and bitmaps.
    ("block-dirty-bitmap-merge", "target"),
    ("blockdev-backup", "target"),
    ("blockdev-mirror", "target"),
    // Sockets, mount points, paths of objects.
    ("block-export-add", "mountpoint"),
    ("migrate-recover", "uri"),
    ("qom-set", "path"),
    ("cxl-add-dynamic-capacity", "path"),
    ("cxl-inject-correctable-error", "path"),
    ("cxl-inject-dram-event", "path"),
    ("cxl-inject-general-media-event", "path"),
    ("cxl-inject-memory-module-event", "path"),
    ("cxl-inject-poison", "path"),
    ("cxl-inject-uncorrectable-errors", "path"),
    ("cxl-release-dynamic-capacity", "path"),
    ("block-export-add", "path"),
    ("display-update", "path"),
    ("nbd-server-start", "path"),
];

/// Whether a member's name says that it is a file.
pub(super) fn looks_like_one(member: &str) -> bool {
    let words = [
        "file",
        "filename",
        "path",
        "uri",
        "target",
        "config",
        "dir",
        "log",
        "logfile",
        "in",
        "out",
        "script",
        "downscript",
        "helper",
        "romfile",
        "tftp",
        "smb",
        "bootfile",
        "mountpoint",
        "sock",
        "evdev",
    ];
    let word = |part: &str| words.contains(&part) || part.ends_with("file");
    word(member) || ["-file", "-path", "_path", "-uri", "-dir"].iter().any(|end| member.ends_with(end))
}

/// Whether the table knows what that member of that command is.
pub(super) fn is_reviewed(command: &str, member: &str) -> bool {
    super::commands::is_read_only(command) || WHOLE_COMMANDS.contains(&command) || NO_RULE.contains(&(command, member))
}

/// The files that a command names. `unknown` are members that QEMU's schema has and our table does not.
pub(super) fn named<'a>(
    command: &str,
    arguments: &Map<String, Value>,
    unknown: impl Fn(&str) -> bool + 'a,
) -> Vec<Named> {
    let mut found = Vec::new();
    for (command, arguments) in super::commands::parts(command, arguments) {
        by_rule(command, arguments, &mut found);
    }
    for_texts(arguments, &mut |member, text| {
        if unknown(member) {
            found.push(Named::Maybe(text.to_owned()));
        }
    });
    found
}

fn by_rule(command: &str, arguments: &Map<String, Value>, found: &mut Vec<Named>) {
    let text = |name: &str| arguments.get(name).and_then(Value::as_str).filter(|t| !t.is_empty());
    let path = |name: &str| text(name).map(|t| Named::Path(t.to_owned()));
    let as_drive = |name: &str| text(name).map(|t| legacy(t, DEEPEST)).unwrap_or_default();
    match command {
        "blockdev-add" => tree(arguments, found),
        "blockdev-reopen" => {
            let options = arguments.get("options").and_then(Value::as_array);
            options.into_iter().flatten().filter_map(Value::as_object).for_each(|o| tree(o, found));
        }
        "blockdev-change-medium" => {
            found.extend(as_drive("filename"));
        }
        // Unless the image is there already, it is made.
        "blockdev-snapshot-sync" if text("mode") == Some("existing") => {
            found.extend(as_drive("snapshot-file"));
        }
        "drive-mirror" | "drive-backup" if text("mode") == Some("existing") => {
            found.extend(as_drive("target"));
        }
        "change-backing-file" => found.extend(text("backing-file").map(|file| Named::Backing {
            file: file.to_owned(),
            node: text("image-node-name").unwrap_or_default().to_owned(),
        })),
        "object-add" => match text("qom-type") {
            Some("memory-backend-file") => found.extend(text("mem-path").map(|t| Named::Memory(t.to_owned()))),
            Some("authz-listfile" | "authz-list-file") => found.extend(path("filename")),
            Some("sev-guest") => found.extend(["dh-cert-file", "session-file"].into_iter().filter_map(path)),
            _ => {}
        },
        "device_add" => {
            found.extend(text("romfile").map(|t| Named::Data(t.to_owned())));
            if matches!(text("driver"), Some("loader" | "guest-loader")) {
                found.extend(["file", "kernel", "initrd"].into_iter().filter_map(path));
            }
        }
        "netdev_add" => scripts(arguments, found),
        "chardev-add" | "chardev-change" => {
            let file = arguments.get("backend").filter(|b| b["type"] == "file");
            let input = file.and_then(|b| b["data"]["in"].as_str());
            found.extend(input.map(|t| Named::Path(t.to_owned())));
        }
        "xen-load-devices-state" => found.extend(path("filename")),
        "migrate-incoming" => {
            found.extend(text("uri").and_then(|uri| uri.strip_prefix("file:")).map(|file| {
                // `file:PATH,offset=N`
                Named::Path(file.split_once(",offset=").map_or(file, |(file, _)| file).to_owned())
            }));
            let channels = arguments.get("channels").and_then(Value::as_array);
            let files = channels.into_iter().flatten().filter_map(|c| c["addr"]["filename"].as_str());
            found.extend(files.map(|file| Named::Path(file.to_owned())));
        }
        _ => {}
    }
}

/// Programs that QEMU runs for a network device (QEMU `net/tap.c`: without any, `/etc/qemu-ifup` and `-ifdown`).
fn scripts(arguments: &Map<String, Value>, found: &mut Vec<Named>) {
    let text = |name: &str| arguments.get(name).and_then(Value::as_str);
    let run = |name: &str| text(name).filter(|t| !t.is_empty() && *t != "no").map(|t| Named::Path(t.to_owned()));
    found.extend(["script", "downscript", "helper"].into_iter().filter_map(run));
    let handed_over = ["fd", "fds", "helper"].iter().any(|name| text(name).is_some());
    if text("type") == Some("tap") && !handed_over {
        for (name, usual) in [("script", "/etc/qemu-ifup"), ("downscript", "/etc/qemu-ifdown")] {
            if text(name).is_none() {
                found.push(Named::Maybe(usual.to_owned()));
            }
        }
    }
}

/// The options of a node and of the nodes below it. Texts in place of a node are references to nodes that are there.
fn tree(options: &Map<String, Value>, found: &mut Vec<Named>) {
    if let Some(driver) = options.get("driver").and_then(Value::as_str) {
        let text = |name: &str| options.get(name).and_then(Value::as_str);
        if FILE_DRIVERS.contains(&driver) {
            found.extend(text("filename").map(|name| Named::Image(name.to_owned())));
        } else if !UPPER_DRIVERS.contains(&driver) {
            found.push(Named::Not(format!("a node of driver {driver} is no local file")));
        } else if driver == "blkdebug" {
            found.extend(text("config").map(|name| Named::Path(name.to_owned())));
        }
    }
    for value in options.values() {
        match value {
            Value::Object(below) => tree(below, found),
            Value::Array(list) => list.iter().filter_map(Value::as_object).for_each(|below| tree(below, found)),
            _ => {}
        }
    }
}

/// A name as `-drive` takes it: a path, `protocol:…` or `json:{…}` (QEMU `block.c`, `bdrv_fill_options`).
fn legacy(name: &str, depth: u8) -> Vec<Named> {
    if let Some(json) = name.strip_prefix("json:") {
        let Ok(Value::Object(options)) = serde_json::from_str(json) else {
            return vec![Named::Not(format!("{name} is not understood"))];
        };
        let mut found = Vec::new();
        // Here keys may be joined by dots, and a driver may be left to the name.
        for_texts(&options, &mut |member, text| match member.rsplit('.').next() {
            Some("driver") if !FILE_DRIVERS.contains(&text) && !UPPER_DRIVERS.contains(&text) => {
                found.push(Named::Not(format!("a node of driver {text} is no local file")));
            }
            Some("filename") if depth == 0 => found.push(Named::Not(format!("{name} goes too deep"))),
            Some("filename") => found.extend(legacy(text, depth - 1)),
            _ => {}
        });
        return found;
    }
    // QEMU `block.c`, `path_has_protocol`: a colon before the first slash.
    let head = name.split('/').next().unwrap_or_default();
    vec![match head.split_once(':') {
        None => Named::Image(name.to_owned()),
        Some((protocol, _)) if FILE_DRIVERS.contains(&protocol) => Named::Image(name[protocol.len() + 1..].to_owned()),
        Some((protocol, _)) => Named::Not(format!("{name} ({protocol}) is no local file")),
    }]
}

/// Every text below, with the name of the member that it is in.
fn for_texts(options: &Map<String, Value>, each: &mut dyn FnMut(&str, &str)) {
    fn visit(member: &str, value: &Value, each: &mut dyn FnMut(&str, &str)) {
        match value {
            Value::String(text) => each(member, text),
            Value::Array(list) => list.iter().for_each(|v| visit(member, v, each)),
            Value::Object(map) => map.iter().for_each(|(name, v)| visit(name, v, each)),
            _ => {}
        }
    }
    options.iter().for_each(|(name, value)| visit(name, value, each));
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use serde_json::json;

    use super::*;

    #[expect(clippy::needless_pass_by_value, reason = "so that calls read as they are written")]
    fn of(command: &str, arguments: Value) -> Vec<Named> {
        named(command, arguments.as_object().unwrap(), |_| false)
    }

    fn image(name: &str) -> Named {
        Named::Image(name.to_owned())
    }

    fn path(name: &str) -> Named {
        Named::Path(name.to_owned())
    }

    #[test]
    fn block_nodes() {
        let chain = json!({
            "driver": "qcow2", "node-name": "n", "data-file": {"driver": "file", "filename": "/d"},
            "file": {"driver": "file", "filename": "/top"},
            "backing": {"driver": "raw", "file": {"driver": "host_device", "filename": "/dev/sdb"}},
        });
        assert_eq!(of("blockdev-add", chain), [image("/dev/sdb"), image("/d"), image("/top")]);
        let quorum = json!({"driver": "quorum", "vote-threshold": 1, "children": [
            "a-node", {"driver": "file", "filename": "/a"}, {"driver": "file", "filename": "json:{}"}]});
        assert_eq!(of("blockdev-add", quorum), [image("/a"), image("json:{}")]);
        assert_eq!(of("blockdev-add", json!({"driver": "qcow2", "file": "node", "backing": null})), []);
        for driver in ["nbd", "null-co", "vvfat", "https", "from-the-future"] {
            let found = of("blockdev-add", json!({"driver": "raw", "file": {"driver": driver, "filename": "/x"}}));
            assert!(matches!(found.as_slice(), [Named::Not(why)] if why.contains(driver)), "{found:?}");
        }
        let reopen = json!({"options": [{"driver": "file", "filename": "/a"}, {"driver": "file", "filename": "/b"}]});
        assert_eq!(of("blockdev-reopen", reopen), [image("/a"), image("/b")]);
    }

    #[test]
    fn names_as_drives_take_them() {
        let medium = |name: &str| of("blockdev-change-medium", json!({"id": "cd", "filename": name}));
        assert_eq!(medium("cd.iso"), [image("cd.iso")]);
        assert_eq!(medium("/a:b/cd.iso"), [image("/a:b/cd.iso")]);
        assert_eq!(medium("file:cd.iso"), [image("cd.iso")]);
        assert_eq!(
            medium("json:{\"driver\":\"raw\",\"file.driver\":\"file\",\"file.filename\":\"/x\"}"),
            [image("/x")]
        );
        assert_eq!(medium("json:{\"file\": {\"filename\": \"/y\"}}"), [image("/y")]);
        for name in [
            "nbd://host/x",
            "fat:rw:/etc",
            "json:{\"driver\":\"nbd\"}",
            "json:[",
            "json:{\"file.filename\":\"ssh://x\"}",
        ] {
            assert!(matches!(medium(name).as_slice(), [Named::Not(_)]), "{name}: {:?}", medium(name));
        }
    }

    #[test]
    fn new_images_are_not_there_yet_and_existing_ones_are() {
        for (command, member) in
            [("blockdev-snapshot-sync", "snapshot-file"), ("drive-mirror", "target"), ("drive-backup", "target")]
        {
            assert_eq!(of(command, json!({"device": "d", member: "/new"})), []);
            assert_eq!(of(command, json!({"device": "d", "mode": "absolute-paths", member: "/new"})), []);
            assert_eq!(of(command, json!({"device": "d", "mode": "existing", member: "/old"})), [image("/old")]);
            let action = json!({"actions": [{"type": command, "data": {"mode": "existing", member: "/old"}}]});
            assert_eq!(of("transaction", action), [image("/old")]);
        }
    }

    #[test]
    fn everything_else() {
        for (command, arguments, want) in [
            (
                "object-add",
                json!({"qom-type": "memory-backend-file", "id": "m", "mem-path": "/m"}),
                vec![Named::Memory("/m".into())],
            ),
            ("object-add", json!({"qom-type": "secret", "id": "s", "file": "/s"}), vec![]),
            ("object-add", json!({"qom-type": "sev-guest", "session-file": "/s"}), vec![path("/s")]),
            ("device_add", json!({"driver": "virtio-net-pci", "romfile": "x.rom"}), vec![Named::Data("x.rom".into())]),
            ("device_add", json!({"driver": "virtio-net-pci", "romfile": ""}), vec![]),
            ("device_add", json!({"driver": "loader", "file": "/l"}), vec![path("/l")]),
            ("device_add", json!({"driver": "usb-mtp", "file": "/l"}), vec![]),
            ("netdev_add", json!({"type": "tap", "script": "/up", "downscript": "no"}), vec![path("/up")]),
            ("netdev_add", json!({"type": "tap", "fd": "x"}), vec![]),
            ("netdev_add", json!({"type": "tap", "script": "no"}), vec![Named::Maybe("/etc/qemu-ifdown".into())]),
            ("netdev_add", json!({"type": "bridge", "helper": "/h"}), vec![path("/h")]),
            (
                "chardev-add",
                json!({"id": "c", "backend": {"type": "file", "data": {"in": "/i", "out": "/o"}}}),
                vec![path("/i")],
            ),
            ("migrate-incoming", json!({"uri": "file:/state,offset=5"}), vec![path("/state")]),
            (
                "migrate-incoming",
                json!({"channels": [{"addr": {"transport": "file", "filename": "/s"}}]}),
                vec![path("/s")],
            ),
            ("migrate", json!({"uri": "exec:cat"}), vec![]),
            ("pmemsave", json!({"filename": "/out"}), vec![]),
            (
                "change-backing-file",
                json!({"image-node-name": "n", "backing-file": "b"}),
                vec![Named::Backing { file: "b".into(), node: "n".into() }],
            ),
        ] {
            assert_eq!(of(command, arguments.clone()), want, "{command} {arguments}");
        }
    }

    #[test]
    fn members_without_a_rule_are_looked_at() {
        let arguments = json!({"deep": [{"seed-file": "/s"}], "id": "x"});
        let found = named("future-add", arguments.as_object().unwrap(), |member| member == "seed-file");
        assert_eq!(found, [Named::Maybe("/s".into())]);
    }
}
