//! What keeping costs: verdicts, states and evidence of hosts with 100 VMs, written by many at once.
//!
//! The time of a processor is that of this process and, with PostgreSQL, of the server's processes; the share is that of one
//! core at 170 reports a second (10,000 hosts, 60 s).

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::{
    digest::{FileDigest, sha256},
    id::{Blob, HostId, Nonce, SessionId, TimeMs, VmId},
    pcr::RegisterValue,
    tpm::ClockInfo,
};
use onequote_tests::lab::{Postgres, block_on};
use onequote_verifier::{
    appraise::state::{Accepted, AcceptedGuest, HostState, Origin, StartedImage},
    challenge::Challenge,
    finding::{Code, Finding},
    result::{ImageLine, State, Verdict, VmVerdict},
    store::{Database, Enrolment, Part, Store as _, Take, Taken},
};

use crate::numbers::Numbers;

const HOSTS: usize = 200;
const VMS: usize = 100;
const WRITERS: usize = 32;
const TIME: Duration = Duration::from_secs(5);

/// Bytes of what came new with a report.
const PART: usize = 6000;

/// Reports a second of 10,000 hosts.
const RATE: f64 = 170.0;

pub(crate) fn takes(numbers: &mut Numbers) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (rate, cost) = block_on(async {
        let store = Database::open(&dir.path().join("v.sqlite")).await?;
        measure(&store, || Ok(Duration::ZERO)).await
    })?;
    let size = fs::metadata(dir.path().join("v.sqlite"))?.len();
    report(numbers, "SQLite", rate, cost);
    numbers.known("store: SQLite file after that", size as f64 / 1e6, "MB");
    let server = Postgres::start()?;
    let url = server.database("bench")?;
    let (rate, cost) = block_on(async {
        let store = Database::connect(&url).await?;
        measure(&store, || processes_of(server.id().context("no server")?)).await
    })?;
    report(numbers, "PostgreSQL", rate, cost);
    Ok(())
}

fn report(numbers: &mut Numbers, what: &str, rate: f64, cost: Duration) {
    numbers.at_least(&format!("store: takes a second, {what}"), rate, "/s", 4.0 * RATE);
    numbers.known(&format!("store: processor time of a take, {what}"), cost.as_secs_f64() * 1e6, "us");
    numbers.below(&format!("store: share of a core at 170/s, {what}"), cost.as_secs_f64() * RATE, "", 0.25);
}

/// Takes a second, and processor time of one.
async fn measure(store: &Database, others: impl Fn() -> Result<Duration>) -> Result<(f64, Duration)> {
    for n in 0..HOSTS {
        let url = "https://127.0.0.1:1".to_owned();
        let ak = n.to_be_bytes().to_vec();
        store.enrol(&Enrolment { id: id(n)?, url, ak, certificate: vec![2; 500], software_tpm: true }, false).await?;
    }
    let (state, verdict) = (state(), verdict(&id(0)?));
    let (begun, own, other) = (Instant::now(), processor(Path::new("/proc/self/stat"))?, others()?);
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (store, mut state, mut verdict) = (store.clone(), state.clone(), verdict.clone());
        writers.spawn(async move {
            let mut done = 0_u64;
            let mut versions = vec![1; HOSTS];
            let mut open: Vec<Option<Nonce>> = vec![None; HOSTS];
            'all: loop {
                for n in (writer..HOSTS).step_by(WRITERS) {
                    if begun.elapsed() > TIME {
                        break 'all;
                    }
                    let host = id(n)?;
                    done += 1;
                    // Nothing is as it was, as after a report.
                    verdict.time = TimeMs(done);
                    verdict.vms.iter_mut().for_each(|vm| vm.entries += 1);
                    state.guests.iter_mut().for_each(|guest| guest.aggregate = sha256(&[&guest.aggregate.0]));
                    let nonce = Nonce::new(sha256(&[&n.to_be_bytes(), &done.to_be_bytes()]).0.to_vec());
                    let next = Challenge { nonce: nonce.context("a nonce")?, expires: TimeMs(u64::MAX / 4) };
                    let part = noise(PART, done);
                    let taken = Taken {
                        host: &host,
                        version: versions[n],
                        nonce: open[n].as_ref(),
                        now: TimeMs(done),
                        verdict: &verdict,
                        state: Some(&state),
                        trees: false,
                        part: Some(if done.is_multiple_of(256) { Part::Whole(&part) } else { Part::More(&part) }),
                        next: Some(&next),
                    };
                    let Take::Kept(version) = store.take(taken).await? else { anyhow::bail!("nobody else writes") };
                    (versions[n], open[n]) = (version, Some(next.nonce));
                }
            }
            Ok(done)
        });
    }
    let mut done = 0;
    while let Some(writer) = writers.join_next().await {
        done += writer??;
    }
    let time = begun.elapsed();
    let spent = processor(Path::new("/proc/self/stat"))? - own + others()?.saturating_sub(other);
    ensure!(done > 0, "nothing was written");
    Ok((done as f64 / time.as_secs_f64(), spent / u32::try_from(done)?))
}

fn id(n: usize) -> Result<HostId> {
    format!("h{n}").parse().map_err(anyhow::Error::msg)
}

/// Bytes that do not shrink.
fn noise(size: usize, seed: u64) -> Vec<u8> {
    let block = |n: u64| sha256(&[&seed.to_be_bytes(), &n.to_be_bytes()]).0;
    (0..).flat_map(block).take(size).collect()
}

fn session(n: usize) -> SessionId {
    let mut session = SessionId::ZERO;
    session.0.copy_from_slice(&noise(8, n as u64));
    session
}

fn state() -> HostState {
    let mut state = HostState::default();
    let register =
        |pcr| RegisterValue { bank: onequote_evidence::digest::HashAlg::Sha256, pcr, value: Blob(vec![7; 32]) };
    state.accepted = Some(Accepted {
        statement: None,
        epoch: onequote_evidence::id::Epoch { number: 1, id: onequote_evidence::id::EpochId([1; 16]) },
        records: 1000,
        registers: vec![register(12), register(13)],
        history_accepted: true,
        clock: ClockInfo { clock: 1, reset_count: 1, restart_count: 1, safe: true },
        boot_id: None,
        gaps: Vec::new(),
        past_gaps: Vec::new(),
    });
    let guest = |n| AcceptedGuest { session: session(n), boot: 1, count: 5000, aggregate: sha256(&[&n.to_be_bytes()]) };
    state.guests = (0..VMS).map(guest).collect();
    state
}

fn verdict(host: &HostId) -> Verdict {
    let mut verdict = Verdict::without_evidence(host.clone(), Finding::new(Code::Unreachable, "x"), None, TimeMs(1));
    verdict.vms = (0..VMS)
        .map(|n| VmVerdict {
            name: format!("vm-{n}"),
            uuid: VmId(uuid::Uuid::new_v4()),
            session: session(n),
            state: State::Trusted,
            run_state: "running".to_owned(),
            boots: 1,
            entries: 5000,
            last_contact: Some(120),
            images: vec![ImageLine {
                slot: "disk0".to_owned(),
                started: StartedImage {
                    session: session(n),
                    path: format!("/var/lib/vms/vm-{n}/disk0.qcow2"),
                    digest: FileDigest::sha256(sha256(&[&n.to_be_bytes()])),
                    read_only: false,
                    origin: Origin::FirstSeen,
                },
            }],
            findings: Vec::new(),
            findings_omitted: 0,
        })
        .collect();
    verdict
}

/// Processor time of a process so far, of its ended children too: `/proc/PID/stat`, fields 14 to 17 (proc(5)).
fn processor(stat: &Path) -> Result<Duration> {
    let text = fs::read_to_string(stat)?;
    let (_, rest) = text.rsplit_once(") ").context("no process")?;
    let ticks: u64 = rest.split(' ').skip(11).take(4).filter_map(|field| field.parse::<u64>().ok()).sum();
    // A tick is 10 ms on Linux for whoever is not the kernel.
    Ok(Duration::from_millis(ticks * 10))
}

/// The same of a process and its children.
fn processes_of(parent: u32) -> Result<Duration> {
    let mut sum = processor(Path::new(&format!("/proc/{parent}/stat")))?;
    for entry in fs::read_dir("/proc")?.flatten() {
        let stat = entry.path().join("stat");
        let Ok(text) = fs::read_to_string(&stat) else { continue };
        let of = text.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<u32>().ok());
        if of == Some(parent) {
            sum += processor(&stat).unwrap_or_default();
        }
    }
    Ok(sum)
}
