//! A door between clients and a peer in this process that plays QEMU, where the real one could not be made to wait,
//! overtake or flood at the right moment. The real one is in `vm/tests/intercept.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use onequote_evidence::{
    event::{CommandOutcome, Event, EventBody, MonitorCommand, VmRef},
    id::{HostId, SessionId, TimeMs, VmId},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Semaphore,
    time::timeout,
};

use super::*;
use crate::{
    qmp::{self, Qmp},
    sink::{BoxFuture, EventSink, SinkError},
    vm::{Outbox, Registry},
};

const LONG: Duration = Duration::from_secs(30);

/// One end of a QMP connection: QEMU's, or a client's.
struct End {
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

impl End {
    fn new(stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        Self { lines: BufReader::new(read).lines(), write }
    }

    async fn say(&mut self, text: impl std::fmt::Display) {
        self.write.write_all(format!("{text}\n").as_bytes()).await.unwrap();
    }

    async fn next(&mut self) -> Option<Value> {
        let line = timeout(LONG, self.lines.next_line()).await.expect("a line in time");
        line.ok().flatten().map(|line| serde_json::from_str(&line).unwrap())
    }

    async fn line(&mut self) -> Value {
        self.next().await.expect("a line")
    }

    /// As QEMU: the next command, which must be this one.
    async fn expect(&mut self, command: &str) -> Value {
        let line = self.line().await;
        let name = line.get("execute").or_else(|| line.get("exec-oob")).unwrap();
        assert_eq!(name, command, "{line}");
        line
    }

    /// As QEMU: answers a command.
    async fn answer(&mut self, command: &Value, value: Value) {
        self.say(json!({"return": value, "id": command["id"]})).await;
    }
}

/// A log that takes what it is let to.
#[derive(Default)]
struct Log {
    events: Mutex<Vec<Event>>,
    records: Mutex<Vec<usize>>,
    /// A permit for each record, if `held`.
    permits: Option<Semaphore>,
    broken: AtomicBool,
}

impl EventSink for Log {
    fn append(&self, events: Vec<Event>) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async {
            if let Some(permits) = &self.permits {
                permits.acquire().await.unwrap().forget();
            }
            self.ready().await?;
            self.records.lock().unwrap().push(events.len());
            self.events.lock().unwrap().extend(events);
            Ok(())
        })
    }

    fn ready(&self) -> BoxFuture<'_, Result<(), SinkError>> {
        let broken = self.broken.load(Ordering::SeqCst);
        let error = || SinkError(Arc::new(std::io::Error::other("no space left on device")));
        Box::pin(async move { if broken { Err(error()) } else { Ok(()) } })
    }
}

impl Log {
    fn commands(&self) -> Vec<MonitorCommand> {
        let command = |event: &Event| match &event.body {
            EventBody::MonitorCommand(command) => Some(command.clone()),
            _ => None,
        };
        self.events.lock().unwrap().iter().filter_map(command).collect()
    }
}

struct World {
    qemu: End,
    door: Door,
    log: Arc<Log>,
    registry: Registry,
    dir: tempfile::TempDir,
}

fn schema() -> Value {
    let command = |name: &str| json!({"name": name, "meta-type": "command", "arg-type": "0", "ret-type": "0"});
    let mut schema: Vec<Value> = [
        "query-status",
        "query-slow",
        "stop",
        "cont",
        "blockdev-add",
        "human-monitor-command",
        "transaction",
        "set_password",
    ]
    .map(command)
    .to_vec();
    schema.push(json!({"name": "yank", "meta-type": "command", "arg-type": "0", "ret-type": "0", "allow-oob": true}));
    schema.push(
        json!({"name": "query-yank", "meta-type": "command", "arg-type": "0", "ret-type": "0", "allow-oob": true}),
    );
    schema.push(json!({"name": "0", "meta-type": "object", "members": []}));
    json!(schema)
}

impl World {
    async fn new(gate: Gate) -> Self {
        Self::with(gate, Log::default(), |_| {}).await
    }

    async fn with(gate: Gate, log: Log, change: impl FnOnce(&mut Settings)) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut qemu = End::new(theirs);
        let version = json!({"qemu": {"micro": 3, "minor": 2, "major": 99}, "package": "Lab 99.2"});
        qemu.say(json!({"QMP": {"version": version, "capabilities": ["oob", "x-from-the-future"]}})).await;
        let limits = qmp::Limits { oob: true, ..qmp::Limits::default() };
        let negotiate = async {
            let command = qemu.expect("qmp_capabilities").await;
            assert_eq!(command["arguments"], json!({"enable": ["oob"]}));
            qemu.answer(&command, json!({})).await;
        };
        let (opened, ()) = tokio::join!(Qmp::negotiate(ours, &limits), negotiate);
        let (qmp, _events) = opened.unwrap();

        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings {
            dir: dir.path().to_owned(),
            vms: vec!["*".to_owned()],
            refuse: Vec::new(),
            limits: Limits::default(),
        };
        change(&mut settings);
        let host: HostId = "host-1".parse().unwrap();
        let vm = VmRef { vm: VmId::from_name(&host, "vm"), session: SessionId([1; 8]) };
        let (log, registry) = (Arc::new(log), Registry::default());
        let vm = Vm {
            name: "vm".to_owned(),
            vm,
            pid: std::process::id(),
            qmp,
            outbox: Outbox::new(vm, Arc::clone(&log) as _, Arc::new(RwLock::default())),
            clock: || TimeMs(1),
            digester: crate::measure::Digester::default(),
            registry: registry.clone(),
            // No session is there to be asked.
            before_quit: tokio::sync::mpsc::channel(1).0,
        };
        Self { qemu, door: Door::open(&settings, vm, gate).unwrap(), log, registry, dir }
    }

    /// A client that was greeted. The first one makes the door ask for the schema.
    async fn greeted(&mut self, first: bool) -> End {
        let mut client = End::new(UnixStream::connect(self.dir.path().join("vm.sock")).await.unwrap());
        if first {
            let command = self.qemu.expect("query-qmp-schema").await;
            self.qemu.answer(&command, schema()).await;
        }
        let greeting = client.line().await;
        assert_eq!(greeting["QMP"]["version"]["package"], "Lab 99.2");
        assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]), "only what we can pass on");
        client
    }

    async fn client(&mut self, first: bool) -> End {
        let mut client = self.greeted(first).await;
        client.say(json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})).await;
        assert_eq!(client.line().await, json!({"return": {}}));
        client
    }

    fn event(&self, n: u64) -> Value {
        json!({"event": "FLOOD", "data": {"n": n}, "timestamp": {"seconds": 1, "microseconds": 2}})
    }
}

#[tokio::test]
async fn answers_go_to_who_asked_under_the_same_id() {
    let mut world = World::new(Gate::Open).await;
    let mut a = world.client(true).await;
    let mut b = world.client(false).await;
    a.say(json!({"execute": "query-status", "id": "libvirt-1"})).await;
    let of_a = world.qemu.expect("query-status").await;
    b.say(json!({"execute": "query-slow", "id": "libvirt-1"})).await;
    let of_b = world.qemu.expect("query-slow").await;
    assert_ne!(of_a["id"], of_b["id"]);
    world.qemu.answer(&of_b, json!("for b")).await;
    world.qemu.answer(&of_a, json!("for a")).await;
    assert_eq!(a.line().await, json!({"return": "for a", "id": "libvirt-1"}));
    assert_eq!(b.line().await, json!({"return": "for b", "id": "libvirt-1"}));
    assert!(world.log.commands().is_empty(), "what only tells is not logged");
}

#[tokio::test]
async fn events_reach_all_who_negotiated_in_order() {
    let mut world = World::new(Gate::Open).await;
    let mut a = world.client(true).await;
    let mut b = world.client(false).await;
    let mut silent = world.greeted(false).await;
    for n in 0..100 {
        world.qemu.say(world.event(n)).await;
    }
    for client in [&mut a, &mut b] {
        for n in 0..100 {
            assert_eq!(client.line().await, world.event(n));
        }
    }
    silent.say(json!({"execute": "qmp_capabilities"})).await;
    assert_eq!(silent.line().await, json!({"return": {}}), "no event before that");
}

#[tokio::test]
async fn a_command_overtakes_only_where_that_was_negotiated() {
    let mut world = World::new(Gate::Open).await;
    let mut client = world.client(true).await;
    client.say(json!({"execute": "query-slow", "id": 1})).await;
    let slow = world.qemu.expect("query-slow").await;
    client.say(json!({"execute": "query-status", "id": 2})).await;
    client.say(json!({"exec-oob": "yank", "id": 3})).await;
    let urgent = world.qemu.expect("yank").await;
    assert_eq!(urgent["exec-oob"], "yank");
    assert_eq!(world.log.commands()[0].command, "yank", "in the log before QEMU saw it");
    world.qemu.answer(&urgent, json!({})).await;
    assert_eq!(client.line().await["id"], 3);
    world.qemu.answer(&slow, json!({})).await;
    assert_eq!(client.line().await["id"], 1);
    let next = world.qemu.expect("query-status").await;
    world.qemu.answer(&next, json!({})).await;
    assert_eq!(client.line().await["id"], 2);

    client.say(json!({"exec-oob": "stop", "id": 4})).await;
    let refused = client.line().await;
    assert_eq!(refused["error"]["desc"], "The command stop does not support OOB");
    let mut plain = world.greeted(false).await;
    plain.say(json!({"execute": "qmp_capabilities"})).await;
    plain.line().await;
    plain.say(json!({"exec-oob": "yank", "id": 5})).await;
    assert_eq!(plain.line().await["error"]["desc"], "QMP input member 'exec-oob' is unexpected");
}

#[tokio::test]
async fn one_client_that_does_not_read_holds_nobody_up_and_is_ended() {
    let mut world = World::new(Gate::Open).await;
    let slow = world.client(true).await;
    let mut good = world.client(false).await;
    let mut n = 0;
    // Its socket and its queue fill up; the other one takes what comes.
    while world.door.status().clients == 2 {
        world.qemu.say(world.event(n)).await;
        assert_eq!(good.line().await["data"]["n"], n);
        n += 1;
        assert!(n < 100_000, "it is never ended");
    }
    good.say(json!({"execute": "query-status", "id": 1})).await;
    let command = world.qemu.expect("query-status").await;
    world.qemu.answer(&command, json!({})).await;
    assert_eq!(good.line().await["id"], 1);
    drop(slow);
}

#[tokio::test]
async fn a_client_that_leaves_an_answer_unread_is_ended() {
    let stall = |settings: &mut Settings| settings.limits.stall = Duration::from_millis(50);
    let mut world = World::with(Gate::Open, Log::default(), stall).await;
    let mut slow = world.client(true).await;
    slow.say(json!({"execute": "query-status"})).await;
    let command = world.qemu.expect("query-status").await;
    world.qemu.answer(&command, json!("x".repeat(4 << 20))).await;
    let gone = async {
        while world.door.status().clients > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, gone).await.unwrap();
}

#[tokio::test]
async fn qemu_sees_a_changing_command_when_the_log_has_it() {
    let log = Log { permits: Some(Semaphore::new(0)), ..Log::default() };
    let mut world = World::with(Gate::Open, log, |_| {}).await;
    let mut a = world.client(true).await;
    let mut b = world.client(false).await;
    a.say(json!({"execute": "stop", "id": 1})).await;
    // Behind it, and in front of the log: what only tells goes on.
    b.say(json!({"execute": "query-status", "id": 2})).await;
    let other = world.qemu.expect("query-status").await;
    world.qemu.answer(&other, json!({})).await;
    b.line().await;
    assert!(world.log.commands().is_empty());
    world.log.permits.as_ref().unwrap().add_permits(1);
    let stop = world.qemu.expect("stop").await;
    let [logged] = &world.log.commands()[..] else { panic!("one command") };
    assert_eq!((logged.command.as_str(), logged.outcome), ("stop", CommandOutcome::Forwarded));
    assert!(logged.client.starts_with(&format!("1: process {}", std::process::id())), "{}", logged.client);
    world.qemu.answer(&stop, json!({})).await;
    assert_eq!(a.line().await, json!({"return": {}, "id": 1}));
    timeout(LONG, world.door.ran()).await.expect("the session is told");
}

#[tokio::test]
async fn what_cannot_be_logged_is_not_passed_nor_logged_later() {
    let mut world = World::new(Gate::Open).await;
    let mut client = world.client(true).await;
    world.log.broken.store(true, Ordering::SeqCst);
    client.say(json!({"execute": "stop", "id": 1})).await;
    let refused = client.line().await;
    assert!(refused["error"]["desc"].as_str().unwrap().contains("no space left"), "{refused}");
    world.log.broken.store(false, Ordering::SeqCst);
    client.say(json!({"execute": "cont", "id": 2})).await;
    let cont = world.qemu.expect("cont").await;
    world.qemu.answer(&cont, json!({})).await;
    client.line().await;
    let names: Vec<_> = world.log.commands().into_iter().map(|c| c.command).collect();
    assert_eq!(names, ["cont"]);
    assert_eq!((world.door.status().commands, world.door.status().refused), (1, 1));
}

#[tokio::test]
async fn commands_that_come_while_the_log_is_busy_share_a_record() {
    let log = Log { permits: Some(Semaphore::new(0)), ..Log::default() };
    let mut world = World::with(Gate::Open, log, |_| {}).await;
    let mut clients = Vec::new();
    for n in 0..5 {
        let mut client = world.client(n == 0).await;
        client.say(json!({"execute": "stop", "id": n})).await;
        clients.push(client);
    }
    // Each has been read once its later query, which overtakes, was seen.
    for client in &mut clients {
        client.say(json!({"exec-oob": "query-yank"})).await;
        let seen = world.qemu.expect("query-yank").await;
        world.qemu.answer(&seen, json!([])).await;
        client.line().await;
    }
    world.log.permits.as_ref().unwrap().add_permits(2);
    for _ in 0..5 {
        let stop = world.qemu.expect("stop").await;
        world.qemu.answer(&stop, json!({})).await;
    }
    assert_eq!(*world.log.records.lock().unwrap(), [1, 4]);
}

#[tokio::test]
async fn nothing_lets_a_vm_run_that_is_being_measured_and_changes_wait() {
    let mut world = World::new(Gate::Measuring).await;
    let mut a = world.client(true).await;
    let mut b = world.client(false).await;
    for command in ["cont", "human-monitor-command"] {
        a.say(json!({"execute": command, "id": command})).await;
        let refused = a.line().await;
        let desc = refused["error"]["desc"].as_str().unwrap();
        assert!(desc.contains("vm is still being measured") && refused["error"]["class"] == "GenericError", "{desc}");
    }
    b.say(json!({"execute": "stop", "id": 1})).await;
    a.say(json!({"execute": "query-status", "id": 2})).await;
    let status = world.qemu.expect("query-status").await;
    world.qemu.answer(&status, json!({})).await;
    a.line().await;
    assert!(world.log.commands().is_empty(), "the log does not know the VM yet");
    world.door.set_gate(Gate::Closed("vm is not let run: its kernel is wrong".to_owned()));
    let stop = world.qemu.expect("stop").await;
    world.qemu.answer(&stop, json!({})).await;
    b.line().await;
    a.say(json!({"execute": "cont", "id": 3})).await;
    assert!(a.line().await["error"]["desc"].as_str().unwrap().contains("its kernel is wrong"));
    let logged: Vec<_> = world.log.commands().into_iter().map(|c| (c.command, c.outcome)).collect();
    assert_eq!(logged, [("stop".into(), CommandOutcome::Forwarded), ("cont".into(), CommandOutcome::Refused)]);
}

#[tokio::test]
async fn the_end_of_a_session_ends_what_waits_for_its_gate() {
    let mut world = World::new(Gate::Measuring).await;
    let mut client = world.client(true).await;
    client.say(json!({"execute": "stop", "id": 1})).await;
    client.say(json!({"exec-oob": "query-yank", "id": 2})).await;
    let seen = world.qemu.expect("query-yank").await;
    world.qemu.answer(&seen, json!([])).await;
    client.line().await;
    let socket = world.dir.path().join("vm.sock");
    drop(world.door);
    while client.next().await.is_some() {}
    assert!(!socket.exists());
    assert!(world.log.commands().is_empty());
}

#[tokio::test]
async fn what_is_forbidden_is_refused_in_transactions_too() {
    let refuse = |settings: &mut Settings| settings.refuse = vec!["human-*".to_owned(), "set_password".to_owned()];
    let mut world = World::with(Gate::Open, Log::default(), refuse).await;
    let mut client = world.client(true).await;
    let action = json!({"type": "human-monitor-command", "data": {}});
    for (command, arguments) in [
        ("human-monitor-command", json!({"command-line": "savevm x"})),
        ("transaction", json!({"actions": [action]})),
        ("set_password", json!({"protocol": "vnc", "password": "hunter2"})),
    ] {
        client.say(json!({"execute": command, "arguments": arguments, "id": 1})).await;
        let refused = client.line().await;
        let desc = refused["error"]["desc"].as_str().unwrap();
        assert!(desc.contains("configuration refuses"), "{desc}");
    }
    let logged = world.log.commands();
    assert!(logged.iter().all(|c| c.outcome == CommandOutcome::Refused && c.detail.contains("refuses")));
    assert_eq!(logged[0].arguments, r#"{"command-line":"savevm x"}"#);
    assert!(!logged[2].arguments.contains("hunter2") && logged.len() == 3, "{}", logged[2].arguments);
    assert_eq!(world.door.status().refused, 3);
}

#[tokio::test]
async fn arguments_are_cut_and_their_digest_is_over_all() {
    let mut world = World::new(Gate::Open).await;
    let mut client = world.client(true).await;
    let arguments = json!({"command-line": "é".repeat(5000)});
    client.say(json!({"execute": "human-monitor-command", "arguments": arguments})).await;
    let command = world.qemu.expect("human-monitor-command").await;
    assert_eq!(command["arguments"], arguments);
    let logged = &world.log.commands()[0];
    assert!((4095..=4096).contains(&logged.arguments.len()));
    assert_eq!(logged.digest, onequote_evidence::digest::sha256(&[arguments.to_string().as_bytes()]));
}

#[tokio::test]
async fn refusals_are_not_all_logged_when_there_are_too_many() {
    let refuse = |settings: &mut Settings| settings.refuse = vec!["stop".to_owned()];
    let mut world = World::with(Gate::Open, Log::default(), refuse).await;
    let mut client = world.client(true).await;
    for _ in 0..500 {
        client.say(json!({"execute": "stop"})).await;
        assert!(client.line().await["error"].is_object());
    }
    let logged = world.log.commands().len();
    assert!((256..300).contains(&logged), "{logged}");
    assert_eq!(world.door.status().refused, 500);
}

#[tokio::test]
async fn rubbish_hurts_only_its_line_and_its_client() {
    let mut world = World::new(Gate::Open).await;
    let mut bad = world.client(true).await;
    let mut good = world.client(false).await;
    for rubbish in
        ["GET / HTTP/1.1", "{\"execute\": ", "\u{1}", "[]", "7", "{]", &"[".repeat(5000), &"x".repeat(3 << 20)]
    {
        bad.say(rubbish).await;
        if rubbish.starts_with("{\"execute\"") {
            // Half a command: the next line belongs to it, and makes it none.
            bad.say("{\"a\"}").await;
            bad.write.write_all(&[0xff]).await.unwrap();
        }
        let error = bad.line().await;
        assert_eq!(error["error"]["class"], "GenericError", "{error}");
        assert!(error.get("id").is_none());
    }
    // Those that make more than one error are over when the next good one is answered.
    bad.say(json!({"execute": "query-status", "id": "after"})).await;
    let command = world.qemu.expect("query-status").await;
    world.qemu.answer(&command, json!({})).await;
    while bad.line().await.get("id").is_none() {}
    good.say(json!({"execute": "query-status", "id": 1})).await;
    let command = world.qemu.expect("query-status").await;
    world.qemu.answer(&command, json!({})).await;
    assert_eq!(good.line().await["id"], 1);
}

#[tokio::test]
async fn clients_come_and_go_and_are_bounded() {
    let two = |settings: &mut Settings| settings.limits.clients = 2;
    let mut world = World::with(Gate::Open, Log::default(), two).await;
    let first = world.client(true).await;
    let mut second = world.client(false).await;
    let mut third = End::new(UnixStream::connect(world.dir.path().join("vm.sock")).await.unwrap());
    assert_eq!(third.next().await, None, "turned away");
    drop(first);
    let gone = async {
        while world.door.status().clients == 2 {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, gone).await.unwrap();
    let mut fourth = world.client(false).await;
    for client in [&mut second, &mut fourth] {
        client.say(json!({"execute": "query-status", "id": 1})).await;
        let command = world.qemu.expect("query-status").await;
        world.qemu.answer(&command, json!({})).await;
        assert_eq!(client.line().await["id"], 1);
    }
    assert!(world.registry.snapshot().vms.is_empty());
}

#[tokio::test]
async fn a_command_in_the_log_goes_to_qemu_though_its_client_is_gone() {
    let log = Log { permits: Some(Semaphore::new(0)), ..Log::default() };
    let mut world = World::with(Gate::Open, log, |_| {}).await;
    let mut client = world.client(true).await;
    client.say(json!({"execute": "stop", "id": 1})).await;
    client.say(json!({"exec-oob": "query-yank", "id": 2})).await;
    let seen = world.qemu.expect("query-yank").await;
    world.qemu.answer(&seen, json!([])).await;
    client.line().await;
    drop(client);
    world.log.permits.as_ref().unwrap().add_permits(1);
    let stop = world.qemu.expect("stop").await;
    world.qemu.answer(&stop, json!({})).await;
    timeout(LONG, world.door.ran()).await.expect("the session is told");
}

#[tokio::test]
async fn when_qemu_ends_the_last_words_arrive_before_the_end() {
    let mut world = World::new(Gate::Open).await;
    let mut client = world.client(true).await;
    client.say(json!({"execute": "stop", "id": 1})).await;
    let stop = world.qemu.expect("stop").await;
    world.qemu.answer(&stop, json!({})).await;
    world.qemu.say(world.event(7)).await;
    drop(world.qemu);
    let (mut answered, mut told) = (false, false);
    while let Some(line) = client.next().await {
        answered |= line["id"] == 1;
        told |= line["event"] == "FLOOD";
    }
    assert!(answered && told);
}
