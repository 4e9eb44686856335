//! **A quote round** is one challenge of a verifier: TCP and TLS 1.3 handshake with both certificates, request, asking
//! all guests for what is new, one extend, one quote, reading the log, the whole evidence stream back. Its time is the
//! verifier's, minus the time that the TPM took for the commands of that round, measured at a relay between proxy and TPM.
//! It is measured twice: with VMs without a guest, whose shims' part is played true to the protocol by this program, three
//! guests of one image, with 1,000 entries each, and 5 new ones a round (the host's own work); and with three guests that
//! really run, with the few entries that they have, no new ones (under TCG the guest's answer is slow, and on few cores
//! the guests compete with the proxy).
//!
//! **TPM commands a round** are counted in the software TPM's own log.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::{
    id::{HostId, Nonce},
    stream::Have,
};
use onequote_tests::lab::{Bare, Guest, Machine, Options, Peer, TpmCommand, TpmRelay, VmSpec, World};
use onequote_verifier::client::{self, Target};
use onequote_verifier::enrol::{Identity, read_enrolment};
use tokio::runtime::Runtime;

use crate::numbers::Numbers;

const LIMIT: Duration = Duration::from_secs(120);

/// Entries that each guest has new in a round.
const NEW_ENTRIES: u64 = 5;

/// Entries that each played guest has at first.
const ENTRIES: u64 = 1000;

/// Rounds before those that count, and rounds that count.
const WARM_UP: usize = 10;
const ROUNDS: usize = 100;
const COUNTED_ROUNDS: u64 = 25;

/// What a discrete TPM of the slower kind takes for a P-256 quote.
const SLOW_QUOTE: Duration = Duration::from_millis(190);

/// Quotes and extends a round, for one and for three VMs.
pub(crate) fn commands(numbers: &mut Numbers) -> Result<()> {
    [1, 3].into_iter().try_for_each(|vms| commands_per_round(numbers, vms))
}

/// Quotes and extends a round, by the TPM's own log.
fn commands_per_round(numbers: &mut Numbers, vms: usize) -> Result<()> {
    let mut world = World::new()?;
    world.start_enrolled()?;
    let _vms = play(&mut world, vms)?;
    let asker = Asker::new(&world)?;
    asker.round()?;
    let (quotes, extends) = counts(&mut world)?;
    for _ in 0..COUNTED_ROUNDS {
        asker.round()?;
    }
    let (quotes_after, extends_after) = counts(&mut world)?;
    let each = |count: u64| count as f64 / COUNTED_ROUNDS as f64;
    numbers.exactly(&format!("TPM2_Quote a round, {vms} VMs"), each(quotes_after - quotes), "commands", 1.0);
    numbers.at_most(&format!("TPM2_PCR_Extend a round, {vms} VMs"), each(extends_after - extends), "commands", 1.0);
    Ok(())
}

fn counts(world: &mut World) -> Result<(u64, u64)> {
    let tpm = world.tpm()?;
    Ok((tpm.commands(TpmCommand::QUOTE)?, tpm.commands(TpmCommand::PCR_EXTEND)?))
}

pub(crate) fn played(numbers: &mut Numbers) -> Result<()> {
    let mut world = World::with(Options { no_count: true, ..Options::default() })?;
    let relay = TpmRelay::start(&mut world)?;
    world.start_enrolled()?;
    let _vms = play(&mut world, 3)?;
    let times = time_rounds(&world, &relay)?;
    times.report(numbers, "3 VMs, guests played");
    Ok(())
}

pub(crate) fn real(numbers: &mut Numbers) -> Result<()> {
    let mut world = World::with(Options { no_count: true, ..Options::default() })?;
    let relay = TpmRelay::start(&mut world)?;
    world.start_enrolled()?;
    for machine in Machine::ALL {
        world.add_vm(VmSpec::new(machine.name(), machine))?.start()?;
    }
    world.wait_all_reported()?;
    let times = time_rounds(&world, &relay)?;
    times.report(numbers, "3 VMs, guests run");
    Ok(())
}

/// Starts VMs without guests and plays their shims' part.
fn play(world: &mut World, vms: usize) -> Result<Vec<(Bare, Peer)>> {
    let mut playing = Vec::new();
    for number in 0..vms {
        let name = format!("vm{number}");
        let bare = world.start_bare(&name, &[])?;
        let mut guest = Guest::new(0);
        guest.grow(ENTRIES)?;
        let peer = Peer::start(world.guest_socket(&name), guest);
        peer.grow_at_collect(NEW_ENTRIES);
        playing.push((bare, peer));
    }
    world.wait_until("the guests' lists", LIMIT, |world| {
        let status = world.proxy_status()?;
        let vms = status["vms"].as_array().map_or(&[][..], Vec::as_slice);
        Ok((vms.len() == playing.len() && vms.iter().all(|vm| vm["entries"] == ENTRIES)).then_some(()))
    })?;
    Ok(playing)
}

/// What rounds took.
struct Times {
    /// The verifier's time without the TPM's.
    own: Vec<Duration>,
    /// The TPM's time for all commands of the round.
    tpm: Vec<Duration>,
    /// The TPM's time for the quote.
    quote: Vec<Duration>,
    bytes: usize,
}

fn time_rounds(world: &World, relay: &TpmRelay) -> Result<Times> {
    let asker = Asker::new(world)?;
    for _ in 0..WARM_UP {
        asker.round()?;
    }
    let mut times = Times { own: Vec::new(), tpm: Vec::new(), quote: Vec::new(), bytes: 0 };
    for _ in 0..ROUNDS {
        let _ = relay.take_spent();
        let start = Instant::now();
        times.bytes = asker.round()?;
        let whole = start.elapsed();
        let spent = relay.take_spent();
        let (quotes, quote) = spent.get(&TpmCommand::QUOTE).copied().unwrap_or_default();
        ensure!(quotes == 1, "{quotes} quotes in one round");
        let tpm = spent.values().map(|(_, time)| *time).sum();
        times.own.push(whole.saturating_sub(tpm));
        times.tpm.push(tpm);
        times.quote.push(quote);
    }
    Ok(times)
}

impl Times {
    fn report(mut self, numbers: &mut Numbers, what: &str) {
        for list in [&mut self.own, &mut self.tpm, &mut self.quote] {
            list.sort_unstable();
        }
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let at = |list: &[Duration], share: f64| list[((list.len() - 1) as f64 * share) as usize];
        let (own, quote) = (at(&self.own, 0.5), at(&self.quote, 0.5));
        numbers.below(&format!("quote round, {what}, without TPM"), ms(own), "ms", 20.0);
        numbers.known(&format!("the same, 95th percentile, {what}"), ms(at(&self.own, 0.95)), "ms");
        numbers.known(&format!("TPM's time in it, {what}"), ms(at(&self.tpm, 0.5)), "ms");
        numbers.known(&format!("the quote's own time, {what}"), ms(quote), "ms");
        numbers.known(&format!("round in % of this quote, {what}"), 100.0 * ms(own) / ms(quote), "%");
        numbers.known(&format!("round in % of a 190 ms quote, {what}"), 100.0 * ms(own) / ms(SLOW_QUOTE), "%");
        numbers.known(&format!("evidence, {what}"), self.bytes as f64, "bytes");
    }
}

/// A verifier's client, as `onequote-verifier attest` uses it.
pub(crate) struct Asker {
    runtime: Runtime,
    identity: Identity,
    host: HostId,
    url: String,
    certificate: Vec<u8>,
}

impl Asker {
    pub(crate) fn new(world: &World) -> Result<Self> {
        let state = world.proxy_state();
        let host: HostId = World::HOST.parse().map_err(anyhow::Error::msg)?;
        let enrolment = read_enrolment(
            host.clone(),
            &world.proxy_url()?,
            &state.join("ak.pub"),
            &state.join("certificate.pem"),
            true,
        )?;
        Ok(Self {
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build()?,
            identity: Identity::load(&world.verifier_state())?,
            host,
            url: world.proxy_url()?,
            certificate: enrolment.certificate,
        })
    }

    /// Asks once. Returns the answer's size.
    pub(crate) fn round(&self) -> Result<usize> {
        let target = Target { host: &self.host, url: &self.url, certificate: &self.certificate };
        let nonce = Nonce::new(uuid::Uuid::new_v4().as_bytes().repeat(2)).context("32 bytes are a nonce")?;
        let answer = self.runtime.block_on(client::ask(target, &self.identity, &nonce, &Have::default(), LIMIT))?;
        Ok(answer.evidence.len())
    }
}
