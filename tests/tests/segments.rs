//! A log in several files, of which the oldest go when every verifier has them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use onequote_tests::lab::{Bare, Verdict, World};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(90);

/// A verifier besides the world's own: its state folder.
struct Other(PathBuf);

impl Other {
    fn init(world: &World, name: &str) -> Result<Self> {
        let other = Self(world.folder().join(name));
        other.run(world, &["init"])?;
        Ok(other)
    }

    fn run(&self, world: &World, arguments: &[&str]) -> Result<std::process::Output> {
        let output = Command::new(&world.assets().verifier).arg("--state").arg(&self.0).args(arguments).output()?;
        ensure!(output.status.code().is_some_and(|code| code < 2), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(output)
    }

    fn enrol(&self, world: &World, more: &[&str]) -> Result<()> {
        let (url, state) = (world.proxy_url()?, world.proxy_state());
        let (ak, certificate) = (state.join("ak.pub"), state.join("certificate.pem"));
        let paths = [ak.to_string_lossy(), certificate.to_string_lossy()];
        let mut arguments = vec!["enrol", World::HOST, "--ak", &paths[0], "--certificate", &paths[1]];
        arguments.extend(["--url", &url, "--software-tpm"]);
        arguments.extend(more);
        self.run(world, &arguments).map(drop)
    }

    fn codes(&self, world: &World) -> Result<Vec<String>> {
        let output = self.run(world, &["attest", World::HOST, "--json"])?;
        codes(&serde_json::from_slice(&output.stdout)?)
    }

    /// How the proxy names it.
    fn entry(&self, name: &str) -> String {
        let certificate = self.0.join("certificate.pem");
        format!("\n[[verifiers]]\nname = {name:?}\ncertificate = {certificate:?}\n")
    }
}

/// Codes of the host's findings, and of VMs' as `VM: code`.
fn codes(verdict: &Value) -> Result<Vec<String>> {
    let of = |list: &Value, prefix: &str| -> Vec<String> {
        let list = list.as_array().into_iter().flatten();
        list.filter_map(|finding| Some(format!("{prefix}{}", finding["code"].as_str()?))).collect()
    };
    let mut codes = of(&verdict["host"]["findings"], "");
    for vm in verdict["vms"].as_array().context("no VMs")? {
        codes.extend(of(&vm["findings"], &format!("{}: ", vm["name"].as_str().unwrap_or_default())));
    }
    Ok(codes)
}

fn own_codes(world: &World) -> Result<Vec<String>> {
    codes(&world.attest()?.json()?)
}

/// Where the log's files begin, by the running proxy.
fn segments(world: &World) -> Result<Vec<u64>> {
    let status = world.proxy_status()?;
    let segments = status["segments"].as_array().context("no segments")?;
    Ok(segments.iter().filter_map(|segment| segment["bytes"].as_u64()).collect())
}

/// Lets things happen to a VM until the log has so many files more.
fn grow(world: &mut World, vm: &Bare, more: usize) -> Result<()> {
    let wanted = segments(world)?.len() + more;
    let mut monitor = vm.monitor()?;
    world.wait_until("the log to grow", LIMIT, |world| {
        for _ in 0..5 {
            monitor.execute("stop", &json!({}))?;
            monitor.execute("cont", &json!({}))?;
        }
        Ok((segments(world)?.len() >= wanted).then_some(()))
    })
}

fn has(codes: &[String], code: &str) -> bool {
    codes.iter().any(|found| found.ends_with(code))
}

#[test]
fn the_oldest_files_go_when_every_verifier_has_them() {
    World::test(|world| {
        let two = Other::init(world, "two")?;
        world.settings().tables = format!("{}\n[log]\nsegment_bytes = 4096\n", two.entry("two"));
        world.start_enrolled()?;
        two.enrol(world, &[])?;
        let vm = world.start_bare("vm", &[])?;
        world.wait_running("vm")?;
        let (before, before_two) = (own_codes(world)?, two.codes(world)?);
        grow(world, &vm, 3)?;

        // One has it all, the other lags: everything stays.
        for _ in 0..3 {
            ensure!(own_codes(world)? == before);
        }
        ensure!(segments(world)?[0] == 0, "dropped before both have it");
        let oldest = world.proxy_state().join("log/epoch-00000001.cel");
        ensure!(oldest.exists());

        // The other catches up; with its next challenge it says so.
        ensure!(two.codes(world)? == before_two);
        ensure!(two.codes(world)? == before_two);
        world.wait_until("the oldest files to go", LIMIT, |world| Ok((segments(world)?[0] > 0).then_some(())))?;
        ensure!(!oldest.exists(), "it is still on disk");
        ensure!(own_codes(world)? == before && two.codes(world)? == before_two, "both go on without a finding");
        ensure!(world.proxy_command(&["log", "--json"])?.success()?.output.contains("log-segment"));

        // A start from the snapshot, and a verifier that comes late.
        let three = Other::init(world, "three")?;
        let tables = format!("{}{}", world.settings().tables, three.entry("three"));
        world.settings().tables = tables;
        world.proxy()?.terminate()?;
        world.start_proxy()?;
        ensure!(world.epochs()? == [1], "the log began anew: {:?}", world.epochs()?);
        world.enrol_again()?;
        two.enrol(world, &["--replace"])?;
        three.enrol(world, &[])?;
        for codes in [own_codes(world)?, two.codes(world)?] {
            ensure!(!has(&codes, "log-segment-start") && !has(&codes, "log-dropped"), "{codes:?}");
        }
        let late = three.codes(world)?;
        ensure!(has(&late, "log-segment-start"), "{late:?}");
        // The VM's own gap, and that it is measured while it runs, are of the proxy's restart.
        ensure!(!has(&late, "vm-not-in-log") && !late.iter().any(|code| code == "log-gap"), "{late:?}");

        // Nobody waits for who does not come.
        let kept = segments(world)?[0];
        grow(world, &vm, 2)?;
        for _ in 0..2 {
            own_codes(world)?;
            two.codes(world)?;
        }
        ensure!(segments(world)?[0] == kept, "three has not accepted it");
        world.proxy_command(&["release", "three"])?.success()?;
        ensure!(segments(world)?[0] > kept);
        ensure!(world.proxy_command(&["release", "four"])?.code != 0);
        let verdict: Verdict = world.verdict()?;
        ensure!(!verdict.host().findings().iter().any(|finding| finding.starts_with("log-")), "{verdict}");
        Ok(())
    });
}
