//! From the start to the end, with restarts of the proxy in between.

use onequote_evidence::event::*;
use serde_json::{Value, json};

use super::world::*;
use crate::vm::*;

fn stopped(body: &EventBody) -> Option<VmStop> {
    match body {
        EventBody::VmStop(e) => Some(e.clone()),
        _ => None,
    }
}

fn attached(body: &EventBody) -> Option<VmAttach> {
    match body {
        EventBody::VmAttach(e) => Some(e.clone()),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pause_resume_reset_and_quit() {
    let world = World::new();
    let mut notices = world.manager.as_ref().unwrap().registry().notices();
    world.file("disk.raw", vec![1; 1 << 20]);
    let mut qemu = world.qemu(
        "vm",
        &["-S", "-M", "q35", "-drive", "file=disk.raw,format=raw,if=virtio,id=root", "-qmp", &second_monitor("b.qmp")],
    );
    world.log.wait_kind("vm-resume").await;
    let monitor = world.monitor("b.qmp").await;
    monitor.execute(qapi::qmp::stop {}).await.unwrap();
    let EventBody::VmPause(pause) = world.log.wait_kind("vm-pause").await else { panic!() };
    assert_eq!(pause.run_state, "paused");
    monitor.execute(qapi::qmp::system_reset {}).await.unwrap();
    let EventBody::VmReset(reset) = world.log.wait_kind("vm-reset").await else { panic!() };
    assert_eq!((reset.by_guest, reset.reason.as_str()), (false, "host-qmp-system-reset"));
    // Written as a guest would, behind the proxy's back.
    monitor
        .call::<String>("human-monitor-command", json!({"command-line": "qemu-io root \"write -P 9 0 512\""}))
        .await
        .unwrap();
    monitor.execute(qapi::qmp::quit {}).await.unwrap();
    qemu.wait().await.unwrap();
    let stop = world.log.wait(stopped).await;
    assert_eq!(stop.cause, StopCause::HostShutdown);
    assert_eq!(stop.images.len(), 1);
    assert_eq!(stop.images[0].digest.to_string(), verity_of(&world.path("disk.raw")));
    assert!(stop.unmeasured.is_empty());
    world.until(|r| r.vms.is_empty()).await;
    assert_eq!(world.log.kinds(), ["vm-create", "vm-start", "vm-resume", "vm-pause", "vm-reset", "vm-stop"]);
    let mut told = Vec::new();
    while let Ok(notice) = notices.try_recv() {
        told.push((notice.kind, notice.status.resets));
    }
    assert_eq!(told, [(NoticeKind::Started, 0), (NoticeKind::Reset, 1), (NoticeKind::Stopped, 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_is_a_loss_and_the_inode_counts() {
    let world = World::new();
    let disk = world.file("disk.raw", vec![1; 1 << 20]);
    let before = verity_of(&disk);
    let mut qemu = world.qemu("vm", &["-S", "-M", "q35", "-drive", "file=disk.raw,format=raw,if=virtio,id=root"]);
    world.log.wait_kind("vm-resume").await;
    std::fs::remove_file(&disk).unwrap();
    world.file("disk.raw", vec![2; 1 << 20]);
    qemu.kill().await.unwrap();
    let stop = world.log.wait(stopped).await;
    assert_eq!(stop.cause, StopCause::Lost);
    assert_eq!(stop.images[0].digest.to_string(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn running_already_is_an_attachment() {
    let world = World::new();
    world.file("disk.raw", vec![1; 1 << 20]);
    let _qemu = world.qemu("vm", &["-M", "q35", "-drive", "file=disk.raw,format=raw,if=virtio,id=root"]);
    let attach = world.log.wait(attached).await;
    assert!(!attach.again);
    assert_eq!(attach.images[0].slot, "root");
    let create = world.log.wait_kind("vm-create").await;
    assert!(matches!(create, EventBody::VmCreate(c) if c.depth == Depth::Observe));
}

#[tokio::test(flavor = "multi_thread")]
async fn hot_plug_and_snapshots_are_found() {
    let world = World::new();
    world.file("disk.raw", vec![1; 1 << 20]);
    let extra = world.file("extra.raw", vec![3; 1 << 20]);
    let _qemu = world.qemu(
        "vm",
        &[
            "-S",
            "-M",
            "q35",
            "-device",
            "pcie-root-port,id=slot1",
            "-drive",
            "file=disk.raw,format=raw,if=virtio,id=root",
            "-qmp",
            &second_monitor("b.qmp"),
        ],
    );
    world.log.wait_kind("vm-resume").await;
    let monitor = world.monitor("b.qmp").await;
    let node = json!({"driver": "raw", "node-name": "n", "read-only": true,
                      "file": {"driver": "file", "filename": "extra.raw"}});
    monitor.call::<Value>("blockdev-add", node).await.unwrap();
    let changed = |slot: &'static str| {
        move |body: &EventBody| match body {
            EventBody::ConfigChange(c) if c.images.iter().any(|i| i.slot == slot) => Some(c.clone()),
            _ => None,
        }
    };
    let change = world.log.wait(changed("n")).await;
    assert_eq!((change.what.as_str(), change.before.as_str()), ("image", ""));
    assert_eq!(change.images[0].digest.to_string(), verity_of(&extra));
    // The same name, another file.
    let other = world.file("other.raw", vec![8; 1 << 20]);
    monitor.call::<Value>("blockdev-del", json!({"node-name": "n"})).await.unwrap();
    std::fs::rename(&other, &extra).unwrap();
    let node = json!({"driver": "raw", "node-name": "n", "read-only": true,
                      "file": {"driver": "file", "filename": "extra.raw"}});
    monitor.call::<Value>("blockdev-add", node).await.unwrap();
    let now = verity_of(&extra);
    let exchanged = |body: &EventBody| match body {
        EventBody::ConfigChange(c) if c.images.iter().any(|i| i.digest.to_string() == now) => Some(()),
        _ => None,
    };
    world.log.wait(exchanged).await;
    let device = json!({"driver": "virtio-blk-pci", "drive": "n", "id": "plugged", "bus": "slot1"});
    monitor.call::<Value>("device_add", device).await.unwrap();
    world
        .log
        .wait(|body| match body {
            EventBody::ConfigChange(c) if c.after == "plugged:virtio-blk-pci" => Some(()),
            _ => None,
        })
        .await;
    // A disk that cannot be measured.
    monitor.call::<Value>("blockdev-add", json!({"driver": "null-co", "node-name": "nowhere"})).await.unwrap();
    let what = |what: &'static str| {
        move |body: &EventBody| match body {
            EventBody::ConfigChange(c) if c.what == what => Some(c.clone()),
            _ => None,
        }
    };
    let change = world.log.wait(what("unmeasured image")).await;
    assert!(change.images.is_empty() && change.after.contains("nowhere"), "{change:?}");
    let snapshot = json!({"device": "root", "snapshot-file": "snap.qcow2", "format": "qcow2"});
    monitor.call::<Value>("blockdev-snapshot-sync", snapshot).await.unwrap();
    let change = world.log.wait(changed("root")).await;
    assert!(change.images[0].path.ends_with("/snap.qcow2"), "{change:?}");
    let base = &change.images[1];
    assert!(base.slot == "root/1" && base.path.ends_with("/disk.raw") && base.read_only, "{base:?}");
    assert_eq!(change.what, "chain");
    monitor.execute(qapi::qmp::quit {}).await.unwrap();
    let stop = world.log.wait(stopped).await;
    assert_eq!(stop.images.iter().map(|i| i.slot.as_str()).collect::<Vec<_>>(), ["root"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_the_living_are_measured_again_and_the_gone_closed() {
    let mut world = World::new();
    let gone_disk = world.file("gone.raw", vec![1; 1 << 20]);
    let mut gone = world.qemu("gone", &["-S", "-M", "q35", "-drive", "file=gone.raw,format=raw,if=virtio,id=root"]);
    let _lives = world.qemu("lives", &["-S", "-M", "q35"]);
    world.until(|r| r.vms.len() == 2 && r.vms.iter().all(|v| v.stage == Stage::Watched)).await;
    world.log.wait_kind("vm-resume").await;
    world.manager.take().unwrap().stop().await;
    let open = open_sessions(&world.log.inventory.read().unwrap());
    assert_eq!(open.len(), 2);
    gone.kill().await.unwrap();
    std::fs::write(&gone_disk, vec![5; 1 << 20]).unwrap();

    let before = world.log.events().len();
    world.start(None);
    let stop = world.log.wait(stopped).await;
    assert_eq!(stop.cause, StopCause::Unwatched);
    assert_eq!(stop.images[0].digest.to_string(), verity_of(&gone_disk));
    assert!(world.log.wait(attached).await.again);
    let lives = open.iter().find(|s| s.name == "lives").unwrap().vm;
    let about: Vec<_> =
        world.log.events()[before..].iter().filter(|e| e.vm == Some(lives)).map(|e| e.body.kind().to_owned()).collect();
    assert_eq!(about, ["log-gap", "vm-attach"]);
    assert_eq!(world.registry().vms.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_vm_starts_again_after_its_end() {
    let world = World::new();
    for round in 0..2 {
        let mut qemu = world.qemu("vm", &["-S", "-M", "q35"]);
        world.until(|r| r.vms.first().is_some_and(|v| v.stage == Stage::Watched && Some(v.pid) == qemu.id())).await;
        qemu.kill().await.unwrap();
        world.until(|r| r.vms.is_empty()).await;
        assert_eq!(world.log.kinds().iter().filter(|k| *k == "vm-stop").count(), round + 1);
    }
    let vms: std::collections::BTreeSet<_> = world.log.events().iter().map(|e| e.vm.unwrap().vm).collect();
    assert_eq!(vms.len(), 1, "the UUID comes from host and name");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_is_lost_is_found_again() {
    let world = World::new();
    let _qemu = world.qemu_elsewhere("b.qmp", &["-M", "none"]);
    drop(world.monitor("b.qmp").await);
    // The process behind the monitor is this one: what matters here is that it lives on.
    let listener = tokio::net::UnixListener::bind(world.socket("vm")).unwrap();
    let serve = async |world: &World| {
        let (mut front, _) = listener.accept().await.unwrap();
        let mut back = tokio::net::UnixStream::connect(world.path("b.qmp")).await.unwrap();
        let (cut, was_cut) = tokio::sync::oneshot::channel::<()>();
        tokio::spawn(async move {
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut front, &mut back) => {}
                _ = was_cut => {}
            }
        });
        cut
    };
    let cut = serve(&world).await;
    world.log.wait_kind("vm-resume").await;
    cut.send(()).unwrap();
    let EventBody::LogGap(gap) = world.log.wait_kind("log-gap").await else { panic!() };
    assert_eq!(gap.reason, GapReason::MonitorLost);
    world.until(|r| r.vms[0].stage == Stage::MonitorLost && r.vms[0].error.is_some()).await;
    let _cut = serve(&world).await;
    assert!(world.log.wait(attached).await.again);
    world.until(|r| r.vms[0].stage == Stage::Watched && r.vms[0].error.is_none()).await;
    assert_eq!(world.log.kinds(), ["vm-create", "vm-start", "vm-resume", "log-gap", "vm-attach"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_written_while_it_is_attached() {
    let world = World::new();
    world.file("disk.raw", vec![1; 64 << 20]);
    let disk = world.path("disk.raw");
    let writing = tokio::task::spawn_blocking(move || {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options().write(true).open(disk).unwrap();
        for n in 0..2000 {
            file.write_all_at(&[n as u8; 512], 0).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    });
    let args = ["-M", "q35", "-drive", "file=disk.raw,format=raw,if=virtio,id=root"];
    let _running = world.qemu("running", &args);
    assert_eq!(world.log.wait(attached).await.images.len(), 1);
    let waiting =
        world.qemu("waiting", &["-S", "-M", "q35", "-drive", "file=disk.raw,format=raw,if=none,id=d,file.locking=off"]);
    let refusal = world.log.wait_kind("vm-refuse").await;
    assert!(matches!(&refusal, EventBody::VmRefuse(r) if r.item == "d" && r.reason.contains("changed")), "{refusal:?}");
    drop(waiting);
    writing.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_without_a_monitor_is_found() {
    let world = World::new();
    let mut qemu = world.qemu_elsewhere("b.qmp", &["-M", "none"]);
    let pid = qemu.id().unwrap();
    drop(world.monitor("b.qmp").await);
    let find = || unmanaged::find(&Default::default(), std::time::Duration::ZERO).unwrap();
    let found = find().into_iter().find(|p| p.pid == pid).unwrap();
    assert!(found.program.ends_with("/qemu-system-x86_64") && found.arguments.contains("b.qmp"), "{found:?}");
    assert!(!unmanaged::find(&[pid].into(), std::time::Duration::ZERO).unwrap().contains(&found));
    let old = unmanaged::find(&Default::default(), std::time::Duration::from_secs(3600)).unwrap();
    assert!(!old.contains(&found));
    qemu.kill().await.unwrap();
    assert!(!find().contains(&found));
}
