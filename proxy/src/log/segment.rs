//! Beginning a segment, and dropping the oldest.

use onequote_evidence::event::{Event, EventBody, LogSegment};
use onequote_evidence::pcr;
use tracing::{info, warn};

use super::{
    LogPlace, PcrRole, RecordStream, RecorderError,
    journal::Journal,
    snapshot::{self, MAX_SNAPSHOT, Snapshot},
};

impl Journal {
    /// Begins a segment when the newest is long enough, and a start from the snapshot would read much less. Without that,
    /// nothing has failed: the log goes on in the file that it is in.
    pub(super) fn begin_segment_if_due(&mut self) -> Result<(), RecorderError> {
        let mut live = self.take_live()?;
        let limit = self.segment_bytes();
        let newest = self.newest_segment();
        let len = live.end.saturating_sub(newest.bytes);
        if len < limit || live.end < live.next_segment_at {
            self.put_back(live);
            return Ok(());
        }
        // Whatever comes of it, not again at once.
        live.next_segment_at = live.end + limit;
        let number = live.replay.segment() + 1;
        let records = live.replay.len();
        let inventory = self.inventory();
        let snapshot = Snapshot::new(live.epoch, number, records, live.last.clone(), live.gap, inventory).to_bytes();
        if snapshot.len() > MAX_SNAPSHOT || snapshot.len() as u64 > len / 2 {
            self.put_back(live);
            return Ok(());
        }
        let (epoch, end) = (live.epoch, live.end);
        let body = LogSegment {
            number,
            start: live.replay.start().clone(),
            registers: pcr::to_list(live.replay.registers()),
            snapshot: snapshot::digest(&snapshot),
        };
        self.put_back(live);
        let store = self.store();
        let begun = store.keep_snapshot(epoch.number, end, &snapshot);
        if let Err(error) = begun.and_then(|()| store.begin_segment(epoch.number, end)) {
            warn!(%error, "the log cannot go on in a new file, and goes on in the one that it is in");
            // A file that is there already would take what comes next.
            return self.store().cut(epoch.number, end, false).map_err(|error| {
                self.forget_live();
                error.into()
            });
        }
        info!(epoch = epoch.number, number, records, "the log goes on in a new file");
        let event = Event { time: self.now(), vm: None, body: body.into() };
        self.append_record(epoch, PcrRole::Vm, &[event])?;
        self.segment_begun(LogPlace { records, bytes: end });
        Ok(())
    }

    /// Drops the segments whose records are all before `place`, up to the newest whose snapshot is there and unchanged.
    ///
    /// # Errors
    /// Of the store, or when the log on disk is not what was written.
    pub(super) fn drop_before(&mut self, place: LogPlace) -> Result<(), RecorderError> {
        let live = self.take_live()?;
        let epoch = live.epoch.number;
        self.put_back(live);
        let segments = self.segments();
        for start in segments.iter().skip(1).rev().filter(|start| start.bytes <= place.bytes) {
            if !self.is_whole(epoch, *start)? {
                warn!(
                    epoch,
                    record = start.records,
                    "a segment's snapshot is missing or changed: it cannot be the oldest"
                );
                continue;
            }
            self.store().drop_before(epoch, start.bytes)?;
            info!(epoch, records = start.records, "every verifier has accepted these records: their files are dropped");
            self.segments_dropped(*start);
            break;
        }
        Ok(())
    }

    /// Whether the snapshot beside a segment is the one that its first record names.
    fn is_whole(&mut self, epoch: u64, start: LogPlace) -> Result<bool, RecorderError> {
        let reader = self.reader();
        let Some(snapshot) = reader.snapshot(epoch, start.bytes, MAX_SNAPSHOT)? else { return Ok(false) };
        let first = RecordStream::new(reader.as_ref(), epoch, start.records, start.bytes).next().transpose()?;
        let events = first.and_then(|record| record.events().ok()).unwrap_or_default();
        let digest = snapshot::digest(&snapshot);
        Ok(matches!(events.as_slice(), [Event { body: EventBody::LogSegment(body), .. }] if body.snapshot == digest))
    }
}
