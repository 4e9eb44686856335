//! What is folded round by round is what the whole would give: the same verdict, the same state, and the same to go on
//! from; and what the whole would refuse is refused with the same finding.

use onequote_evidence::{
    event::{
        EventBody, GapReason, GuestEntries, GuestHello, LogGap, MonitorCommand, StopCause, VmDelete, VmPause, VmReset,
    },
    id::{Blob, BootId, SessionId, Sha256},
    ima::{Aggregate, Entry},
    statement::GuestBoot,
    stream::{Evidence, Guest},
    tpm::Public,
};
use proptest::{prelude::*, sample::Index};

use super::{
    super::{Context, Received, Shared, WholeNeeded, begin, finish, go_on, kept::Kept, logs::Logs},
    *,
};
use crate::policy::Policy;

/// Something that happens on the host.
#[derive(Debug, Clone)]
enum Op {
    Start(u8),
    Stop(u8),
    Delete(u8),
    /// A guest measures files, some of which no policy knows.
    Measure(u8, Vec<u8>),
    Reset(u8),
    Pause(u8),
    Command(u8),
    VmGap(u8),
    /// The host measures a file; some are behind the quote.
    Host(u8, bool),
    ProxyStart,
    Gap,
    Unmanaged,
    Policy(u8),
    Reboot,
    /// The log is begun anew, and VMs go on.
    Replace,
    /// A file that no policy knows is run as QEMU from now on.
    OtherQemu,
    /// The verifier asks.
    Round(Option<Tamper>),
}

/// What somebody changes on the way, or on the host's disk.
#[derive(Debug, Clone)]
enum Tamper {
    Bytes(u8, Index),
    Cut(u8, Index),
    Reference(Index, u32),
    DropList(Index),
    Entry(Index, Index),
    Stated(Index),
    StatedAggregate(Index),
    UnstatedVm(Index),
    Clock,
    Extended(u8),
}

fn tamper() -> impl Strategy<Value = Tamper> {
    let at = any::<Index>;
    prop_oneof![
        (0_u8..3, at()).prop_map(|(log, at)| Tamper::Bytes(log, at)),
        (0_u8..3, at()).prop_map(|(log, at)| Tamper::Cut(log, at)),
        (at(), 0_u32..40).prop_map(|(at, to)| Tamper::Reference(at, to)),
        at().prop_map(Tamper::DropList),
        (at(), at()).prop_map(|(entry, byte)| Tamper::Entry(entry, byte)),
        at().prop_map(Tamper::Stated),
        at().prop_map(Tamper::StatedAggregate),
        at().prop_map(Tamper::UnstatedVm),
        Just(Tamper::Clock),
        (0_u8..15).prop_map(Tamper::Extended),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let vm = || 1_u8..5;
    prop_oneof![
        4 => vm().prop_map(Op::Start),
        2 => vm().prop_map(Op::Stop),
        1 => vm().prop_map(Op::Delete),
        8 => (vm(), prop::collection::vec(0_u8..12, 1..6)).prop_map(|(vm, files)| Op::Measure(vm, files)),
        2 => vm().prop_map(Op::Reset),
        1 => vm().prop_map(Op::Pause),
        1 => vm().prop_map(Op::Command),
        1 => vm().prop_map(Op::VmGap),
        4 => (0_u8..9, any::<bool>()).prop_map(|(file, ahead)| Op::Host(file, ahead)),
        1 => Just(Op::ProxyStart),
        1 => Just(Op::Gap),
        1 => Just(Op::Unmanaged),
        2 => (0_u8..3).prop_map(Op::Policy),
        1 => Just(Op::Reboot),
        1 => Just(Op::Replace),
        1 => Just(Op::OtherQemu),
        12 => Just(Op::Round(None)),
        6 => tamper().prop_map(|tamper| Op::Round(Some(tamper))),
    ]
}

/// A host with a history, and a verifier that keeps what it can.
struct History {
    world: World,
    sessions: u8,
    /// The host's list as far as it went into the register, and behind that.
    host: Vec<Blob>,
    ahead: Vec<Blob>,
    shared: Shared,
    kept: Option<Kept>,
    /// What the proxy sent when that was made.
    sent: Option<Evidence>,
    /// Rounds that went on from what was kept, and that needed the whole after all.
    went_on: usize,
    whole_needed: usize,
}

const LISTED: &str = "[host.ima]\n\"/usr/bin/onequote-proxy\" = [\"sha256:0808080808080808080808080808080808080808080808080808080808080808\"]\n";

impl History {
    fn new() -> Self {
        let mut world = World::with_two_vms();
        world.statement.vms.iter_mut().for_each(|vm| vm.last_contact = Some(0));
        let zeros = [[0; 32]; 10].concat();
        let first = ima_entry_of("boot_aggregate", onequote_evidence::digest::sha256(&[&zeros]).as_bytes(), false);
        let host = vec![first, ima_entry("/usr/bin/onequote-proxy", 8), ima_entry("/vm/qemu", 0)];
        let shared = Shared::default();
        let mut new = Self {
            world,
            sessions: 9,
            host,
            ahead: Vec::new(),
            shared,
            kept: None,
            sent: None,
            went_on: 0,
            whole_needed: 0,
        };
        new.measured();
        new
    }

    /// The host's list and register as they are now.
    fn measured(&mut self) {
        let mut aggregate = Aggregate::EMPTY;
        self.host.iter().for_each(|blob| aggregate.push(&Entry::parse(&blob.0, 20).unwrap()));
        self.world.pcrs.insert(10, aggregate.value);
        self.world.host_ima = self.host.iter().chain(&self.ahead).flat_map(|blob| blob.0.clone()).collect();
    }

    fn session(&self, vm: u8) -> Option<u8> {
        let stated = self.world.statement.vms.iter().find(|stated| stated.vm == vm_id(vm))?;
        Some(stated.session.0[0])
    }

    fn name(vm: u8) -> &'static str {
        ["web", "db", "dev", "other"][usize::from(vm - 1)]
    }

    fn stop(&mut self, vm: u8) {
        if let Some(session) = self.session(vm) {
            let left = if vm % 2 == 1 { vec![image("disk0", 50 + vm, false)] } else { Vec::new() };
            self.world.stop(vm, session, StopCause::GuestShutdown, left);
        }
    }

    fn measure(&mut self, vm: u8, files: &[u8]) {
        let Some(session) = self.session(vm) else { return };
        let at = vm_ref(vm, session);
        let stated = self.world.statement.vms.iter().find(|stated| stated.vm == at.vm).unwrap();
        let resets = self.world.records.iter().flat_map(|record| record.events().unwrap());
        let resets = resets.filter(|event| event.vm == Some(at) && event.body.kind() == "vm-reset").count() as u32;
        let boot = resets.max(stated.boots.last().map_or(0, |boot| boot.boot));
        let known = self.world.guests.iter().position(|list| list.session == at.session && list.boot == boot);
        let list = known.unwrap_or_else(|| {
            let hello = GuestHello { boot, boot_id: BootId([boot as u8; 16]), hash_size: 20, count: 0 };
            self.world.log(13, Some(at), hello);
            let list = Guest { vm: at.vm, session: at.session, boot, first: 0, entries: Vec::new() };
            self.world.guests.push(list);
            self.world.guests.len() - 1
        });
        let first = self.world.guests[list].entries.len() as u64;
        for file in files {
            // Every third has a digest that no policy knows.
            let entry =
                ima_entry(["/bin/init", "/bin/sh", "/tmp/x"][usize::from(file % 3)], file % 3 + 1 + file / 9 * 40);
            let known = self.world.dictionary.iter().position(|other| *other == entry).unwrap_or_else(|| {
                self.world.dictionary.push(entry);
                self.world.dictionary.len() - 1
            });
            self.world.guests[list].entries.push(known as u32);
        }
        let aggregate = self.world.aggregate(&self.world.guests[list].entries.clone());
        let count = files.len() as u64;
        self.world.log(13, Some(at), GuestEntries { boot, first, count, aggregate });
        let stated = self.world.statement.vms.iter_mut().find(|stated| stated.vm == at.vm).unwrap();
        stated.boots.retain(|known| known.boot != boot);
        stated.boots.push(GuestBoot { boot, count: first + count, aggregate });
        stated.boots.sort_by_key(|boot| boot.boot);
    }

    fn happen(&mut self, op: &Op) {
        let world = &mut self.world;
        match op {
            Op::Start(vm) => {
                self.stop(*vm);
                self.sessions = self.sessions.wrapping_add(1).max(10);
                let images =
                    if vm % 2 == 1 { vec![image("disk0", 5, false), image("disk0/1", 6, true)] } else { vec![] };
                self.world.start(Self::name(*vm), *vm, self.sessions, images);
            }
            Op::Stop(vm) => self.stop(*vm),
            Op::Delete(vm) => {
                self.stop(*vm);
                let delete = VmDelete { name: Self::name(*vm).into(), images: Vec::new(), unmeasured: Vec::new() };
                self.world.log(12, Some(vm_ref(*vm, 1)), delete);
            }
            Op::Measure(vm, files) => self.measure(*vm, files),
            Op::Reset(vm) => self.event(*vm, VmReset { by_guest: true, reason: "guest-reset".into() }),
            Op::Pause(vm) => self.event(*vm, VmPause { run_state: "paused".into() }),
            Op::Command(vm) => {
                let (client, arguments) = ("a tool".into(), "{}".into());
                let outcome = onequote_evidence::event::CommandOutcome::Forwarded;
                let command = "qom-set".into();
                let detail = String::new();
                self.event(
                    *vm,
                    MonitorCommand {
                        client,
                        command,
                        arguments,
                        digest: Sha256::ZERO,
                        outcome,
                        detail,
                        files: Vec::new(),
                    },
                );
            }
            Op::VmGap(vm) => self.event(*vm, LogGap { reason: GapReason::MonitorLost, detail: "for a while".into() }),
            Op::Host(file, ahead) => {
                let entry = ima_entry(&format!("/usr/bin/{file}"), *file);
                self.ahead.push(entry);
                if !ahead {
                    self.host.append(&mut self.ahead);
                }
                self.measured();
            }
            Op::ProxyStart => {
                let history = self.history();
                self.world.proxy_start(history);
            }
            Op::Gap => world.log(12, None, LogGap { reason: GapReason::ProxyDown, detail: "for a while".into() }),
            Op::Unmanaged => {
                let other = onequote_evidence::event::UnmanagedVm {
                    pid: 5,
                    program: "/bin/qemu".into(),
                    arguments: String::new(),
                };
                world.log(12, None, other);
            }
            Op::Policy(which) => {
                let accepting =
                    POLICY.replacen("[host]", "[host]\naccept_gaps = [\"proxy-down\", \"monitor-lost\"]", 1);
                let listed = POLICY.replacen("[[vm]]", &format!("{LISTED}\n[[vm]]"), 1);
                world.policy = Some([POLICY.to_owned(), accepting, listed][usize::from(*which)].clone());
            }
            Op::Reboot => {
                world.reboot();
                self.ahead.clear();
                self.host.truncate(3);
                self.measured();
            }
            Op::Replace => {
                let registers = self.registers();
                self.world.next_epoch(registers);
                self.world.statement.vms.iter_mut().for_each(|vm| vm.boots.clear());
                self.world.guests.clear();
            }
            Op::OtherQemu => self.ahead.push(ima_entry("/vm/qemu", 77)),
            Op::Round(tamper) => self.round(tamper.as_ref()),
        }
    }

    fn event(&mut self, vm: u8, body: impl Into<EventBody>) {
        if let Some(session) = self.session(vm) {
            self.world.log(12, Some(vm_ref(vm, session)), body);
        }
    }

    fn history(&self) -> Vec<onequote_evidence::pcr::RegisterValue> {
        let EventBody::ProxyStart(start) = self.world.records[0].events().unwrap()[0].body.clone() else { panic!() };
        start.history
    }

    fn registers(&self) -> Vec<onequote_evidence::pcr::RegisterValue> {
        let mut replay = onequote_evidence::log::Replay::begin(&self.world.records[0]).unwrap();
        self.world.records[1..].iter().for_each(|record| replay.apply(record).unwrap());
        onequote_evidence::pcr::to_list(replay.registers())
    }

    /// The verifier asks, and gets what is new, as somebody may have changed it. Both ways of looking at it must agree.
    fn round(&mut self, tamper: Option<&Tamper>) {
        self.world.clock.clock += 1;
        let mut clock = None;
        let parts = self.world.quote(&nonce(1), |statement, attest| {
            match tamper {
                Some(Tamper::Stated(at)) if !statement.vms.is_empty() => {
                    let vm = at.index(statement.vms.len());
                    statement.vms[vm].boots.iter_mut().for_each(|boot| boot.count += 1);
                }
                Some(Tamper::StatedAggregate(at)) if !statement.vms.is_empty() => {
                    let vm = at.index(statement.vms.len());
                    statement.vms[vm].boots.iter_mut().for_each(|boot| boot.aggregate.0[0] ^= 1);
                }
                Some(Tamper::UnstatedVm(at)) if !statement.vms.is_empty() => {
                    statement.vms.remove(at.index(statement.vms.len()));
                }
                Some(Tamper::Clock) => attest.clock.clock = 0,
                _ => {}
            }
            clock = Some(attest.clock);
        });
        let mut now = Received::parse(&parts.stream()).unwrap().into_evidence();
        let honest = now.clone();
        let from = self.sent.clone().filter(|_| self.kept.is_some());
        if let Some(tamper) = tamper {
            change(&mut now, from.as_ref(), tamper);
        }
        if let Some(Tamper::Extended(pcr)) = tamper {
            // Somebody extended another register: the values beside the quote say so, and it does not.
            now.head.registers.iter_mut().filter(|value| value.pcr == *pcr).for_each(|value| value.value.0[0] ^= 1);
        }
        let policy = self.world.policy.as_ref().map(|text| Policy::parse(text, "policy").unwrap());
        let ak = Public::parse(&self.world.ak.public()).unwrap();
        let host = "host-1".parse().unwrap();
        let freshness = asked(&nonce(1));
        let context = Context {
            host: Some(&host),
            ak: &ak,
            software_tpm: true,
            freshness: &freshness,
            state: &self.world.state,
            policy: policy.as_ref().map(|policy| (policy, 1)),
            now: self.world.now,
            lifetime: 1000,
            facts: false,
            shared: &self.shared,
        };
        let whole = match begin(now.head.clone(), &context) {
            Ok(begun) => {
                let whole = finish(begun.clone(), &now.clone().into(), &context);
                if let (Some(kept), Some(from)) = (&self.kept, &from) {
                    let before = format!("{kept:?}");
                    let delta = delta(&now, from);
                    match go_on(&begun, kept, &delta, &context) {
                        Ok(gone_on) => {
                            assert_eq!(gone_on.verdict, whole.verdict);
                            assert_eq!(gone_on.state, whole.state);
                            assert_same(gone_on.kept.as_ref(), whole.kept.as_ref());
                            self.went_on += 1;
                        }
                        Err(WholeNeeded) => self.whole_needed += 1,
                    }
                    assert_eq!(format!("{kept:?}"), before, "a round leaves what was kept as it was");
                }
                whole
            }
            Err(refused) => *refused,
        };
        if tamper.is_some() {
            return;
        }
        assert_eq!(now, honest);
        if let Some(state) = whole.state {
            assert_eq!(whole.kept.is_none(), whole.verdict.vms.iter().any(|vm| guest_list_is_wrong(&vm.findings)));
            self.world.state = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
            self.kept = whole.kept;
            self.sent = Some(honest);
        }
    }
}

fn guest_list_is_wrong(findings: &[Finding]) -> bool {
    findings.iter().any(|finding| finding.code.as_str().starts_with("guest-list"))
}

fn assert_same(one: Option<&Kept>, other: Option<&Kept>) {
    let (one, other) = (one.map(comparable).unwrap_or_default(), other.map(comparable).unwrap_or_default());
    if let Some(at) = one.bytes().zip(other.bytes()).position(|(a, b)| a != b) {
        let around = |text: &str| text.chars().skip(at.saturating_sub(300)).take(500).collect::<String>();
        panic!("differ at {at}:\n{}\n{}", around(&one), around(&other));
    }
    assert_eq!(one.len(), other.len());
}

/// What of it must be the same whichever way it came: everything but what else was looked for in the host's list.
fn comparable(kept: &Kept) -> String {
    let mut kept = kept.clone();
    kept.host.programs = Default::default();
    format!("{kept:?}")
}

/// What a proxy sends of `now` to who has `before`: what is the same at the beginning is left out.
fn delta(now: &Evidence, before: &Evidence) -> Logs {
    fn skip<T: PartialEq>(first: &mut u64, items: &mut Vec<T>, before: &[T]) {
        if items.starts_with(before) {
            items.drain(..before.len());
            *first = before.len() as u64;
        }
    }
    let mut logs = Logs::from(now.clone());
    let Logs { firmware, host_ima, records, dictionary, guests } = &mut logs;
    skip(&mut firmware.first, &mut firmware.items, &before.firmware);
    skip(&mut host_ima.first, &mut host_ima.items, &before.host_ima);
    skip(&mut records.first, &mut records.items, &before.records);
    skip(&mut dictionary.first, &mut dictionary.items, &before.dictionary);
    for list in guests {
        let known = before.guests.iter().find(|b| (b.session, b.boot) == (list.session, list.boot));
        skip(&mut list.first, &mut list.entries, known.map_or(&[], |known| &known.entries));
    }
    logs
}

/// Changes what is new.
fn change(now: &mut Evidence, before: Option<&Evidence>, tamper: &Tamper) {
    let len = |of: fn(&Evidence) -> usize| before.map_or(0, of);
    match tamper {
        Tamper::Bytes(log, at) | Tamper::Cut(log, at) => {
            let (log, old) = match log {
                0 => (&mut now.records, len(|e| e.records.len())),
                1 => (&mut now.host_ima, len(|e| e.host_ima.len())),
                _ => (&mut now.firmware, len(|e| e.firmware.len())),
            };
            if log.len() > old {
                let at = old + at.index(log.len() - old);
                if matches!(tamper, Tamper::Cut(..)) {
                    log.truncate(at);
                } else {
                    log[at] ^= 1;
                }
            } else if matches!(tamper, Tamper::Bytes(..)) {
                log.push(1);
            }
        }
        Tamper::Reference(at, to) => {
            let lists = now.guests.len();
            if lists > 0 {
                let list = &mut now.guests[at.index(lists)];
                let known =
                    before.and_then(|b| b.guests.iter().find(|b| (b.session, b.boot) == (list.session, list.boot)));
                match list.entries.len() > known.map_or(0, |known| known.entries.len()) {
                    true => *list.entries.last_mut().unwrap() = *to,
                    false => list.entries.push(*to),
                }
            }
        }
        Tamper::DropList(at) if !now.guests.is_empty() => {
            now.guests.remove(at.index(now.guests.len()));
        }
        Tamper::Entry(entry, byte) => {
            let old = len(|e| e.dictionary.len());
            if now.dictionary.len() > old {
                let entry = old + entry.index(now.dictionary.len() - old);
                let entry = &mut now.dictionary[entry].0;
                let byte = byte.index(entry.len());
                entry[byte] ^= 1;
            }
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn rounds_and_the_whole_agree(ops in prop::collection::vec(op(), 1..70)) {
        let mut history = History::new();
        ops.iter().for_each(|op| history.happen(op));
        history.happen(&Op::Round(None));
        history.happen(&Op::Round(None));
    }
}

/// The way that is compared above is taken: most rounds go on.
#[test]
fn rounds_go_on_from_what_was_kept() {
    let mut history = History::new();
    history.happen(&Op::Round(None));
    assert!(history.kept.is_some());
    for round in 0..30_u8 {
        history.happen(&Op::Measure(1, vec![round % 12]));
        history.happen(&Op::Host(round % 9, round % 3 == 0));
        history.happen(&Op::Start(2 + round % 3));
        history.happen(&Op::Measure(2 + round % 3, vec![1, 2]));
        history.happen(&Op::Round(None));
    }
    assert_eq!((history.went_on, history.whole_needed), (30, 0));
    // What nobody asked for until now is looked for from the start: another proxy.
    let path = "/usr/bin/another".to_owned();
    let history_values = history.history();
    history.world.proxy_start(history_values);
    let last = history.world.records.pop().unwrap();
    let mut events = last.events().unwrap();
    if let EventBody::ProxyStart(start) = &mut events[0].body {
        start.path = Some(path);
    }
    let record = onequote_evidence::record::Record::new(last.recnum, last.pcr, &BANKS, &events);
    history.world.records.push(record);
    history.happen(&Op::Round(None));
    assert_eq!((history.went_on, history.whole_needed), (30, 1));
    history.happen(&Op::Round(None));
    assert_eq!((history.went_on, history.whole_needed), (31, 1));
    assert!(history.session(1).is_some_and(|session| session == SessionId([session; 8]).0[0]));
}

/// What came in many rounds is what would have come in one.
#[test]
fn the_number_of_rounds_changes_nothing() {
    let grow = |rounds: bool| {
        let mut history = History::new();
        for round in 0..20_u8 {
            history.happen(&Op::Start(1 + round % 4));
            history.happen(&Op::Measure(1 + round % 4, vec![round % 12, 5]));
            history.happen(&Op::Command(1 + round % 4));
            history.happen(&Op::Reset(1 + round % 4));
            history.happen(&Op::Measure(1 + round % 4, vec![round % 12]));
            if rounds {
                history.happen(&Op::Round(None));
            }
        }
        history.world.clock.clock = 5000;
        history.happen(&Op::Round(None));
        (comparable(history.kept.as_ref().unwrap()), history.world.state)
    };
    let (mut many, mut one) = (grow(true), grow(false));
    // Whose key and quote it was differs.
    for state in [&mut many.1, &mut one.1] {
        state.base = Default::default();
    }
    assert_eq!(many, one);
}
