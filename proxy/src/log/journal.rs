//! The recorder's work, one step after the other: recovery, appends, quotes. No thread and no queue here, so that
//! tests can stop it between any two steps.

use std::{
    sync::{Arc, PoisonError},
    time::Instant,
};

use onequote_evidence::{
    event::{Event, EventBody, GapReason, LogGap, ProxyStart},
    id::{BootId, Epoch, TimeMs},
    log::{LogError, LogErrorKind, Replay},
    pcr::{self, Register, Registers},
    record::Record,
    tpm::Attest,
};
use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    LogHead, LogPlace, LogRead, LogStore, PcrRole, QualifyingData, Quoted, RecordStream, RecorderConfig, RecorderError,
    StoreError, TpmFactory, TpmInfo,
    index::Index,
    pace::Pace,
    recovery::{self, Continue, Extend, Gap, Plan, TpmState},
};
use crate::{
    inventory::Inventory,
    tpm::{Clock, Tpm, TpmError},
};

/// How often registers are read and quoted before somebody else's extends are too many.
const QUOTE_ATTEMPTS: u32 = 16;

/// How often the TPM is opened anew for one request.
const REOPENS: u32 = 1;

/// The highest PCR that only a TPM reset can reset (TCG PC Client Platform TPM Profile, table 6).
const LAST_STATIC_PCR: u8 = 15;

/// The log's files and the TPM.
pub(super) struct Journal {
    config: RecorderConfig,
    store: Box<dyn LogStore>,
    open_tpm: TpmFactory,
    /// None until the log is known to agree with the registers, and again after a failure that left that in doubt.
    live: Option<Live>,
    /// Whether this process's `proxy-start` is in the log.
    announced: bool,
    /// The boot whose log this process goes on with, if it was another.
    kexec_from: Option<BootId>,
    state: watch::Sender<Option<State>>,
    /// `TPM2_Quote` commands since the start.
    quotes: u64,
    pace: Pace,
}

/// Log and registers in agreement.
pub(super) struct Live {
    tpm: Box<dyn Tpm>,
    clock: Clock,
    pub(super) epoch: Epoch,
    pub(super) replay: Replay,
    /// Length of the log.
    pub(super) end: u64,
    /// The last `proxy-start`.
    pub(super) last: ProxyStart,
    /// Whether the epoch began with a `log-gap` for a reason that sets the log before it aside.
    pub(super) gap: bool,
    /// No segment begins before this length.
    pub(super) next_segment_at: u64,
}

/// What others may look at beside the recorder.
#[derive(Clone)]
pub(super) struct State {
    pub(super) index: Index,
    pub(super) head: LogHead,
    pub(super) tpm: TpmInfo,
    /// What keeps the recorder from working, as of its last attempt.
    pub(super) failure: Option<RecorderError>,
    /// `TPM2_Quote` commands since the start.
    pub(super) quotes: u64,
}

/// Where a record went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) epoch: Epoch,
    pub(super) recnum: u64,
}

impl Journal {
    /// Makes log and registers agree and records `proxy-start`.
    pub(super) fn start(
        config: RecorderConfig,
        store: Box<dyn LogStore>,
        open_tpm: TpmFactory,
    ) -> Result<Self, RecorderError> {
        let (vm, guest) = (config.pcr_vm, config.pcr_guest);
        if vm == guest || vm.max(guest) > LAST_STATIC_PCR {
            return Err(RecorderError::BadRegisters(vm, guest));
        }
        let (state, _) = watch::channel(None);
        let mut journal = Self {
            config,
            store,
            open_tpm,
            live: None,
            announced: false,
            kexec_from: None,
            state,
            quotes: 0,
            pace: Pace::default(),
        };
        journal.recover()?;
        if !journal.announced {
            journal.announce()?;
        }
        Ok(journal)
    }

    /// What the recorder shows of itself.
    pub(super) fn subscribe(&self) -> watch::Receiver<Option<State>> {
        self.state.subscribe()
    }

    /// How long the TPM is to rest before the next extend.
    pub(super) fn pace(&self) -> &Pace {
        &self.pace
    }

    /// The logs, for reading.
    pub(super) fn reader(&self) -> Arc<dyn LogRead> {
        self.store.reader()
    }

    /// Records events of `epoch`: on disk, then in the register.
    ///
    /// # Errors
    /// [`RecorderError::NewEpoch`] when that epoch is over. After [`RecorderError::Tpm`] the record may be in the file, to be extended at the next recovery; after any
    /// other error it is not.
    pub(super) fn append(&mut self, epoch: Epoch, role: PcrRole, events: &[Event]) -> Result<Position, RecorderError> {
        self.noting_failure(|journal| journal.append_once_more(epoch, role, events))
    }

    /// Quotes all registers of the configuration, with what `prepare` makes of the log's head.
    ///
    /// # Errors
    /// See [`RecorderError`].
    pub(super) fn quote(&mut self, prepare: impl FnOnce(&LogHead) -> QualifyingData) -> Result<Quoted, RecorderError> {
        self.noting_failure(|journal| journal.quote_steadily(prepare))
    }

    /// Does something else with the TPM. What fails there says nothing of the log, but a TPM that is gone is opened anew
    /// at the next request.
    ///
    /// # Errors
    /// See [`RecorderError`].
    pub(super) fn with_tpm<T>(
        &mut self,
        work: impl FnOnce(&mut dyn Tpm) -> Result<T, TpmError>,
    ) -> Result<T, RecorderError> {
        let mut live = self.take_live()?;
        let outcome = work(live.tpm.as_mut());
        if !outcome.as_ref().is_err_and(|error| error.kind.is_fatal()) {
            self.live = Some(live);
        }
        Ok(outcome?)
    }

    fn noting_failure<T>(
        &mut self,
        action: impl FnOnce(&mut Self) -> Result<T, RecorderError>,
    ) -> Result<T, RecorderError> {
        let outcome = action(self);
        let failure = match &outcome {
            Err(error @ (RecorderError::Disk(_) | RecorderError::Tpm(_) | RecorderError::Damaged(_))) => {
                Some(error.clone())
            }
            _ => None,
        };
        let quotes = self.quotes;
        self.state.send_if_modified(|state| {
            let Some(state) = state else { return false };
            state.quotes = quotes;
            let changed = state.failure.is_some() != failure.is_some();
            state.failure = failure;
            changed
        });
        outcome
    }

    fn announce(&mut self) -> Result<(), RecorderError> {
        let live = self.take_live()?;
        let mut events = vec![proxy_start(&mut self.config, live.clock, live.epoch, live.replay.registers())];
        if let Some(before) = self.kexec_from {
            let detail = format!("boot {before} was followed by boot {}, and the TPM went on", self.config.boot_id);
            warn!(%before, now = %self.config.boot_id, "another kernel runs, but the TPM was not reset");
            events.push(gap_event(&mut self.config, GapReason::Kexec, detail));
        }
        let epoch = live.epoch;
        self.live = Some(live);
        self.append(epoch, PcrRole::Vm, &events)?;
        self.announced = true;
        Ok(())
    }

    /// Log and registers in agreement; recovers if they aren't known to be. The caller puts it back when they still
    /// are.
    pub(super) fn take_live(&mut self) -> Result<Live, RecorderError> {
        if self.live.is_none() {
            self.recover()?;
        }
        self.live.take().ok_or(RecorderError::Ended)
    }

    pub(super) fn put_back(&mut self, live: Live) {
        self.live = Some(live);
    }

    /// It is in doubt whether log and registers agree.
    pub(super) fn forget_live(&mut self) {
        self.live = None;
    }

    pub(super) fn store(&mut self) -> &mut dyn LogStore {
        self.store.as_mut()
    }

    pub(super) fn segment_bytes(&self) -> u64 {
        self.config.segment_bytes
    }

    pub(super) fn now(&mut self) -> TimeMs {
        (self.config.now)()
    }

    pub(super) fn inventory(&self) -> Inventory {
        self.config.inventory.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where the segments that are there begin.
    pub(super) fn segments(&self) -> Vec<LogPlace> {
        self.state.borrow().as_ref().map(|state| state.index.segments().to_vec()).unwrap_or_default()
    }

    fn oldest(&self) -> LogPlace {
        self.segments().first().copied().unwrap_or_default()
    }

    pub(super) fn newest_segment(&self) -> LogPlace {
        self.state.borrow().as_ref().map(|state| state.index.newest()).unwrap_or_default()
    }

    pub(super) fn segment_begun(&self, place: LogPlace) {
        self.change_index(|index| index.begin_segment(place));
    }

    pub(super) fn segments_dropped(&self, place: LogPlace) {
        self.change_index(|index| index.drop_before(place));
    }

    fn change_index(&self, change: impl FnOnce(&mut Index)) {
        self.state.send_if_modified(|state| {
            let Some(state) = state else { return false };
            change(&mut state.index);
            state.head.first = state.index.first();
            false
        });
    }

    fn append_once_more(&mut self, epoch: Epoch, role: PcrRole, events: &[Event]) -> Result<Position, RecorderError> {
        self.begin_segment_if_due()?;
        self.append_record(epoch, role, events)
    }

    /// One record, once more when the TPM failed.
    pub(super) fn append_record(
        &mut self,
        epoch: Epoch,
        role: PcrRole,
        events: &[Event],
    ) -> Result<Position, RecorderError> {
        let mut reopens = 0;
        loop {
            let mut live = self.take_live()?;
            if live.epoch != epoch {
                let now = live.epoch.number;
                self.live = Some(live);
                return Err(RecorderError::NewEpoch { asked: epoch.number, now });
            }
            let record = Record::new(live.replay.len(), self.pcr(role), live.replay.banks(), events);
            let position = Position { epoch: live.epoch, recnum: record.recnum };
            let bytes = record.to_bytes();
            match write(self.store.as_mut(), live.epoch.number, live.end, &bytes) {
                Ok(()) => {}
                Err(Unwritten { error, taken_back }) => {
                    self.live = taken_back.then_some(live);
                    return Err(error.into());
                }
            }
            let extend = Extend::from(&record);
            let began = Instant::now();
            match live.tpm.extend(extend.pcr, &extend.digests) {
                Ok(()) => {
                    self.pace.extended(began, Instant::now());
                    live.replay.apply(&record).map_err(RecorderError::Damaged)?;
                    live.end += bytes.len() as u64;
                    for event in events {
                        if let EventBody::ProxyStart(start) = &event.body {
                            live.last = start.clone();
                        }
                    }
                    self.fold(|inventory| events.iter().for_each(|event| inventory.apply(event)));
                    self.show(&live, |index| index.push(bytes.len() as u64));
                    self.live = Some(live);
                    return Ok(position);
                }
                Err(error) => {
                    warn!(%error, recnum = record.recnum, "a record could not be extended; opening the TPM anew");
                    // Gone before another is opened: a TPM without resource manager has room for one of us.
                    drop(live);
                    if reopens == REOPENS || self.recover().is_err() {
                        return Err(error.into());
                    }
                }
            }
            reopens += 1;
            let made_up =
                self.live.as_ref().is_some_and(|now| now.epoch == position.epoch && now.replay.len() > position.recnum);
            if made_up {
                return Ok(position);
            }
        }
    }

    fn pcr(&self, role: PcrRole) -> u8 {
        match role {
            PcrRole::Vm => self.config.pcr_vm,
            PcrRole::Guest => self.config.pcr_guest,
        }
    }

    fn quote_steadily(&mut self, prepare: impl FnOnce(&LogHead) -> QualifyingData) -> Result<Quoted, RecorderError> {
        let mut prepare = Some(prepare);
        let mut prepared: Option<(LogHead, QualifyingData)> = None;
        let mut reopens = 0;
        for _ in 0..QUOTE_ATTEMPTS {
            let mut live = self.take_live()?;
            let registers = self.quoted_registers(&live);
            let outcome = live.tpm.pcr_read(&registers).and_then(|values| {
                let agrees = |(register, value): (&Register, &Vec<u8>)| {
                    !registers.contains(register) || values.get(register) == Some(value)
                };
                if !live.replay.registers().iter().all(agrees) {
                    return Ok(Attempt::Foreign);
                }
                let head = LogHead { first: self.oldest(), ..head(&live) };
                match (&prepared, prepare.take()) {
                    (None, Some(prepare)) => {
                        let data = prepare(&head);
                        prepared = Some((head, data));
                    }
                    (Some((before, _)), _) if *before == head => {}
                    _ => return Ok(Attempt::Moved),
                }
                let Some((head, data)) = &prepared else { return Ok(Attempt::Moved) };
                self.quotes += 1;
                let quote = live.tpm.quote(data.as_bytes(), &registers)?;
                Ok(Attempt::Quoted(Quoted { quote, pcr_values: values, head: head.clone() }, *data))
            });
            match outcome {
                Ok(Attempt::Quoted(quoted, data)) => {
                    self.live = Some(live);
                    if check_quote(&quoted, data, &registers)? {
                        return Ok(quoted);
                    }
                }
                Ok(Attempt::Foreign) => warn!("a register is not what the log says; comparing both again"),
                Ok(Attempt::Moved) => {
                    self.live = Some(live);
                    return Err(RecorderError::HeadMoved);
                }
                Err(error) if !error.kind.is_fatal() => {
                    self.live = Some(live);
                    return Err(error.into());
                }
                Err(error) if reopens == REOPENS => return Err(error.into()),
                Err(error) => {
                    warn!(%error, "a quote failed; opening the TPM anew");
                    reopens += 1;
                    drop(live);
                    if self.recover().is_err() {
                        return Err(error.into());
                    }
                }
            }
        }
        Err(RecorderError::Unsteady { attempts: QUOTE_ATTEMPTS })
    }

    fn quoted_registers(&self, live: &Live) -> Vec<Register> {
        let ours = [self.config.pcr_vm, self.config.pcr_guest];
        let mut registers: Vec<Register> = live
            .replay
            .banks()
            .iter()
            .filter(|bank| self.config.quoted_banks.contains(bank))
            .flat_map(|&bank| self.config.quoted_pcrs.iter().chain(&ours).map(move |&pcr| Register { bank, pcr }))
            .collect();
        registers.sort_unstable();
        registers.dedup();
        registers
    }

    /// Opens the TPM, compares registers and log, and does what the comparison asks for (see [`crate::log`]).
    fn recover(&mut self) -> Result<(), RecorderError> {
        self.live = None;
        let mut tpm = (self.open_tpm)()?;
        let banks = tpm.active_banks()?;
        let (pcr_vm, pcr_guest) = (self.config.pcr_vm, self.config.pcr_guest);
        let ours: Vec<Register> =
            banks.iter().flat_map(|&bank| [pcr_vm, pcr_guest].map(|pcr| Register { bank, pcr })).collect();
        if !banks.iter().any(|bank| self.config.quoted_banks.contains(bank)) {
            return Err(RecorderError::NoQuotedBank { active: banks, quoted: self.config.quoted_banks.clone() });
        }
        let clock = tpm.clock()?;
        let registers = tpm.pcr_read(&ours)?;
        let now = TpmState { clock, registers, pcr_vm, pcr_guest, boot_id: self.config.boot_id };
        let info = TpmInfo {
            ak_public: tpm.ak_public().into(),
            software: tpm.is_software(),
            model: tpm.model().into(),
            banks: banks.into(),
        };
        let (live, index, before) = match recovery::plan(self.store.reader().as_ref(), &now)? {
            Plan::Continue(log) => self.go_on(tpm, clock, *log)?,
            Plan::Begin { number, gap, remains } => {
                let (live, index) = self.begin(tpm, now, number, gap.as_ref(), remains)?;
                (live, index, Inventory::default())
            }
        };
        self.fold_all(&index, before)?;
        let head = LogHead { first: index.first(), ..head(&live) };
        self.state.send_replace(Some(State { index, head, tpm: info, failure: None, quotes: self.quotes }));
        self.live = Some(live);
        Ok(())
    }

    /// Makes the inventory anew from the whole log, or from what a snapshot says of its beginning.
    fn fold_all(&self, index: &Index, before: Inventory) -> Result<(), RecorderError> {
        let (reader, first) = (self.store.reader(), index.first());
        let mut inventory = before;
        for record in RecordStream::new(reader.as_ref(), index.epoch.number, first.records, first.bytes) {
            let record = record?;
            let events = record.events().map_err(|e| {
                RecorderError::Damaged(LogError { recnum: record.recnum, offset: 0, kind: LogErrorKind::Malformed(e) })
            })?;
            events.iter().for_each(|event| inventory.apply(event));
        }
        self.fold(|old| *old = inventory);
        Ok(())
    }

    fn fold(&self, change: impl FnOnce(&mut Inventory)) {
        change(&mut self.config.inventory.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Drops what is acknowledged ([`Self::drop_before`]).
    pub(super) fn drop_acknowledged(&mut self, place: LogPlace) -> Result<(), RecorderError> {
        self.noting_failure(|journal| journal.drop_before(place))
    }

    /// Recovers if log and registers are not known to agree.
    pub(super) fn ready(&mut self) -> Result<(), RecorderError> {
        self.noting_failure(|journal| {
            journal.live = Some(journal.take_live()?);
            Ok(())
        })
    }

    fn go_on(
        &mut self,
        mut tpm: Box<dyn Tpm>,
        clock: Clock,
        log: Continue,
    ) -> Result<(Live, Index, Inventory), RecorderError> {
        let Continue { epoch, replay, index, last, gap, before, missing, torn, set_aside, kexec_from } = log;
        self.kexec_from = kexec_from;
        let (number, records) = (epoch.number, index.len());
        if torn {
            warn!(epoch = number, records, "the last record is torn; cutting it off, its bytes are kept aside");
            self.store.cut(number, index.end(), true)?;
        } else if self.store.reader().segments(number)?.last().is_some_and(|start| *start >= index.end()) {
            info!(epoch = number, records, "a segment has no record yet; the log goes on before it");
            self.store.cut(number, index.end(), false)?;
        }
        if let Some(extend) = missing {
            info!(epoch = number, records, "the last record had not been extended; making up for it");
            self.store.sync(number)?;
            tpm.extend(extend.pcr, &extend.digests)?;
        }
        if let Some(old) = set_aside {
            self.store.set_aside(old)?;
        }
        let live = Live { tpm, clock, epoch, replay, end: index.end(), last, gap, next_segment_at: 0 };
        Ok((live, index, before))
    }

    fn begin(
        &mut self,
        mut tpm: Box<dyn Tpm>,
        now: TpmState,
        number: u64,
        gap: Option<&Gap>,
        remains: bool,
    ) -> Result<(Live, Index), RecorderError> {
        let TpmState { clock, registers, .. } = now;
        if remains && self.store.reader().read_at(number, 0, &mut [0])? > 0 {
            self.store.cut(number, 0, true)?;
        }
        self.store.create(number)?;
        let epoch = Epoch { number, id: (self.config.new_epoch_id)() };
        let mut events = vec![proxy_start(&mut self.config, clock, epoch, &registers)];
        if let Some(Gap { reason, detail, set_aside }) = gap {
            warn!(%reason, detail, epoch = number, "the registers do not follow from the log: a new epoch begins");
            let aside = set_aside.map(|old| format!("; the log of epoch {old} is set aside")).unwrap_or_default();
            events.push(gap_event(&mut self.config, *reason, format!("{detail}{aside}")));
        } else {
            info!(epoch = number, "a new log begins");
        }
        let mut banks: Vec<_> = registers.keys().map(|register| register.bank).collect();
        banks.dedup();
        let record = Record::new(0, self.config.pcr_vm, &banks, &events);
        let bytes = record.to_bytes();
        write(self.store.as_mut(), number, 0, &bytes).map_err(|unwritten| unwritten.error)?;
        self.announced = true;
        let extend = Extend::from(&record);
        tpm.extend(extend.pcr, &extend.digests)?;
        if let Some(old) = gap.and_then(|gap| gap.set_aside) {
            self.store.set_aside(old)?;
        }
        let replay = Replay::begin(&record).map_err(RecorderError::Damaged)?;
        let mut index = Index::new(epoch, LogPlace::default());
        index.push(bytes.len() as u64);
        let (end, last) = (bytes.len() as u64, replay.start().clone());
        let gap = gap.is_some_and(|gap| gap.reason != GapReason::TpmReset);
        Ok((Live { tpm, clock, epoch, replay, end, last, gap, next_segment_at: 0 }, index))
    }

    /// Shows the new head to others.
    fn show(&self, live: &Live, change: impl FnOnce(&mut Index)) {
        self.state.send_modify(|state| {
            if let Some(state) = state {
                change(&mut state.index);
                state.head = LogHead { first: state.index.first(), ..head(live) };
            }
        });
    }
}

enum Attempt {
    Quoted(Quoted, QualifyingData),
    /// A register of ours is not what the log says.
    Foreign,
    /// The log is not the one that the qualifying data was made for.
    Moved,
}

/// An append that failed, and whether nothing of it is left.
struct Unwritten {
    error: StoreError,
    taken_back: bool,
}

/// Appends bytes durably, or not at all.
fn write(store: &mut dyn LogStore, epoch: u64, end: u64, bytes: &[u8]) -> Result<(), Unwritten> {
    store.append(epoch, end, bytes).and_then(|()| store.sync(epoch)).map_err(|error| {
        let taken_back = store.cut(epoch, end, false).is_ok();
        Unwritten { error, taken_back }
    })
}

/// Whether the quote is over the values that were read: they may have changed in between.
fn check_quote(quoted: &Quoted, data: QualifyingData, registers: &[Register]) -> Result<bool, RecorderError> {
    let bad = RecorderError::BadQuote;
    let attest = Attest::parse(&quoted.quote.attest).map_err(|_| bad("it does not parse"))?;
    if attest.extra_data != data.as_bytes() {
        return Err(bad("the qualifying data is another"));
    }
    if !attest.selection.is_exactly(&registers.iter().copied().collect()) {
        return Err(bad("the registers are others"));
    }
    let digest = attest.selection.digest_sha256(&quoted.pcr_values);
    Ok(digest.is_some_and(|digest| digest.as_bytes() == attest.pcr_digest))
}

/// The head, but for the oldest record: that is the index's.
fn head(live: &Live) -> LogHead {
    LogHead {
        epoch: live.epoch,
        log_len: live.replay.len(),
        registers: live.replay.registers().clone(),
        bytes: live.end,
        first: LogPlace::default(),
    }
}

fn gap_event(config: &mut RecorderConfig, reason: GapReason, detail: String) -> Event {
    Event { time: (config.now)(), vm: None, body: LogGap { reason, detail }.into() }
}

fn proxy_start(config: &mut RecorderConfig, clock: Clock, epoch: Epoch, registers: &Registers) -> Event {
    let body = ProxyStart {
        host: config.host.clone(),
        epoch,
        boot_id: config.boot_id,
        version: config.version.clone(),
        binary: config.binary,
        history: pcr::to_list(registers),
        pcr_vm: config.pcr_vm,
        pcr_guest: config.pcr_guest,
        reset_count: clock.reset_count,
        restart_count: clock.restart_count,
        path: config.path.clone(),
    };
    Event { time: (config.now)(), vm: None, body: body.into() }
}
