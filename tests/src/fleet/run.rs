//! The fleet: its hosts, who of them is an attacker, how they live, and whether the verifier knows them as they are.

use std::{
    path::Path,
    sync::{
        Arc, Mutex as Plain, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use onequote_evidence::{
    id::{HostId, Nonce},
    stream::Have,
};
use onequote_proxy::{
    join::Membership,
    report::{Dial, Proxy, Reporter, Status},
};
use onequote_verifier::result::{State, Verdict};
use tokio::{
    runtime::Handle,
    sync::Mutex,
    task::{JoinHandle, JoinSet},
};

use super::{
    Attack, Catalogue, Host, Surroundings, Truth,
    host::host_now,
    line::{Line, Observed},
    meter::{Meter, Totals},
    verifier::Verifier,
};
use crate::lab::Random;

/// What a fleet is like.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Hosts.
    pub hosts: usize,
    /// VMs on each.
    pub vms: usize,
    /// Programs that guests may run beyond those that they begin with.
    pub programs: usize,
    /// One host in so many is an attacker; none if 0.
    pub attackers: usize,
    /// What everything follows from.
    pub seed: u64,
}

/// How hosts live.
#[derive(Debug, Clone, Copy)]
pub struct Life {
    /// Mean time between two things that happen on a host.
    pub every: Duration,
    /// Whether hosts are booted and proxies started again, too.
    pub restarts: bool,
}

/// A host in the fleet.
pub struct Member {
    /// Its id.
    pub id: HostId,
    /// It.
    pub host: Mutex<Host>,
    /// What is counted of its reports.
    pub meter: Arc<Meter>,
    /// What it is, if it is an attacker.
    pub attack: Option<Attack>,
    struck: AtomicBool,
    membership: Plain<Option<Membership>>,
    /// Where its connections are made; this runtime unless set.
    elsewhere: Plain<Option<Handle>>,
    reporter: Mutex<Option<JoinHandle<()>>>,
}

/// The fleet.
pub struct Fleet {
    /// Its hosts.
    pub members: Vec<Arc<Member>>,
    /// What is counted over all.
    pub totals: Arc<Totals>,
    /// What all of them share.
    pub around: Arc<Surroundings>,
    /// What it is like.
    pub plan: Plan,
    seeds: AtomicU64,
}

impl Fleet {
    /// Makes the hosts, boots them and starts their VMs.
    ///
    /// # Errors
    /// A host does not start.
    pub async fn new(plan: Plan, folder: &Path) -> Result<Self> {
        let around = Arc::new(Surroundings::new(Catalogue::new(plan.programs), folder)?);
        let totals = Arc::new(Totals::default());
        let mut random = Random::seeded(plan.seed);
        let mut members = Vec::with_capacity(plan.hosts);
        for number in 0..plan.hosts {
            let mut host = Host::new(&format!("host-{number:05}"), Arc::clone(&around))?;
            host.boot()?;
            host.start_vms(plan.vms).await?;
            let attacker = plan.attackers > 0 && number % plan.attackers == plan.attackers - 1;
            let attack = attacker.then(|| Attack::ALL[number / plan.attackers % Attack::ALL.len()]);
            if let Some(attack) = attack {
                attack.prepare(&mut host, &mut random).await?;
            }
            members.push(Arc::new(Member {
                id: host.id.clone(),
                host: Mutex::new(host),
                meter: Arc::new(Meter::new(Arc::clone(&totals))),
                attack,
                struck: AtomicBool::new(false),
                membership: Plain::default(),
                elsewhere: Plain::default(),
                reporter: Mutex::default(),
            }));
        }
        let seeds = AtomicU64::new(random.number());
        Ok(Self { members, totals, around, plan, seeds })
    }

    /// All hosts begin to report.
    ///
    /// # Errors
    /// A host is in no fleet, or its proxy does not run.
    pub async fn connect(&self) -> Result<()> {
        for member in &self.members {
            member.connect().await?;
        }
        Ok(())
    }

    /// All hosts stop to report.
    pub async fn disconnect(&self) {
        for member in &self.members {
            member.disconnect().await;
        }
    }

    /// Things happen for so long. Gives how many.
    ///
    /// # Errors
    /// A host cannot do what is to happen.
    pub async fn live(&self, life: Life, time: Duration) -> Result<u64> {
        let mut random = Random::seeded(self.seeds.fetch_add(1, Ordering::Relaxed));
        let end = Instant::now() + time;
        let pause = life.every.div_f64(self.members.len() as f64);
        let (mut happened, mut tasks) = (0, JoinSet::new());
        let mut next = Instant::now();
        while Instant::now() < end {
            next += pause.mul_f64(2.0 * random.below(1000) as f64 / 1000.0);
            tokio::time::sleep_until(next.min(end).into()).await;
            let member = &self.members[random.below(self.members.len() as u64) as usize];
            // Of an attacker nothing more is known once it has struck.
            if member.struck.load(Ordering::Relaxed) {
                continue;
            }
            let (member, seed, vms, programs) =
                (Arc::clone(member), random.number(), self.plan.vms, self.around.catalogue.allowed);
            tasks.spawn(async move { member.act(life, vms, programs, Random::seeded(seed)).await });
            happened += 1;
            while let Some(done) = tasks.try_join_next() {
                done??;
            }
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok(happened)
    }

    /// All attackers of which the verifier has accepted evidence strike. Gives how many.
    ///
    /// # Errors
    /// One of them cannot, or was never accepted in time.
    pub async fn strike(&self, limit: Duration) -> Result<usize> {
        let mut random = Random::seeded(self.seeds.fetch_add(1, Ordering::Relaxed));
        let mut count = 0;
        for member in self.members.iter().filter(|member| !member.struck.load(Ordering::Relaxed)) {
            let Some(attack) = member.attack else { continue };
            // What it puts back must be older than what the verifier has.
            let mut host = member.host.lock().await;
            if let Some(key) = host.any_running(&mut random) {
                let programs: Vec<usize> = (0..8).map(|_| self.any_program(&mut random)).collect();
                host.run_programs(key, &programs).await?;
            }
            member.accepted(&host, limit).await.with_context(|| format!("{} before {attack:?}", member.id))?;
            member.struck.store(true, Ordering::Relaxed);
            member.disconnect().await;
            attack.strike(&mut host, &mut random).await.with_context(|| format!("{attack:?} on {}", member.id))?;
            drop(host);
            member.connect().await?;
            count += 1;
        }
        Ok(count)
    }

    fn any_program(&self, random: &mut Random) -> usize {
        let boot = self.around.catalogue.boot().len();
        boot + random.below((self.around.catalogue.allowed - boot) as u64) as usize
    }

    /// How many hosts of which something was ever accepted there are, and how many are connected now.
    #[must_use]
    pub fn reporting(&self) -> (usize, usize) {
        let accepted = self.members.iter().filter(|member| member.meter.last().is_some_and(|told| told.accepted));
        (accepted.count(), self.members.iter().filter(|member| member.meter.is_connected()).count())
    }

    /// Waits until the verifier has accepted everything that happened on every honest host, and has judged something of
    /// every attacker that struck.
    ///
    /// # Errors
    /// Not in time; the text says of whom.
    pub async fn settle(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        for member in &self.members {
            let left = end.saturating_duration_since(Instant::now());
            if member.struck.load(Ordering::Relaxed) {
                continue;
            }
            let host = member.host.lock().await;
            member.accepted(&host, left).await.with_context(|| format!("{} of {}", member.id, self.members.len()))?;
        }
        Ok(())
    }

    /// Bytes of a whole evidence stream, and of all lists and logs that it is about as they stand on the host, in the mean over
    /// so many hosts.
    ///
    /// # Errors
    /// A host gives no evidence.
    pub async fn whole(&self, sample: usize) -> Result<(f64, f64)> {
        let (mut streams, mut lists, mut count) = (0_u64, 0_u64, 0_u64);
        for member in self.members.iter().filter(|member| member.attack.is_none()).take(sample) {
            let host = member.host.lock().await;
            let nonce = Nonce::new(vec![1; 32]).context("a nonce")?;
            let stream = host.attest()?.challenge(nonce, vec![0; 32], Have::default()).await?;
            streams += stream.left();
            lists += host.list_bytes();
            count += 1;
        }
        Ok((streams as f64 / count.max(1) as f64, lists as f64 / count.max(1) as f64))
    }

    /// Compares what the verifier says of every host with what is true. Gives what does not fit: nothing lost, no wrong
    /// verdict, no attacker missed.
    ///
    /// # Errors
    /// The verifier does not answer, or a host is not there.
    pub async fn compare(&self, verifier: &Verifier) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for member in &self.members {
            let verdict = verifier.verdict(&member.id)?;
            let host = member.host.lock().await;
            let truth = host.truth()?;
            drop(host);
            let Some(verdict) = verdict else {
                wrong.push(format!("{}: no verdict", member.id));
                continue;
            };
            let struck = member.attack.filter(|_| member.struck.load(Ordering::Relaxed));
            let why = match struck {
                Some(attack) if attack.found_in(&verdict) => continue,
                Some(attack) => format!("{attack:?} was not found ({} is missing)", attack.code()),
                None => match differs(&verdict, &truth) {
                    None => continue,
                    Some(why) => why,
                },
            };
            wrong.push(format!("{}: {why}; {}", member.id, short(&verdict)));
        }
        Ok(wrong)
    }

    /// Waits until `compare` finds nothing.
    ///
    /// # Errors
    /// Not in time; the text has what is wrong.
    pub async fn agree(&self, verifier: &Verifier, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let wrong = self.compare(verifier).await?;
            if wrong.is_empty() {
                return Ok(());
            }
            if Instant::now() >= end {
                bail!("the verifier is wrong about {} hosts: {:#?}", wrong.len(), &wrong[..wrong.len().min(5)]);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until so many more reports were appraised.
    ///
    /// # Errors
    /// Not in time.
    pub async fn more(&self, reports: u64, limit: Duration) -> Result<()> {
        let wanted = self.totals.taken.load(Ordering::Relaxed) + reports;
        let end = Instant::now() + limit;
        while self.totals.taken.load(Ordering::Relaxed) < wanted {
            ensure!(Instant::now() < end, "waited in vain for {reports} reports");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Honest hosts that the verifier calls untrusted, or of which it says so of a VM: there must be none, whatever happens.
    ///
    /// # Errors
    /// The verifier does not answer.
    pub fn accused(&self, verifier: &Verifier) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for member in self.members.iter().filter(|member| member.attack.is_none()) {
            let Some(verdict) = verifier.verdict(&member.id)? else { continue };
            let vms = verdict.vms.iter().any(|vm| vm.state == State::Untrusted);
            if verdict.host.state == State::Untrusted || vms {
                wrong.push(format!("{}: {}", member.id, short(&verdict)));
            }
        }
        Ok(wrong)
    }
}

/// How a verdict differs from what is true of an honest host.
fn differs(verdict: &Verdict, truth: &Truth) -> Option<String> {
    let Some(quote) = &verdict.quote else { return Some("its verdict rests on no quote".to_owned()) };
    let vms = verdict.vms.iter().map(|vm| (vm.uuid, (vm.session, vm.entries))).collect();
    let known = Truth { epoch: quote.epoch.number, records: quote.records, vms };
    if known != *truth {
        let counts = |truth: &Truth| (truth.epoch, truth.records, truth.vms.len());
        return Some(format!("known {:?}, true {:?}", counts(&known), counts(truth)));
    }
    (!verdict.all_trusted()).then(|| "an honest host is not trusted".to_owned())
}

fn short(verdict: &Verdict) -> String {
    let codes = verdict.host.findings.iter().chain(verdict.vms.iter().flat_map(|vm| &vm.findings));
    let codes: Vec<String> =
        codes.take(4).map(|f| format!("{} {} {}", f.code, f.item, f.actual.as_deref().unwrap_or_default())).collect();
    format!("{} {codes:?}", verdict.host.state)
}

impl Member {
    /// Where it reports to, from now on.
    pub fn enrolled(&self, membership: Membership) {
        *lock(&self.membership) = Some(membership);
    }

    /// Its connections are made by this runtime from now on: one whose threads are in another network.
    pub fn move_to(&self, runtime: Handle) {
        *lock(&self.elsewhere) = Some(runtime);
    }

    /// The verifier is there now.
    ///
    /// # Errors
    /// It is not enrolled.
    pub fn set_url(&self, url: &str) -> Result<()> {
        let mut membership = lock(&self.membership);
        url.clone_into(&mut membership.as_mut().context("the host is not enrolled")?.details.url);
        Ok(())
    }

    /// What it keeps of the verifier.
    ///
    /// # Errors
    /// It is not enrolled.
    pub fn dial(&self) -> Result<Dial> {
        Ok(Dial::of(lock(&self.membership).as_ref().context("the host is not enrolled")?))
    }

    /// Reports from now on, with the proxy that runs now.
    ///
    /// # Errors
    /// It is not enrolled, or its proxy does not run.
    pub async fn connect(&self) -> Result<()> {
        let dial = self.dial()?;
        let host = self.host.lock().await;
        let (attest, log) = (host.attest()?.clone(), host.log()?.clone());
        let proxy = Proxy { attest, log, releasing: None, verifier: "verifier".to_owned() };
        drop(host);
        let reporter = Reporter {
            verifier: "verifier".to_owned(),
            host: self.id.clone(),
            attest: Arc::new(Observed { proxy, meter: Arc::clone(&self.meter) }),
            connect: Line { dial, meter: Arc::clone(&self.meter) },
            changes: true,
            status: Arc::new(Status::new("verifier")),
            now: host_now,
        };
        let mut running = self.reporter.lock().await;
        end(running.take()).await;
        let runtime = lock(&self.elsewhere).clone().unwrap_or_else(Handle::current);
        *running = Some(runtime.spawn(reporter.run()));
        Ok(())
    }

    /// Reports no more.
    pub async fn disconnect(&self) {
        end(self.reporter.lock().await.take()).await;
    }

    /// Waits until the verifier has accepted all that the host has logged.
    ///
    /// # Errors
    /// Not in time.
    pub async fn accepted(&self, host: &Host, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let records = host.log()?.head()?.log_len;
            let told = self.meter.last();
            if told.as_ref().is_some_and(|told| told.accepted && told.position >= records) {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "the verifier has not accepted {records} records: {told:?}, {:?}, connected: {}",
                self.meter.refused(),
                self.meter.is_connected()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// One thing happens.
    async fn act(&self, life: Life, vms: usize, programs: usize, mut random: Random) -> Result<()> {
        let mut host = self.host.lock().await;
        if self.struck.load(Ordering::Relaxed) {
            return Ok(());
        }
        match random.below(100) {
            // What an attacker has prepared must still fit when it strikes.
            86..100 if !life.restarts || self.attack.is_some() => {}
            0..70 => {
                let new: Vec<usize> = (0..=random.below(5)).map(|_| random.below(programs as u64) as usize).collect();
                if let Some(key) = host.any_running(&mut random) {
                    host.run_programs(key, &new).await?;
                }
            }
            70..78 if self.attack.is_none() => {
                if let Some(key) = host.any_running(&mut random) {
                    host.stop_vm(key).await?;
                }
            }
            70..86 => {
                let missing = vms.saturating_sub(host.running_vms());
                if missing > 0 {
                    host.start_vms(1).await?;
                }
            }
            86..94 => {
                host.restart_proxy().await?;
                drop(host);
                self.connect().await?;
            }
            _ => {
                host.stop_all().await?;
                // Images' continuity rests on it: a host that goes down in good order says so before.
                if self.accepted(&host, Duration::from_secs(20)).await.is_ok() {
                    host.reboot().await?;
                    self.meter.forget();
                }
                host.start_vms(vms).await?;
                drop(host);
                self.connect().await?;
            }
        }
        Ok(())
    }
}

/// Ends a task, and returns when it has ended.
async fn end(task: Option<JoinHandle<()>>) {
    if let Some(task) = task {
        task.abort();
        let _ = task.await;
    }
}

fn lock<T>(mutex: &Plain<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
