//! **Push on change**: from the moment in which a guest is told to run a program that its policy does not know to the verifier's
//! verdict that has the finding, as its API shows it. 100 guests are connected: three real ones with real shims, and others
//! whose shims' part is played by this program true to the protocol, their VMs by monitor doubles. The host has joined and
//! reports over the connection that it holds; its period is an hour, so that every report here is pushed. The time has in it
//! the guest's serial console (under TCG), the shim's look at the list, log, extend, asking 100 guests, quote (by swtpm),
//! transport, appraisal and the polling of the API.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use onequote_tests::lab::{Guest, Machine, Options, Peer, VmSpec, World};
use serde_json::Value;

use crate::numbers::Numbers;
use crate::starts::{LIMIT, double, record};

/// Guests that are connected.
const GUESTS: usize = 100;

/// Entries that each played guest has.
const ENTRIES: u64 = 1000;

/// Programs that each real guest runs.
const PROGRAMS: usize = 34;

/// How often the API is asked.
const POLL: Duration = Duration::from_millis(5);

pub(crate) fn execs(numbers: &mut Numbers) -> Result<()> {
    let mut world = World::with(Options { no_count: true, ..Options::default() })?;
    join(&mut world)?;
    let recording = record(&mut world)?;
    let mut played = Vec::new();
    for number in 0..GUESTS - Machine::ALL.len() {
        let vm = double(&world, &recording, number)?;
        let mut guest = Guest::new(0);
        guest.grow(ENTRIES)?;
        played.push((vm, Peer::start(world.guest_socket(&format!("vm{number}")), guest)));
    }
    for machine in Machine::ALL {
        world.add_vm(VmSpec::new(machine.name(), machine))?.start()?;
    }
    world.wait_all_reported()?;
    world.wait_until("all guests' lists", LIMIT * 5, |world| {
        let status = world.proxy_status()?;
        let vms = status["vms"].as_array().map_or(&[][..], Vec::as_slice);
        Ok((vms.iter().filter(|vm| vm["entries"].as_u64() > Some(0)).count() == GUESTS).then_some(()))
    })?;
    world.learn_policy()?;
    world.ask_served()?.host().is("trusted")?;

    let address = fs::read_to_string(world.verifier_state().join("serve.addr"))?.trim().to_owned();
    let mut times = Vec::new();
    for number in 0..PROGRAMS {
        for machine in Machine::ALL {
            let path = format!("/disk/bin/new{number}");
            let vm = world.vm(machine.name())?;
            vm.write_program(&path, &format!("echo {number}"))?;
            let start = Instant::now();
            let shown = thread::scope(|scope| {
                let shown = scope.spawn(|| finding(&address, machine.name(), &path));
                vm.run(&path)?;
                shown.join().unwrap_or_else(|_| anyhow::bail!("the polling panicked"))
            })?;
            times.push(shown - start);
        }
    }
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share).ceil() as usize].as_secs_f64() * 1000.0;
    let reports = world.proxy_status()?["reports"][0].take();
    numbers.below("exec to finding, 100 guests, p99", at(0.99), "ms", 1000.0);
    numbers.known("the same, median", at(0.5), "ms");
    numbers.known("the same, longest", at(1.0), "ms");
    numbers.known("execs measured", times.len() as f64, "execs");
    numbers.known("reports for them", reports["reports"].as_f64().unwrap_or_default(), "reports");
    numbers.known("bytes of the last report", reports["last"]["bytes"].as_f64().unwrap_or_default(), "bytes");
    drop(played);
    Ok(())
}

/// Has the host join a verifier that wants a report an hour, and one for each change.
fn join(world: &mut World) -> Result<()> {
    world.verifier(&["init"])?.success()?;
    world.write_proxy_config()?;
    let url = world.start_door("127.0.0.1:0", &[])?;
    let token = world.token(&["--software-tpm"])?;
    let file = world.folder().join("token");
    fs::write(&file, format!("{token}\n"))?;
    world.proxy_command(&["join", &url, "--token-file", &file.to_string_lossy(), "--name", "lab"])?.success()?;
    world.start_proxy()
}

/// When the verdict on this VM has a finding about that program.
fn finding(address: &str, vm: &str, path: &str) -> Result<Instant> {
    let start = Instant::now();
    loop {
        let mut stream = TcpStream::connect(address)?;
        let request = format!("GET /v1/hosts/{} HTTP/1.1\r\nHost: v\r\nConnection: close\r\n\r\n", World::HOST);
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").context("no HTTP answer")?.1;
        let verdict: Value = serde_json::from_str(body)?;
        let vms = verdict["vms"].as_array().map_or(&[][..], Vec::as_slice);
        let findings =
            vms.iter().filter(|judged| judged["name"] == vm).filter_map(|judged| judged["findings"].as_array());
        let about = |finding: &Value| {
            finding["code"] == "ima-unknown-file" && finding["item"].as_str().is_some_and(|item| item.contains(path))
        };
        if findings.flatten().any(about) {
            return Ok(Instant::now());
        }
        ensure!(start.elapsed() < LIMIT, "no finding about {path} of {vm}: {body}");
        thread::sleep(POLL);
    }
}
