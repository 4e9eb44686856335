//! What comes in, over and over, by one way: what is kept at hand, what is written, and what is not.

use std::{
    io::{Cursor, Read},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use onequote_evidence::{
    id::{HostId, TimeMs},
    stream::{self, Evidence, Guest, Have, Item, Pieces},
};

use super::{Answer, Expected, Intake, Outcome, Taken, Wanted};
use crate::{
    appraise::{
        Received,
        testing::{BINDING, World, ima_entry},
    },
    enrol::Identity,
    finding::Code,
    round::{Times, Verifier},
    source::{Source, System},
    store::{Database, Enrolment, Store as _},
};

const LIFETIME: Duration = Duration::from_secs(60);

/// A host, and a verifier that it reports to.
struct Scene {
    world: World,
    verifier: Verifier<Database>,
    id: HostId,
    /// What the proxy remembers of its quotes: the statements' digests, and what there was.
    quotes: Vec<(onequote_evidence::id::Sha256, Evidence)>,
    _folder: tempfile::TempDir,
}

fn verifier(store: Database, folder: &std::path::Path) -> Verifier<Database> {
    if Identity::load(folder).is_err() {
        Identity::create(folder).unwrap();
    }
    Verifier {
        store,
        identity: Identity::load(folder).unwrap(),
        authority: None,
        source: Arc::new(System),
        times: Times::default(),
        intake: Intake::default(),
    }
}

impl Scene {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Database::open(&folder.path().join("v.sqlite")).await.unwrap();
        let world = World::with_two_vms();
        let id: HostId = "host-1".parse().unwrap();
        let (url, ak) = ("https://127.0.0.1:1".into(), world.ak.public());
        store
            .enrol(&Enrolment { id: id.clone(), url, ak, certificate: vec![1], software_tpm: true }, false)
            .await
            .unwrap();
        store.set_policy(&id, world.policy.as_ref().unwrap(), TimeMs(1)).await.unwrap();
        let verifier = verifier(store, folder.path());
        Self { world, verifier, id, quotes: Vec::new(), _folder: folder }
    }

    /// What a proxy answers: what it knows the verifier to have is left out.
    fn answer(&mut self, expected: &Expected) -> Vec<u8> {
        self.world.clock.clock += 1;
        let parts = self.world.quote_for(&expected.challenge.nonce, BINDING, |_, _| {});
        let now = Evidence::parse(&parts.stream()).unwrap();
        let had = expected.have.statement.and_then(|digest| self.quotes.iter().find(|(known, _)| *known == digest));
        let mut pieces = Pieces::default();
        match had {
            Some((_, had)) => {
                pieces.push_log(Item::Records, had.records.len() as u64, &now.records[had.records.len()..]);
                let entries = now.dictionary[had.dictionary.len()..].iter().cloned();
                pieces.push_dictionary(had.dictionary.len() as u64, entries);
                for list in &now.guests {
                    let known = had.guests.iter().find(|known| known.session == list.session);
                    let first = known.map_or(0, |known| known.entries.len());
                    pieces.push_guest(&Guest { first: first as u64, entries: list.entries[first..].to_vec(), ..*list });
                }
            }
            None => {
                pieces.push_log(Item::Records, 0, &now.records);
                pieces.push_dictionary(0, now.dictionary.iter().cloned());
                now.guests.iter().for_each(|list| pieces.push_guest(list));
            }
        }
        self.quotes.push((onequote_evidence::digest::sha256(&[&now.head.statement.0]), now.clone()));
        stream::compress(&pieces.stream(now.head)).unwrap()
    }

    async fn give(&self, expected: &Expected, evidence: impl Read + Send + 'static) -> Outcome {
        let answer =
            Answer { challenge: expected.challenge.clone(), binding: BINDING.to_vec(), certificate: None, evidence };
        let wanted = Wanted { next: Some(LIFETIME), ..Wanted::default() };
        self.verifier.take(&self.id, answer, wanted).await.unwrap()
    }

    /// One report.
    async fn report(&mut self, expected: &Expected) -> Taken {
        let answer = self.answer(expected);
        taken(self.give(expected, Cursor::new(answer)).await)
    }
}

fn taken(outcome: Outcome) -> Taken {
    match outcome {
        Outcome::Taken(taken) => *taken,
        Outcome::Again(again) => panic!("{again:?}"),
    }
}

#[tokio::test]
async fn reports_go_on_and_only_what_is_new_is_written() {
    let mut scene = Scene::new().await;
    let expected = scene.verifier.expect(&scene.id, LIFETIME).await.unwrap();
    assert_eq!(expected.have, Have::default());
    let first = scene.report(&expected).await;
    assert!(first.accepted && first.verdict.all_trusted(), "{:#?}", first.verdict);
    let mut expected = first.next.unwrap();
    for round in 0..6_u8 {
        assert!(expected.have.statement.is_some(), "{round}");
        if round % 2 == 0 {
            scene.world.entries(2, 2, &[ima_entry("/bin/db", 3)]);
        }
        let report = scene.report(&expected).await;
        assert!(report.accepted && report.verdict.all_trusted(), "{round}: {:#?}", report.verdict);
        let parts = scene.verifier.store.parts(&scene.id).await.unwrap();
        assert_eq!(parts.len(), 2 + usize::from(round / 2));
        expected = report.next.unwrap();
    }
    scene.world.entries(1, 1, &[ima_entry("/tmp/evil", 9)]);
    let report = scene.report(&expected).await;
    assert!(report.accepted);
    assert_eq!(report.verdict.vms[0].findings[0].code, Code::ImaUnknownFile);

    // Another verifier on the same store, which has nothing at hand, says the same: from the parts.
    let other = verifier(scene.verifier.store.clone(), scene._folder.path());
    let first = std::mem::replace(&mut scene.verifier, other);
    let again = scene.verifier.expect_now(&scene.id, false, LIFETIME).await.unwrap();
    assert!(again.have.records.is_some() && again.have.guests.len() == 2);
    // The proxy goes by the details, which are those of its last quote.
    let last = scene.quotes.last().unwrap().0;
    let known = Expected { have: Have { statement: Some(last), ..Have::default() }, ..again };
    let second = scene.report(&known).await;
    assert!(second.accepted);
    assert_eq!(second.verdict.vms[0].findings, report.verdict.vms[0].findings);
    assert_eq!(scene.verifier.store.parts(&scene.id).await.unwrap().len(), 1, "put together");
    // The first has an older version at hand. It begins with what is written now.
    scene.verifier = first;
    let expected = scene.verifier.expect_now(&scene.id, false, LIFETIME).await.unwrap();
    assert!(expected.have.records.is_some());

    // Somebody changed what is kept: with it nothing replays, so all of it is asked for.
    let parts = scene.verifier.store.parts(&scene.id).await.unwrap();
    let mut forged = Received::read(&parts[0]).unwrap();
    let last = forged.logs.records.items.len() - 1;
    forged.logs.records.items[last] ^= 1;
    let host = scene.verifier.store.host(&scene.id).await.unwrap();
    let forged = crate::store::Taken {
        host: &scene.id,
        version: host.version,
        nonce: None,
        now: TimeMs(1),
        verdict: host.verdict.as_ref().unwrap(),
        state: None,
        trees: false,
        part: Some(crate::store::Part::Whole(&forged.logs.to_part().unwrap())),
        next: None,
    };
    assert!(matches!(scene.verifier.store.take(forged).await.unwrap(), crate::store::Take::Kept(_)));
    let expected = scene.verifier.expect_now(&scene.id, false, LIFETIME).await.unwrap();
    let last = scene.quotes.last().unwrap().0;
    let known = Expected { have: Have { statement: Some(last), ..Have::default() }, ..expected };
    let answer = scene.answer(&known);
    let Outcome::Again(again) = scene.give(&known, Cursor::new(answer)).await else { panic!("taken") };
    assert_eq!(again.have, Have::default());
    let healed = scene.report(&again).await;
    assert!(healed.accepted);
    assert_eq!(healed.verdict.vms[0].findings, report.verdict.vms[0].findings);
}

/// Counts what is read of it.
struct Counted(Cursor<Vec<u8>>, Arc<AtomicUsize>);

impl Read for Counted {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let most = out.len().min(1024);
        let read = self.0.read(&mut out[..most])?;
        self.1.fetch_add(read, Ordering::Relaxed);
        Ok(read)
    }
}

#[tokio::test]
async fn what_is_refused_leaves_everything_as_it_was() {
    let mut scene = Scene::new().await;
    let expected = scene.verifier.expect(&scene.id, LIFETIME).await.unwrap();
    let old = scene.answer(&expected);
    let first = taken(scene.give(&expected, Cursor::new(old.clone())).await);
    let mut expected = first.next.unwrap();
    let state = scene.verifier.store.host(&scene.id).await.unwrap().state;

    // Another key's, rubbish, what was answered before, and evidence with one bit changed.
    let mut stranger = World::with_two_vms();
    // Much that nothing presses together.
    let noise = |n: u32| (0..200_u32).map(|i| (i ^ n).wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect::<Vec<_>>();
    stranger.host_ima = (0..10_000).flat_map(noise).collect();
    let stranger = stranger.quote_for(&expected.challenge.nonce, BINDING, |_, _| {}).stream();
    let stranger = stream::compress(&stranger).unwrap();
    let size = stranger.len();
    let read = Arc::new(AtomicUsize::new(0));
    let report = taken(scene.give(&expected, Counted(Cursor::new(stranger), Arc::clone(&read))).await);
    assert_eq!(report.verdict.host.findings[0].code, Code::SignatureInvalid);
    let read = read.load(Ordering::Relaxed);
    assert!(read < 64 * 1024 && size > 200_000, "{read} of {size} bytes were read before the signature was looked at");
    expected = report.next.unwrap();

    let report = taken(scene.give(&expected, Cursor::new(b"rubbish".to_vec())).await);
    assert_eq!(report.verdict.host.findings[0].code, Code::EvidenceMalformed);
    expected = report.next.unwrap();
    let report = taken(scene.give(&expected, Cursor::new(old)).await);
    assert_eq!(report.verdict.host.findings[0].code, Code::NonceReused);
    expected = report.next.unwrap();
    scene.world.entries(1, 1, &[ima_entry("/bin/sh", 2)]);
    let honest = scene.world.dictionary.clone();
    scene.world.guests[0].entries.swap(0, 1);
    let report = scene.report(&expected).await;
    scene.quotes.pop();
    scene.world.guests[0].entries.swap(0, 1);
    assert_eq!(scene.world.dictionary, honest);
    // Of a list that was sent before only the end is sent: what is changed before it is not even seen.
    assert!(report.accepted);
    expected = report.next.unwrap();
    let after = scene.verifier.store.host(&scene.id).await.unwrap().state;
    assert_eq!(after.tree, state.tree);

    // A challenge serves once, also when both answers are good.
    scene.quotes.clear();
    let answer = scene.answer(&expected);
    assert!(taken(scene.give(&expected, Cursor::new(answer.clone())).await).accepted);
    let report = taken(scene.give(&expected, Cursor::new(answer)).await);
    assert!(!report.accepted);
    assert_eq!(report.verdict.host.findings[0].code, Code::NonceReused);
}

#[tokio::test]
async fn what_goes_on_from_nothing_is_asked_for_whole_and_then_refused() {
    let mut scene = Scene::new().await;
    let expected = scene.verifier.expect(&scene.id, LIFETIME).await.unwrap();
    let first = scene.report(&expected).await;
    // The proxy goes on from a quote that the verifier never had: its own fault, or a lie.
    scene.world.entries(1, 1, &[ima_entry("/bin/sh", 2)]);
    let mut expected = first.next.unwrap();
    scene.answer(&expected);
    let never = scene.quotes.last().unwrap().0;
    scene.world.entries(1, 1, &[ima_entry("/bin/sh", 2)]);
    let lie = |expected: Expected| Expected { have: Have { statement: Some(never), ..Have::default() }, ..expected };
    let answer = scene.answer(&lie(expected.clone()));
    let Outcome::Again(again) = scene.give(&expected, Cursor::new(answer)).await else { panic!("taken") };
    assert_eq!(again.have, Have::default());
    expected = *again;
    let answer = scene.answer(&lie(expected.clone()));
    let report = taken(scene.give(&expected, Cursor::new(answer)).await);
    assert_eq!(report.verdict.host.findings[0].code, Code::EvidenceMalformed);
    let report = scene.report(&report.next.unwrap()).await;
    assert!(report.accepted && report.verdict.all_trusted());
    let now = System.now();
    assert!(report.verdict.expires > now);
}

#[tokio::test]
async fn a_new_policy_judges_everything_again() {
    let mut scene = Scene::new().await;
    let expected = scene.verifier.expect(&scene.id, LIFETIME).await.unwrap();
    let first = scene.report(&expected).await;
    let stricter = scene.world.policy.clone().unwrap().replacen("\"/bin/db\"", "\"/bin/other\"", 1);
    scene.verifier.store.set_policy(&scene.id, &stricter, TimeMs(2)).await.unwrap();
    let report = scene.report(&first.next.unwrap()).await;
    assert!(report.accepted && report.verdict.host.policy == Some(2));
    assert_eq!(report.verdict.vms[1].findings[0].code, Code::ImaUnknownFile);
}
