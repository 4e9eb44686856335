//! The proxy with real VMs, no verifier: the gate, the guests' lists, what it tells of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use anyhow::ensure;
use onequote_tests::lab::{Machine, VmSpec, World};

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn vm_gated_guests_are_let_go_and_their_lists_kept_whole() {
    World::test(|world| {
        world.start_proxy_alone()?;
        for machine in Machine::ALL {
            world.add_vm(VmSpec::new(machine.name(), machine))?.start()?;
        }
        world.wait_all_reported()?;
        for machine in Machine::ALL {
            let exported = world.proxy_export(machine.name())?;
            ensure!(exported == world.vm(machine.name())?.ima_list()?, "another list of {}", machine.name());
        }
        let log = world.proxy_command(&["log"])?.success()?.output;
        ensure!(log.matches("vm-start").count() == 3, "three starts are logged: {log}");
        world.vm("q35")?.power_off()?;
        world.wait_until("the end of q35 to be logged", LIMIT, |world| {
            let log = world.proxy_command(&["log"])?.success()?.output;
            Ok(log.contains("vm-stop").then_some(()))
        })
    });
}

#[test]
fn vm_a_launched_guest_is_let_go() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let config = world.proxy_config();
        world.add_vm(VmSpec::new("launched", Machine::Microvm))?.launch(&config)?;
        world.wait_all_reported()
    });
}
