//! The pieces of an evidence stream: the host's logs, the measurement log, the guests' lists.

use std::{fs, io, path::PathBuf, sync::Arc};

use hyper::body::Bytes;
use onequote_evidence::{
    event::VmRef,
    id::Blob,
    statement::Statement,
    stream::{Guest, Have, Item, Known, PIECE_TARGET, Packer, Pieces, Quote},
};

use super::{AttestError, Attester};
use crate::{guest::Lists, log::LogHead};

/// The most bytes that are read of one of the host's logs.
const MAX_HOST_LOG: u64 = 128 * 1024 * 1024;

/// All that a statement is about.
pub(super) struct Logs {
    firmware: Vec<u8>,
    host_ima: Vec<u8>,
    records: Vec<u8>,
    /// Bytes of the measurement log that were dropped before them.
    dropped: u64,
    lists: Lists,
}

impl Attester {
    /// Everything that the statement is about. Host logs are read after the quote, so that they are never behind it.
    pub(super) async fn logs(&self, statement: &Statement, head: &LogHead) -> Result<Logs, AttestError> {
        let firmware = read_host_log(self.firmware_log.clone()).await?;
        let host_ima = read_host_log(self.ima_list.clone()).await?;
        let mut records = Vec::new();
        let mut next = head.first.records;
        while next < head.log_len {
            let chunk = self.log.records(head.epoch.number, next, head.log_len, PIECE_TARGET).await;
            let chunk = chunk.map_err(|e| AttestError::Recorder(Arc::new(e)))?;
            records.extend(chunk.bytes);
            next = chunk.next;
        }
        let wanted = statement.vms.iter().flat_map(|vm| {
            let key = VmRef { vm: vm.vm, session: vm.session };
            vm.boots.iter().map(move |boot| (key, boot.boot, boot.count))
        });
        let dropped = head.first.bytes;
        Ok(Logs { firmware, host_ima, records, dropped, lists: self.room.lists(wanted.collect()).await })
    }
}

impl Logs {
    /// The second frame of a stream, without what the verifier has.
    pub(super) fn frame(&self, quote: &Quote, have: &Have) -> Result<Bytes, AttestError> {
        let mut out = Pieces::begin(Packer::new(Vec::new()), quote);
        self.push(&mut out, have);
        match out.finish().and_then(Packer::finish) {
            Ok(frame) => Ok(frame.into()),
            Err(error) => Err(AttestError::Read { what: "the stream".to_owned(), error: Arc::new(error) }),
        }
    }

    fn push<W: io::Write>(&self, out: &mut Pieces<W>, have: &Have) {
        for (kind, log, known) in [
            (Item::Firmware as fn(_) -> Item, &self.firmware, have.firmware),
            (Item::HostIma, &self.host_ima, have.host_ima),
        ] {
            let had = Known::bytes_of(known, log);
            out.push_log(kind, had as u64, &log[had..]);
        }
        // A beginning that was dropped cannot be told by its digest any more: the verifier puts the rest behind it.
        let had = if self.dropped == 0 { Known::bytes_of(have.records, &self.records) } else { 0 };
        out.push_log(Item::Records, self.dropped + had as u64, &self.records[had..]);
        let dictionary = &self.lists.dictionary;
        let had = Known::entries_of(have.dictionary, dictionary);
        out.push_dictionary(had as u64, dictionary[had..].iter().map(|entry| Blob(entry.to_vec())));
        for (key, boot, references) in &self.lists.lists {
            // References mean entries of the dictionary that the verifier has.
            let known = have.guest(key.vm, key.session, *boot).filter(|_| had > 0);
            let first = Known::references_of(known, references);
            let entries = references[first..].to_vec();
            out.push_guest(&Guest { vm: key.vm, session: key.session, boot: *boot, first: first as u64, entries });
        }
    }
}

/// The log in this file; nothing where the host has none.
async fn read_host_log(path: Option<PathBuf>) -> Result<Vec<u8>, AttestError> {
    let Some(path) = path else { return Ok(Vec::new()) };
    let what = path.display().to_string();
    let read = tokio::task::spawn_blocking(move || {
        use std::io::Read as _;
        let mut bytes = Vec::new();
        fs::File::open(&path)?.take(MAX_HOST_LOG).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    });
    match read.await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => Err(AttestError::Read { what, error: Arc::new(error) }),
        Err(error) => Err(AttestError::Read { what, error: Arc::new(error) }),
    }
}
