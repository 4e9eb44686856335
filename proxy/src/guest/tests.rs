//! Guests that behave, that break off, that lie and that flood, over an in-memory connection.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use onequote_evidence::{
    digest::FileDigest,
    event::{Depth, Event, EventBody, VmCreate, VmRef, VmReset, VmStart},
    guest_frame::{self, GuestFrame, HostFrame},
    id::{Blob, BootId, SessionId, Sha256, VmId},
    ima::{Aggregate, Entry},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::*;
use crate::sink::{BoxFuture, SinkError};

/// A log in memory that keeps the inventory as the recorder does, and can be told to fail.
struct MemoryLog {
    inventory: Arc<RwLock<Inventory>>,
    events: Mutex<Vec<Event>>,
    broken: AtomicBool,
    appends: AtomicU64,
}

impl MemoryLog {
    fn check(&self) -> Result<(), SinkError> {
        match self.broken.load(Ordering::SeqCst) {
            true => Err(SinkError(Arc::new(io::Error::other("broken")))),
            false => Ok(()),
        }
    }

    fn put(&self, events: Vec<Event>) {
        let mut inventory = self.inventory.write().unwrap();
        for event in &events {
            inventory.apply(event);
        }
        self.events.lock().unwrap().extend(events);
    }
}

impl EventSink for MemoryLog {
    fn append(&self, events: Vec<Event>) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move {
            self.check()?;
            self.appends.fetch_add(1, Ordering::SeqCst);
            self.put(events);
            Ok(())
        })
    }

    fn ready(&self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move { self.check() })
    }
}

struct Lab {
    dir: tempfile::TempDir,
    log: Arc<MemoryLog>,
    room: Arc<Room>,
}

fn vm(n: u8) -> VmRef {
    VmRef { vm: VmId(uuid::Uuid::from_bytes([n; 16])), session: SessionId([n; 8]) }
}

fn now() -> TimeMs {
    TimeMs(1)
}

fn event(vm: VmRef, body: impl Into<EventBody>) -> Event {
    Event { time: now(), vm: Some(vm), body: body.into() }
}

fn started(n: u8) -> Vec<Event> {
    let create = VmCreate {
        name: format!("vm{n}"),
        pid: 1,
        depth: Depth::Gate,
        uuid_given: true,
        qemu: "7.2.0".into(),
        machine: "q35".into(),
        memory: 1,
        cpus: 1,
        accelerator: "tcg".into(),
        guest_cid: None,
        devices: vec![],
        monitors: vec![],
    };
    vec![event(vm(n), create), event(vm(n), VmStart { components: vec![], images: vec![] })]
}

impl Lab {
    fn new() -> Self {
        let inventory = Arc::new(RwLock::new(Inventory::default()));
        let log = MemoryLog {
            inventory,
            events: Mutex::default(),
            broken: AtomicBool::new(false),
            appends: AtomicU64::new(0),
        };
        log.put([started(1), started(2)].concat());
        Self::open(tempfile::tempdir().unwrap(), Arc::new(log), Limits::default())
    }

    fn open(dir: tempfile::TempDir, log: Arc<MemoryLog>, limits: Limits) -> Self {
        let (room, _) = open(dir.path(), limits, now, Arc::clone(&log.inventory), Arc::clone(&log) as _).unwrap();
        Self { dir, log, room }
    }

    /// The proxy ends and starts again with the same folder and log.
    fn restart(self, limits: Limits) -> Self {
        Self::open(self.dir, self.log, limits)
    }

    fn connect(&self, vm: VmRef) -> Shim {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let room = Arc::clone(&self.room);
        let task = tokio::spawn(async move { serve(&room, vm, theirs).await.to_string() });
        Shim { stream: ours, task }
    }

    async fn list(&self, vm: VmRef, boot: u32) -> (u64, Vec<u8>) {
        self.room.collect(Duration::from_millis(200)).await;
        let (count, aggregate) = {
            let inventory = self.log.inventory.read().unwrap();
            let boot = inventory.vm(&vm).unwrap().boots.iter().find(|b| b.boot == boot).unwrap();
            (boot.count, boot.aggregate)
        };
        let lists = self.room.lists(vec![(vm, boot, count)]).await;
        let bytes: Vec<u8> = lists.lists[0].2.iter().flat_map(|&id| lists.dictionary[id as usize].to_vec()).collect();
        assert_eq!(aggregate_of(&bytes).value, aggregate);
        (count, bytes)
    }

    fn kinds(&self) -> Vec<String> {
        self.log.events.lock().unwrap().iter().map(|e| e.body.kind().to_owned()).collect()
    }
}

/// A shim's end of a connection.
struct Shim {
    stream: DuplexStream,
    task: JoinHandle<String>,
}

impl Shim {
    async fn send(&mut self, frame: GuestFrame) {
        let _ = self.stream.write_all(&guest_frame::to_wire(&frame)).await;
    }

    async fn receive(&mut self) -> Option<HostFrame> {
        let mut prefix = [0; 4];
        self.stream.read_exact(&mut prefix).await.ok()?;
        let mut body = vec![0; guest_frame::body_len(prefix).unwrap()];
        self.stream.read_exact(&mut body).await.ok()?;
        Some(HostFrame::parse(&body).unwrap())
    }

    async fn hello(&mut self, boot: u8) -> Option<(u64, Sha256)> {
        let frame = GuestFrame::Hello { version: 1, boot_id: BootId([boot; 16]), hash_size: 20, count: 0 };
        self.send(frame).await;
        match self.receive().await? {
            HostFrame::Have { count, aggregate } => Some((count, aggregate)),
            other @ HostFrame::Collect { .. } => panic!("{other:?}"),
        }
    }

    async fn resume(&mut self, boot: u8) -> u64 {
        let (count, aggregate) = self.hello(boot).await.unwrap();
        self.send(GuestFrame::Resume { count, aggregate }).await;
        count
    }

    async fn entries(&mut self, first: u64, entries: &[Vec<u8>]) {
        self.send(GuestFrame::Entries { first, entries: Blob(entries.concat()) }).await;
    }

    /// Answers one request to collect.
    async fn collected(&mut self, count: u64) {
        let Some(HostFrame::Collect { id }) = self.receive().await else { panic!("collect") };
        self.send(GuestFrame::Collected { id, count }).await;
    }

    async fn end(self) -> String {
        drop(self.stream);
        self.task.await.unwrap()
    }
}

fn entry(n: u32) -> Vec<u8> {
    let block = |bytes: &[u8]| [&(bytes.len() as u32).to_le_bytes(), bytes].concat();
    let digest = FileDigest::sha256(onequote_evidence::digest::sha256(&[&n.to_le_bytes()]));
    let data = [block(&[b"sha256:\0".as_slice(), &digest.value.0].concat()), block(format!("/bin/p{n}\0").as_bytes())]
        .concat();
    let hash = onequote_evidence::digest::HashAlg::Sha1.hash(&data);
    [10_u32.to_le_bytes().to_vec(), hash, block(b"ima-ng"), block(&data)].concat()
}

fn entries(range: std::ops::Range<u32>) -> Vec<Vec<u8>> {
    range.map(entry).collect()
}

fn aggregate_of(list: &[u8]) -> Aggregate {
    let mut aggregate = Aggregate::EMPTY;
    for entry in onequote_evidence::ima::ListReader::new(list, 20) {
        let entry: Entry<'_> = entry.unwrap();
        aggregate.push(&entry);
    }
    aggregate
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_comes_whole_over_broken_connections_and_restarts() {
    let mut lab = Lab::new();
    let whole = entries(0..10);
    for round in 0..5_u64 {
        let mut shim = lab.connect(vm(1));
        assert_eq!(shim.resume(7).await, round * 2);
        shim.entries(round * 2, &whole[round as usize * 2..][..2]).await;
        // The connection is cut inside the next frame.
        let next = guest_frame::to_wire(&GuestFrame::Entries { first: round * 2 + 2, entries: Blob(entry(99)) });
        shim.stream.write_all(&next[..next.len() / 2]).await.unwrap();
        shim.end().await;
        assert_eq!(lab.list(vm(1), 0).await, (round * 2 + 2, whole[..round as usize * 2 + 2].concat()));
        if round % 2 == 0 {
            lab = lab.restart(Limits::default());
        }
    }
    assert!(!lab.kinds().contains(&"guest-rewind".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_past_is_a_rewind_and_ends_the_boot() {
    let lab = Lab::new();
    let mut shim = lab.connect(vm(1));
    shim.resume(7).await;
    shim.entries(0, &entries(0..3)).await;
    shim.end().await;

    let mut liar = lab.connect(vm(1));
    let (count, _) = liar.hello(7).await.unwrap();
    assert_eq!(count, 3);
    let other = aggregate_of(&entries(5..8).concat());
    liar.send(GuestFrame::Resume { count, aggregate: other.value }).await;
    assert!(liar.end().await.contains("another past"));
    lab.list(vm(1), 0).await;
    assert!(lab.kinds().contains(&"guest-rewind".to_owned()));

    let mut again = lab.connect(vm(1));
    assert_eq!(again.hello(7).await, None);
    assert!(again.end().await.contains("nothing more"));
    assert_eq!(lab.list(vm(1), 0).await, (3, entries(0..3).concat()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_boot_needs_a_reset() {
    let lab = Lab::new();
    let mut shim = lab.connect(vm(1));
    shim.resume(7).await;
    shim.entries(0, &entries(0..3)).await;
    shim.end().await;
    lab.list(vm(1), 0).await;
    lab.log.put(vec![event(vm(1), VmReset { by_guest: true, reason: "guest-reset".into() })]);

    let mut rebooted = lab.connect(vm(1));
    assert_eq!(rebooted.resume(8).await, 0);
    rebooted.entries(0, &entries(0..2)).await;
    rebooted.end().await;
    assert_eq!(lab.list(vm(1), 0).await.0, 3);
    assert_eq!(lab.list(vm(1), 1).await, (2, entries(0..2).concat()));

    // A third boot id without a reset is a rewind.
    let mut liar = lab.connect(vm(1));
    assert_eq!(liar.hello(9).await, None);
    liar.end().await;
    lab.list(vm(1), 1).await;
    assert!(lab.kinds().contains(&"guest-rewind".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn gaps_rubbish_and_floods_hurt_only_their_guest() {
    let mut lab = Lab::new();
    for (frame, why) in [
        (GuestFrame::Entries { first: 1, entries: Blob(entry(0)) }, "begin at 1"),
        (GuestFrame::Entries { first: 0, entries: Blob(vec![0xff; 100]) }, "IMA entry"),
        (GuestFrame::Entries { first: 0, entries: Blob(vec![]) }, "without an entry"),
        (GuestFrame::Resume { count: 0, aggregate: Sha256::ZERO }, "in the middle"),
    ] {
        let mut shim = lab.connect(vm(1));
        shim.resume(7).await;
        shim.send(frame).await;
        let ended = shim.task.await.unwrap();
        assert!(ended.contains(why), "{ended}");
    }
    lab = lab.restart(Limits { entries: 5, ..Limits::default() });
    let mut flood = lab.connect(vm(1));
    flood.resume(7).await;
    flood.entries(0, &entries(0..6)).await;
    assert!(flood.task.await.unwrap().contains("limit"));
    let mut good = lab.connect(vm(2));
    good.resume(7).await;
    good.entries(0, &entries(0..3)).await;
    good.end().await;
    assert_eq!(lab.list(vm(2), 0).await.0, 3);
    assert!(lab.kinds().contains(&"guest-overflow".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_waits_for_the_good_and_names_the_late() {
    let lab = Lab::new();
    let (mut good, mut silent) = (lab.connect(vm(1)), lab.connect(vm(2)));
    good.resume(7).await;
    silent.resume(7).await;
    // Both are known to be connected when their resume was answered; the writer knows since hello.
    let room = Arc::clone(&lab.room);
    let collecting = tokio::spawn(async move { room.collect(Duration::from_millis(300)).await });
    good.entries(0, &entries(0..2)).await;
    good.collected(2).await;
    let late = collecting.await.unwrap();
    assert_eq!(late.into_iter().collect::<Vec<_>>(), [vm(2)]);
    assert_eq!(lab.log.inventory.read().unwrap().vm(&vm(1)).unwrap().boots[0].count, 2);
    drop(silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_costs_one_record_however_many_guests_answer() {
    let lab = Lab::new();
    let mut shims = [lab.connect(vm(1)), lab.connect(vm(2))];
    for shim in &mut shims {
        shim.resume(7).await;
    }
    lab.room.collect(Duration::ZERO).await;
    for shim in &mut shims {
        shim.receive().await.unwrap();
    }
    let before = lab.log.appends.load(Ordering::SeqCst);
    let room = Arc::clone(&lab.room);
    let collecting = tokio::spawn(async move { room.collect(Duration::from_secs(60)).await });
    // Who was asked knows that what it sends is held back.
    let mut asked = Vec::new();
    for shim in &mut shims {
        let Some(HostFrame::Collect { id }) = shim.receive().await else { panic!("collect") };
        asked.push(id);
    }
    for (n, shim) in (1..).zip(&mut shims) {
        shim.entries(0, &entries(0..2)).await;
        // In the list before the other guest says anything.
        while lab.room.lists(vec![(vm(n), 0, 2)]).await.lists[0].2.len() < 2 {}
    }
    assert_eq!(lab.log.appends.load(Ordering::SeqCst), before);
    for (shim, id) in shims.iter_mut().zip(asked) {
        shim.send(GuestFrame::Collected { id, count: 2 }).await;
    }
    assert!(collecting.await.unwrap().is_empty());
    assert_eq!(lab.log.appends.load(Ordering::SeqCst), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_does_not_keep_a_guest_waiting_for_itself() {
    let lab = Lab::new();
    let mut shim = lab.connect(vm(1));
    shim.resume(7).await;
    let room = Arc::clone(&lab.room);
    let collecting = tokio::spawn(async move { room.collect(Duration::from_secs(60)).await });
    for n in 0..40 {
        shim.entries(n, &entries(n as u32..n as u32 + 1)).await;
    }
    shim.collected(40).await;
    assert!(collecting.await.unwrap().is_empty());
    assert_eq!(lab.list(vm(1), 0).await.0, 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_log_loses_and_doubles_nothing() {
    let lab = Lab::new();
    let mut shim = lab.connect(vm(1));
    shim.resume(7).await;
    shim.entries(0, &entries(0..2)).await;
    lab.list(vm(1), 0).await;
    lab.log.broken.store(true, Ordering::SeqCst);
    shim.entries(2, &entries(2..4)).await;
    tokio::time::timeout(Duration::from_millis(100), lab.room.lists(vec![])).await.unwrap();
    lab.log.broken.store(false, Ordering::SeqCst);
    shim.entries(4, &entries(4..5)).await;
    shim.end().await;
    assert_eq!(lab.list(vm(1), 0).await, (5, entries(0..5).concat()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_changed_on_disk_is_kept_as_it_is_and_takes_nothing() {
    for damage in [cut as fn(&Path), flip] {
        let lab = Lab::new();
        let mut shim = lab.connect(vm(1));
        shim.resume(7).await;
        shim.entries(0, &entries(0..4)).await;
        shim.end().await;
        lab.list(vm(1), 0).await;
        let file = lab.dir.path().join("references");
        damage(&file);
        let lab = lab.restart(Limits::default());
        let mut shim = lab.connect(vm(1));
        assert_eq!(shim.hello(7).await, None);
        assert!(shim.end().await.contains("damaged"));
        let lists = lab.room.lists(vec![(vm(1), 0, 4)]).await;
        let bytes: Vec<u8> = lists.lists[0].2.iter().flat_map(|&id| lists.dictionary[id as usize].to_vec()).collect();
        assert_ne!(bytes, entries(0..4).concat());
    }
}

fn cut(file: &Path) {
    let len = std::fs::metadata(file).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(len - 4).unwrap();
}

fn flip(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let last = bytes.len() - 4;
    bytes[last] ^= 1;
    std::fs::write(file, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn boots_are_bounded_too() {
    let lab = Lab::new().restart(Limits { boots: 2, ..Limits::default() });
    for boot in 0..3 {
        let mut shim = lab.connect(vm(1));
        let begun = shim.hello(boot).await.is_some();
        assert_eq!(begun, boot < 2);
        shim.end().await;
        lab.list(vm(1), 0).await;
        lab.log.put(vec![event(vm(1), VmReset { by_guest: true, reason: "guest-reset".into() })]);
    }
    assert!(lab.kinds().contains(&"guest-overflow".to_owned()));
}

#[test]
fn the_hosts_limits_cut_off_only_those_over_their_share() {
    let limits = Limits { host_bytes: 100, ..Limits::default() };
    let bytes = |bytes| room::Brought { entries: 1, bytes };
    assert_eq!(limits.exceeded(bytes(90), bytes(100), 4), None);
    assert!(limits.exceeded(bytes(90), bytes(101), 4).is_some());
    assert_eq!(limits.exceeded(bytes(25), bytes(190), 4), None);
    assert!(limits.exceeded(bytes(26), bytes(190), 4).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_trickles_does_not_fill_the_log() {
    let lab = Lab::new().restart(Limits { records: 2, ..Limits::default() });
    let mut shim = lab.connect(vm(1));
    shim.resume(7).await;
    let records = || lab.kinds().iter().filter(|kind| *kind == "guest-entries").count();
    for n in 0..6 {
        shim.entries(u64::from(n), &entries(n..n + 1)).await;
        if records() < 2 {
            let logged = n as usize + 1;
            tokio::time::timeout(Duration::from_secs(10), async {
                while records() < logged {
                    tokio::task::yield_now().await;
                }
            })
            .await
            .unwrap();
        }
    }
    assert_eq!(records(), 2, "one record an entry, until there were too many");
    // A quote shows all that came, in one more record; and what nobody asks for comes a little later.
    shim.end().await;
    assert_eq!(lab.list(vm(1), 0).await, (6, entries(0..6).concat()));
    assert!(records() <= 4, "{:?}", lab.kinds());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_has_few_connections() {
    let lab = Lab::new();
    let mut places = Vec::new();
    while let Some(place) = lab.room.admit(vm(1)) {
        places.push(place);
        assert!(places.len() < 100);
    }
    assert!(lab.room.admit(vm(2)).is_some(), "one guest does not keep another out");
    places.pop();
    assert!(lab.room.admit(vm(1)).is_some());
}
