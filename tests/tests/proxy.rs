//! The proxy with real VMs, no verifier: the gate, the guests' lists, what it tells of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use anyhow::{Result, ensure};
use onequote_tests::lab::{Machine, VmSpec, World};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);

fn vm_status(world: &World, name: &str) -> Result<Value> {
    let status = world.proxy_status()?;
    let vms = status["vms"].as_array().cloned().unwrap_or_default();
    Ok(vms.into_iter().find(|vm| vm["name"] == name).unwrap_or_default())
}

/// Waits until the proxy has as many entries of the guest as the guest itself.
fn wait_settled(world: &mut World, name: &str) -> Result<()> {
    world.wait_until("the guest's whole list", LIMIT, |world| {
        let answer = world.vm(name)?.ask("sh cat /sys/kernel/security/ima/runtime_measurements_count")?;
        let own: u64 = answer.output.trim().parse()?;
        Ok((vm_status(world, name)?["entries"] == own).then_some(()))
    })
}

#[test]
fn vm_gated_guests_are_let_go_and_their_lists_kept_whole() {
    World::test(|world| {
        world.start_proxy_alone()?;
        for machine in Machine::ALL {
            world.add_vm(VmSpec::new(machine.name(), machine))?.start()?;
        }
        world.wait_all_ready()?;
        for machine in Machine::ALL {
            wait_settled(world, machine.name())?;
            let exported = world.proxy_export(machine.name())?;
            ensure!(exported == world.vm(machine.name())?.ima_list()?, "another list of {}", machine.name());
        }
        let log = world.proxy_command(&["log"])?.success()?.output;
        eprintln!("{log}");
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
        world.vm("launched")?.wait_ready()?;
        wait_settled(world, "launched")
    });
}
