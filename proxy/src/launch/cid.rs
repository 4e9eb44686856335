//! Guests' vsock addresses (CIDs) on this host: which are taken, and one that is free.

use std::{collections::BTreeMap, io, path::Path, time::Duration};

use onequote_evidence::digest::sha256;
use serde::Deserialize;
use tokio::time::timeout;

use crate::serve::ask;

/// How long the running proxy may take to tell.
const PATIENCE: Duration = Duration::from_secs(2);

/// How many names for a CID are tried. Of 2³⁰ CIDs, no host has so many that this many in a row are taken.
const ATTEMPTS: u32 = 64;

/// CIDs that VMs of this host have, with the VMs' names.
pub type TakenCids = BTreeMap<u64, String>;

#[derive(Deserialize)]
struct Status {
    vms: Vec<Vm>,
}

#[derive(Deserialize)]
struct Vm {
    name: String,
    guest_cid: Option<u64>,
}

/// Asks the running proxy which CIDs are taken.
///
/// # Errors
/// When no proxy answers.
pub async fn taken_cids(admin_socket: &Path) -> io::Result<TakenCids> {
    let answer = timeout(PATIENCE, ask(admin_socket, "/v1/status"));
    let status = answer.await.map_err(|_| io::Error::other(format!("the proxy gave no answer in {PATIENCE:?}")))??;
    let status: Status = serde_json::from_slice(&status)?;
    Ok(status.vms.into_iter().filter_map(|vm| Some((vm.guest_cid?, vm.name))).collect())
}

/// A CID for a VM: the same one each time, above those that people choose by hand. When another VM has it, the next in a
/// row that is the same each time, too.
pub(super) fn choose(name: &str, taken: &TakenCids) -> Option<u32> {
    (0..ATTEMPTS).map(|attempt| candidate(name, attempt)).find(|cid| holder(taken, *cid, name).is_none())
}

/// Who other than the VM itself has a CID: one of its own name is its last run, which is about to be logged.
pub(super) fn holder<'a>(taken: &'a TakenCids, cid: u32, name: &str) -> Option<&'a str> {
    taken.get(&cid.into()).map(String::as_str).filter(|other| *other != name)
}

pub(super) fn candidate(name: &str, attempt: u32) -> u32 {
    let hash = match attempt {
        0 => sha256(&[b"onequote.cid.v1", name.as_bytes()]),
        n => sha256(&[b"onequote.cid.v1", name.as_bytes(), &[0], &n.to_le_bytes()]),
    };
    let [a, b, c, d, ..] = hash.0;
    0x1000 + (u32::from_le_bytes([a, b, c, d]) & 0x3fff_ffff)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn the_next_one_is_taken_when_one_is_taken() {
        let first = choose("web", &TakenCids::new()).unwrap();
        assert_eq!(choose("web", &TakenCids::new()), Some(first));
        assert_eq!(first, candidate("web", 0));
        let mut taken = TakenCids::from([(first.into(), "other".to_owned())]);
        let second = choose("web", &taken).unwrap();
        assert_eq!(second, candidate("web", 1));
        taken.insert(second.into(), "third".to_owned());
        assert_eq!(choose("web", &taken), Some(candidate("web", 2)));
        // Its own last run does not move it.
        taken.insert(first.into(), "web".to_owned());
        assert_eq!(choose("web", &taken), Some(first));
        let all = (0..ATTEMPTS).map(|n| (u64::from(candidate("web", n)), "other".to_owned())).collect();
        assert_eq!(choose("web", &all), None);
    }
}
