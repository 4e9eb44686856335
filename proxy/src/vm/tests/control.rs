//! What people ask of a VM through the proxy.

use std::sync::atomic::Ordering;

use super::world::*;
use crate::vm::*;

const UUID: &str = "6f0c3a52-93ad-4e4c-8f3e-55ad1e3cbb10";

fn at(stage: Stage, name: &'static str) -> impl Fn(&RegistrySnapshot) -> bool {
    move |known| known.vms.iter().any(|vm| vm.name == name && vm.stage == stage)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_could_not_be_logged_is_logged_once_it_is_retried() {
    let world = World::new();
    world.log.broken.store(true, Ordering::SeqCst);
    let _qemu = world.qemu("web", &["-S"]);
    world.until(at(Stage::Refused, "web")).await;
    let registry = world.manager.as_ref().unwrap().registry().clone();
    let error = registry.retry("web").await.unwrap_err();
    assert!(matches!(&error, ControlError::RefusedAgain(why) if why.contains("no space left")), "{error}");
    world.log.broken.store(false, Ordering::SeqCst);
    registry.retry("web").await.unwrap();
    world.log.wait_kind("vm-resume").await;
    assert_eq!(world.log.kinds(), ["vm-create", "vm-refuse", "vm-start", "vm-resume"]);
    assert!(matches!(registry.retry("web").await.unwrap_err(), ControlError::NotRefused(..)));
    assert_eq!(registry.find("web").unwrap().error, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_with_one_uuid_the_second_may_run_when_the_first_has_ended() {
    let world = World::new();
    let _first = world.qemu("first", &["-S", "-uuid", UUID]);
    world.until(at(Stage::Watched, "first")).await;
    let mut second = world.qemu("second", &["-S", "-uuid", UUID]);
    world.until(at(Stage::Refused, "second")).await;
    let registry = world.manager.as_ref().unwrap().registry().clone();

    let error = registry.quit(UUID).await.unwrap_err();
    assert!(
        matches!(&error, ControlError::Several(_, who) if who.contains("first") && who.contains("second")),
        "{error}"
    );
    let error = registry.retry("second").await.unwrap_err();
    assert!(matches!(&error, ControlError::RefusedAgain(why) if why.contains("first")), "{error}");
    let error = registry.power_down("second").await.unwrap_err();
    assert!(matches!(&error, ControlError::NotRunning(_, state) if state == "prelaunch"), "{error}");

    let first = registry.quit("first").await.unwrap();
    assert_eq!(registry.ended_within(first.vm.session, LONG).await, None);
    assert_eq!(registry.retry("second").await.unwrap().stage, Stage::Watched);
    assert_eq!(registry.find(UUID).unwrap().name, "second");
    let still = registry.ended_within(registry.find("second").unwrap().vm.session, std::time::Duration::ZERO).await;
    assert_eq!(still.unwrap().name, "second");
    registry.quit("second").await.unwrap();
    assert!(second.wait().await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_not_there_is_named_with_what_is_known() {
    let world = World::new();
    let registry = world.manager.as_ref().unwrap().registry().clone();
    let error = registry.quit("web").await.unwrap_err().to_string();
    assert!(error.contains("no VM web is there;"), "{error}");
    // Somebody listens, but is no QEMU.
    let _silent = std::os::unix::net::UnixListener::bind(world.socket("web")).unwrap();
    world.until(|known| !known.sockets.is_empty()).await;
    let error = registry.power_down("web").await.unwrap_err().to_string();
    assert!(error.contains("web.qmp"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_a_monitor_does_not_keep_it() {
    let mut world = World::new();
    let mut qemu = world.qemu("web", &["-S"]);
    world.until(at(Stage::Watched, "web")).await;
    let old = world.manager.as_ref().unwrap().registry().clone();
    world.start(None);
    // A monitor serves one client: the new manager has it.
    world.until(at(Stage::Watched, "web")).await;
    let error = old.quit("web").await.unwrap_err();
    assert!(matches!(error, ControlError::Monitor { .. }), "{error}");
    world.manager.as_ref().unwrap().registry().quit("web").await.unwrap();
    assert!(qemu.wait().await.unwrap().success());
}
