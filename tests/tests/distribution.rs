//! A whole Debian as guest: systemd, `ima_policy=tcb`, the shim from its packages, by service and from the initramfs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use onequote_tests::lab::{
    Distribution, SMALL_PACKAGE, ShimStart, World, note,
    trees::{with_lines, without_table},
};

/// A machine that does other things beside makes a guest under TCG slow.
const LIMIT: Duration = Duration::from_secs(300);

const VMS: [(&str, ShimStart); 2] = [("service", ShimStart::Service), ("initramfs", ShimStart::Initramfs)];

/// What root reads or runs in the guest when the small package is installed: its program and script, and dpkg's files that
/// are others then than those of the image.
const INSTALLED: [&str; 4] = [
    "ima-unknown-file /usr/bin/onequote-lab-tool",
    "ima-unknown-file /var/lib/dpkg/info/onequote-lab-tool.postinst",
    "ima-unknown-file /var/lib/dpkg/tmp.ci/control",
    "ima-wrong-digest /var/lib/dpkg/status",
];

#[test]
fn vm_of_a_whole_distribution_is_judged_by_a_policy_of_its_image() {
    World::test(|world| {
        let start = Instant::now();
        let tell = |what: &str| eprintln!("{:6.1} s  {what}", start.elapsed().as_secs_f32());
        let debian = Distribution::prepare(world.assets())?;
        tell(&format!("a Debian of {} packages", debian.packages()?));
        world.start_enrolled()?;
        for (name, shim) in VMS {
            debian.add_vm(world, name, shim)?;
            world.vm(name)?.start()?;
        }
        let rule = debian.rule(world)?;
        world.wait_all_reported()?;
        tell("both are up, and their lists have arrived");
        for (name, shim) in VMS {
            let service = world.vm(name)?.ask("sh systemctl is-active onequote-shim")?.output;
            let expected = if shim == ShimStart::Service { "active" } else { "inactive" };
            ensure!(service.trim() == expected, "the shim's service in {name}: {service}");
        }

        world.set_learnt(|learnt| {
            let mut policy = with_lines(&learnt, "[host]", "unmanaged = \"allowed\"\n")?;
            policy = policy.replace("# To allow that: monitors =", "monitors =");
            policy = without_table(&policy, "[vm.ima]")?;
            for (name, _) in VMS {
                policy = with_lines(&policy, &format!("name = \"{name}\""), &rule)?;
            }
            Ok(policy)
        })?;
        let found = world.verdict()?;
        found.host().is("trusted")?;
        for (name, _) in VMS {
            found.vm(name).is("trusted")?;
            let entries = found.vm(name).field("entries").as_u64().unwrap_or(0);
            ensure!(entries >= 2000, "{entries} entries in {name}");
            tell(&format!("{name}: trusted, with {entries} entries"));
        }

        let (_, before) = world.attest_counted()?;
        ensure!(before < 10_000, "{before} bytes of evidence although nothing is new");
        install(world, "service")?;
        world.wait_all_reported()?;
        let (found, after) = world.attest_counted()?;
        tell(&format!("a package is installed; evidence: {before} bytes before, {after} now"));
        let mut findings = found.vm("service").findings();
        // dpkg writes its status more than once.
        findings.sort();
        findings.dedup();
        ensure!(findings == INSTALLED, "{findings:#?}");
        found.vm("service").is("untrusted")?;
        found.vm("initramfs").is("trusted")?;
        note(&format!(
            "distribution: {:.0} s; two guests, evidence of {before} bytes with nothing new, {after} after apt-get",
            start.elapsed().as_secs_f32()
        ));
        Ok(())
    });
}

/// As an administrator does there. It takes longer than an answer may.
fn install(world: &mut World, name: &str) -> Result<()> {
    let line =
        format!("{{ apt-get install -y {SMALL_PACKAGE} >/run/install.log 2>&1; echo $? >/run/install.done; }} &");
    world.vm(name)?.ask(&format!("sh {line}"))?;
    world.wait_until("the package to be installed", LIMIT, |world| {
        // No program is run to look: it would be measured.
        let asked = world.vm(name)?.ask("sh [ ! -e /run/install.done ] || echo done")?;
        Ok((asked.output.trim() == "done").then_some(()))
    })?;
    let log = world.vm(name)?.ask("sh cat /run/install.done /run/install.log")?.output;
    ensure!(log.starts_with("0\n") && log.contains("here I am"), "{log}");
    Ok(())
}
