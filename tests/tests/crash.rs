//! The proxy killed at random points, again and again: its log and the TPM stay in step, nothing is lost or doubled.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::event::{EventBody, GapReason};
use onequote_tests::lab::{Guest, LogView, Peer, Random, World, wait};

const KILLS: usize = 200;
const LIMIT: Duration = Duration::from_secs(60);
const VM: &str = "bare";

/// Where kills hit.
#[derive(Debug, Default)]
struct Hits {
    /// Before this start was in the log.
    before_start: usize,
    /// Then before the VM was measured again.
    measuring: usize,
    /// Then before the guest was back.
    waiting: usize,
    /// While the guest's entries were logged.
    logging: usize,
    /// The last record was in the file and not in the TPM.
    unextended: usize,
    /// The last record was torn.
    torn: usize,
}

#[test]
fn a_proxy_that_is_killed_over_and_over_loses_and_doubles_nothing() {
    World::test(|world| {
        let mut random = Random::announced();
        let begin = Instant::now();
        world.start_proxy_alone()?;
        let mut bare = world.start_bare(VM, &[])?;
        let peer = Peer::start(world.guest_socket(VM), Guest::new(6));
        peer.grow_steadily(3);
        world.wait_until("the guest's first connection", LIMIT, |_| Ok((peer.connections() > 0).then_some(())))?;
        world.proxy()?.kill()?;

        let up = start_up_time(world)?;
        let mut seen = Seen { log: world.read_log()?, ..Seen::default() };
        for round in 0..KILLS {
            kill_somewhere(world, &mut random, &peer, up)?;
            seen.check_after_kill(world, &peer).with_context(|| format!("after kill {round}"))?;
            bare.qemu.check_alive()?;
        }
        let Seen { mut log, hits, .. } = seen;
        let records = log.records.len();
        eprintln!(
            "{KILLS} kills in {:.0} s, start-up {up:.2?}, {records} records: {hits:?}",
            begin.elapsed().as_secs_f32()
        );
        // Random, but so likely that its absence means that the test has lost its aim.
        ensure!(hits.before_start > 0 && hits.measuring > 0 && hits.logging > 0, "the kills missed a phase: {hits:?}");

        world.start_proxy()?;
        peer.grow_steadily(0);
        let count = peer.guest().count();
        world.wait_until("the guest's whole list", LIMIT, |world| {
            peer.check()?;
            Ok((world.proxy_status()?["vms"][0]["entries"] == count).then_some(()))
        })?;
        ensure!(world.proxy_export(VM)? == peer.guest().list(), "the host's list is not the guest's");
        ensure!(bare.run_state()? == "running", "the VM does not run");
        ensure!(world.proxy()?.terminate()?.success(), "the proxy does not end well");

        ensure!(world.epochs()? == [1], "the log began anew: {:?}", world.epochs()?);
        log.grow(fs::read(world.log_file()?)?)?;
        let bound = world.bound_log()?;
        ensure!(bound.bytes == log.bytes);
        check_whole(&bound, &peer)
    });
}

/// How long a start takes until all is up again, the guest's connection included.
fn start_up_time(world: &mut World) -> Result<Duration> {
    let start = Instant::now();
    world.start_proxy()?;
    world.wait_until("the VM to be watched again", LIMIT, |world| {
        Ok((world.proxy_status()?["vms"][0]["stage"] == "watched").then_some(()))
    })?;
    let time = start.elapsed();
    world.proxy()?.kill()?;
    Ok(time)
}

/// Starts the proxy and kills it somewhere on its way up, or a little after the guest is back.
fn kill_somewhere(world: &mut World, random: &mut Random, peer: &Peer, up: Duration) -> Result<()> {
    let connections = peer.connections();
    let start = Instant::now();
    world.spawn_proxy()?;
    let (from, delay) = match random.below(2) {
        0 => (start, random.time(up)),
        _ => {
            wait::for_true("the guest to be back", LIMIT, || {
                world.proxy()?.check_alive()?;
                Ok(peer.connections() > connections)
            })?;
            (Instant::now(), random.time(Duration::from_millis(60)))
        }
    };
    // The one thing that is wanted here is that time passes.
    std::thread::sleep(delay.saturating_sub(from.elapsed()));
    world.proxy()?.check_alive()?;
    world.proxy()?.kill()
}

/// What was in the log after the last kill.
#[derive(Default)]
struct Seen {
    log: LogView,
    /// Entries of the guest.
    logged: u64,
    hits: Hits,
}

impl Seen {
    fn check_after_kill(&mut self, world: &World, peer: &Peer) -> Result<()> {
        peer.check()?;
        let (hits, before) = (&mut self.hits, self.log.records.len());
        self.log.grow(fs::read(world.log_file()?)?)?;
        hits.torn += usize::from(self.log.whole < self.log.bytes.len());
        hits.unextended += self.log.behind(&world.tpm_registers()?)?;
        let new = self.log.events_from(before)?;
        let has = |kind: &str| new.iter().any(|event| event.body.kind() == kind);
        match (has("proxy-start"), has("vm-attach"), has("guest-entries")) {
            (false, ..) => hits.before_start += 1,
            (true, false, _) => hits.measuring += 1,
            (true, true, false) => hits.waiting += 1,
            (true, true, true) => hits.logging += 1,
        }
        // What was logged before this start was not asked for again.
        ensure!(!has("guest-entries") || peer.last_have() >= self.logged, "the host forgot entries that it had logged");
        for event in new {
            if let EventBody::GuestEntries(body) = event.body {
                self.logged = body.first + body.count;
            }
        }
        Ok(())
    }
}

/// Each entry once and in its place, each event that happens once once, and no gap that should not be.
fn check_whole(log: &LogView, peer: &Peer) -> Result<()> {
    let guest = peer.guest();
    let mut next = 0;
    for event in log.events()? {
        match &event.body {
            EventBody::GuestEntries(body) => {
                ensure!(body.boot == 0 && body.first == next, "entries {} after {next}", body.first);
                next += body.count;
                ensure!(guest.aggregate(next)?.value == body.aggregate, "another aggregate after {next} entries");
            }
            EventBody::LogGap(gap) => ensure!(gap.reason == GapReason::ProxyDown, "a gap: {gap:?}"),
            EventBody::GuestHello(body) => ensure!(body.boot_id == guest.boot_id && body.boot == 0, "{body:?}"),
            EventBody::ProxyStart(_) | EventBody::VmAttach(_) | EventBody::GuestLost(_) => {}
            EventBody::VmCreate(_) | EventBody::VmStart(_) | EventBody::VmResume(_) | EventBody::VmPause(_) => {}
            // What else runs on this machine is not this test's.
            EventBody::UnmanagedVm(_) => {}
            other => anyhow::bail!("an event that should not be: {other:?}"),
        }
    }
    ensure!(next == guest.count(), "{next} entries in the log, {} in the guest", guest.count());
    ensure!(log.count("vm-create")? == 1 && log.count("vm-start")? == 1, "the VM was created or started twice");
    ensure!(log.count("proxy-start")? <= KILLS + 4, "more starts in the log than there were");
    Ok(())
}
