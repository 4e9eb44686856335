//! Several verifiers on one database: who of them asks which host.
//!
//! Each says in the database that it is there, again and again, for a while that outlasts two misses. A host belongs to the
//! one that is there for which the hash of its id and the host's is the greatest, so that each knows what is its own
//! without a word, few hosts move when one comes or goes, and those of one that died are taken over when its while is
//! over. For moments two may ask the same host: the store keeps one verdict at a time, so that costs a quote and nothing
//! else.

use std::time::Duration;

use onequote_evidence::{digest::sha256, id::HostId};

use crate::{
    source::Source,
    store::{Store, StoreError},
};

/// How long a verifier counts as there after it said so.
pub const LEASE: Duration = Duration::from_secs(8);

/// This verifier among those on its database.
#[derive(Debug)]
pub struct Replica {
    id: String,
    there: Vec<String>,
}

impl Replica {
    /// A new one, of which nobody knows yet.
    #[must_use]
    pub fn new(source: &dyn Source) -> Self {
        let mut id = [0; 16];
        source.fill(&mut id);
        Self { id: hex::encode(id), there: Vec::new() }
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Says that it is there, and looks who else is.
    ///
    /// # Errors
    /// [`StoreError`]; who is there stays as it was.
    pub async fn beat<S: Store>(&mut self, store: &S) -> Result<(), StoreError> {
        let there = store.present(&self.id, LEASE).await?;
        if there != self.there {
            tracing::info!(verifiers = there.len(), "verifiers work on this database");
            self.there = there;
        }
        Ok(())
    }

    /// Whether this verifier asks the host.
    #[must_use]
    pub fn asks(&self, host: &HostId) -> bool {
        let weight = |replica: &str| sha256(&[replica.as_bytes(), b"/", host.as_str().as_bytes()]);
        self.there.iter().max_by_key(|replica| weight(replica)).is_none_or(|replica| *replica == self.id)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn each_host_is_asked_by_one_and_stays_with_it() {
        let hosts: Vec<HostId> = (0..300).map(|n| format!("h{n}").parse().unwrap()).collect();
        let of = |id: &str, there: &[&str]| Replica {
            id: id.to_owned(),
            there: there.iter().map(|&id| id.to_owned()).collect(),
        };
        let all = ["a", "b", "c"];
        let mut moved = 0;
        for host in &hosts {
            let asked: Vec<&str> = all.into_iter().filter(|id| of(id, &all).asks(host)).collect();
            assert_eq!(asked.len(), 1, "{host}");
            // When c goes, only its hosts move.
            let after: Vec<&str> = ["a", "b"].into_iter().filter(|id| of(id, &["a", "b"]).asks(host)).collect();
            assert_eq!(after.len(), 1, "{host}");
            assert!(asked == after || asked == ["c"], "{host}");
            moved += usize::from(asked == ["c"]);
        }
        assert!((60..140).contains(&moved), "{moved} of 300 were one's of three");
    }
}
