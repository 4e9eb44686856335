//! **Guest entries bound to the TPM per second**, behind a TPM that takes 10 ms an extend. A real proxy process, with its files
//! on this disk and a software TPM behind a relay, has a thousand VMs: doubles that answer at their monitors what a real QEMU
//! did. This program plays their shims at the VMs' sockets, with frames by the shim's own encoder, made beforehand: all
//! guests of one image connect at once and send their lists as fast as the proxy takes them. An entry counts as bound when the
//! proxy says that the record which speaks of it is extended. The same with entries that no two guests share.
//!
//! **The proxy's memory** with these lists: the peak of its resident memory since its start (`VmHWM`), and again after
//! a quote and evidence for a verifier that has nothing yet.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use onequote_evidence::guest_frame::{GuestFrame, HostFrame, VERSION, body_len, to_wire};
use onequote_evidence::id::{Blob, BootId};
use onequote_evidence::ima::SHA1_HASH_SIZE;
use onequote_tests::lab::{Guest, Options, Process, TpmCommand, TpmRelay, World};

use crate::numbers::Numbers;
use crate::rounds::Asker;
use crate::starts::{double, record};

const LIMIT: Duration = Duration::from_secs(300);

/// What an extend takes in a discrete TPM.
const EXTEND: Duration = Duration::from_millis(10);

/// Guests of one image, and the entries of each.
const GUESTS: usize = 1000;
const ENTRIES: u64 = 5000;

/// Guests that have nothing in common: together about what the proxy takes of distinct entries.
const LONERS: usize = 100;

/// Threads that send.
const SENDERS: usize = 4;

const WANTED: f64 = 1_000_000.0;
const MEMORY: f64 = 256.0;

pub(crate) fn bound(numbers: &mut Numbers) -> Result<()> {
    let image = Frames::of(0)?;
    let mut scene = Scene::new(GUESTS)?;
    let took = scene.send(&vec![image; GUESTS])?;
    let all = GUESTS as f64 * ENTRIES as f64;
    numbers.at_least("guest entries bound per second, one image", all / took.as_secs_f64(), "entries/s", WANTED);
    numbers.known("extends for them, 10 ms each", scene.extends()? as f64, "extends");
    let pid = scene.world.proxy()?.id();
    numbers.below("proxy's peak memory, 1,000 guests x 5,000 entries", peak(pid)?, "MiB", MEMORY);
    let asker = Asker::new(&scene.world)?;
    let bytes = asker.round()?;
    numbers.known("first evidence of them, compressed", bytes as f64, "bytes");
    numbers.below("the same peak, after this evidence", peak(pid)?, "MiB", MEMORY);
    Ok(())
}

pub(crate) fn distinct(numbers: &mut Numbers) -> Result<()> {
    let lists = (1..=LONERS as u64).map(Frames::of).collect::<Result<Vec<_>>>()?;
    let mut scene = Scene::new(LONERS)?;
    let took = scene.send(&lists)?;
    let all = LONERS as f64 * ENTRIES as f64;
    numbers.known("guest entries bound per second, all distinct", all / took.as_secs_f64(), "entries/s");
    numbers.known("extends for them, 10 ms each", scene.extends()? as f64, "extends");
    numbers.known("proxy's peak memory, 500,000 distinct entries", peak(scene.world.proxy()?.id())?, "MiB");
    Ok(())
}

/// A guest's whole list as frames, ready to be sent.
#[derive(Clone)]
struct Frames {
    boot_id: BootId,
    bytes: Arc<[u8]>,
}

impl Frames {
    fn of(seed: u64) -> Result<Self> {
        let mut guest = Guest::new(seed);
        guest.grow(ENTRIES)?;
        let (mut bytes, mut first) = (Vec::new(), 0);
        while first < ENTRIES {
            let (entries, count) = guest.frame(first);
            bytes.extend(to_wire(&GuestFrame::Entries { first, entries: Blob(entries) }));
            first += count;
        }
        Ok(Self { boot_id: guest.boot_id, bytes: bytes.into() })
    }
}

/// A proxy with VMs.
struct Scene {
    world: World,
    relay: TpmRelay,
    _doubles: Vec<Process>,
    sockets: Vec<PathBuf>,
}

impl Scene {
    fn new(guests: usize) -> Result<Self> {
        let mut world = World::with(Options { no_count: true, ..Options::default() })?;
        let relay = TpmRelay::start(&mut world)?;
        world.start_enrolled()?;
        let recording = record(&mut world)?;
        let doubles = (0..guests).map(|number| double(&world, &recording, number)).collect::<Result<Vec<_>>>()?;
        world.wait_until("all VMs to run", LIMIT, |world| {
            let status = world.proxy_status()?;
            let vms = status["vms"].as_array().map_or(&[][..], Vec::as_slice);
            Ok((vms.iter().filter(|vm| vm["run_state"] == "running").count() >= guests).then_some(()))
        })?;
        relay.delay(TpmCommand::PCR_EXTEND, EXTEND);
        let sockets = (0..guests).map(|number| world.guest_socket(&format!("vm{number}"))).collect();
        Ok(Self { world, relay, _doubles: doubles, sockets })
    }

    /// Sends each guest's list; tells how long it took from the first frame until all is bound.
    fn send(&mut self, lists: &[Frames]) -> Result<Duration> {
        let connect = |(socket, list): (&PathBuf, &Frames)| {
            Ok(Sender { stream: begin(socket, list.boot_id)?, left: list.bytes.clone(), at: 0 })
        };
        let mut connections = self.sockets.iter().zip(lists).map(connect).collect::<Result<Vec<_>>>()?;
        let _ = self.relay.take_spent();
        let (start, share) = (Arc::new(Barrier::new(SENDERS + 1)), connections.len().div_ceil(SENDERS));
        let mut threads = Vec::new();
        for _ in 0..SENDERS {
            let mut mine = connections.split_off(connections.len().saturating_sub(share));
            let start = Arc::clone(&start);
            threads.push(thread::spawn(move || {
                start.wait();
                send_all(&mut mine)?;
                // Open until all is bound: a connection that ends is an event of its own.
                anyhow::Ok(mine)
            }));
        }
        start.wait();
        let began = Instant::now();
        let mut open = Vec::new();
        for thread in threads {
            open.extend(thread.join().map_err(|_| anyhow::anyhow!("a sender panicked"))??);
        }
        let wanted = lists.len();
        let took = self.world.wait_until("all entries to be bound", LIMIT, |world| {
            let status = world.proxy_status()?;
            let vms = status["vms"].as_array().map_or(&[][..], Vec::as_slice);
            let done = vms.iter().filter(|vm| vm["entries"] == ENTRIES).count();
            Ok((done >= wanted).then(|| began.elapsed()))
        })?;
        ensure!(open.len() == wanted, "{} of {wanted} connections", open.len());
        Ok(took)
    }

    /// Extends since the lists began to be sent.
    fn extends(&self) -> Result<u64> {
        Ok(self.relay.take_spent().get(&TpmCommand::PCR_EXTEND).copied().unwrap_or_default().0)
    }
}

struct Sender {
    stream: UnixStream,
    left: Arc<[u8]>,
    at: usize,
}

/// Writes what each connection takes, in turn, until all is written.
fn send_all(connections: &mut [Sender]) -> Result<()> {
    loop {
        let (mut left, mut moved) = (false, false);
        for one in connections.iter_mut().filter(|one| one.at < one.left.len()) {
            left = true;
            match one.stream.write(&one.left[one.at..]) {
                Ok(0) => bail!("a connection takes nothing"),
                Ok(count) => {
                    one.at += count;
                    moved = true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("the proxy closed a connection"),
            }
        }
        if !left {
            return Ok(());
        }
        if !moved {
            // All sockets are full: the processors are the proxy's.
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Says hello and resumes, as a guest of which the host has nothing yet.
fn begin(socket: &PathBuf, boot_id: BootId) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("nobody at {}", socket.display()))?;
    let hello = GuestFrame::Hello { version: VERSION, boot_id, hash_size: SHA1_HASH_SIZE as u32, count: ENTRIES };
    stream.write_all(&to_wire(&hello))?;
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix)?;
    let mut body = vec![0; body_len(prefix)?];
    stream.read_exact(&mut body)?;
    let HostFrame::Have { count, aggregate } = HostFrame::parse(&body)? else { bail!("the first frame is not have") };
    ensure!(count == 0, "the host has {count} entries already");
    stream.write_all(&to_wire(&GuestFrame::Resume { count, aggregate }))?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// The most memory that a process had resident since its start, in MiB.
fn peak(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}
