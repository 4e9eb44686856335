//! The whole path: VMs measured, guests' lists bound, one quote, a verdict; and what an attacker changes on the way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::stream::{self, Evidence, Item, Pieces};
use onequote_tests::lab::{Machine, VmSpec, World};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);

/// Findings about the host, or about one VM, as `code item`.
fn findings(of: &Value) -> Vec<String> {
    let list = of["findings"].as_array().cloned().unwrap_or_default();
    list.iter().map(|f| format!("{} {}", f["code"].as_str().unwrap(), f["item"].as_str().unwrap_or(""))).collect()
}

fn vm<'a>(verdict: &'a Value, name: &str) -> &'a Value {
    verdict["vms"].as_array().and_then(|vms| vms.iter().find(|vm| vm["name"] == name)).unwrap_or(&Value::Null)
}

fn has(of: &Value, code: &str, item: &str) -> bool {
    findings(of).iter().any(|f| f.starts_with(&format!("{code} ")) && f.contains(item))
}

fn state(of: &Value) -> &str {
    of["state"].as_str().unwrap_or("none")
}

/// Waits until the proxy has the guest's whole list.
fn settle(world: &mut World, name: &str) -> Result<()> {
    world.wait_until("the guest's whole list", LIMIT, |world| {
        let answer = world.vm(name)?.ask("sh cat /sys/kernel/security/ima/runtime_measurements_count")?;
        let own: u64 = answer.output.trim().parse()?;
        let status = world.proxy_status()?;
        let vms = status["vms"].as_array().cloned().unwrap_or_default();
        let known = vms.iter().find(|vm| vm["name"] == name).map(|vm| vm["entries"].clone());
        Ok((known == Some(own.into())).then_some(()))
    })
}

fn wait_running(world: &mut World, name: &str) -> Result<()> {
    world.wait_until("the proxy to let the VM run", LIMIT, |world| {
        let status = world.proxy_status()?;
        let vms = status["vms"].as_array().cloned().unwrap_or_default();
        Ok(vms.iter().any(|vm| vm["name"] == name && vm["run_state"] == "running").then_some(()))
    })
}

fn wait_stopped(world: &mut World, name: &str) -> Result<()> {
    world.wait_until("the VM's end to be logged", LIMIT, |world| {
        let status = world.proxy_status()?;
        let vms = status["vms"].as_array().cloned().unwrap_or_default();
        Ok(vms.iter().all(|vm| vm["name"] != name).then_some(()))
    })
}

/// One appraisal, whatever its outcome.
fn verdict(world: &World) -> Result<Value> {
    world.attest()?.json()
}

#[test]
fn vm_three_clean_vms_are_trusted_from_one_quote_and_an_unknown_program_is_found() {
    World::test(|world| {
        world.start_enrolled()?;
        for machine in Machine::ALL {
            world.add_vm(VmSpec::new(machine.name(), machine))?.start()?;
        }
        world.wait_all_ready()?;
        for machine in Machine::ALL {
            settle(world, machine.name())?;
        }
        world.learn_policy()?;

        let before = world.tpm()?.quotes()?;
        let run = world.attest()?;
        let clean = run.json()?;
        ensure!(world.tpm()?.quotes()? == before + 1, "not one quote");
        ensure!(state(&clean["host"]) == "trusted", "host: {:?}", findings(&clean["host"]));
        ensure!(clean["host"]["software_tpm"] == true, "the verdict does not say that the TPM is software");
        for machine in Machine::ALL {
            let vm = vm(&clean, machine.name());
            ensure!(state(vm) == "trusted", "{}: {:?}", machine.name(), findings(vm));
            ensure!(vm["entries"].as_u64() > Some(0), "no entries of {}", machine.name());
        }
        ensure!(run.code == 0, "exit code {}", run.code);

        let microvm = world.vm("microvm")?;
        microvm.write_program("/disk/bin/intruder", "echo in")?;
        microvm.run("/disk/bin/intruder")?;
        settle(world, "microvm")?;
        let run = world.attest()?;
        let found = run.json()?;
        ensure!(run.code == 1, "exit code {}", run.code);
        ensure!(state(vm(&found, "microvm")) == "untrusted", "{found:#}");
        ensure!(has(vm(&found, "microvm"), "ima-unknown-file", "/disk/bin/intruder"), "{found:#}");
        for name in ["q35", "uefi"] {
            ensure!(state(vm(&found, name)) == "trusted", "{name}: {:?}", findings(vm(&found, name)));
        }
        ensure!(state(&found["host"]) == "trusted", "{found:#}");
        Ok(())
    });
}

/// Starts VM `name` (its guest need not come up), takes the verdict, ends the VM.
fn start_and_judge(world: &mut World, name: &str) -> Result<Value> {
    world.vm(name)?.start()?;
    wait_running(world, name)?;
    let verdict = verdict(world)?;
    world.vm(name)?.kill()?;
    wait_stopped(world, name)?;
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
            wait_running(world, name)?;
        }
        learn_without_runtime(world)?;
        for name in ["direct", "chain"] {
            world.vm(name)?.kill()?;
            wait_stopped(world, name)?;
        }
        for (name, file, code, item) in [
            ("direct", "vmlinux", "component-kernel", "vmlinux"),
            ("direct", "initrd", "component-initrd", "initrd"),
            ("chain", "base.qcow2", "image-mismatch", "/1"),
        ] {
            world.vm(name)?.flip_byte(file, None)?;
            let found = start_and_judge(world, name)?;
            ensure!(state(vm(&found, name)) == "untrusted", "{file}: {found:#}");
            ensure!(has(vm(&found, name), code, item), "{file}: {:?}", findings(vm(&found, name)));
            world.vm(name)?.flip_byte(file, None)?;
            let mended = start_and_judge(world, name)?;
            ensure!(state(vm(&mended, name)) == "trusted", "{file} mended: {:?}", findings(vm(&mended, name)));
        }
        world.vm("direct")?.edit_config("lab.disk=", "lab.disc=")?;
        let found = start_and_judge(world, "direct")?;
        ensure!(has(vm(&found, "direct"), "component-kernel-cmdline", ""), "{:?}", findings(vm(&found, "direct")));

        // A writable image that changed while its VM was off, between one start and the next.
        world.vm("direct")?.edit_config("lab.disc=", "lab.disk=")?;
        let clean = start_and_judge(world, "direct")?;
        ensure!(state(vm(&clean, "direct")) == "trusted", "{:?}", findings(vm(&clean, "direct")));
        world.vm("direct")?.flip_byte("disk.img", None)?;
        let found = start_and_judge(world, "direct")?;
        ensure!(state(vm(&found, "direct")) == "untrusted", "{found:#}");
        ensure!(
            findings(vm(&found, "direct")).iter().any(|f| f.starts_with("image-")),
            "{:?}",
            findings(vm(&found, "direct"))
        );
        Ok(())
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
            Ok(run[0]["digest"].as_str().context("a digest")?.to_owned())
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
        wait_running(world, "web")?;
        world.vm("web")?.kill()?;
        wait_stopped(world, "web")?;

        world.vm("web")?.flip_byte("vmlinux", None)?;
        world.vm("web")?.start()?;
        let error = world.wait_until("the refusal", LIMIT, |world| {
            let status = world.proxy_status()?;
            let vms = status["vms"].as_array().cloned().unwrap_or_default();
            Ok(vms.iter().find(|vm| vm["name"] == "web").and_then(|vm| vm["error"].as_str().map(str::to_owned)))
        })?;
        ensure!(error.contains("kernel"), "{error}");
        let status = world.proxy_status()?;
        ensure!(status["vms"][0]["run_state"] == "prelaunch", "{status:#}");
        let found = verdict(world)?;
        ensure!(has(vm(&found, "web"), "vm-refused", ""), "{:?}", findings(vm(&found, "web")));
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
        world.wait_all_ready()?;
        settle(world, "m")?;
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
            ensure!(has(&found["host"], code, item), "{what}: {:?}", findings(&found["host"]));
            ensure!(state(&found["host"]) == "untrusted", "{what}: {found:#}");
        }
        let mut lists = good.clone();
        lists.guests[0].entries.swap(1, 2);
        let found = verify_changed(world, &lists)?;
        ensure!(has(vm(&found, "m"), "guest-list-aggregate", "record"), "{found:#}");
        lists = good.clone();
        lists.guests[0].entries.pop();
        let found = verify_changed(world, &lists)?;
        ensure!(has(vm(&found, "m"), "guest-list-count", "record"), "{found:#}");

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

        // The guest's list: the proxy reads it at its start.
        world.proxy()?.terminate()?;
        let lists = world.proxy_state().join("guests");
        let list = fs::read_dir(&lists)?
            .filter_map(|f| f.ok().map(|f| f.path()))
            .find(|f| f.extension().is_some_and(|e| e == "list"))
            .context("a list")?;
        let mut bytes = fs::read(&list)?;
        let len = bytes.len();
        bytes.copy_within(len - 8..len - 4, len - 4);
        fs::write(&list, bytes)?;
        world.start_proxy()?;
        world.enrol_again()?;
        let found = world.wait_until("the VM to be found again", LIMIT, |world| {
            let found = verdict(world)?;
            Ok((state(vm(&found, "m")) != "none").then_some(found))
        })?;
        ensure!(
            findings(vm(&found, "m")).iter().any(|f| f.starts_with("guest-list-") && f.contains("record")),
            "{found:#}"
        );
        Ok(())
    });
}

fn edited_copy(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut copy = bytes.to_vec();
    copy[at] ^= 1;
    copy
}

/// The verdict on evidence that somebody changed on its way.
fn verify_changed(world: &World, evidence: &Evidence) -> Result<Value> {
    let mut pieces = Pieces::default();
    pieces.push_log(Item::Records, 0, &evidence.records);
    pieces.push_dictionary(0, evidence.dictionary.iter().cloned());
    evidence.guests.iter().for_each(|guest| pieces.push_guest(guest));
    let file = world.folder().join("changed.oq");
    fs::write(&file, stream::compress(&pieces.stream(evidence.head.clone()))?)?;
    world.verifier(&["verify", &file.to_string_lossy(), "--host", World::HOST, "--json"])?.json()
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
        let here = world.verifier(&["verify", &saved, "--host", World::HOST, "--json"])?.json()?;
        ensure!(findings(&here["host"]).iter().all(|f| !f.starts_with("signature")), "{here:#}");

        let late = world.verifier(&["verify", &saved, "--host", World::HOST, "--nonce", &"ab".repeat(32), "--json"])?;
        ensure!(has(&late.json()?["host"], "nonce-other", ""), "{}", late.output);
        ensure!(late.code == 1, "exit code {}", late.code);

        let mut other = World::new()?;
        other.start_enrolled()?;
        let ak = other.proxy_state().join("ak.pub");
        let foreign = world.verifier(&["verify", &saved, "--ak", &ak.to_string_lossy(), "--json"])?;
        ensure!(has(&foreign.json()?["host"], "signature-invalid", ""), "{}", foreign.output);
        ensure!(foreign.code == 1, "exit code {}", foreign.code);
        Ok(())
    });
}
