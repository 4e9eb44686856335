//! One guest's list in one boot: references into the dictionary, in memory and in a file.
//!
//! The file holds u32 little-endian references, only ever appended to, named `VM-SESSION-BOOT.list`. What counts is
//! not the file but the log: `guest-entries` events say how many entries with which aggregate were bound to the TPM.
//! At start the file is read up to the logged count; entries behind it were never logged and come again from the
//! guest. A file that does not give the logged aggregate is *damaged*: it is kept and shown as it is, and the guest
//! can add nothing to it.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use onequote_evidence::{event::VmRef, id::BootId, ima::Aggregate};

use super::dictionary::Dictionary;
use crate::inventory::LoggedBoot;

/// A list.
pub(super) struct GuestList {
    /// Which boot of the session.
    pub(super) boot: u32,
    /// The boot id that the guest claimed.
    pub(super) boot_id: BootId,
    /// Size of the template hash, in bytes.
    pub(super) hash_size: u32,
    /// References into the dictionary.
    pub(super) refs: Vec<u32>,
    /// Count and aggregate of `refs`.
    pub(super) received: Aggregate,
    /// Count and aggregate of what the log has. Never ahead of `received`.
    pub(super) logged: Aggregate,
    /// Whether and why nothing more is taken.
    pub(super) closed: Option<Closed>,
    /// Not kept open: a guest decides how many lists it begins.
    path: PathBuf,
    /// References that are in the file.
    saved: usize,
}

/// Why a list takes nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closed {
    /// The guest claimed another past, or went over a limit: it is in the log.
    ByGuest,
    /// The file on the host does not give what was logged.
    Damaged,
}

impl GuestList {
    /// Begins a list. A file that is there already belongs to a start that was never logged and is emptied.
    ///
    /// # Errors
    /// Of the file system.
    pub(super) fn create(folder: &Path, vm: &VmRef, boot: u32, boot_id: BootId, hash_size: u32) -> io::Result<Self> {
        let path = file_name(folder, vm, boot);
        File::create(&path)?;
        Ok(Self {
            boot,
            boot_id,
            hash_size,
            refs: Vec::new(),
            received: Aggregate::EMPTY,
            logged: Aggregate::EMPTY,
            closed: None,
            path,
            saved: 0,
        })
    }

    /// Reads a list that the log speaks of.
    ///
    /// # Errors
    /// Of the file system, but a missing or short file is a damaged list.
    pub(super) fn load(folder: &Path, vm: &VmRef, logged: &LoggedBoot, dictionary: &Dictionary) -> io::Result<Self> {
        let path = file_name(folder, vm, logged.boot);
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        let mut bytes = Vec::new();
        (&mut file).take(logged.count.saturating_mul(4)).read_to_end(&mut bytes)?;
        let refs: Vec<u32> = bytes.as_chunks().0.iter().map(|c| u32::from_le_bytes(*c)).collect();
        let mut received = Aggregate::EMPTY;
        for id in &refs {
            let Some(digest) = dictionary.digest(*id) else { break };
            received.push_digest(digest);
        }
        let expected = Aggregate { count: logged.count, value: logged.aggregate };
        let damaged = received != expected;
        if !damaged {
            file.set_len(refs.len() as u64 * 4)?;
        }
        Ok(Self {
            boot: logged.boot,
            boot_id: logged.boot_id,
            hash_size: logged.hash_size,
            saved: refs.len(),
            refs,
            received,
            logged: expected,
            closed: if damaged { Some(Closed::Damaged) } else { logged.closed.then_some(Closed::ByGuest) },
            path,
        })
    }

    /// Whether there is something that is not in the file.
    pub(super) fn is_unsaved(&self) -> bool {
        self.saved != self.refs.len()
    }

    /// Writes what is new to the file and syncs it. After an error it can be tried again.
    ///
    /// # Errors
    /// Of the file system.
    pub(super) fn save(&mut self) -> io::Result<()> {
        if !self.is_unsaved() {
            return Ok(());
        }
        let bytes: Vec<u8> = self.refs[self.saved..].iter().flat_map(|id| id.to_le_bytes()).collect();
        let mut file = OpenOptions::new().write(true).open(&self.path)?;
        file.seek(SeekFrom::Start(self.saved as u64 * 4))?;
        file.write_all(&bytes)?;
        file.sync_data()?;
        self.saved = self.refs.len();
        Ok(())
    }
}

fn file_name(folder: &Path, vm: &VmRef, boot: u32) -> PathBuf {
    folder.join(format!("{}-{}-{boot}.list", vm.vm, vm.session))
}
