//! What a verifier keeps of a host's evidence is not believed for being kept.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::{
    id::{HostId, TimeMs},
    stream::compress,
};
use onequote_tests::lab::{Bare, Guest, Peer, World};
use onequote_verifier::appraise::Received;
use onequote_verifier::store::{Database, Part, Store as _, Take, Taken};

const LIMIT: Duration = Duration::from_secs(90);

/// Entries that a guest has at first.
const ENTRIES: u64 = 2000;

/// A VM whose shim's part the test plays.
fn play(world: &mut World, name: &str) -> Result<(Bare, Peer)> {
    let bare = world.start_bare(name, &[])?;
    let mut guest = Guest::new(0);
    guest.grow(ENTRIES)?;
    let peer = Peer::start(world.guest_socket(name), guest);
    world.wait_until("the guest's list", LIMIT, |world| {
        Ok((world.vm_status(name)?["entries"] == ENTRIES).then_some(()))
    })?;
    Ok((bare, peer))
}

#[test]
fn what_is_kept_is_replayed_and_never_believed() {
    World::test(|world| {
        world.start_enrolled()?;
        let (_one, _peer) = play(world, "one")?;
        let first = world.verdict()?;
        let (_, steady) = world.attest_counted()?;
        let host = World::HOST.parse().map_err(anyhow::Error::msg)?;
        let runtime = tokio::runtime::Runtime::new()?;
        let store = runtime.block_on(Database::open(&world.verifier_state().join("verifier.sqlite")))?;
        let kept = runtime.block_on(store.parts(&host))?;
        let evidence = Received::read(kept.first().context("nothing is kept")?)
            .map_err(|finding| anyhow::anyhow!("{finding:?}"))?
            .into_evidence();
        // Somebody changes one entry, one reference, one record, or all of it.
        let changes: [fn(&mut onequote_evidence::stream::Evidence); 4] = [
            |e| {
                let path = e.dictionary[7].0.len() - 2;
                e.dictionary[7].0[path] ^= 1;
            },
            |e| e.guests[0].entries.swap(3, 4),
            |e| {
                let last = e.records.len() - 1;
                e.records[last] ^= 1;
            },
            |e| e.guests[0].entries.truncate(1000),
        ];
        let mut forged = vec![b"rubbish".to_vec()];
        for change in changes {
            let mut evidence = evidence.clone();
            change(&mut evidence);
            forged.push(compress(&evidence.stream())?);
        }
        for (number, stream) in forged.iter().enumerate() {
            runtime.block_on(forge(&store, &host, stream))?;
            let (healed, bytes) = world.attest_counted()?;
            ensure!(bytes > steady, "{number}: {bytes} bytes, as if nothing had happened");
            for verdict in [healed, world.verdict()?] {
                ensure!(verdict.host().findings() == first.host().findings(), "{number}: {verdict}");
                ensure!(verdict.vm("one").state() == first.vm("one").state(), "{number}: {verdict}");
                ensure!(verdict.vm("one").field("entries") == ENTRIES, "{number}: {verdict}");
            }
        }
        Ok(())
    });
}

/// Puts this in place of the evidence that is kept, and leaves everything else as it is.
async fn forge(store: &Database, host: &HostId, stream: &[u8]) -> Result<()> {
    let kept = store.host(host).await?;
    let forged = Taken {
        host,
        version: kept.version,
        nonce: None,
        now: TimeMs(0),
        verdict: kept.verdict.as_ref().context("there is no verdict")?,
        state: None,
        trees: false,
        part: Some(Part::Whole(stream)),
        next: None,
    };
    ensure!(matches!(store.take(forged).await?, Take::Kept(_)));
    Ok(())
}
