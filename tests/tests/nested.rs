//! A host with everything: UEFI firmware, TPM, Debian with systemd and IMA, the proxy as its service, KVM, and guests over
//! AF_VSOCK. Attested from outside, then attacked in ways that need a real machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use onequote_tests::lab::{NestedHost, Verdict, World, note, wait};

const LIMIT: Duration = Duration::from_secs(180);

#[test]
fn vm_that_is_a_host_is_attested_with_its_guests() {
    let mut world = match NestedHost::world(false) {
        Ok(world) => world,
        Err(error) => panic!("no world for this test: {error:#}"),
    };
    if let Err(error) = play(&mut world) {
        // The world prints its logs while it goes.
        panic!("{error:#}");
    }
}

fn play(world: &mut World) -> Result<()> {
    let start = Instant::now();
    let tell = |what: &str| {
        eprintln!("{:6.1} s  {what}", start.elapsed().as_secs_f32());
        if what.contains("again") || what.contains("once more") {
            note(&format!("nested: {what}"));
        }
    };
    let mut host = NestedHost::install(world, &["one", "two"])?;
    tell(&format!("disks are made; the host runs by {}", host.accelerator()));
    host.boot(&tell)?;

    world.join_nested(&mut host)?;
    let known = world.verifier(&["hosts", "--json"])?.json()?;
    let vouched = known[0]["vouched"].as_str().unwrap_or_default();
    ensure!(vouched.contains("vouched for by"), "nobody vouches for its TPM: {known}");
    tell("it has joined over its network");
    // The verifier asks it at once, over the network.
    let first = world.wait_served()?;
    let found = world.served_verdict()?;
    ensure!(found.host().has("host-without-policy", ""), "{found}");
    world.set_nested_policy(&host)?;
    let before = host.quotes()?;
    let (found, second) = world.attest_counted()?;
    ensure!(host.quotes()? == before + 1, "not one quote for host and guests");
    tell(&format!("evidence: {first} bytes at first, then {second}"));
    found.host().is("trusted")?;
    ensure!(found.host().field("software_tpm") == true, "a software TPM that is not told: {found}");
    for vm in ["one", "two"] {
        found.vm(vm).is("trusted")?;
    }
    // What was asked of the host meanwhile is in it; what was sent before is not.
    ensure!(second * 4 < first, "{second} bytes instead of {first}");

    host.guest("one", "write /disk/bin/miner echo dig")?;
    host.guest("one", "run /disk/bin/miner")?;
    let found = until(world, |found| found.vm("one").has("ima-unknown-file", "/disk/bin/miner"))?;
    found.vm("one").is("untrusted")?;
    found.vm("two").is("trusted")?;
    found.host().is("trusted")?;
    tell("an unknown program in a guest is found");

    // As an update does: another file under the name.
    host.run("cd /usr/local/sbin && cp onequote-proxy new && echo >>new && mv new onequote-proxy")?;
    host.run("systemctl restart onequote-proxy")?;
    let found = until(world, |found| found.host().has("ima-wrong-digest", "/usr/local/sbin/onequote-proxy"))?;
    found.host().is("untrusted")?;
    ensure!(found.vm("two").state() != "trusted", "a VM is better than its host: {found}");
    tell("another proxy is found");

    host.forget_guests()?;
    host.move_proxy()?;
    host.power_off()?;
    host.tell_kernel("lab.other=1")?;
    host.boot(&tell)?;
    world.wait_told(&host)?;
    let (found, third) = world.attest_counted()?;
    found.host().is_untrusted_for("boot-image", "BOOTX64.EFI")?;
    tell(&format!("another kernel is found; {third} bytes"));
    note(&format!(
        "nested: {:.0} s by {}; evidence of {first} bytes at first, {second} in steady state, {third} after a reboot",
        start.elapsed().as_secs_f32(),
        host.accelerator()
    ));
    // Another boot is another log: nothing that was sent before says anything about it.
    ensure!(third > second * 4, "{third} bytes instead of {second}");
    Ok(())
}

/// Asks until it is so.
fn until(world: &World, condition: impl Fn(&Verdict) -> bool) -> Result<Verdict> {
    let mut last = None;
    let found = wait::until("the finding", LIMIT, || {
        // The proxy may be starting.
        let Ok(found) = world.verdict() else { return Ok(None) };
        let found = last.insert(found);
        Ok(condition(found).then(|| found.clone()))
    });
    found.with_context(|| format!("last verdict: {}", last.map_or_else(String::new, |found| found.to_string())))
}

/// Every way in which a host can stop and go on, for real, and what the verifier makes of each.
#[test]
fn vm_that_is_a_host_sleeps_and_changes_its_kernel() {
    let mut world = match NestedHost::world(false) {
        Ok(world) => world,
        Err(error) => panic!("no world for this test: {error:#}"),
    };
    if let Err(error) = sleep(&mut world) {
        panic!("{error:#}");
    }
}

fn sleep(world: &mut World) -> Result<()> {
    let start = Instant::now();
    let tell = |what: &str| {
        eprintln!("{:6.1} s  epochs: {what}", start.elapsed().as_secs_f32());
        if what.contains("again") {
            note(&format!("nested, epochs: {what}"));
        }
    };
    let mut host = NestedHost::install(world, &[])?;
    host.add_swap()?;
    host.boot(&tell)?;
    world.join_nested(&mut host)?;
    world.wait_served()?;
    world.set_nested_policy(&host)?;
    let found = world.verdict()?;
    found.host().is("trusted")?;
    ensure!(!found.notes().contains("was suspended"), "{found}");

    host.suspend()?;
    let found = world.verdict()?;
    found.host().is("trusted")?;
    ensure!(found.notes().contains("was suspended"), "a suspend is not told: {found}");
    tell("a suspend to memory is told, and no alarm");

    // The registers began anew under a kernel that went on.
    host.hibernate()?;
    let found = until(world, |found| found.host().has("tpm-reset", ""))?;
    found.host().is("untrusted")?;
    ensure!(!found.host().has("host-kexec", ""), "{found}");
    tell(&format!("a suspend to disk is found: {:?}", found.host().findings()));

    host.power_off()?;
    host.boot(&tell)?;
    let found = until(world, |found| found.host().state() == "trusted")?;
    ensure!(found.host().findings().is_empty(), "{found}");
    tell("a reboot is no alarm");

    // The kernel went, the registers go on.
    host.kexec()?;
    let found = until(world, |found| found.host().has("host-kexec", ""))?;
    found.host().is("untrusted")?;
    ensure!(!found.host().has("tpm-reset", "") && !found.host().has("foreign-extend", ""), "{found}");
    tell(&format!("another kernel by kexec is found: {:?}", found.host().findings()));
    Ok(())
}
