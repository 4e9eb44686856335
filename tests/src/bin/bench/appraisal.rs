//! **Appraisal on one core.** Hosts are made in memory, their quotes signed by a software key; what is timed is what a
//! verifier does with their bytes, on one thread, without network and store.
//!
//! - *First verification*: a host's IMA list of distinct entries, each a file of an allow list with as many. Timed from the
//!   stream's logs in memory to the verdict. Beside it: the same from the compressed stream, and the hashes alone, which
//!   are the least that it can cost (SHA-1 and SHA-256 of the template data, and the register's next value).
//! - *Guests of one image*: 1,000 lists of 5,000 entries, each in an order of its own behind a common beginning, from the
//!   compressed stream to the verdict.
//! - *Steady reports*: quote and 20 new entries of a guest, 10,000 entries in the policy, from the compressed stream to
//!   verdict and to what would be written. Beside it the share that is the check of the signature.
//! - *Memory at hand* of a host with 100 VMs: by how much this process grows.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use onequote_evidence::digest::{HashAlg, MAX_DIGEST, sha256};
use onequote_evidence::event::{
    Component, Depth, Event, EventBody, GuestEntries, GuestHello, Image, ProxyStart, Role, VmCreate, VmRef, VmStart,
};
use onequote_evidence::id::{Blob, BootId, Epoch, EpochId, Nonce, SessionId, Sha256, TimeMs, VmId};
use onequote_evidence::ima::{Aggregate, Entry, ListReader, SHA1_HASH_SIZE};
use onequote_evidence::log::Replay;
use onequote_evidence::nonce_tree;
use onequote_evidence::pcr::{self, QUOTED_PCRS, Register, RegisterValue, extend_sha256};
use onequote_evidence::record::Record;
use onequote_evidence::statement::{self, GuestBoot, Statement, VmState};
use onequote_evidence::stream::{self, Guest, Head, Item, Pieces, Reader};
use onequote_evidence::tpm::{Attest, ClockInfo, PcrSelection, Public, software::Ak};
use onequote_verifier::appraise::{
    self, Appraisal, Context, Received, Shared, freshness::Freshness, kept::Kept, logs::Logs, signature,
    state::HostState,
};
use onequote_verifier::policy::Policy;

use crate::numbers::Numbers;

const LISTED: usize = 200_000;
const GUESTS: usize = 1000;
const ENTRIES: usize = 5000;
const COMMON: usize = 3000;
const REPORTS: usize = 3000;
const NEW: usize = 20;
const POLICY: usize = 10_000;
const HOSTS: usize = 20;
const VMS: usize = 100;

/// Rounds of which the best counts: others work on this machine too.
const BEST_OF: usize = 5;

pub(crate) fn first(numbers: &mut Numbers) -> Result<()> {
    let mut bed = Bed::new(0)?;
    let boot = sha256(&[&[0; 320]]);
    bed.measure(&entry("boot_aggregate", &boot));
    (0..LISTED).for_each(|n| bed.measure(&file(n)));
    bed.quote()?;
    let policy = format!("[host]\nunlisted_programs = \"allowed\"\n[host.ima]\n{}", allow(LISTED));
    let policy = Policy::parse(&policy, "the bench's policy")?;
    let stream = bed.stream(None)?;
    let received = Received::read(&stream).map_err(|finding| anyhow!("{finding:?}"))?;
    let hashes = best(|| {
        let mut value = Sha256::ZERO;
        for entry in ListReader::new(&bed.host_ima, SHA1_HASH_SIZE).flatten() {
            black_box(HashAlg::Sha1.hash_into(&[entry.data], &mut [0; MAX_DIGEST]));
            value = extend_sha256(&value, &sha256(&[entry.data]));
        }
        black_box(value);
        Ok(())
    })?;
    let all = best(|| {
        let appraisal = bed.appraise(&received, &policy, &HostState::default(), &Shared::default());
        ensure!(appraisal.verdict.all_trusted(), "{:?}", appraisal.verdict.host.findings);
        Ok(())
    })?;
    let bytes = best(|| {
        let received = Received::read(&stream).map_err(|finding| anyhow!("{finding:?}"))?;
        let appraisal = bed.appraise(&received, &policy, &HostState::default(), &Shared::default());
        ensure!(appraisal.verdict.all_trusted());
        Ok(())
    })?;
    let per_second = |time: Duration| LISTED as f64 / time.as_secs_f64();
    numbers.at_least("distinct IMA entries verified per second", per_second(all), "entries/s", 2_000_000.0);
    numbers.known("the same from the compressed stream", per_second(bytes), "entries/s");
    numbers.known("their hashes alone", per_second(hashes), "entries/s");
    numbers.known("time in % that is hashes", 100.0 * hashes.as_secs_f64() / all.as_secs_f64(), "%");
    Ok(())
}

pub(crate) fn guests(numbers: &mut Numbers) -> Result<()> {
    let mut bed = Bed::new(0)?;
    let image: Vec<Blob> = (0..ENTRIES).map(|n| Blob(file(n))).collect();
    bed.dictionary = image;
    for vm in 0..GUESTS {
        let at = bed.start(vm, format!("vm{vm}"));
        // An order of its own: steps that have no factor in common with the number of the rest.
        let (rest, step) = (ENTRIES - COMMON, [3, 7, 9, 11, 13, 17, 19, 21][vm % 8]);
        let own = (0..rest).map(|n| (COMMON + (n * step + vm) % rest) as u32);
        let list: Vec<u32> = (0..COMMON as u32).chain(own).collect();
        bed.grow(at, &list);
    }
    bed.quote()?;
    let policy = Policy::parse(&guest_policy(ENTRIES), "the bench's policy")?;
    let stream = bed.stream(None)?;
    let time = best(|| {
        let received = Received::read(&stream).map_err(|finding| anyhow!("{finding:?}"))?;
        let appraisal = bed.appraise(&received, &policy, &HostState::default(), &Shared::default());
        ensure!(appraisal.verdict.all_trusted() && appraisal.verdict.vms.len() == GUESTS);
        Ok(())
    })?;
    let value = vec![Sha256([1; 32]); GUESTS * ENTRIES];
    let hashes = best(|| {
        black_box(value.iter().fold(Sha256::ZERO, |value, digest| extend_sha256(&value, digest)));
        Ok(())
    })?;
    numbers.at_most("1,000 guests x 5,000 entries, bytes to verdict", time.as_secs_f64(), "s", 1.0);
    numbers.known("their aggregates' hashes alone", hashes.as_secs_f64(), "s");
    numbers.known("the stream of it", stream.len() as f64, "bytes");
    Ok(())
}

pub(crate) fn steady(numbers: &mut Numbers) -> Result<()> {
    let mut bed = Bed::new(0)?;
    let vms: Vec<VmRef> = (0..10).map(|vm| bed.start(vm, format!("vm{vm}"))).collect();
    vms.iter().for_each(|&at| bed.grow_by(at, 0..1000));
    bed.quote()?;
    let policy = Policy::parse(&guest_policy(POLICY), "the bench's policy")?;
    let shared = Shared::default();
    let first = Received::read(&bed.stream(None)?).map_err(|finding| anyhow!("{finding:?}"))?;
    let mut appraisal = bed.appraise(&first, &policy, &HostState::default(), &shared);
    let mut reports = Vec::with_capacity(REPORTS);
    for report in 0..REPORTS {
        let had = bed.lengths();
        let from = 1000 + report * NEW;
        bed.grow_by(vms[report % vms.len()], (from..from + NEW).map(|n| n % POLICY));
        bed.quote()?;
        reports.push((bed.stream(Some(&had))?, bed.head.clone().context("a head")?));
    }
    let sizes: usize = reports.iter().map(|(stream, _)| stream.len()).sum();
    let start = Instant::now();
    let mut written = 0;
    for (stream, _) in &reports {
        let state = appraisal.state.take().context("no state")?;
        let kept = appraisal.kept.take().context("nothing kept")?;
        let (next, part) = bed.go_on(stream, &kept, &policy, &state, &shared)?;
        ensure!(next.verdict.all_trusted(), "{:?}", next.verdict);
        written += part;
        appraisal = next;
    }
    let all = start.elapsed();
    let start = Instant::now();
    for (_, head) in &reports {
        black_box(signature::check(&bed.ak_public, &head.attest.0, &head.signature.0)).map_err(|f| anyhow!("{f:?}"))?;
    }
    let signatures = start.elapsed();
    let count = REPORTS as f64;
    numbers.at_least("steady reports appraised per second", count / all.as_secs_f64(), "reports/s", 5000.0);
    let share = 100.0 * signatures.as_secs_f64() / all.as_secs_f64();
    numbers.known("time in % that is the signature check", share, "%");
    numbers.known("bytes of such a report", sizes as f64 / count, "bytes");
    numbers.known("bytes of evidence written for it", written as f64 / count, "bytes");
    Ok(())
}

pub(crate) fn memory(numbers: &mut Numbers) -> Result<()> {
    let policy = Policy::parse(&guest_policy(POLICY), "the bench's policy")?;
    let shared = Shared::default();
    let mut hosts: Vec<(HostState, Kept)> = Vec::new();
    let mut before = 0;
    // The first makes what all share.
    for host in 0..=HOSTS {
        let mut bed = Bed::new(host)?;
        for vm in 0..VMS {
            let at = bed.start(host * VMS + vm, format!("vm{vm}"));
            bed.grow_by(at, 0..1000);
        }
        bed.quote()?;
        let received = Received::read(&bed.stream(None)?).map_err(|finding| anyhow!("{finding:?}"))?;
        let Appraisal { state, kept, .. } = bed.appraise(&received, &policy, &HostState::default(), &shared);
        // As it is after the store gave it, or after a round: nothing that was only needed meanwhile.
        hosts.push((state.context("no state")?, kept.context("nothing kept")?));
        drop((received, bed));
        if host == 0 {
            before = resident()?;
        }
    }
    let grown = resident()?.saturating_sub(before);
    ensure!(grown > 0, "hosts took memory that was freed before: there is no number");
    let each = grown as f64 / HOSTS as f64;
    numbers.known("memory at hand of a host with 100 VMs", each / 1024.0, "KiB");
    numbers.below("the same for 10,000 such hosts", each * 10_000.0 / f64::from(1 << 30), "GiB", 4.0);
    black_box(hosts);
    Ok(())
}

/// Resident memory, in bytes.
fn resident() -> Result<usize> {
    let pages: usize = std::fs::read_to_string("/proc/self/statm")?.split(' ').nth(1).context("statm")?.parse()?;
    Ok(pages * 4096)
}

fn best(mut run: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..BEST_OF {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}

fn name(n: usize) -> String {
    format!("/usr/lib/x86_64-linux-gnu/part{}/lib{n}.so", n % 97)
}

fn content(n: usize) -> Sha256 {
    sha256(&[&(n as u64).to_le_bytes()])
}

fn file(n: usize) -> Vec<u8> {
    entry(&name(n), &content(n))
}

/// An `ima-ng` entry as the kernel lists it.
fn entry(path: &str, digest: &Sha256) -> Vec<u8> {
    let block = |bytes: &[u8]| [&(bytes.len() as u32).to_le_bytes(), bytes].concat();
    let data =
        [block(&[b"sha256:\0".as_slice(), digest.as_bytes()].concat()), block(&[path.as_bytes(), &[0]].concat())];
    let data = data.concat();
    [&10_u32.to_le_bytes(), HashAlg::Sha1.hash(&data).as_slice(), &block(b"ima-ng"), &block(&data)].concat()
}

/// The first so many files, as a policy has them.
fn allow(count: usize) -> String {
    (0..count).map(|n| format!("\"{}\" = [\"sha256:{}\"]\n", name(n), content(n))).collect()
}

fn guest_policy(count: usize) -> String {
    let any = "kernel = \"any\"\ninitrd = \"any\"\nkernel_cmdline = \"any\"\nfirmware = \"any\"\n";
    let images = "[vm.images]\ndisk0 = { continuity = true }\n";
    format!("[[vm]]\nname = \"vm*\"\n{any}{images}[vm.ima]\n{}", allow(count))
}

/// A host without a machine.
struct Bed {
    ak: Ak,
    ak_public: Public,
    records: Vec<u8>,
    replay: Replay,
    statement: Statement,
    clock: ClockInfo,
    host_ima: Vec<u8>,
    pcr_10: Sha256,
    dictionary: Vec<Blob>,
    guests: Vec<(Guest, Aggregate)>,
    nonce: Nonce,
    head: Option<Head>,
}

/// How long every log was.
struct Lengths {
    host_ima: usize,
    records: usize,
    dictionary: usize,
    guests: Vec<usize>,
}

impl Bed {
    fn new(number: usize) -> Result<Self> {
        let ak = Ak::generate().map_err(|_| anyhow!("no key"))?;
        let epoch = Epoch { number: 1, id: EpochId([1; 16]) };
        let zero = |pcr| RegisterValue { bank: HashAlg::Sha256, pcr, value: Blob(vec![0; 32]) };
        let host: onequote_evidence::id::HostId = format!("host-{number}").parse().map_err(anyhow::Error::msg)?;
        let clock = ClockInfo { clock: 1000, reset_count: 5, restart_count: 1, safe: true };
        let start = ProxyStart {
            host: host.clone(),
            epoch,
            boot_id: BootId([3; 16]),
            version: "0.1.0".into(),
            binary: None,
            history: vec![zero(12), zero(13)],
            pcr_vm: 12,
            pcr_guest: 13,
            reset_count: clock.reset_count,
            restart_count: clock.restart_count,
            path: None,
        };
        let event = Event { time: TimeMs(1), vm: None, body: start.into() };
        let record = Record::new(0, 12, &[HashAlg::Sha256], &[event]);
        let statement = Statement {
            version: statement::VERSION,
            host,
            epoch,
            log_len: 1,
            registers: Vec::new(),
            vms: Vec::new(),
            unmanaged: Vec::new(),
            time: TimeMs(1),
        };
        Ok(Self {
            ak_public: Public::parse(&ak.public())?,
            ak,
            records: record.to_bytes(),
            replay: Replay::begin(&record)?,
            statement,
            clock,
            host_ima: Vec::new(),
            pcr_10: Sha256::ZERO,
            dictionary: Vec::new(),
            guests: Vec::new(),
            nonce: Nonce::new(vec![7; 32]).context("a nonce")?,
            head: None,
        })
    }

    fn measure(&mut self, raw: &[u8]) {
        if let Ok(entry) = Entry::parse(raw, SHA1_HASH_SIZE) {
            self.pcr_10 = extend_sha256(&self.pcr_10, &Aggregate::digest(&entry));
            self.host_ima.extend_from_slice(raw);
        }
    }

    fn log(&mut self, pcr: u8, vm: VmRef, bodies: impl IntoIterator<Item = EventBody>) {
        let events: Vec<Event> =
            bodies.into_iter().map(|body| Event { time: TimeMs(1000), vm: Some(vm), body }).collect();
        let record = Record::new(self.replay.len(), pcr, &[HashAlg::Sha256], &events);
        if self.replay.apply(&record).is_ok() {
            self.records.extend(record.to_bytes());
        }
    }

    /// A VM as they are: measured before it ran, one disk.
    fn start(&mut self, number: usize, name: String) -> VmRef {
        let vm = VmId(uuid::Uuid::from_u128(0x4000_8000_0000_0000_0000 + number as u128));
        let at = VmRef { vm, session: SessionId((number as u64 + 1).to_be_bytes()) };
        let create = VmCreate {
            name: name.clone(),
            pid: 77,
            depth: Depth::Gate,
            uuid_given: true,
            qemu: "7.2.0".into(),
            machine: "q35".into(),
            memory: 1 << 30,
            cpus: 2,
            accelerator: "kvm".into(),
            guest_cid: Some(9),
            devices: Vec::new(),
            monitors: Vec::new(),
        };
        let roles =
            [Role::QemuBinary, Role::Kernel, Role::Initrd, Role::KernelCmdline, Role::Firmware, Role::Arguments];
        let digest = |n: usize| onequote_evidence::digest::FileDigest::sha256(content(n));
        let part = |(n, role): (usize, Role)| Component {
            role,
            path: format!("/srv/vms/shared/{role}"),
            size: 9_000_000,
            digest: digest(if role == Role::Arguments { number } else { n }),
            text: None,
            memory: None,
        };
        let components = roles.into_iter().enumerate().map(part).collect();
        let disk = Image {
            slot: "disk0".into(),
            path: format!("/srv/vms/{name}/disk0.qcow2"),
            format: "qcow2".into(),
            read_only: false,
            size: 1 << 33,
            digest: digest(number),
        };
        self.log(12, at, [create.into(), VmStart { components, images: vec![disk] }.into()]);
        self.log(13, at, [GuestHello { boot: 0, boot_id: BootId([9; 16]), hash_size: 20, count: 0 }.into()]);
        self.statement.vms.push(VmState {
            vm,
            session: at.session,
            name,
            run_state: "running".into(),
            depth: Depth::Gate,
            boots: vec![GuestBoot { boot: 0, count: 0, aggregate: Sha256::ZERO }],
            last_contact: Some(10),
            late: false,
        });
        let list = Guest { vm, session: at.session, boot: 0, first: 0, entries: Vec::new() };
        self.guests.push((list, Aggregate::EMPTY));
        at
    }

    /// A guest's list grows by these files.
    fn grow_by(&mut self, at: VmRef, files: impl IntoIterator<Item = usize>) {
        let files: Vec<u32> = files.into_iter().map(|n| n as u32).collect();
        let most = files.iter().copied().max().map_or(0, |most| most as usize + 1);
        for n in self.dictionary.len()..most {
            self.dictionary.push(Blob(file(n)));
        }
        self.grow(at, &files);
    }

    fn grow(&mut self, at: VmRef, references: &[u32]) {
        let Some(guest) = self.guests.iter().position(|(list, _)| list.session == at.session) else { return };
        let (list, aggregate) = &mut self.guests[guest];
        let first = aggregate.count;
        for &reference in references {
            if let Ok(entry) = Entry::parse(&self.dictionary[reference as usize].0, SHA1_HASH_SIZE) {
                aggregate.push(&entry);
                list.entries.push(reference);
            }
        }
        let Aggregate { count, value } = *aggregate;
        self.statement.vms[guest].boots = vec![GuestBoot { boot: 0, count, aggregate: value }];
        self.log(13, at, [GuestEntries { boot: 0, first, count: count - first, aggregate: value }.into()]);
    }

    fn quote(&mut self) -> Result<()> {
        self.clock.clock += 1;
        self.statement.log_len = self.replay.len();
        self.statement.registers = pcr::to_list(self.replay.registers());
        let value = |pcr: u8| match self.replay.registers().get(&Register { bank: HashAlg::Sha256, pcr }) {
            Some(value) => value.clone(),
            None if pcr == 10 => self.pcr_10.0.to_vec(),
            None => vec![0; 32],
        };
        let values: Vec<Vec<u8>> = QUOTED_PCRS.iter().map(|&pcr| value(pcr)).collect();
        let statement = self.statement.to_bytes();
        let leaf = nonce_tree::leaf(&self.nonce, &[0xbb; 32]);
        let (root, paths) = nonce_tree::build(&[leaf]).context("a tree")?;
        let attest = Attest {
            qualified_signer: vec![7; 34],
            extra_data: nonce_tree::qualifying_data(&root, &statement).0.to_vec(),
            clock: self.clock,
            firmware_version: 42,
            selection: PcrSelection { banks: vec![(HashAlg::Sha256.tpm_id(), QUOTED_PCRS.into_iter().collect())] },
            pcr_digest: HashAlg::Sha256.hash(&values.concat()),
        };
        let attest = attest.to_bytes();
        let register = |(&pcr, value)| RegisterValue { bank: HashAlg::Sha256, pcr, value: Blob(value) };
        self.head = Some(Head {
            version: stream::VERSION,
            statement: Blob(statement),
            signature: Blob(self.ak.sign(&attest).map_err(|_| anyhow!("no signature"))?),
            attest: Blob(attest),
            path: paths[0].clone(),
            registers: QUOTED_PCRS.iter().zip(values).map(register).collect(),
            nonce: Blob(self.nonce.as_bytes().to_vec()),
            binding: Blob(vec![0xbb; 32]),
        });
        Ok(())
    }

    fn lengths(&self) -> Lengths {
        Lengths {
            host_ima: self.host_ima.len(),
            records: self.records.len(),
            dictionary: self.dictionary.len(),
            guests: self.guests.iter().map(|(list, _)| list.entries.len()).collect(),
        }
    }

    /// The stream of the last quote, for who has this much.
    fn stream(&self, had: Option<&Lengths>) -> Result<Vec<u8>> {
        let none = Lengths { host_ima: 0, records: 0, dictionary: 0, guests: vec![0; self.guests.len()] };
        let had = had.unwrap_or(&none);
        let mut pieces = Pieces::default();
        pieces.push_log(Item::HostIma, had.host_ima as u64, &self.host_ima[had.host_ima..]);
        pieces.push_log(Item::Records, had.records as u64, &self.records[had.records..]);
        pieces.push_dictionary(had.dictionary as u64, self.dictionary[had.dictionary..].iter().cloned());
        for ((list, _), &first) in self.guests.iter().zip(&had.guests) {
            pieces.push_guest(&Guest { first: first as u64, entries: list.entries[first..].to_vec(), ..*list });
        }
        Ok(stream::compress(&pieces.stream(self.head.clone().context("no quote")?))?)
    }

    fn with<T>(&self, policy: &Policy, state: &HostState, shared: &Shared, run: impl FnOnce(&Context<'_>) -> T) -> T {
        let freshness = Freshness::Asked {
            nonce: self.nonce.clone(),
            binding: vec![0xbb; 32],
            expires: TimeMs(u64::MAX),
            unused: true,
            claimed_was_answered: false,
        };
        run(&Context {
            host: Some(&self.statement.host),
            ak: &self.ak_public,
            software_tpm: true,
            freshness: &freshness,
            state,
            policy: Some((policy, 1)),
            now: TimeMs(5000),
            lifetime: 60_000,
            facts: false,
            shared,
        })
    }

    fn appraise(&self, received: &Received, policy: &Policy, state: &HostState, shared: &Shared) -> Appraisal {
        self.with(policy, state, shared, |context| appraise::appraise(received, context))
    }

    /// The whole way of a report: from its bytes to the verdict, and the bytes that are kept of it.
    fn go_on(
        &self,
        stream: &[u8],
        kept: &Kept,
        policy: &Policy,
        state: &HostState,
        shared: &Shared,
    ) -> Result<(Appraisal, usize)> {
        self.with(policy, state, shared, |context| {
            let reader = Reader::open(stream)?;
            let begun = appraise::begin(reader.head().clone(), context);
            let begun = begun.map_err(|refused| anyhow!("{:?}", refused.verdict.host.findings))?;
            let logs = Logs::collect(reader)?;
            let next = appraise::go_on(&begun, kept, &logs, context).map_err(|_| anyhow!("the whole is needed"))?;
            let part = logs.news().map(|news| news.to_part()).transpose()?;
            Ok((next, part.map_or(0, |part| part.len())))
        })
    }
}
