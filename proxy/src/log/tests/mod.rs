//! The log against every fault that can be counted.

use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicU8, Ordering},
};

use onequote_evidence::{
    digest::{HashAlg, sha256},
    event::{Event, EventBody, GapReason, VmPause},
    id::{BootId, Epoch, EpochId, TimeMs},
    log::{LogReader, Replay},
    pcr::{QUOTED_PCRS, Registers},
    record::Record,
};

use super::{
    PcrRole, RecorderConfig, RecorderError,
    journal::{Journal, Position},
    memory::{DiskFault, MemoryDisk},
};
use crate::tpm::fake::{FakeChip, Fault};

mod boots;
mod crash;
mod damage;
mod failure;
mod real;
mod recorder;
mod segments;

pub(super) const BANKS: [HashAlg; 3] = [HashAlg::Sha1, HashAlg::Sha256, HashAlg::Sha384];

/// A host: a chip, a disk, and a count of the steps that change or ask one of them.
#[derive(Clone)]
struct World {
    chip: FakeChip,
    disk: MemoryDisk,
    steps: Arc<Mutex<Steps>>,
    /// What its kernel's boot id is made of.
    boot: Arc<AtomicU8>,
}

#[derive(Default)]
struct Steps {
    /// Names of the steps so far, and the bytes that they write.
    done: Vec<(&'static str, usize)>,
    /// The step at which something happens.
    at: Option<(usize, Happens)>,
    /// Whether the process is dead after it.
    deadly: bool,
    dead: bool,
}

/// What happens at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Happens {
    /// It fails, not done.
    Before,
    /// It fails, done.
    After,
    /// It fails, this many bytes done.
    Torn(usize),
}

impl World {
    fn new() -> Self {
        let world = Self {
            chip: FakeChip::new(&BANKS),
            disk: MemoryDisk::default(),
            steps: Arc::default(),
            boot: Arc::new(AtomicU8::new(3)),
        };
        let this = world.clone();
        world.chip.set_fault(move |name| {
            let fault = match this.steps().step(name, 0) {
                None => Fault::None,
                Some(Happens::After) => Fault::After,
                Some(_) => Fault::Before,
            };
            assert!(name != "extend" || fault == Fault::Before || this.disk.is_synced(), "extended before synced");
            fault
        });
        let steps = Arc::clone(&world.steps);
        world.disk.set_fault(move |name, bytes| match steps.lock().unwrap().step(name, bytes) {
            None => DiskFault::None,
            Some(Happens::Before) => DiskFault::Before,
            Some(Happens::After) => DiskFault::After,
            Some(Happens::Torn(part)) => DiskFault::Torn(part),
        });
        world
    }

    fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap()
    }

    /// Starts counting anew; at step `at` something happens.
    fn plan(&self, at: Option<(usize, Happens)>, deadly: bool) {
        *self.steps() = Steps { at, deadly, ..Steps::default() };
    }

    fn start(&self) -> Result<Journal, RecorderError> {
        let chip = self.chip.clone();
        let config = RecorderConfig { boot_id: BootId([self.boot.load(Ordering::Relaxed); 16]), ..config() };
        Journal::start(config, self.disk.store(), Box::new(move || chip.connect()))
    }

    /// A start that nothing disturbs.
    fn start_well(&self) -> Journal {
        self.plan(None, false);
        self.start().unwrap()
    }

    /// Another kernel runs.
    fn kexec(&self) {
        self.boot.fetch_add(1, Ordering::Relaxed);
    }

    /// The host is started again.
    fn reboot(&self) {
        self.chip.reset();
        self.kexec();
    }

    fn registers(&self) -> Registers {
        self.chip.registers(&[12, 13])
    }
}

impl Steps {
    fn step(&mut self, name: &'static str, bytes: usize) -> Option<Happens> {
        if self.dead {
            return Some(Happens::Before);
        }
        let now = self.done.len();
        self.done.push((name, bytes));
        let happens = self.at.and_then(|(at, happens)| (at == now).then_some(happens));
        self.dead = happens.is_some() && self.deadly;
        happens
    }
}

fn config() -> RecorderConfig {
    static EPOCHS: AtomicU8 = AtomicU8::new(1);
    RecorderConfig {
        host: "host-1".parse().unwrap(),
        boot_id: BootId([3; 16]),
        version: "0.1.0".to_owned(),
        binary: None,
        path: None,
        pcr_vm: 12,
        pcr_guest: 13,
        quoted_pcrs: QUOTED_PCRS.to_vec(),
        quoted_banks: HashAlg::ALL.to_vec(),
        inventory: Arc::default(),
        segment_bytes: u64::MAX,
        now: Box::new(|| TimeMs(5)),
        new_epoch_id: Box::new(|| EpochId([EPOCHS.fetch_add(1, Ordering::Relaxed); 16])),
    }
}

/// The epoch that the journal shows to others.
fn epoch(journal: &Journal) -> Epoch {
    journal.subscribe().borrow().as_ref().unwrap().head.epoch
}

/// Appends one event in the epoch in force.
fn append(journal: &mut Journal, role: PcrRole, tag: &str) -> Result<Position, RecorderError> {
    journal.append(epoch(journal), role, &[event(tag)])
}

/// An event that can be found again.
fn event(tag: &str) -> Event {
    Event { time: TimeMs(7), vm: None, body: VmPause { run_state: tag.to_owned() }.into() }
}

/// What a log says, checked.
#[derive(Debug)]
struct Told {
    registers: Registers,
    tags: Vec<String>,
    starts: usize,
    gaps: Vec<GapReason>,
}

fn told(bytes: &[u8]) -> Told {
    let records: Vec<Record> = LogReader::new(bytes, 0).collect::<Result<_, _>>().unwrap();
    let mut replay = Replay::begin(&records[0]).unwrap();
    for record in &records[1..] {
        replay.apply(record).unwrap();
    }
    let mut told = Told { registers: replay.registers().clone(), tags: Vec::new(), starts: 0, gaps: Vec::new() };
    for event in records.iter().flat_map(|record| record.events().unwrap()) {
        match event.body {
            EventBody::VmPause(body) => told.tags.push(body.run_state),
            EventBody::ProxyStart(_) => told.starts += 1,
            EventBody::LogGap(body) => told.gaps.push(body.reason),
            other => panic!("nobody logged {other:?}"),
        }
    }
    told
}

/// Checks that a log tells what was acknowledged, in order and once, nothing twice, and nothing that was never said.
fn assert_tells(told: &Told, acknowledged: &[String], attempted: &[String]) {
    let mut tags = told.tags.clone();
    tags.sort();
    tags.dedup();
    assert_eq!(tags.len(), told.tags.len(), "doubled: {told:?}");
    assert!(tags.iter().all(|tag| attempted.contains(tag)), "invented: {told:?}");
    let order: Vec<&String> = told.tags.iter().filter(|tag| acknowledged.contains(tag)).collect();
    assert_eq!(order, acknowledged.iter().collect::<Vec<_>>(), "lost or out of order: {told:?}");
}

/// What a proxy does in these tests; true when it got to the end.
#[derive(Default)]
struct Work {
    attempted: Vec<String>,
    acknowledged: Vec<String>,
    round: u32,
}

impl Work {
    fn run(&mut self, world: &World) -> Result<(), RecorderError> {
        self.round += 1;
        let mut journal = world.start()?;
        self.append(&mut journal, PcrRole::Vm, &["a"])?;
        self.append(&mut journal, PcrRole::Guest, &["b", "c"])?;
        let data = sha256(&[b"nonce"]);
        let quoted = journal.quote(|_| data)?;
        assert_eq!(quoted.head.registers, world.registers());
        self.append(&mut journal, PcrRole::Guest, &["d"])
    }

    fn append(&mut self, journal: &mut Journal, role: PcrRole, tags: &[&str]) -> Result<(), RecorderError> {
        let tags: Vec<String> = tags.iter().map(|tag| format!("{tag}{}", self.round)).collect();
        self.attempted.extend(tags.clone());
        let events: Vec<Event> = tags.iter().map(|tag| event(tag)).collect();
        journal.append(epoch(journal), role, &events)?;
        self.acknowledged.extend(tags);
        Ok(())
    }
}
