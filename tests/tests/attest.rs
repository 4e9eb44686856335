//! The whole path: VMs measured, guests' lists bound, one quote, a verdict; and what an attacker changes on the way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::stream::{self, Evidence, Item, Pieces};
use onequote_tests::lab::{Machine, Verdict, VmSpec, World};

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn vm_three_clean_vms_are_trusted_from_one_quote_and_an_unknown_program_is_found() {
    World::test(|world| {
        world.start_enrolled()?;
        for machine in Machine::ALL {
            world.add_vm(VmSpec::new(machine.name(), machine))?.start()?;
        }
        world.wait_all_reported()?;
        world.learn_policy()?;

        let before = world.tpm()?.quotes()?;
        let clean = world.verdict()?;
        let quotes = world.tpm()?.quotes()?;
        ensure!(quotes == before + 1, "not one quote");
        ensure!(world.proxy_status()?["quotes"] == quotes, "the proxy counts otherwise: {}", world.proxy_status()?);
        clean.host().is("trusted")?;
        ensure!(clean.host().field("software_tpm") == true, "the verdict does not say that the TPM is software");
        for machine in Machine::ALL {
            clean.vm(machine.name()).is("trusted")?;
            ensure!(clean.vm(machine.name()).field("entries").as_u64() > Some(0), "no entries: {clean}");
        }
        ensure!(clean.code == 0, "{clean}");

        let microvm = world.vm("microvm")?;
        microvm.write_program("/disk/bin/intruder", "echo in")?;
        microvm.run("/disk/bin/intruder")?;
        world.wait_all_reported()?;
        let found = world.verdict()?;
        ensure!(found.code == 1, "{found}");
        found.vm("microvm").is_untrusted_for("ima-unknown-file", "/disk/bin/intruder")?;
        for name in ["q35", "uefi"] {
            found.vm(name).is("trusted")?;
        }
        found.host().is("trusted")
    });
}

/// Starts VM `name` (its guest need not come up), takes the verdict, ends the VM.
fn start_and_judge(world: &mut World, name: &str) -> Result<Verdict> {
    world.vm(name)?.start()?;
    world.wait_running(name)?;
    let verdict = world.verdict()?;
    world.vm(name)?.kill()?;
    world.wait_gone(name)?;
    Ok(verdict)
}

/// Policies of these tests do not ask for run time: the guests are not waited for.
fn learn_without_runtime(world: &World) -> Result<()> {
    let file = world.learn_policy()?;
    let text = fs::read_to_string(&file)?;
    let text = text.replace("runtime = \"required\"", "runtime = \"optional\"");
    fs::write(&file, text)?;
    world.verifier(&["policy", "set", World::HOST, &file.to_string_lossy()])?.success()?;
    Ok(())
}

#[test]
fn vm_one_changed_byte_before_the_start_names_the_component() {
    World::test(|world| {
        world.start_enrolled()?;
        for (name, machine) in [("direct", Machine::Q35), ("chain", Machine::Uefi)] {
            world.add_vm(VmSpec::new(name, machine))?.start()?;
            world.wait_running(name)?;
        }
        learn_without_runtime(world)?;
        for name in ["direct", "chain"] {
            world.vm(name)?.kill()?;
            world.wait_gone(name)?;
        }
        for (name, file, code, item) in [
            ("direct", "vmlinux", "component-kernel", "vmlinux"),
            ("direct", "initrd", "component-initrd", "initrd"),
            ("chain", "base.qcow2", "image-mismatch", "/1"),
        ] {
            world.vm(name)?.flip_byte(file, None)?;
            start_and_judge(world, name)?.vm(name).is_untrusted_for(code, item)?;
            world.vm(name)?.flip_byte(file, None)?;
            start_and_judge(world, name)?.vm(name).is("trusted")?;
        }
        world.vm("direct")?.edit_config("lab.disk=", "lab.disc=")?;
        let found = start_and_judge(world, "direct")?;
        found.vm("direct").is_untrusted_for("component-kernel-cmdline", "")?;

        // A writable image that changed while its VM was off, between one start and the next.
        world.vm("direct")?.edit_config("lab.disc=", "lab.disk=")?;
        start_and_judge(world, "direct")?.vm("direct").is("trusted")?;
        world.vm("direct")?.flip_byte("disk.img", None)?;
        start_and_judge(world, "direct")?.vm("direct").is_untrusted_for("image-discontinuity", "disk.img")
    });
}

#[test]
fn vm_enforce_keeps_a_changed_vm_stopped() {
    World::test(|world| {
        world.add_vm(VmSpec::new("web", Machine::Q35))?;
        let folder = world.vm("web")?.folder().to_owned();
        let digest = |world: &World, file: &str| -> Result<String> {
            let path = folder.join(file);
            let run = world.proxy_command(&["measure", "--json", &path.to_string_lossy()])?.success()?.json()?;
            Ok(run[0]["sha256"].as_str().context("a digest")?.to_owned())
        };
        let references = world.folder().join("references.toml");
        let text = format!(
            "[[vm]]\nname = \"web\"\nkernel = [{:?}]\ninitrd = [{:?}]\n",
            digest(world, "vmlinux")?,
            digest(world, "initrd")?
        );
        fs::write(&references, text)?;
        world.settings().enforce = Some(references);
        world.start_enrolled()?;
        world.vm("web")?.start()?;
        world.wait_running("web")?;
        world.vm("web")?.kill()?;
        world.wait_gone("web")?;

        world.vm("web")?.flip_byte("vmlinux", None)?;
        world.vm("web")?.start()?;
        let error = world.wait_until("the refusal", LIMIT, |world| {
            Ok(world.vm_status("web")?["error"].as_str().map(str::to_owned))
        })?;
        ensure!(error.contains("kernel"), "{error}");
        ensure!(world.vm_status("web")?["run_state"] == "prelaunch", "it was let go: {error}");
        let found = world.verdict()?;
        ensure!(found.vm("web").has("vm-refused", ""), "{found}");
        Ok(())
    });
}

/// The newest log file.
fn log_file(world: &World) -> Result<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(world.proxy_state().join("log"))?.map(|f| f.map(|f| f.path())).collect::<std::io::Result<_>>()?;
    files.retain(|f| f.extension().is_some_and(|e| e == "cel"));
    files.sort();
    files.pop().context("a log file")
}

#[test]
fn vm_a_changed_log_or_list_on_disk_is_refused() {
    World::test(|world| {
        world.start_enrolled()?;
        world.add_vm(VmSpec::new("m", Machine::Microvm))?.start()?;
        world.wait_all_reported()?;
        world.learn_policy()?;
        ensure!(world.attest()?.code == 0, "not trusted before the attack");

        // As a lying host would send it.
        let saved = world.folder().join("evidence.oq");
        world.verifier(&["attest", World::HOST, "--json", "--save", &saved.to_string_lossy()])?.success()?;
        let good = Evidence::parse(&stream::expand(&fs::read(&saved)?, stream::MAX_EXPANDED)?)?;
        let ends = record_ends(&good.records);
        let part = |range: std::ops::Range<usize>| &good.records[range];
        let mut edited = good.records.clone();
        edited[ends[2] - 3] ^= 1;
        let swapped =
            [part(0..ends[0]), part(ends[1]..ends[2]), part(ends[0]..ends[1]), part(ends[2]..good.records.len())];
        let dropped = [part(0..ends[0]), part(ends[1]..good.records.len())];
        let last = ends[ends.len() - 2];
        for (what, records, code, item) in [
            ("edited", edited, "log-digest", "record 2"),
            ("reordered", swapped.concat(), "log-order", "record 1"),
            ("dropped", dropped.concat(), "log-order", "record 1"),
            ("truncated in a record", part(0..good.records.len() - 5).to_vec(), "log-truncated", "record"),
            ("truncated after a record", part(0..last).to_vec(), "log-length", "record"),
        ] {
            let found = verify_changed(world, &Evidence { records, ..good.clone() })?;
            found.host().is_untrusted_for(code, item).with_context(|| what)?;
        }
        let mut lists = good.clone();
        lists.guests[0].entries.swap(1, 2);
        verify_changed(world, &lists)?.vm("m").is_untrusted_for("guest-list-aggregate", "record")?;
        lists = good.clone();
        lists.guests[0].entries.pop();
        verify_changed(world, &lists)?.vm("m").is_untrusted_for("guest-list-count", "record")?;

        // The file under the running proxy: it sends what is there, or says which records are missing.
        let file = log_file(world)?;
        let whole = fs::read(&file)?;
        let cut = whole.len() - 5;
        for bytes in [edited_copy(&whole, ends[2] - 3), whole[..cut].to_vec()] {
            fs::write(&file, bytes)?;
            let run = world.attest()?;
            ensure!(run.code == 1 || run.code == 3, "exit code {}: {}", run.code, run.output);
            ensure!(run.output.contains("record"), "no record named: {}", run.output);
        }
        fs::write(&file, &whole)?;
        ensure!(world.attest()?.code == 0, "not trusted after the log was put back");

        // The guest's list: the proxy reads it at its start. The last reference is to another entry.
        world.proxy()?.terminate()?;
        let references = world.proxy_state().join("guests/references");
        let mut bytes = fs::read(&references)?;
        let last = bytes.len() - 4;
        bytes[last] ^= 1;
        fs::write(&references, bytes)?;
        world.start_proxy()?;
        world.enrol_again()?;
        let found = world.wait_until("the VM to be found again", LIMIT, |world| {
            let found = world.verdict()?;
            Ok((found.vm("m").state() != "none").then_some(found))
        })?;
        let findings = found.vm("m").findings();
        ensure!(findings.iter().any(|f| f.starts_with("guest-list-") && f.contains("record")), "{findings:?}");
        found.vm("m").is("untrusted")
    });
}

fn edited_copy(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut copy = bytes.to_vec();
    copy[at] ^= 1;
    copy
}

/// The verdict on evidence that somebody changed on its way.
fn verify_changed(world: &World, evidence: &Evidence) -> Result<Verdict> {
    let mut pieces = Pieces::default();
    pieces.push_log(Item::Records, 0, &evidence.records);
    pieces.push_dictionary(0, evidence.dictionary.iter().cloned());
    evidence.guests.iter().for_each(|guest| pieces.push_guest(guest));
    let file = world.folder().join("changed.oq");
    fs::write(&file, stream::compress(&pieces.stream(evidence.head.clone()))?)?;
    Verdict::of(&world.verifier(&["verify", &file.to_string_lossy(), "--host", World::HOST, "--json"])?)
}

/// Where each record of a log ends.
fn record_ends(log: &[u8]) -> Vec<usize> {
    let mut reader = onequote_evidence::log::LogReader::new(log, 0);
    let mut ends = Vec::new();
    while let Some(record) = reader.next() {
        record.expect("a good log");
        ends.push(reader.offset());
    }
    ends
}

#[test]
fn evidence_of_another_host_or_another_time_is_refused() {
    World::test(|world| {
        world.start_enrolled()?;
        let saved = world.folder().join("evidence.oq");
        let saved = saved.to_string_lossy();
        world.verifier(&["attest", World::HOST, "--json", "--save", &saved])?;
        let verify = |more: &[&str]| Verdict::of(&world.verifier(&[&["verify", &saved, "--json"], more].concat())?);
        let here = verify(&["--host", World::HOST])?;
        ensure!(!here.host().has("signature-invalid", "") && !here.host().has("qualifying-data", ""), "{here}");

        let late = verify(&["--host", World::HOST, "--nonce", &"ab".repeat(32)])?;
        late.host().is_untrusted_for("nonce-other", "")?;
        ensure!(late.code == 1, "{late}");

        let mut other = World::new()?;
        other.start_enrolled()?;
        let foreign = verify(&["--ak", &other.proxy_state().join("ak.pub").to_string_lossy()])?;
        foreign.host().is_untrusted_for("signature-invalid", "")?;
        ensure!(foreign.code == 1, "{foreign}");
        Ok(())
    });
}

#[test]
fn what_was_sent_is_not_sent_again() {
    World::test(|world| {
        world.start_enrolled()?;
        let (_, first) = world.attest_counted()?;
        world.learn_policy()?;
        let (found, second) = world.attest_counted()?;
        found.host().is("trusted")?;
        // The head has quote and statement, which are new each time.
        ensure!(second < first, "{second} bytes instead of {first}");
        // What is saved is whole, and of use to who has nothing.
        let saved = world.folder().join("evidence.oq");
        let run = world.verifier(&["attest", World::HOST, "--json", "--save", &saved.to_string_lossy()])?;
        Verdict::of(&run)?.host().is("trusted")?;
        let (file, key) = (saved.to_string_lossy(), world.proxy_state().join("ak.pub"));
        let learnt = world.verifier(&["policy", "learn", "--evidence", &file, "--ak", &key.to_string_lossy()])?;
        ensure!(learnt.success()?.output.contains("[host.registers]"), "nothing is learnt from what was saved");
        // Another log begins anew, and is sent from its start.
        world.proxy()?.terminate()?;
        world.tpm()?.reset()?;
        world.start_proxy()?;
        world.enrol_again()?;
        let (_, again) = world.attest_counted()?;
        ensure!(again > second, "{again} bytes after a reset instead of more than {second}");
        let (_, rest) = world.attest_counted()?;
        ensure!(rest < again, "{rest} bytes instead of {again}");
        Ok(())
    });
}
