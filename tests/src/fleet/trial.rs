//! A fleet of some size against a verifier for some time, and what that costs: for benches and for people.

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;

use super::{Fleet, Life, Plan, Times, Verifier, own_cpu, own_peak};

/// What is tried.
#[derive(Debug, Clone)]
pub struct Trial {
    /// The fleet.
    pub plan: Plan,
    /// Time between two reports of a host.
    pub period: Duration,
    /// For how long.
    pub time: Duration,
    /// Mean time between two things that happen on a host.
    pub every: Duration,
    /// Whether a change on a host is reported at once.
    pub push: bool,
    /// Where the verifier keeps what it knows; its own SQLite unless given.
    pub database: Option<String>,
    /// Verifiers on that database.
    pub replicas: usize,
}

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Hosts.
    pub hosts: usize,
    /// VMs on each.
    pub vms: usize,
    /// Seconds until the last host's first report was accepted.
    pub first_seconds: f64,
    /// Processor seconds of the verifiers for all first reports.
    pub first_cpu: f64,
    /// Times of first reports.
    pub first: Times,
    /// Seconds measured after that.
    pub seconds: f64,
    /// Things that happened on hosts then.
    pub happened: u64,
    /// Reports that were begun, appraised, sent away, and lost with a connection.
    pub begun: u64,
    /// See above.
    pub taken: u64,
    /// See above.
    pub later: u64,
    /// See above.
    pub lost: u64,
    /// Times of these reports.
    pub steady: Times,
    /// Processor seconds of the verifiers and of the simulator then.
    pub verifier_cpu: f64,
    /// See above.
    pub simulator_cpu: f64,
    /// The most memory of a verifier, and of the simulator, in bytes.
    pub verifier_memory: u64,
    /// See above.
    pub simulator_memory: u64,
    /// Bytes of a first report, and of a later one, in the mean.
    pub first_bytes: f64,
    /// See above.
    pub steady_bytes: f64,
    /// Bytes of a whole evidence stream at the end, in the mean over some hosts.
    pub whole_bytes: f64,
    /// Bytes of all whole lists and logs as they stand on the hosts, in the mean over the same hosts, without compression.
    pub list_bytes: f64,
    /// Bytes of the verifier's SQLite database; 0 with another.
    pub database_bytes: u64,
    /// Attackers that struck.
    pub attackers: usize,
    /// What the verifier has wrong at the end.
    pub wrong: Vec<String>,
}

/// Hosts of which whole evidence is asked for its size.
const SAMPLE: usize = 16;

impl Trial {
    /// Runs it in this folder and tells how far it is.
    ///
    /// # Errors
    /// A part of it does not work. What the verifier has wrong is no error.
    pub async fn run(&self, folder: &Path, tell: impl Fn(&str)) -> Result<Outcome> {
        let limit = Duration::from_secs(600).max(self.period * 4);
        ensure!(self.replicas <= 1 || self.database.is_some(), "several verifiers need a database that they share");
        tell(&format!("{} hosts with {} VMs each are made", self.plan.hosts, self.plan.vms));
        let fleet = Fleet::new(self.plan.clone(), folder).await?;
        let mut verifiers = vec![Verifier::new(folder, self.database.as_deref())?];
        tell("they are enrolled in bulk: written into the verifier's database, with certificates of its authority");
        // One URL for each replica; hosts are spread over them.
        let gap = if self.push { "500ms" } else { "0s" };
        // A verdict must not grow old while this machine, which is the whole fleet too, is busy.
        let lifetime = (self.period * 10).max(Duration::from_secs(3600)).as_secs().to_string();
        let more = ["--report-gap", gap, "--lifetime", &lifetime];
        verifiers[0].start("127.0.0.1:0", self.period, &more)?;
        for number in 1..self.replicas {
            let folder = folder.join(format!("replica-{number}"));
            let mut replica = verifiers[0].replica(&folder)?;
            replica.start("127.0.0.1:0", self.period, &more)?;
            verifiers.push(replica);
        }
        let mut urls = Vec::new();
        for verifier in &verifiers {
            urls.push(format!("https://{}", verifier.door()?));
        }
        fleet.enrol_in_bulk(&verifiers[0], self.database.as_deref(), &urls).await?;
        let cpu = || verifiers.iter().map(Verifier::cpu).sum::<Result<Duration>>();

        let (began, spent) = (Instant::now(), cpu()?);
        fleet.connect().await?;
        let told = AtomicU64::new(0);
        loop {
            let (accepted, connected) = fleet.reporting();
            if accepted == fleet.members.len() {
                break;
            }
            let seconds = began.elapsed().as_secs();
            if told.swap(seconds / 10, Ordering::Relaxed) != seconds / 10 {
                tell(&format!("{seconds} s: {connected} connected, first reports of {accepted} accepted"));
            }
            ensure!(began.elapsed() < limit, "first reports of {accepted} only after {seconds} s");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (first_seconds, first_cpu) = (began.elapsed().as_secs_f64(), (cpu()? - spent).as_secs_f64());
        let first = fleet.totals.take_times();
        let totals = &fleet.totals;
        let counts = || {
            let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
            (get(&totals.begun), get(&totals.taken), get(&totals.later), get(&totals.lost))
        };
        tell(&format!(
            "all first reports were accepted after {first_seconds:.1} s; now {} s of life",
            self.time.as_secs()
        ));

        let (before, spent, own, began) = (counts(), cpu()?, own_cpu()?, Instant::now());
        let life = Life { every: self.every, restarts: true };
        let (living, telling) = (fleet.live(life, self.time), async {
            loop {
                tokio::time::sleep(Duration::from_secs(10)).await;
                let now = counts();
                let seconds = began.elapsed().as_secs();
                tell(&format!(
                    "{seconds} s: {} reports appraised, {} sent away, {} lost",
                    now.1 - before.1,
                    now.2 - before.2,
                    now.3 - before.3
                ));
            }
        });
        let happened = tokio::select! {
            happened = living => happened?,
            () = telling => 0,
        };
        // Whoever is honest has reported everything by the second period's end.
        let settled = Duration::from_secs(60) + self.period * 2;
        fleet.settle(settled).await?;
        let after = counts();
        let (seconds, verifier_cpu, simulator_cpu) =
            (began.elapsed().as_secs_f64(), (cpu()? - spent).as_secs_f64(), (own_cpu()? - own).as_secs_f64());
        let steady = totals.take_times();
        let mean = |(count, sum): &(AtomicU64, AtomicU64)| {
            sum.load(Ordering::Relaxed) as f64 / count.load(Ordering::Relaxed).max(1) as f64
        };
        let (first_bytes, steady_bytes) = (mean(&totals.first), mean(&totals.steady));
        let attackers = fleet.strike(limit).await?;
        if attackers > 0 {
            tell(&format!("{attackers} attackers have struck"));
        }
        let (whole_bytes, list_bytes) = fleet.whole(SAMPLE).await?;
        fleet.settle(settled).await?;
        let wrong = match fleet.agree(&verifiers[0], Duration::from_secs(60)).await {
            Ok(()) => Vec::new(),
            Err(_) => fleet.compare(&verifiers[0]).await?,
        };
        let memory = verifiers.iter().map(Verifier::peak).collect::<Result<Vec<u64>>>()?;
        Ok(Outcome {
            hosts: self.plan.hosts,
            vms: self.plan.vms,
            first_seconds,
            first_cpu,
            first,
            seconds,
            happened,
            begun: after.0 - before.0,
            taken: after.1 - before.1,
            later: after.2 - before.2,
            lost: after.3 - before.3,
            steady,
            verifier_cpu,
            simulator_cpu,
            verifier_memory: memory.into_iter().max().context("there is a verifier")?,
            simulator_memory: own_peak()?,
            first_bytes,
            steady_bytes,
            whole_bytes,
            list_bytes,
            database_bytes: std::fs::metadata(verifiers[0].state().join("verifier.sqlite"))
                .map_or(0, |data| data.len()),
            attackers,
            wrong,
        })
    }
}

/// Lets this process, and those that it starts, have as many connections as the system allows.
///
/// # Errors
/// There are too few for so many hosts.
pub fn raise_descriptors(hosts: usize) -> Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).context("raising the limit of open files")?;
    let needed = hosts as u64 + 200;
    ensure!(maximum.is_none_or(|most| most >= needed), "{needed} open files are needed, {maximum:?} allowed");
    Ok(())
}
