//! The pieces of an evidence stream: the host's logs, the measurement log, the guests' lists.

use std::{fs, path::PathBuf, sync::Arc};

use onequote_evidence::{
    event::VmRef,
    id::Blob,
    statement::Statement,
    stream::{Guest, Item, PIECE_TARGET, Pieces},
};

use super::{AttestError, Attester};
use crate::log::LogHead;

/// The most bytes that are read of one of the host's logs.
const MAX_HOST_LOG: u64 = 128 * 1024 * 1024;

impl Attester {
    /// Everything that the statement is about, as items of a stream. Host logs are read after the quote, so that they
    /// are never behind it.
    pub(super) async fn pieces(&self, statement: &Statement, head: &LogHead) -> Result<Pieces, AttestError> {
        let mut out = Pieces::default();
        for (path, kind) in
            [(&self.firmware_log, Item::Firmware as fn(_) -> Item), (&self.ima_list, Item::HostIma as fn(_) -> Item)]
        {
            if let Some(path) = path {
                out.push_log(kind, 0, &read_host_log(path.clone()).await?);
            }
        }
        let (mut next, mut offset) = (0, 0);
        while next < head.log_len {
            let chunk = self.log.records(head.epoch.number, next, head.log_len, PIECE_TARGET).await;
            let chunk = chunk.map_err(|e| AttestError::Recorder(Arc::new(e)))?;
            out.push_log(Item::Records, offset, &chunk.bytes);
            offset += chunk.bytes.len() as u64;
            next = chunk.next;
        }
        self.guests(statement, &mut out).await;
        Ok(out)
    }

    async fn guests(&self, statement: &Statement, out: &mut Pieces) {
        let wanted = statement.vms.iter().flat_map(|vm| {
            let key = VmRef { vm: vm.vm, session: vm.session };
            vm.boots.iter().map(move |boot| (key, boot.boot, boot.count))
        });
        let lists = self.room.lists(wanted.collect()).await;
        out.push_dictionary(0, lists.dictionary.iter().map(|entry| Blob(entry.to_vec())));
        for (key, boot, entries) in lists.lists {
            out.push_guest(&Guest { vm: key.vm, session: key.session, boot, first: 0, entries });
        }
    }
}

async fn read_host_log(path: PathBuf) -> Result<Vec<u8>, AttestError> {
    let what = path.display().to_string();
    let read = tokio::task::spawn_blocking(move || {
        use std::io::Read as _;
        let mut bytes = Vec::new();
        fs::File::open(&path)?.take(MAX_HOST_LOG).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    });
    match read.await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => Err(AttestError::Read { what, error: Arc::new(error) }),
        Err(error) => Err(AttestError::Read { what, error: Arc::new(error) }),
    }
}
