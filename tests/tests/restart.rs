//! A VM that is stopped and started again, with its images as they were or not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use anyhow::ensure;
use onequote_tests::lab::{Machine, VmSpec, World};

#[test]
fn vm_restarted_unchanged_stays_trusted_and_changed_does_not() {
    World::test(|world| {
        world.start_enrolled()?;
        for machine in Machine::ALL {
            world.add_vm(VmSpec::new(machine.name(), machine))?.start()?;
        }
        world.wait_all_reported()?;
        world.learn_policy()?;

        // UEFI changes its variables whenever it starts; the log carries what it left from one run to the next.
        for machine in Machine::ALL {
            let vm = world.vm(machine.name())?;
            vm.power_off()?;
            vm.start()?;
        }
        world.wait_all_reported()?;
        let run = world.attest()?;
        ensure!(run.code == 0, "the same images are no longer trusted: {}", run.output);

        world.vm("q35")?.power_off()?;
        world.wait_gone("q35")?;
        world.vm("q35")?.flip_byte("disk.img", None)?;
        world.vm("q35")?.start()?;
        world.wait_all_reported()?;
        let verdict = world.attest()?.json()?;
        for vm in verdict["vms"].as_array().into_iter().flatten() {
            let changed = vm["name"] == "q35";
            ensure!(vm["state"] == if changed { "untrusted" } else { "trusted" }, "{verdict:#}");
            if changed {
                ensure!(vm["findings"][0]["code"] == "image-discontinuity", "{vm:#}");
                ensure!(vm["findings"][0]["item"].as_str().is_some_and(|item| item.contains("disk.img")), "{vm:#}");
            }
        }
        Ok(())
    });
}
