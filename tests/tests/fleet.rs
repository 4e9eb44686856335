//! A fleet against a verifier of its own process: how it lives, who attacks, what breaks. In each test nothing may be lost (at
//! the end the verifier knows every host exactly as it is), no honest host may ever be called untrusted, and the verifier's
//! memory is bounded.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{path::Path, sync::atomic::Ordering, time::Duration};

use onequote_evidence::id::Blob;
use onequote_evidence::report::{Cause, MAX_CHUNK, ProxyFrame, VerifierFrame, to_wire};
use onequote_tests::{
    fleet::{Fleet, Life, Network, Plan, Verifier, Wire, step_clocks},
    lab::{Random, note, skip},
};
use onequote_verifier::{finding::Code, result::State};
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

const SECOND: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(120);

/// What a verifier of a small fleet may have at most, whatever is done to it: a debug build has 60 MiB with nothing to do.
const MEMORY: u64 = 400 * 1024 * 1024;

/// Everything that happens on a host, several times a second over all.
const LIFE: Life = Life { every: Duration::from_secs(6), restarts: true };

/// Verdicts that outlive a test on a busy machine.
const LASTING: [&str; 2] = ["--lifetime", "3600"];

/// A fleet, enrolled in bulk at a verifier that serves.
async fn fleet(folder: &Path, plan: Plan) -> (Fleet, Verifier) {
    fleet_at("127.0.0.1:0", folder, plan, 2 * SECOND, &LASTING).await
}

async fn fleet_at(door: &str, folder: &Path, plan: Plan, period: Duration, more: &[&str]) -> (Fleet, Verifier) {
    let mut verifier = Verifier::new(folder, None).unwrap();
    let fleet = Fleet::new(plan, folder).await.unwrap();
    verifier.start(door, period, more).unwrap();
    let port = verifier.door().unwrap().rsplit_once(':').unwrap().1.to_owned();
    fleet.enrol_in_bulk(&verifier, None, &[format!("https://127.0.0.1:{port}")]).await.unwrap();
    (fleet, verifier)
}

fn plan(hosts: usize, vms: usize) -> Plan {
    Plan { hosts, vms, programs: 200, attackers: 0, seed: 1 }
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Nothing lost, nobody accused, memory bounded.
async fn all_is_well(what: &str, fleet: &Fleet, verifier: &Verifier) {
    fleet.settle(LIMIT).await.unwrap();
    fleet.agree(verifier, LIMIT).await.unwrap();
    let nobody: [String; 0] = [];
    assert_eq!(fleet.accused(verifier).unwrap(), nobody);
    let peak = verifier.peak().unwrap();
    assert!(peak < MEMORY, "{peak} bytes");
    let times = fleet.totals.take_times();
    let lost = fleet.totals.lost.load(Ordering::Relaxed);
    note(&format!(
        "{what}: {} reports, half of them within {:.0} ms, {lost} lost with a connection and made up for; verifier's peak {} MiB",
        times.count,
        times.median,
        peak >> 20
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn honest_hosts_are_known_as_they_are_and_attackers_are_found() {
    let folder = folder();
    let (fleet, verifier) = fleet(folder.path(), Plan { attackers: 4, ..plan(64, 4) }).await;
    fleet.connect().await.unwrap();
    fleet.settle(LIMIT).await.unwrap();
    fleet.agree(&verifier, LIMIT).await.unwrap();
    fleet.live(LIFE, 3 * SECOND).await.unwrap();
    assert_eq!(fleet.strike(LIMIT).await.unwrap(), 16);
    fleet.live(LIFE, 3 * SECOND).await.unwrap();
    all_is_well("a fleet with 16 attackers", &fleet, &verifier).await;
}

/// By the true protocol: endorsement key, a credential that the TPM opens, proof, certificate.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_join_by_token_and_report() {
    let folder = folder();
    let mut verifier = Verifier::new(folder.path(), None).unwrap();
    let fleet = Fleet::new(plan(120, 1), folder.path()).await.unwrap();
    verifier.start("127.0.0.1:0", 2 * SECOND, &LASTING).unwrap();
    fleet.join(&verifier, &format!("https://{}", verifier.door().unwrap())).await.unwrap();
    fleet.connect().await.unwrap();
    all_is_well("120 hosts that joined by token", &fleet, &verifier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verifier_that_is_killed_under_load_loses_nothing() {
    let folder = folder();
    let (fleet, mut verifier) = fleet(folder.path(), plan(100, 4)).await;
    let door = verifier.door().unwrap();
    // The first time in the middle of the first reports.
    fleet.connect().await.unwrap();
    for reports in [20, 150, 100] {
        let living = fleet.live(LIFE, 2 * SECOND);
        let (lived, counted) = tokio::join!(living, fleet.more(reports, LIMIT));
        lived.unwrap();
        counted.unwrap();
        verifier.kill().unwrap();
        verifier.start(&door, 2 * SECOND, &LASTING).unwrap();
    }
    fleet.more(100, LIMIT).await.unwrap();
    assert!(fleet.totals.connections.load(Ordering::Relaxed) >= 4 * 90, "they came back each time");
    all_is_well("a verifier killed three times", &fleet, &verifier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_that_are_started_again_go_on_where_they_were() {
    let folder = folder();
    let (fleet, verifier) = fleet(folder.path(), plan(60, 4)).await;
    fleet.connect().await.unwrap();
    fleet.settle(LIMIT).await.unwrap();
    for member in &fleet.members {
        member.host.lock().await.restart_proxy().await.unwrap();
        member.connect().await.unwrap();
    }
    fleet.live(LIFE, 2 * SECOND).await.unwrap();
    all_is_well("all proxies started again", &fleet, &verifier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_cut_off_becomes_stale_and_comes_back() {
    let network = match Network::new() {
        Ok(network) => network,
        Err(why) => return skip("cutting half of a fleet off", &format!("no network name space here: {why:#}")),
    };
    let elsewhere = network.runtime().unwrap();
    let folder = folder();
    let times = ["--lifetime", "12"];
    let (fleet, verifier) = fleet_at("0.0.0.0:0", folder.path(), plan(40, 3), 2 * SECOND, &times).await;
    let port = verifier.door().unwrap().rsplit_once(':').unwrap().1.to_owned();
    let (here, there) = fleet.members.split_at(20);
    for member in there {
        member.move_to(elsewhere.handle().clone());
        member.set_url(&format!("https://{}:{port}", network.host())).unwrap();
    }
    fleet.connect().await.unwrap();
    fleet.settle(LIMIT).await.unwrap();
    network.cable(false).unwrap();
    fleet.live(LIFE, 2 * SECOND).await.unwrap();
    let state = |id| verifier.verdict(id).unwrap().unwrap().host.state;
    let end = std::time::Instant::now() + LIMIT;
    while !there.iter().all(|member| matches!(state(&member.id), State::Stale | State::Unreachable)) {
        assert!(std::time::Instant::now() < end, "who is cut off stays green");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let green = here.iter().filter(|member| state(&member.id) == State::Trusted).count();
    assert!(green > 0, "the others go on");
    let nobody: [String; 0] = [];
    assert_eq!(fleet.accused(&verifier).unwrap(), nobody);
    network.cable(true).unwrap();
    all_is_well("half of the fleet cut off", &fleet, &verifier).await;
    fleet.disconnect().await;
    elsewhere.shutdown_background();
}

/// Clocks of hosts are no evidence: whatever they say, what the TPM says counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_whose_clocks_are_stepped_stay_trusted() {
    let folder = folder();
    let (fleet, verifier) = fleet(folder.path(), plan(20, 3)).await;
    fleet.connect().await.unwrap();
    for step in [24 * 3600 * 1000, -2 * 24 * 3600 * 1000, 24 * 3600 * 1000] {
        step_clocks(step);
        fleet.live(LIFE, SECOND).await.unwrap();
        fleet.settle(LIMIT).await.unwrap();
        fleet.agree(&verifier, LIMIT).await.unwrap();
    }
    all_is_well("clocks stepped by days", &fleet, &verifier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_counts_once_and_only_as_the_last_answer() {
    let folder = folder();
    let (fleet, verifier) = fleet(folder.path(), plan(2, 3)).await;
    let (member, other) = (&fleet.members[0], &fleet.members[1]);
    let accepted = |frame: &VerifierFrame| matches!(frame, VerifierFrame::Taken { accepted: true, .. });
    let mut wire = Wire::open(member).await.unwrap();
    let first = wire.ask.nonce.clone();
    let report = wire.evidence(&first).await.unwrap();
    assert!(accepted(&wire.report(&first, &report).await.unwrap()));
    let known = verifier.verdict(&member.id).unwrap().unwrap();
    assert_eq!(known.host.state, State::Trusted);

    // Doubled: its nonce is not the last one any more, so that nothing is taken.
    let again = wire.report(&first, &report).await;
    assert!(matches!(again, Ok(VerifierFrame::Refused { .. })), "{again:?}");
    assert_eq!(verifier.verdict(&member.id).unwrap().unwrap().quote, known.quote);

    // Played again under the next nonce: that is an attack, and found.
    let mut wire = Wire::open(member).await.unwrap();
    let next = wire.ask.nonce.clone();
    let replayed = wire.report(&next, &report).await.unwrap();
    assert!(matches!(replayed, VerifierFrame::Taken { accepted: false, .. }), "{replayed:?}");
    let verdict = verifier.verdict(&member.id).unwrap().unwrap();
    let codes: Vec<Code> = verdict.host.findings.iter().map(|finding| finding.code).collect();
    assert!(codes.contains(&Code::NonceReused) || codes.contains(&Code::NonceOther), "{codes:?}");

    // Out of order: the evidence was made before that of the report which was accepted meanwhile.
    let mut early = Wire::open(member).await.unwrap();
    let nonce = early.ask.nonce.clone();
    let old = early.evidence(&nonce).await.unwrap();
    let mut late = Wire::open(member).await.unwrap();
    let newer = late.ask.nonce.clone();
    let fresh = late.evidence(&newer).await.unwrap();
    assert!(accepted(&late.report(&newer, &fresh).await.unwrap()));
    let before = verifier.verdict(&member.id).unwrap().unwrap();
    assert_eq!(before.host.state, State::Trusted);
    let answer = early.report(&nonce, &old).await;
    assert!(!answer.as_ref().is_ok_and(accepted), "{answer:?}");
    assert_eq!(verifier.verdict(&member.id).unwrap().unwrap().quote, before.quote);

    // Another host's report, over one's own connection.
    let mut own = Wire::open(member).await.unwrap();
    let nonce = own.ask.nonce.clone();
    let theirs = Wire::open(other).await.unwrap().evidence(&nonce).await.unwrap();
    let answer = own.report(&nonce, &theirs).await.unwrap();
    assert!(matches!(answer, VerifierFrame::Taken { accepted: false, .. }), "{answer:?}");
    assert_eq!(verifier.verdict(&member.id).unwrap().unwrap().host.state, State::Untrusted);

    fleet.connect().await.unwrap();
    all_is_well("doubled and exchanged reports", &fleet, &verifier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gibibyte_of_rubbish_takes_little_and_delays_nobody() {
    const ANNOUNCED: u64 = 64 << 20;
    let folder = folder();
    let (fleet, verifier) = fleet(folder.path(), plan(24, 3)).await;
    let bad = &fleet.members[0];
    for member in &fleet.members[1..] {
        member.connect().await.unwrap();
    }
    let mut random = Random::seeded(7);
    let rubbish: Vec<u8> = (0..MAX_CHUNK / 8).flat_map(|_| random.number().to_le_bytes()).collect();
    // zstd of zeros without end: what is announced expands to more than any evidence may have.
    let zeros = zstd::bulk::compress(&vec![0; 128 << 20], 1).unwrap();
    let zeros = zeros.repeat(MAX_CHUNK / zeros.len());
    let (mut announced, mut sent) = (0, 0);
    for round in 0..(1 << 30) / ANNOUNCED {
        let mut wire = Wire::open(bad).await.unwrap();
        let begin = ProxyFrame::Begin { nonce: wire.ask.nonce.clone(), cause: Cause::Change, size: ANNOUNCED };
        wire.send(&begin).await.unwrap();
        announced += ANNOUNCED;
        let VerifierFrame::Go = wire.next().await.unwrap() else { panic!("not let in") };
        let content = if round % 2 == 0 { &rubbish } else { &zeros };
        let mut left = ANNOUNCED;
        while left > 0 {
            let part = &content[..content.len().min(MAX_CHUNK).min(left as usize)];
            let frame = to_wire(&ProxyFrame::Chunk { bytes: Blob(part.to_vec()) });
            if wire.send_bytes(&frame).await.is_err() {
                break;
            }
            left -= part.len() as u64;
            sent += part.len() as u64;
        }
        // Whatever the verifier says of it, it is not that it accepted it.
        let said = wire.next().await;
        assert!(!matches!(said, Ok(VerifierFrame::Taken { accepted: true, .. })), "{said:?}");
    }
    // No frames at all.
    let mut wire = Wire::open(bad).await.unwrap();
    while wire.send_bytes(&rubbish).await.is_ok() {
        sent += rubbish.len() as u64;
        assert!(sent < 2 << 30, "the verifier listens to rubbish without end");
    }
    note(&format!("{} MiB of rubbish announced, {} MiB got rid of", announced >> 20, sent >> 20));
    bad.connect().await.unwrap();
    all_is_well("a host that sends rubbish", &fleet, &verifier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_hosts_are_let_go_and_delay_nobody() {
    let folder = folder();
    let (fleet, verifier) = fleet(folder.path(), plan(40, 3)).await;
    let (slow, swift) = fleet.members.split_at(20);
    let door = verifier.door().unwrap();
    // Some never end their handshake, some never end a frame, some never end a report.
    let mut idle = Vec::new();
    for _ in 0..100 {
        let mut stream = TcpStream::connect(&door).await.unwrap();
        stream.write_all(&[0x16]).await.unwrap();
        idle.push(stream);
    }
    let mut wires = Vec::new();
    for (number, member) in slow.iter().enumerate() {
        let mut wire = Wire::open(member).await.unwrap();
        let begin = ProxyFrame::Begin { nonce: wire.ask.nonce.clone(), cause: Cause::Change, size: 32 << 20 };
        let begin = to_wire(&begin);
        match number % 2 {
            0 => wire.send_bytes(&begin[..5]).await.unwrap(),
            _ => {
                wire.send_bytes(&begin).await.unwrap();
                let _ = wire.next().await.unwrap();
                wire.send_bytes(&to_wire(&ProxyFrame::Chunk { bytes: Blob(vec![7; 100]) })).await.unwrap();
            }
        }
        wires.push(wire);
    }
    for member in swift {
        member.connect().await.unwrap();
    }
    for member in swift {
        let host = member.host.lock().await;
        member.accepted(&host, LIMIT).await.unwrap();
    }
    // A byte now and then is not enough.
    let end = std::time::Instant::now() + LIMIT;
    for mut wire in wires {
        while wire.send_bytes(&[0]).await.is_ok() {
            assert!(std::time::Instant::now() < end, "a slow host is not let go");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
    drop(idle);
    for member in slow {
        member.connect().await.unwrap();
    }
    all_is_well("slow hosts", &fleet, &verifier).await;
}
