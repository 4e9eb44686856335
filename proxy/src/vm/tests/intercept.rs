//! Intercepted monitors in front of the real QEMU.

use std::{io::IoSlice, os::fd::AsFd, path::Path, sync::atomic::Ordering};

use onequote_evidence::event::*;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

use super::world::*;
use crate::intercept::{Limits, Settings};

/// A management tool.
struct Tool {
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
    /// Events that came while an answer was waited for.
    events: Vec<Value>,
}

impl Tool {
    /// Connects as soon as somebody listens.
    async fn greeted(path: &Path) -> Self {
        let connect = async {
            loop {
                match UnixStream::connect(path).await {
                    Ok(stream) => return stream,
                    Err(_) => tokio::time::sleep(std::time::Duration::from_millis(2)).await,
                }
            }
        };
        let (read, write) = timeout(LONG, connect).await.unwrap().into_split();
        let mut tool = Self { lines: BufReader::new(read).lines(), write, events: Vec::new() };
        let greeting = tool.line().await;
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "{greeting}");
        tool
    }

    async fn new(path: &Path) -> Self {
        let mut tool = Self::greeted(path).await;
        tool.say(&json!({"execute": "qmp_capabilities"}).to_string()).await;
        assert_eq!(tool.line().await, json!({"return": {}}));
        tool
    }

    async fn say(&mut self, text: &str) {
        self.write.write_all(format!("{text}\n").as_bytes()).await.unwrap();
    }

    async fn next(&mut self) -> Option<Value> {
        let line = timeout(LONG, self.lines.next_line()).await.expect("a line in time");
        line.ok().flatten().map(|line| serde_json::from_str(&line).unwrap())
    }

    async fn line(&mut self) -> Value {
        self.next().await.expect("a line")
    }

    /// The next line that is no event.
    async fn answer(&mut self) -> Value {
        loop {
            let line = self.line().await;
            if line.get("event").is_none() {
                return line;
            }
            self.events.push(line);
        }
    }

    async fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.say(&json!({"execute": command, "arguments": arguments, "id": command}).to_string()).await;
        let answer = self.answer().await;
        assert_eq!(answer["id"], command);
        answer
    }

    async fn run(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.ask(command, arguments).await;
        assert!(answer["return"] != Value::Null, "{command}: {answer}");
        answer["return"].clone()
    }

    async fn refused(&mut self, command: &str, arguments: Value) -> String {
        let answer = self.ask(command, arguments).await;
        assert_eq!(answer["error"]["class"], "GenericError", "{command}: {answer}");
        answer["error"]["desc"].as_str().unwrap().to_owned()
    }

    async fn nodes(&mut self) -> Vec<String> {
        let nodes = self.run("query-named-block-nodes", json!({"flat": true})).await;
        nodes.as_array().unwrap().iter().map(|n| n["node-name"].as_str().unwrap().to_owned()).collect()
    }
}

fn world(refuse: &[&str]) -> World {
    let mut world = World::new();
    std::fs::create_dir(world.path("monitors")).unwrap();
    world.intercept = Some(Settings {
        dir: world.path("monitors"),
        vms: vec!["*".to_owned()],
        refuse: refuse.iter().map(|&r| r.to_owned()).collect(),
        limits: Limits::default(),
    });
    world.start(None);
    world
}

fn door(world: &World, vm: &str) -> std::path::PathBuf {
    world.path("monitors").join(format!("{vm}.sock"))
}

fn commands(world: &World) -> Vec<MonitorCommand> {
    let command = |event: Event| match event.body {
        EventBody::MonitorCommand(command) => Some(command),
        _ => None,
    };
    world.log.events().into_iter().filter_map(command).collect()
}

const PLAIN: [&str; 3] = ["-S", "-M", "q35"];

/// Whatever a client says, it is answered in QEMU's own words.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_is_said_to_qemu_and_to_the_proxy() {
    let world = world(&[]);
    let _intercepted = world.qemu("vm", &PLAIN);
    world.log.wait_kind("vm-resume").await;
    let _direct = world.qemu_elsewhere("direct.qmp", &["-M", "q35"]);
    let (direct, door) = (world.path("direct.qmp"), door(&world, "vm"));
    let (mut qemu, mut proxy) = (Tool::greeted(&direct).await, Tool::greeted(&door).await);
    for line in [
        r#"{"execute":"query-version"}"#,
        r#"{"exec-oob":"query-version"}"#,
        r#"{"execute":"qmp_capabilities","arguments":{"x":1},"id":4}"#,
        r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":5}"#,
        r#"{"execute":"qmp_capabilities","id":6}"#,
        r#"{"execute":"query-kvm","id":{"a":[1,2.5,null,true],"b":"x\u00e9y"}}"#,
        r#"{"execute":"query-kvm","id":null}"#,
        r#"{"execute":"query-kvm","id":18446744073709551615}"#,
        r#"{"execute":"nope","id":"n"}"#,
        r#"{"execute":"query-kvm","bogus":1,"id":"b"}"#,
        r#"{"exec-oob":"query-kvm","id":1}"#,
        r#"{"exec-oob":"migrate-pause","id":"libvirt-5"}"#,
        r#"{"execute":"query-kvm","exec-oob":"query-kvm"}"#,
        r#"{"execute":5}"#,
        r#"{"id":7}"#,
        "[1,2]",
        r#"{"execute":"query-kvm","arguments":5}"#,
        r#"{"execute":"query-kvm","arguments":{"x":1},"id":9}"#,
        r#"{"execute":'query-kvm','id':'it\'s'}"#,
        r#"{"execute":"query-kvm"}{"execute":"query-name","id":2}"#,
        "{ \"execute\":\n \"query-kvm\" }",
        r#"{"execute":"query-kvm","execute":"query-kvm"}"#,
        r#"{"execute":"qom-get","arguments":{"path":"/machine","property":"type"},"id":1}"#,
        r#"{"execute":"qom-set","arguments":{"path":"/nowhere","property":"x","value":1},"id":1}"#,
        r#"{"execute":"device_del","arguments":{"id":"none"},"id":1}"#,
        r#"{"execute":"human-monitor-command","arguments":{"command-line":"info name"},"id":1}"#,
    ] {
        qemu.say(line).await;
        proxy.say(line).await;
        let values = 1 + line.matches("}{").count();
        for _ in 0..values {
            let (said, want) = (proxy.answer().await, qemu.answer().await);
            assert_eq!(said, want, "{line}");
        }
    }
    // In the words of another parser, but of the same class, and the next one counts.
    for line in ["garbage", "\u{1}", "{]"] {
        proxy.say(line).await;
        let answer = proxy.answer().await;
        assert!(answer["error"]["desc"].as_str().unwrap().starts_with("JSON parse error"), "{line}: {answer}");
        proxy.run("query-kvm", json!({})).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_member_that_names_a_file_has_a_rule() {
    let world = world(&[]);
    let _qemu = world.qemu_elsewhere("direct.qmp", &["-M", "none"]);
    let qmp = world.monitor("direct.qmp").await;
    let unknown = crate::intercept::members_without_rule(&qmp).await;
    assert!(unknown.is_empty(), "look at these and add them to intercept/files.rs: {unknown:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_measured_and_logged_before_qemu_opens_it() {
    let world = world(&[]);
    let image = world.file("new.raw", vec![7; 1 << 20]);
    let _qemu = world.qemu("vm", &PLAIN);
    world.log.wait_kind("vm-resume").await;
    let EventBody::VmCreate(create) = &world.log.events()[0].body else { panic!() };
    assert_eq!(create.depth, Depth::Intercept);
    let mut tool = Tool::new(&door(&world, "vm")).await;
    // Relative to QEMU's folder, not ours.
    let file = json!({"driver": "file", "filename": "new.raw"});
    let node = json!({"driver": "raw", "node-name": "new", "file": file});

    world.log.broken.store(true, Ordering::SeqCst);
    let why = tool.refused("blockdev-add", node.clone()).await;
    assert!(why.contains("no space left"), "{why}");
    assert!(!tool.nodes().await.contains(&"new".to_owned()), "QEMU has what the log has not");
    world.log.broken.store(false, Ordering::SeqCst);

    tool.run("blockdev-add", node.clone()).await;
    let logged = commands(&world);
    let [command] = logged.as_slice() else { panic!("{logged:#?}") };
    assert_eq!((command.command.as_str(), command.outcome), ("blockdev-add", CommandOutcome::Forwarded));
    assert_eq!(serde_json::from_str::<Value>(&command.arguments).unwrap(), node);
    assert_eq!(command.files[0].path, image.to_string_lossy());
    assert_eq!(command.files[0].digest.to_string(), verity_of(&image));
    assert!(tool.nodes().await.contains(&"new".to_owned()));
    // What it did is found at once, and stands behind it.
    let change = world.log.wait_kind("config-change").await;
    let EventBody::ConfigChange(change) = change else { panic!() };
    assert_eq!((change.what.as_str(), change.images[0].slot.as_str()), ("image", "new"));
    let kinds = world.log.kinds();
    let at = |kind: &str| kinds.iter().position(|k| k == kind).unwrap();
    assert!(at("monitor-command") < at("config-change"), "{kinds:?}");
    let status = world.registry().vms[0].monitor.clone().unwrap();
    assert_eq!((status.clients, status.commands, status.refused), (1, 1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_measured_does_not_reach_qemu() {
    let world = world(&[]);
    world.file("disk.raw", vec![1; 1 << 20]);
    world.file("cd.iso", "cd");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        world.path("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let cd = ["-drive", "if=none,id=cd,media=cdrom", "-device", "ide-cd,drive=cd,id=cd0"];
    let disk = ["-drive", "file=disk.raw,if=none,id=d,format=raw,node-name=d0", "-device", "virtio-blk-pci,drive=d"];
    let _qemu = world.qemu("vm", &[&PLAIN[..], &cd, &disk].concat());
    world.log.wait_kind("vm-resume").await;
    let mut tool = Tool::new(&door(&world, "vm")).await;
    let node = |file: Value| json!({"driver": "raw", "node-name": "new", "file": file});
    let action = json!({"type": "blockdev-snapshot-sync",
        "data": {"device": "d", "snapshot-file": "gone", "mode": "existing", "format": "qcow2"}});
    let refused = [
        ("blockdev-add", node(json!({"driver": "file", "filename": "gone"})), "gone"),
        ("blockdev-add", node(json!({"driver": "file", "filename": "pipe"})), "pipe"),
        ("blockdev-add", node(json!({"driver": "null-co"})), "null-co"),
        ("blockdev-change-medium", json!({"id": "cd0", "filename": "gone.iso"}), "gone.iso"),
        ("blockdev-change-medium", json!({"id": "cd0", "filename": "nbd://host/x"}), "nbd"),
        ("transaction", json!({"actions": [action]}), "gone"),
        ("device_add", json!({"driver": "virtio-net-pci", "romfile": "gone.rom"}), "gone.rom"),
        ("netdev_add", json!({"type": "tap", "id": "n", "script": "/gone.sh"}), "/gone.sh"),
        ("drive-mirror", json!({"device": "d", "mode": "existing", "sync": "none", "target": "gone"}), "gone"),
    ];
    let before = tool.nodes().await;
    for (command, arguments, word) in &refused {
        let why = tool.refused(command, arguments.clone()).await;
        assert!(why.contains(word) && why.contains("not passed"), "{command}: {why}");
    }
    assert_eq!(tool.nodes().await, before);
    let logged = commands(&world);
    assert_eq!(logged.len(), refused.len());
    for (command, (name, _, word)) in logged.iter().zip(&refused) {
        assert_eq!((command.command.as_str(), command.outcome), (*name, CommandOutcome::Unmeasurable));
        assert!(command.detail.contains(word) && command.files.is_empty(), "{}", command.detail);
    }

    tool.run("blockdev-change-medium", json!({"id": "cd0", "filename": "cd.iso"})).await;
    let EventBody::MonitorCommand(command) = world
        .log
        .wait(|body| match body {
            EventBody::MonitorCommand(c) if c.outcome == CommandOutcome::Forwarded => Some(body.clone()),
            _ => None,
        })
        .await
    else {
        panic!()
    };
    assert_eq!(command.files[0].digest.to_string(), verity_of(&world.path("cd.iso")));
    // A backing file's name is relative to its image.
    let why =
        tool.refused("change-backing-file", json!({"device": "d", "image-node-name": "d0", "backing-file": "b"})).await;
    assert!(why.contains(&world.path("b").to_string_lossy().into_owned()), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn forbidden_commands_stay_here() {
    let world = world(&["human-monitor-command", "migrate*"]);
    let _qemu = world.qemu("vm", &PLAIN);
    world.log.wait_kind("vm-resume").await;
    let mut tool = Tool::new(&door(&world, "vm")).await;
    let line = json!({"command-line": "stop"});
    let why = tool.refused("human-monitor-command", line).await;
    assert!(why.contains("configuration refuses human-monitor-command"), "{why}");
    tool.refused("migrate", json!({"uri": "exec:cat >/dev/null"})).await;
    let status = tool.run("query-status", json!({})).await;
    assert_eq!(status["status"], "running");
    let logged: Vec<_> = commands(&world).into_iter().map(|c| (c.command, c.outcome, c.arguments)).collect();
    assert_eq!(logged[0].2, r#"{"command-line":"stop"}"#);
    assert!(logged.len() == 2 && logged.iter().all(|c| c.1 == CommandOutcome::Refused), "{logged:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_must_not_run_is_not_let_run_by_a_client() {
    let world = world(&[]);
    let _qemu = world.qemu("vm", &["-S", "-M", "q35", "-drive", "driver=null-co,if=virtio,id=nothing"]);
    world.log.wait_kind("vm-refuse").await;
    let mut tool = Tool::new(&door(&world, "vm")).await;
    for (command, arguments) in [("cont", json!({})), ("human-monitor-command", json!({"command-line": "cont"}))] {
        let why = tool.refused(command, arguments).await;
        assert!(why.contains("vm is not let run") && why.contains("nothing"), "{why}");
    }
    assert_eq!(tool.run("query-status", json!({})).await["status"], "prelaunch");
    tool.run("quit", json!({})).await;
    world.log.wait_kind("vm-stop").await;
    assert_eq!(
        world.log.kinds(),
        ["vm-create", "vm-refuse", "monitor-command", "monitor-command", "monitor-command", "vm-stop"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tools_and_the_end_of_one_and_of_qemu() {
    let world = world(&[]);
    let _qemu = world.qemu("vm", &PLAIN);
    world.log.wait_kind("vm-resume").await;
    let door = door(&world, "vm");
    let (mut a, mut b) = (Tool::new(&door).await, Tool::new(&door).await);
    a.run("stop", json!({})).await;
    while b.line().await["event"] != "STOP" {}
    b.run("cont", json!({})).await;
    assert!(b.events.iter().any(|e| e["event"] == "RESUME") || b.line().await["event"] == "RESUME");
    // One is killed in the middle of a line.
    a.write.write_all(b"{\"execute\": \"stop").await.unwrap();
    drop(a);
    world.until(|r| r.vms[0].monitor.as_ref().is_some_and(|m| m.clients == 1)).await;
    assert_eq!(b.run("query-status", json!({})).await["status"], "running");
    b.run("quit", json!({})).await;
    let mut told = b.events.iter().any(|e| e["event"] == "SHUTDOWN");
    while let Some(line) = b.next().await {
        told |= line["event"] == "SHUTDOWN";
    }
    assert!(told);
    world.log.wait_kind("vm-stop").await;
    world.until(|r| r.vms.is_empty()).await;
    assert!(!door.exists());
    assert_eq!(world.log.kinds().last().unwrap(), "vm-stop");
    let logged: Vec<_> = commands(&world).into_iter().map(|c| c.command).collect();
    assert_eq!(logged, ["stop", "cont", "quit"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptors_pass_through() {
    let world = world(&[]);
    let image = world.file("handed.raw", vec![3; 1 << 20]);
    let _qemu = world.qemu("vm", &PLAIN);
    world.log.wait_kind("vm-resume").await;
    let mut tool = Tool::new(&door(&world, "vm")).await;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let line = json!({"execute": "add-fd", "arguments": {"fdset-id": 5}, "id": "fd"}).to_string();
    {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let fds = [file.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let socket = tool.write.as_ref();
        let sent = sendmsg(socket, &[IoSlice::new(line.as_bytes())], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, line.len());
    }
    let answer = tool.answer().await;
    assert_eq!(answer["return"]["fdset-id"], 5, "{answer}");
    let file = json!({"driver": "file", "filename": "/dev/fdset/5"});
    tool.run("blockdev-add", json!({"driver": "raw", "node-name": "n", "file": file})).await;
    let command = commands(&world).pop().unwrap();
    assert_eq!(command.files[0].path, image.to_string_lossy());
    assert_eq!(command.files[0].digest.to_string(), verity_of(&image));
    // Without one it is as with QEMU.
    let why = tool.refused("getfd", json!({"fdname": "x"})).await;
    assert!(why.contains("SCM_RIGHTS"), "{why}");
}
