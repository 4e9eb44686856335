//! Who answers at a monitor, who else commands a QEMU, and who let it run.

use std::{
    io::Write as _,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    process::Stdio,
};

use onequote_evidence::event::*;
use serde_json::json;

use super::{
    gate::{bzimage, refused, started},
    world::*,
};
use crate::{qmp::Qmp, vm::*};

/// Where the impostor passes on what it is asked.
const RELAY_TO: &str = "ONEQUOTE_TEST_RELAY_TO";

async fn call(qmp: &Qmp, command: &str, arguments: serde_json::Value) {
    qmp.call::<serde::de::IgnoredAny>(command, arguments).await.unwrap();
}

/// Accepts one connection and passes everything on to the monitor at `to` and back.
fn relay(listener: &UnixListener, to: &std::path::Path) {
    let (ours, _) = listener.accept().unwrap();
    let theirs = loop {
        if let Ok(stream) = UnixStream::connect(to) {
            break stream;
        }
        std::thread::yield_now();
    };
    let (mut from, mut back) = (ours.try_clone().unwrap(), theirs.try_clone().unwrap());
    // Either end closes when it likes.
    std::thread::spawn(move || std::io::copy(&mut from, &mut &theirs));
    let _ = std::io::copy(&mut back, &mut &ours);
}

/// Not a test: the impostor's process, started by the test below with the listening socket for standard input.
#[test]
fn an_impostors_process() {
    let Some(to) = std::env::var_os(RELAY_TO) else { return };
    let listener = UnixListener::from(rustix::io::dup(std::io::stdin()).unwrap());
    relay(&listener, std::path::Path::new(&to));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_another_process_holds_is_refused() {
    let world = World::new();
    let _qemu = world.qemu_elsewhere("real.qmp", &["-M", "q35"]);
    drop(world.monitor("real.qmp").await);
    // This process listens, and so is the one that the kernel names; another one accepts.
    let listener = UnixListener::bind(world.socket("vm")).unwrap();
    let mut impostor = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "vm::tests::who::an_impostors_process"])
        .env(RELAY_TO, world.path("real.qmp"))
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let refusal = world.log.wait(refused).await;
    assert_eq!((refusal.cause, refusal.item.as_str()), (RefuseCause::Impostor, "monitor"));
    assert!(refusal.reason.contains("does not hold the connection"), "{}", refusal.reason);
    assert!(!world.log.kinds().contains(&"vm-start".to_owned()));
    impostor.kill().unwrap();
    impostor.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_speaks_for_another_one_is_refused() {
    let world = World::new();
    world.file("kernel", bzimage());
    let _qemu = world.qemu_elsewhere("real.qmp", &["-M", "q35", "-kernel", "kernel"]);
    drop(world.monitor("real.qmp").await);
    let (listener, to) = (UnixListener::bind(world.socket("vm")).unwrap(), world.path("real.qmp"));
    std::thread::spawn(move || relay(&listener, &to));
    let refusal = world.log.wait(refused).await;
    assert_eq!((refusal.cause, refusal.item.as_str()), (RefuseCause::Impostor, "monitor"));
    assert!(refusal.reason.contains("\"kernel\" for kernel"), "{}", refusal.reason);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_was_told_to_lie_is_refused() {
    let world = World::new();
    for name in ["evil", "good"] {
        world.file(name, bzimage());
    }
    let _qemu = world.qemu_elsewhere("late.qmp", &["-M", "q35", "-kernel", "evil", "-append", "x"]);
    let monitor = world.monitor("late.qmp").await;
    call(&monitor, "qom-set", json!({"path": "/machine", "property": "kernel", "value": "good"})).await;
    drop(monitor);
    std::fs::rename(world.path("late.qmp"), world.socket("late")).unwrap();
    let refusal = world.log.wait(refused).await;
    assert_eq!(refusal.cause, RefuseCause::Impostor);
    assert!(refusal.reason.contains("\"good\" for kernel") && refusal.reason.contains("evil"), "{}", refusal.reason);
}

fn created(body: &EventBody) -> Option<VmCreate> {
    match body {
        EventBody::VmCreate(e) => Some(e.clone()),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_monitors_and_debuggers_are_logged() {
    let world = World::new();
    let _qemu = world.qemu("alone", &["-S", "-M", "q35"]);
    let create = world.log.wait(created).await;
    assert_eq!((create.monitors.as_slice(), create.accelerator.as_str()), ([].as_slice(), "tcg"));

    let world = World::new();
    std::fs::File::create(world.path("mon.cfg"))
        .unwrap()
        .write_all(b"[chardev \"m\"]\nbackend = \"null\"\n[mon \"mm\"]\nchardev = \"m\"\nmode = \"readline\"\n")
        .unwrap();
    let args = ["-S", "-M", "q35", "-qmp", "unix:b.qmp,server=on,wait=off", "-gdb", "unix:g,server=on,wait=off"];
    let more = ["-serial", "mon:null", "-readconfig", "mon.cfg"];
    let _qemu = world.qemu("many", &[&args[..], &more].concat());
    let create = world.log.wait(created).await;
    assert_eq!(
        create.monitors,
        [
            "debugger gdb: unix:g,server=on",
            "monitor compat_monitor1: unix:b.qmp,server=on",
            "monitor m: null",
            "monitor on a console serial0: mux",
        ]
    );
}

/// What came before the proxy, and what becomes of the VM.
async fn continued(before: &[&str]) -> (World, VmRefuse, VmAttach) {
    let world = World::new();
    let _qemu = world.qemu_elsewhere("late.qmp", &["-M", "q35"]);
    let monitor = world.monitor("late.qmp").await;
    for command in before {
        call(&monitor, command, json!({})).await;
        // It comes out of its main loop later.
        if *command == "cont" {
            while crate::measure::Execution::ask(&monitor, &crate::measure::Arguments::default()).await.unwrap().has_run
                != Some(true)
            {
                tokio::task::yield_now().await;
            }
        }
    }
    if before.last() == Some(&"system_reset") {
        while monitor.execute(qapi::qmp::query_status {}).await.unwrap().status != qapi::qmp::RunState::prelaunch {
            tokio::task::yield_now().await;
        }
    }
    drop(monitor);
    std::fs::rename(world.path("late.qmp"), world.socket("late")).unwrap();
    let EventBody::VmAttach(attach) = world.log.wait_kind("vm-attach").await else { unreachable!() };
    let refusal = world.log.wait(refused).await;
    assert_eq!(world.log.kinds(), ["vm-create", "vm-refuse", "vm-attach"]);
    world.until(|r| r.vms[0].stage == Stage::Watched).await;
    (world, refusal, attach)
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_else_let_it_run_before_the_proxy_came() {
    let (world, refusal, attach) = continued(&["cont"]).await;
    assert_eq!(refusal.cause, RefuseCause::Continued);
    assert!(refusal.reason.contains("-S") && refusal.reason.contains("runs already"), "{}", refusal.reason);
    assert!(!attach.again);
    assert_eq!(world.log.wait(created).await.depth, Depth::Observe);
}

/// A reset puts a stopped VM back into `prelaunch`, where it looks as if it had never run.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_ran_and_was_reset_is_not_gated() {
    let (world, refusal, _) = continued(&["cont", "stop", "system_reset"]).await;
    assert_eq!(refusal.cause, RefuseCause::Continued);
    assert!(refusal.reason.contains("stopped and reset"), "{}", refusal.reason);
    // The proxy does not let it run: it never gated it.
    assert_eq!(world.registry().vms[0].run_state, "prelaunch");
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_else_let_it_run_while_it_was_logged() {
    let world = World::new();
    let second = world.path("b.qmp");
    *world.log.meanwhile.lock().unwrap() = Some(Box::pin(async move {
        let (monitor, _events) = Qmp::connect(&second, &crate::qmp::Limits::default()).await.unwrap();
        call(&monitor, "cont", json!({})).await;
    }));
    let _qemu = world.qemu("vm", &["-S", "-M", "q35", "-qmp", &second_monitor("b.qmp")]);
    let refusal = world.log.wait(refused).await;
    assert_eq!(refusal.cause, RefuseCause::Continued);
    world.log.wait_kind("vm-resume").await;
    assert_eq!(world.log.kinds(), ["vm-create", "vm-start", "vm-refuse", "vm-attach", "vm-resume"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_nobody_touched_is_gated() {
    let world = World::new();
    let _qemu = world.qemu("vm", &["-S", "-M", "q35"]);
    world.log.wait(started).await;
    world.log.wait_kind("vm-resume").await;
    assert!(!world.log.kinds().contains(&"vm-refuse".to_owned()));
}
