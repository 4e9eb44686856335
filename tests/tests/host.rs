//! What happens on the host beside its VMs: VMs that were not measured first, extends and resets by others, the
//! verifier that asks on its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use onequote_tests::lab::{Machine, Verdict, VmSpec, World, wait};

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn vm_that_ran_before_it_was_seen_is_untrusted() {
    World::test(|world| {
        world.start_enrolled()?;
        world.add_vm(VmSpec::new("gated", Machine::Microvm))?.start()?;
        world.wait_running("gated")?;
        world.learn_policy()?;
        world.vm("gated")?.kill()?;
        world.wait_gone("gated")?;
        world.vm("gated")?.spec().gated = false;
        world.vm("gated")?.start()?;
        world.wait_running("gated")?;
        // Until it is measured it is `unmeasured`.
        let found = world.wait_until("the VM to be measured", LIMIT, |world| {
            let found = world.verdict()?;
            ensure!(found.vm("gated").state() != "trusted", "{found}");
            Ok(found.vm("gated").has("attached-while-running", "").then_some(found))
        })?;
        found.vm("gated").is_untrusted_for("attached-while-running", "")
    });
}

#[test]
fn vm_without_a_monitor_is_found_and_the_host_is_untrusted() {
    World::test(|world| {
        world.start_enrolled()?;
        let policy = world.learn_policy()?;
        let strict = std::fs::read_to_string(&policy)?.replace("unmanaged = \"allowed\"\n", "");
        std::fs::write(&policy, strict)?;
        world.verifier(&["policy", "set", World::HOST, &policy.to_string_lossy()])?.success()?;
        let mut hidden = VmSpec::new("hidden", Machine::Microvm);
        (hidden.monitor, hidden.vsock, hidden.gated) = (false, false, false);
        world.add_vm(hidden)?.start()?;
        let pid = world.vm("hidden")?.qemu()?.id();
        // The proxy gives a young process time to open its monitor.
        let found = world.wait_until("the hidden VM to be found", LIMIT, |world| {
            let found = world.verdict()?;
            Ok(found.host().has("unmanaged-vm", &format!("pid {pid}")).then_some(found))
        })?;
        found.host().is("untrusted")?;
        // A proxy that has just started knows of it before it answers anybody.
        world.proxy()?.terminate()?;
        world.start_proxy()?;
        world.enrol_again()?;
        world.verdict()?.host().is_untrusted_for("unmanaged-vm", &format!("pid {pid}"))
    });
}

fn tpm2(world: &World, arguments: &[&str]) -> Result<()> {
    let status = Command::new(arguments[0])
        .args(&arguments[1..])
        .env("TPM2TOOLS_TCTI", world.tcti())
        .status()
        .context("tpm2-tools")?;
    ensure!(status.success(), "{arguments:?} ended with {status}");
    Ok(())
}

#[test]
fn an_extend_by_somebody_else_is_never_papered_over() {
    World::test(|world| {
        world.start_enrolled()?;
        world.learn_policy()?;
        world.verdict()?.host().is("trusted")?;
        world.proxy()?.terminate()?;
        tpm2(world, &["tpm2_pcrextend", &format!("12:sha256={}", "ab".repeat(32))])?;
        world.start_proxy()?;
        world.enrol_again()?;
        let found = world.verdict()?;
        found.host().is_untrusted_for("foreign-extend", "")?;
        let log = world.proxy_command(&["log"])?.success()?.output;
        ensure!(log.contains("log-gap") && log.contains("foreign-extend"), "{log}");
        // It does not go away by asking again.
        world.verdict()?.host().is("untrusted")
    });
}

#[test]
fn a_reset_of_the_tpm_under_a_running_host_is_found() {
    World::test(|world| {
        world.start_enrolled()?;
        let policy = world.learn_policy()?;
        world.verdict()?.host().is("trusted")?;
        world.proxy()?.terminate()?;
        world.tpm()?.reset()?;
        world.start_proxy()?;
        world.enrol_again()?;
        for _ in 0..2 {
            world.verdict()?.host().is_untrusted_for("tpm-reset", "record 0")?;
        }
        let log = world.proxy_command(&["log"])?.success()?.output;
        ensure!(log.contains("epoch 2") && log.contains("tpm-reset"), "{log}");
        // A proxy whose log was taken away knows nothing of it; the verifier does.
        world.proxy()?.terminate()?;
        world.tpm()?.reset()?;
        for epoch in world.epochs()? {
            std::fs::remove_file(world.proxy_state().join(format!("log/epoch-{epoch:08}.cel")))?;
        }
        std::fs::write(world.proxy_state().join("log/epoch-00000005.cel"), "")?;
        world.start_proxy()?;
        world.enrol_again()?;
        world.verdict()?.host().is_untrusted_for("tpm-reset", "epoch 5")?;
        let log = world.proxy_command(&["log"])?.success()?.output;
        ensure!(log.contains("epoch 5") && !log.contains("log-gap"), "{log}");
        // Who knows why it was may accept it.
        let text = std::fs::read_to_string(&policy)?.replacen("[host]\n", "[host]\naccept_gaps = [\"tpm-reset\"]\n", 1);
        std::fs::write(&policy, text)?;
        world.verifier(&["policy", "set", World::HOST, &policy.to_string_lossy()])?.success()?;
        world.verdict()?.host().is("trusted")
    });
}

#[test]
fn a_suspend_of_the_tpm_is_no_alarm() {
    World::test(|world| {
        world.start_enrolled()?;
        world.learn_policy()?;
        world.verdict()?.host().is("trusted")?;
        world.tpm()?.suspend()?;
        world.verdict()?.host().is("trusted")?;
        let log = world.proxy_command(&["log"])?.success()?.output;
        ensure!(log.contains("epoch 1") && !log.contains("log-gap"), "{log}");
        Ok(())
    });
}

#[test]
fn vm_that_runs_while_the_log_begins_anew_is_not_forgotten() {
    World::test(|world| {
        world.start_enrolled()?;
        world.add_vm(VmSpec::new("stays", Machine::Microvm))?.start()?;
        world.wait_running("stays")?;
        world.learn_policy()?;
        world.proxy()?.terminate()?;
        world.tpm()?.reset()?;
        world.start_proxy()?;
        world.enrol_again()?;
        // At first the log knows only that it is there.
        let found = world.wait_until("the VM to be measured", LIMIT, |world| {
            let found = world.verdict()?;
            ensure!(matches!(found.vm("stays").state(), "untrusted" | "unmeasured"), "{found}");
            Ok(found.vm("stays").has("attached-while-running", "").then_some(found))
        })?;
        found.vm("stays").is_untrusted_for("attached-while-running", "")
    });
}

#[test]
fn old_evidence_does_not_answer_a_new_challenge() {
    World::test(|world| {
        world.start_enrolled()?;
        world.learn_policy()?;
        let saved = world.folder().join("evidence.oq");
        let run = world.verifier(&["attest", World::HOST, "--json", "--save", &saved.to_string_lossy()])?;
        Verdict::of(&run)?.host().is("trusted")?;
        // The log has gone on since: what was true then is not shown as true now.
        world.proxy()?.terminate()?;
        world.start_proxy()?;
        world.enrol_again()?;
        world.verdict()?.host().is("trusted")?;
        let nonce = "00".repeat(32);
        let arguments = ["verify", &saved.to_string_lossy(), "--host", World::HOST, "--nonce", &nonce, "--json"];
        Verdict::of(&world.verifier(&arguments)?)?.host().is_untrusted_for("nonce-other", "")
    });
}

#[test]
fn a_verifier_that_serves_asks_on_its_own_and_keeps_no_old_green() {
    World::test(|world| {
        world.start_enrolled()?;
        world.learn_policy()?;
        world.start_serve(1)?;
        world.wait_until("a verdict nobody asked for", LIMIT, |world| {
            Ok((world.served_verdict()?.host().state() == "trusted").then_some(()))
        })?;
        world.proxy()?.kill()?;
        // The proxy is gone, so the world's own wait, which watches over it, does not serve here.
        wait::for_true("the green to go", LIMIT, || Ok(world.served_verdict()?.host().state() == "unreachable"))?;
        world.start_proxy()?;
        world.enrol_again()?;
        world.wait_until("the host to be found again", LIMIT, |world| {
            Ok((world.served_verdict()?.host().state() == "trusted").then_some(()))
        })
    });
}
