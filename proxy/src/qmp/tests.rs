//! Against a peer in this process, and against the real QEMU.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::*;

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 1, "minor": 0, "major": 99}, "package": ""}, "capabilities": ["new"]}}"#;

struct Peer {
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

impl Peer {
    fn new(stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        Self { lines: BufReader::new(read).lines(), write }
    }

    async fn say(&mut self, line: &str) {
        self.write.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    async fn command(&mut self) -> Value {
        serde_json::from_str(&self.lines.next_line().await.unwrap().unwrap()).unwrap()
    }

    async fn answer(&mut self, command: &Value, value: Value) {
        self.say(&json!({"return": value, "id": command["id"]}).to_string()).await;
    }
}

fn limits() -> Limits {
    Limits { line: 4096, events: 4, greeting: Duration::from_millis(200), reply: Duration::from_millis(300), oob: true }
}

async fn open() -> (Peer, Qmp, Events) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer::new(theirs);
    let greet = async {
        peer.say(GREETING).await;
        let command = peer.command().await;
        assert_eq!(command["execute"], "qmp_capabilities");
        peer.answer(&command, json!({})).await;
        peer
    };
    let limits = limits();
    let (peer, opened) = tokio::join!(greet, Qmp::negotiate(ours, &limits));
    let (qmp, events) = opened.unwrap();
    (peer, qmp, events)
}

#[tokio::test]
async fn answers_go_to_who_asked_even_out_of_order() {
    let (mut peer, qmp, _events) = open().await;
    assert_eq!(qmp.version(), "99.0.1");
    assert_eq!(qmp.peer_pid(), Some(std::process::id()));
    let serve = async {
        let first = peer.command().await;
        let second = peer.command().await;
        assert_ne!(first["id"], second["id"]);
        peer.answer(&second, second["arguments"].clone()).await;
        peer.answer(&first, first["arguments"].clone()).await;
    };
    let (a, b, ()) =
        tokio::join!(qmp.call::<Value>("a", json!({"n": 1})), qmp.call::<Value>("b", json!({"n": 2})), serve);
    assert_eq!(a.unwrap(), json!({"n": 1}));
    assert_eq!(b.unwrap(), json!({"n": 2}));
}

#[tokio::test]
async fn a_cancelled_command_disturbs_no_other() {
    let (mut peer, qmp, _events) = open().await;
    assert!(tokio::time::timeout(Duration::from_millis(10), qmp.call::<Value>("slow", json!({}))).await.is_err());
    let slow = peer.command().await;
    let serve = async {
        let quick = peer.command().await;
        peer.answer(&slow, json!("late")).await;
        peer.answer(&quick, json!("quick")).await;
    };
    let (quick, ()) = tokio::join!(qmp.call::<String>("quick", json!({})), serve);
    assert_eq!(quick.unwrap(), "quick");
}

#[tokio::test]
async fn refusals_timeouts_and_wrong_answers_are_told_apart() {
    let (mut peer, qmp, _events) = open().await;
    let refuse = async {
        let c = peer.command().await;
        peer.say(&json!({"error": {"class": "CommandNotFound", "desc": "no such"}, "id": c["id"]}).to_string()).await;
        let c = peer.command().await;
        peer.answer(&c, json!({"status": 5})).await;
        peer.command().await;
    };
    let ask = async {
        let e = qmp.call::<Value>("x-unknown", json!({})).await.unwrap_err();
        assert!(e.is_unknown_command() && e.to_string().contains("no such"), "{e}");
        let e = qmp.execute(qapi::qmp::query_status {}).await.unwrap_err();
        assert!(matches!(&e, QmpError::Answer { command, .. } if command == "query-status"), "{e}");
        let e = qmp.execute(qapi::qmp::query_status {}).await.unwrap_err();
        assert!(matches!(&e, QmpError::Timeout { .. }), "{e}");
    };
    tokio::join!(refuse, ask);
}

#[tokio::test]
async fn unknown_events_pass_and_too_many_leave_a_mark() {
    let (mut peer, qmp, mut events) = open().await;
    let stamp = json!({"seconds": 1, "microseconds": 2});
    for n in 0..10 {
        peer.say(&json!({"event": "FROM_THE_FUTURE", "data": {"n": n}, "timestamp": stamp}).to_string()).await;
    }
    peer.say(&json!({"event": "STOP", "timestamp": stamp}).to_string()).await;
    // All of them have been routed once a later answer is here.
    let (done, ()) = tokio::join!(qmp.call::<Value>("x", json!({})), async {
        let c = peer.command().await;
        peer.answer(&c, json!({})).await;
    });
    done.unwrap();
    for n in 0..4 {
        assert!(
            matches!(events.next().await.unwrap(), Event::Other { name, data } if name == "FROM_THE_FUTURE" && data["n"] == n)
        );
    }
    assert!(matches!(events.next().await.unwrap(), Event::Missed(7)));
    peer.say(&json!({"event": "STOP", "timestamp": stamp}).to_string()).await;
    let stop = events.next().await.unwrap();
    assert!(matches!(&stop, Event::Known(e) if matches!(**e, qapi::qmp::Event::STOP { .. })), "{stop:?}");
    drop(peer);
    assert!(matches!(events.next().await.unwrap_err(), QmpError::Closed));
    assert!(matches!(qmp.call::<Value>("x", json!({})).await.unwrap_err(), QmpError::Closed));
}

#[tokio::test]
async fn silence_rubbish_and_long_lines_instead_of_a_greeting() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    assert!(matches!(Qmp::negotiate(ours, &limits()).await.err().unwrap(), QmpError::NoGreeting(_)));

    for (said, told) in [
        ("SSH-2.0-OpenSSH\r\n".to_owned(), "SSH-2.0"),
        ("{}\n".to_owned(), "no QEMU monitor"),
        (format!("{}\n", "x".repeat(5000)), "longer than 4096"),
        ("y".repeat(50_000), "longer than 4096"),
        ("{\"QMP\": ".to_owned(), "closed"),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(said.as_bytes()).await.unwrap();
        theirs.shutdown().await.unwrap();
        let e = Qmp::negotiate(ours, &limits()).await.err().unwrap();
        assert!(e.to_string().contains(told), "{e}");
    }
}

#[tokio::test]
async fn rubbish_later_ends_the_connection_for_everybody() {
    let (mut peer, qmp, mut events) = open().await;
    let (asked, ()) = tokio::join!(qmp.call::<Value>("x", json!({})), async {
        peer.command().await;
        peer.say("out of order").await;
    });
    assert!(matches!(asked.unwrap_err(), QmpError::Rubbish(line) if line == "out of order"));
    assert!(matches!(events.next().await.unwrap_err(), QmpError::Rubbish(_)));
}

#[tokio::test]
async fn dropping_the_last_handle_closes_the_socket() {
    let (mut peer, qmp, mut events) = open().await;
    drop(qmp);
    assert!(peer.lines.next_line().await.unwrap().is_none());
    assert!(events.next().await.is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_line_panics_or_hangs(lines in prop::collection::vec(prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        r#"\{"(return|error|event|id)": ?(\{\}|1|"x"|null|\[\])(, "(id|event|error|data)": ?(1|2|"STOP"|\{\}))?\}"#.prop_map(String::into_bytes),
    ], 0..20)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut peer, qmp, mut events) = open().await;
            for line in &lines {
                // The other end may have closed already.
                let _ = peer.write.write_all(line).await;
                let _ = peer.write.write_all(b"\n").await;
            }
            drop(peer);
            while events.next().await.is_ok() {}
            assert!(qmp.call::<Value>("x", json!({})).await.is_err());
        });
    }
}

#[tokio::test]
async fn the_real_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.qmp");
    let mut qemu = tokio::process::Command::new("qemu-system-x86_64")
        .args(["-M", "none", "-S", "-display", "none", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", path.display()))
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let limits = Limits { greeting: Duration::from_secs(20), ..Limits::default() };
    let (qmp, mut events) = loop {
        match Qmp::connect(&path, &limits).await {
            Err(e) if e.is_not_listening() => tokio::task::yield_now().await,
            other => break other.unwrap(),
        }
    };
    assert_eq!(qmp.peer_pid(), qemu.id());
    let status = qmp.execute(qapi::qmp::query_status {}).await.unwrap();
    assert_eq!(status.status, qapi::qmp::RunState::prelaunch);
    let second = Limits { greeting: Duration::from_millis(300), ..limits };
    assert!(matches!(Qmp::connect(&path, &second).await.err().unwrap(), QmpError::NoGreeting(_)));
    qmp.execute(qapi::qmp::quit {}).await.unwrap();
    let shutdown = events.next().await.unwrap();
    assert!(matches!(shutdown, Event::Known(e) if matches!(*e, qapi::qmp::Event::SHUTDOWN { .. })));
    assert!(matches!(events.next().await.unwrap_err(), QmpError::Closed));
    qemu.wait().await.unwrap();
}
