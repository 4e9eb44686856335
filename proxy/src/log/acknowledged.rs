//! Who has accepted how much of the log: the condition for dropping any of it.
//!
//! A verifier says with each challenge which statement it accepted last. The proxy remembers, for its last statements, how long
//! the log was in each, so that this names a length. The oldest segments go when every verifier that is enrolled (named in the
//! configuration, or joined) has acknowledged a length behind them. One that stays silent holds them, until it is enrolled no
//! more or the operator says that nobody waits for it.
//!
//! What each verifier has acknowledged, and who is not waited for, is in `acknowledged.json` beside the log, of one epoch. Which
//! statement means which length is remembered in memory only: after a restart of the proxy each verifier acknowledges with the
//! first statement that it accepts after it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use onequote_evidence::id::{Epoch, Sha256};
use serde::{Deserialize, Serialize};

use super::LogPlace;

const FILE: &str = "acknowledged.json";

/// An acknowledgement is written down when it is so many bytes further than the one that was.
const GRAIN: u64 = 64 * 1024;

/// Statements that are remembered.
const REMEMBERED: usize = 256;

/// `acknowledged.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    epoch: Epoch,
    /// By verifier's name.
    verifiers: BTreeMap<String, LogPlace>,
    /// Nobody waits for these until they ask again.
    released: BTreeSet<String>,
}

impl Kept {
    fn new(epoch: Epoch) -> Self {
        Self { epoch, verifiers: BTreeMap::new(), released: BTreeSet::new() }
    }
}

/// Acknowledgements of one epoch's log.
pub struct Acknowledged {
    folder: PathBuf,
    state: Mutex<State>,
}

struct State {
    kept: Kept,
    /// Of `kept`, what is on disk.
    written: BTreeMap<String, LogPlace>,
    enrolled: BTreeSet<String>,
    /// The last statements, and where the log ended in them.
    statements: HashMap<Sha256, LogPlace>,
    /// Their order.
    order: VecDeque<Sha256>,
}

/// What one verifier has acknowledged, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Acknowledgement {
    /// The verifier.
    pub verifier: String,
    /// Records that it has accepted.
    pub records: u64,
    /// Whether the log is kept for it.
    pub waited_for: bool,
}

impl Acknowledged {
    /// Reads what is kept of `epoch` in the log's folder. `enrolled` are the verifiers' names. What is unreadable, or of another
    /// epoch, counts as nothing: then nothing is dropped until all have acknowledged again.
    #[must_use]
    pub fn open(folder: &Path, epoch: Epoch, enrolled: BTreeSet<String>) -> Self {
        let kept = read_kept(folder).filter(|kept| kept.epoch == epoch).unwrap_or_else(|| Kept::new(epoch));
        let (written, statements) = (kept.verifiers.clone(), HashMap::new());
        let state = State { kept, written, enrolled, statements, order: VecDeque::new() };
        Self { folder: folder.to_owned(), state: Mutex::new(state) }
    }

    /// A statement was quoted, over a log that ends at `place`.
    pub fn quoted(&self, statement: Sha256, place: LogPlace) {
        self.lock().remember(statement, place);
    }

    /// A verifier asked. One that joined while the proxy runs is waited for from now on.
    pub fn seen(&self, verifier: &str) {
        let mut state = self.lock();
        if !state.enrolled.contains(verifier) {
            state.enrolled.insert(verifier.to_owned());
        }
    }

    /// A verifier has accepted that statement. Gives how far the log can be dropped now, when that may be news.
    pub fn accepted(&self, verifier: &str, statement: &Sha256) -> Option<LogPlace> {
        let mut state = self.lock();
        let place = *state.statements.get(statement)?;
        let released = state.kept.released.remove(verifier);
        let known = state.kept.verifiers.entry(verifier.to_owned()).or_default();
        if *known >= place && !released {
            return None;
        }
        *known = (*known).max(place);
        let written = state.written.get(verifier).copied().unwrap_or_default();
        if released || place.bytes >= written.bytes.saturating_add(GRAIN) {
            state.written = state.kept.verifiers.clone();
            // What is not written has to be acknowledged once more after a restart.
            if let Err(error) = write_kept(&self.folder, &state.kept) {
                tracing::warn!("acknowledgements cannot be written: {error}");
            }
        }
        state.droppable()
    }

    /// How far the log can be dropped.
    pub fn droppable(&self) -> Option<LogPlace> {
        self.lock().droppable()
    }

    /// Nobody waits for this verifier any more, until it asks again. Whether it is enrolled.
    ///
    /// # Errors
    /// When it cannot be written down.
    pub fn release(&self, verifier: &str) -> io::Result<bool> {
        let mut state = self.lock();
        let enrolled = state.enrolled.contains(verifier);
        if enrolled && state.kept.released.insert(verifier.to_owned()) {
            write_kept(&self.folder, &state.kept)?;
        }
        Ok(enrolled)
    }

    /// What each enrolled verifier has acknowledged.
    #[must_use]
    pub fn all(&self) -> Vec<Acknowledgement> {
        let state = self.lock();
        let of = |verifier: &String| Acknowledgement {
            verifier: verifier.clone(),
            records: state.kept.verifiers.get(verifier).copied().unwrap_or_default().records,
            waited_for: !state.kept.released.contains(verifier),
        };
        state.enrolled.iter().map(of).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The least that all whom the log is kept for have acknowledged.
    fn droppable(&self) -> Option<LogPlace> {
        let waited_for = self.enrolled.iter().filter(|name| !self.kept.released.contains(*name));
        let acknowledged = waited_for.map(|name| self.kept.verifiers.get(name).copied().unwrap_or_default());
        // Where nobody is enrolled, or nobody is waited for, nothing is dropped.
        acknowledged.min().filter(|place| place.records > 0)
    }

    fn remember(&mut self, statement: Sha256, place: LogPlace) {
        if self.statements.insert(statement, place).is_none() {
            self.order.push_back(statement);
        }
        if self.order.len() > REMEMBERED
            && let Some(old) = self.order.pop_front()
        {
            self.statements.remove(&old);
        }
    }
}

fn read_kept(folder: &Path) -> Option<Kept> {
    let bytes = fs::read(folder.join(FILE)).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn write_kept(folder: &Path, kept: &Kept) -> io::Result<()> {
    let beside = folder.join("acknowledged.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    file.write_all(&serde_json::to_vec_pretty(kept).map_err(io::Error::other)?)?;
    file.sync_all()?;
    fs::rename(&beside, folder.join(FILE))?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use onequote_evidence::{digest::sha256, id::EpochId};

    use super::*;

    const EPOCH: Epoch = Epoch { number: 3, id: EpochId([3; 16]) };

    fn open(folder: &Path, epoch: Epoch, enrolled: &[&str]) -> Acknowledged {
        Acknowledged::open(folder, epoch, enrolled.iter().map(|name| (*name).to_owned()).collect())
    }

    fn statement(n: u32) -> Sha256 {
        sha256(&[&n.to_le_bytes()])
    }

    fn place(n: u64) -> LogPlace {
        LogPlace { records: n, bytes: n * GRAIN }
    }

    #[test]
    fn what_all_have_accepted_can_go_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let all = open(dir.path(), EPOCH, &["a", "b"]);
        (1..=5).for_each(|n| all.quoted(statement(n), place(n.into())));
        assert_eq!(all.accepted("a", &statement(4)), None, "b has said nothing");
        assert_eq!(all.accepted("nobody", &statement(5)), None, "one that is not enrolled does not count");
        assert_eq!(all.accepted("b", &statement(9)), None, "a statement that was never made");
        assert_eq!(all.accepted("b", &statement(2)), Some(place(2)));
        assert_eq!(all.accepted("b", &statement(5)), Some(place(4)));
        assert_eq!(all.accepted("b", &statement(1)), None, "an older one takes nothing back");
        assert_eq!(all.droppable(), Some(place(4)));
        let records: Vec<u64> = all.all().iter().map(|one| one.records).collect();
        assert_eq!(records, [4, 5]);

        // It is on disk, for the same epoch only; who is enrolled now counts.
        assert_eq!(open(dir.path(), EPOCH, &["a", "b"]).droppable(), Some(place(4)));
        assert_eq!(open(dir.path(), EPOCH, &["b"]).droppable(), Some(place(5)), "a is enrolled no more");
        assert_eq!(open(dir.path(), EPOCH, &["a", "b", "c"]).droppable(), None, "a new one has nothing yet");
        assert_eq!(open(dir.path(), Epoch { number: 4, ..EPOCH }, &["a", "b"]).droppable(), None);
        let joined = open(dir.path(), EPOCH, &["a", "b"]);
        joined.seen("c");
        assert_eq!(joined.droppable(), None, "nor has one that joined meanwhile");
        assert_eq!(open(dir.path(), EPOCH, &[]).droppable(), None, "where nobody is enrolled nothing goes");
        fs::write(dir.path().join(FILE), "rubbish").unwrap();
        assert_eq!(open(dir.path(), EPOCH, &["a", "b"]).droppable(), None);
    }

    #[test]
    fn nobody_waits_for_one_that_was_released_until_it_asks() {
        let dir = tempfile::tempdir().unwrap();
        let all = open(dir.path(), EPOCH, &["a", "b"]);
        (1..=5).for_each(|n| all.quoted(statement(n), place(n.into())));
        assert_eq!(all.accepted("a", &statement(4)), None);
        assert!(!all.release("nobody").unwrap());
        assert!(all.release("b").unwrap());
        assert_eq!(all.droppable(), Some(place(4)));
        let again = open(dir.path(), EPOCH, &["a", "b"]);
        assert_eq!(again.droppable(), Some(place(4)), "it is on disk");
        assert_eq!(again.all().iter().map(|one| one.waited_for).collect::<Vec<_>>(), [true, false]);
        assert_eq!(all.accepted("b", &statement(1)), Some(place(1)));
        assert!(all.all().iter().all(|one| one.waited_for));
        assert!(all.release("a").unwrap() && all.release("b").unwrap());
        assert_eq!(all.droppable(), None, "where nobody is waited for, nobody has accepted anything");
    }

    #[test]
    fn statements_are_remembered_in_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let all = open(dir.path(), EPOCH, &["a"]);
        (0..=REMEMBERED as u32).for_each(|n| all.quoted(statement(n), place(u64::from(n) + 1)));
        assert_eq!(all.accepted("a", &statement(0)), None, "the oldest is forgotten");
        assert_eq!(all.accepted("a", &statement(1)), Some(place(2)));
    }
}
