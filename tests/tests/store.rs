//! What must hold of the store, whatever database is behind it: one suite, run on SQLite and on PostgreSQL.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use onequote_evidence::id::{HostId, Nonce, Sha256, TimeMs};
use onequote_tests::lab::{Postgres, block_on};
use onequote_verifier::{
    appraise::state::HostState,
    challenge::Challenge,
    finding::{Code, Finding},
    result::Verdict,
    store::{
        Database, Enrolment, Forgotten, Limits, NonceUse, Part, Store as _, StoreError, Take, Taken,
        enrol::{AuditEntry, Claim, EnrolStore as _, IssuedCertificate, Join, Standing, Token},
    },
};
use sqlx::{Connection as _, PgConnection, SqliteConnection};

/// Where a test has its database.
enum Place {
    Sqlite(PathBuf),
    Postgres(String),
}

impl Place {
    async fn open(&self) -> Database {
        match self {
            Self::Sqlite(path) => Database::open(path).await,
            Self::Postgres(url) => Database::connect(url).await,
        }
        .unwrap()
    }

    /// Does what the store never would.
    async fn execute(&self, sql: &'static str) {
        match self {
            Self::Sqlite(path) => {
                let mut file = SqliteConnection::connect(path.to_str().unwrap()).await.unwrap();
                sqlx::raw_sql(sql).execute(&mut file).await.unwrap();
            }
            Self::Postgres(url) => {
                let mut server = PgConnection::connect(url).await.unwrap();
                sqlx::raw_sql(sql).execute(&mut server).await.unwrap();
            }
        }
    }
}

/// The suite: a test for each on SQLite, and one for all on PostgreSQL, since they share a server.
macro_rules! suite {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            use super::*;
            $(
                #[test]
                fn $name() {
                    let dir = tempfile::tempdir().unwrap();
                    let place = Place::Sqlite(dir.path().join("v.sqlite"));
                    block_on(async { super::$name(&place).await; Ok(()) }).unwrap();
                }
            )*
        }

        #[test]
        fn postgresql() {
            let server = Postgres::start_with(&["fsync=off"]).unwrap();
            $(
                println!("{}", stringify!($name));
                let place = Place::Postgres(server.database(stringify!($name)).unwrap());
                block_on(async { $name(&place).await; Ok(()) }).unwrap();
            )*
        }
    };
}

suite!(
    hosts_policies_and_states,
    a_take_is_all_or_nothing,
    of_many_takes_at_once_one_is_kept,
    two_stores_on_one_database_are_one,
    one_tpm_joins_as_one_host_however_many_ask,
    texts_of_policies_are_kept_once_and_as_long_as_somebody_has_them,
    verifiers_know_of_each_other_while_they_are_there,
    a_check_finds_what_cannot_be_read,
    a_nonce_serves_once,
    tokens_are_used_up,
    ids_and_keys_belong_together,
    withdrawn_hosts,
    certificates_end_with_the_join_that_gave_them,
    addresses_move_unless_they_are_fixed,
    the_audit_log_is_in_order,
);

fn enrolment(ak: u8) -> Enrolment {
    Enrolment {
        id: "h1".parse().unwrap(),
        url: "https://127.0.0.1:1".into(),
        ak: vec![ak],
        certificate: vec![2],
        software_tpm: true,
    }
}

async fn hosts_policies_and_states(place: &Place) {
    let store = place.open().await;
    let id: HostId = "h1".parse().unwrap();
    assert!(matches!(store.host(&id).await, Err(StoreError::NoHost(_))));
    store.enrol(&enrolment(1), false).await.unwrap();
    let moved = Enrolment { url: "https://127.0.0.1:2".into(), ..enrolment(1) };
    store.enrol(&moved, false).await.unwrap();
    assert_eq!(store.host(&id).await.unwrap().enrolment, moved, "the same host at another address");
    assert!(matches!(store.enrol(&enrolment(2), false).await, Err(StoreError::HostExists(_))));
    assert_eq!(store.set_policy(&id, "a", TimeMs(1)).await.unwrap(), 1);
    assert_eq!(store.set_policy(&id, "b", TimeMs(2)).await.unwrap(), 2);
    let host = store.host(&id).await.unwrap();
    assert_eq!(store.policy(&host).await.unwrap(), Some((2, "b".into())));
    assert_eq!(store.policy_text(&onequote_evidence::digest::sha256(&[b"a"])).await.unwrap(), Some("a".into()));

    let mut state = HostState::default();
    state.accept_image("00000000-0000-0000-0000-000000000001".parse().unwrap(), "disk0", any_digest());
    assert!(store.put_state(&id, host.version, &state).await.unwrap());
    assert!(!store.put_state(&id, host.version, &state).await.unwrap(), "the version is an old one");
    let version = store.host(&id).await.unwrap().version;
    let verdict = verdict(&id, 3);
    assert_eq!(take(&store, &id, version, None).await, Take::Kept(version + 1));
    assert_eq!(take(&store, &id, version, None).await, Take::Moved, "a verdict alone counts too");
    drop(store);
    let store = place.open().await;
    let host = store.host(&id).await.unwrap();
    assert_eq!((&host.state, host.verdict), (&state, Some(verdict)));
    store.enrol(&enrolment(1), true).await.unwrap();
    assert_eq!(store.host(&id).await.unwrap().state, state, "the same key keeps the state");
    store.enrol(&enrolment(9), true).await.unwrap();
    assert_eq!(store.host(&id).await.unwrap().state, HostState::default());
    assert_eq!(store.hosts().await.unwrap(), std::slice::from_ref(&id));
    store.remove(&id).await.unwrap();
    assert!(store.hosts().await.unwrap().is_empty());
}

fn verdict(id: &HostId, time: u64) -> Verdict {
    Verdict::without_evidence(id.clone(), Finding::new(Code::Unreachable, "h1"), None, TimeMs(time))
}

fn taken<'a>(id: &'a HostId, version: u64, verdict: &'a Verdict) -> Taken<'a> {
    let (now, nonce) = (TimeMs(5), None);
    Taken { host: id, version, nonce, now, verdict, state: None, trees: false, part: None, next: None }
}

async fn take(store: &Database, id: &HostId, version: u64, nonce: Option<&Nonce>) -> Take {
    store.take(Taken { nonce, ..taken(id, version, &verdict(id, 3)) }).await.unwrap()
}

fn nonce(byte: u8) -> Nonce {
    Nonce::new(vec![byte; 32]).unwrap()
}

async fn a_take_is_all_or_nothing(place: &Place) {
    let store = place.open().await;
    store.enrol(&enrolment(1), false).await.unwrap();
    let id: HostId = "h1".parse().unwrap();
    let host = async || store.host(&id).await.unwrap();
    store.issue(&nonce(1), &id, TimeMs(1), TimeMs(9)).await.unwrap();

    // A challenge that was never issued, and a version that is an old one: nothing is written.
    let (mut state, verdict) = (HostState::default(), verdict(&id, 3));
    state.accept_image("00000000-0000-0000-0000-000000000001".parse().unwrap(), "disk0", any_digest());
    let next = Challenge { nonce: nonce(2), expires: TimeMs(20) };
    let all = Taken {
        nonce: Some(&nonce(9)),
        state: Some(&state),
        trees: true,
        part: Some(Part::Whole(b"one")),
        next: Some(&next),
        ..taken(&id, 1, &verdict)
    };
    assert_eq!(store.take(all).await.unwrap(), Take::Nonce(NonceUse::Unknown));
    let moved = Taken { nonce: Some(&nonce(1)), version: 7, ..all };
    assert_eq!(store.take(moved).await.unwrap(), Take::Moved);
    let before = host().await;
    assert_eq!((before.version, before.verdict, before.challenge), (1, None, None));
    assert!(store.parts(&id).await.unwrap().is_empty() && !store.was_answered(&id, &[1; 32]).await.unwrap());

    // All of it.
    let all = Taken { nonce: Some(&nonce(1)), ..all };
    assert_eq!(store.take(all).await.unwrap(), Take::Kept(2));
    let kept = host().await;
    assert_eq!((kept.version, &kept.state, kept.verdict), (2, &state, Some(verdict.clone())));
    assert_eq!((kept.challenge, store.version(&id).await.unwrap()), (Some(next.clone()), 2));
    assert!(store.was_answered(&id, &[1; 32]).await.unwrap());
    let again = Taken { version: 2, ..all };
    assert_eq!(store.take(again).await.unwrap(), Take::Nonce(NonceUse::Answered));

    // The challenge in the host's row serves once too; a round that asked another one leaves it open.
    store.issue(&nonce(3), &id, TimeMs(1), TimeMs(9)).await.unwrap();
    assert_eq!(take(&store, &id, 2, Some(&nonce(3))).await, Take::Kept(3));
    assert_eq!(host().await.challenge, Some(next));
    let last = Challenge { nonce: nonce(4), expires: TimeMs(30) };
    let more =
        Taken { nonce: Some(&nonce(2)), part: Some(Part::More(b"two")), next: Some(&last), ..taken(&id, 3, &verdict) };
    assert_eq!(store.take(more).await.unwrap(), Take::Kept(4));
    assert_eq!(store.parts(&id).await.unwrap(), [b"one".to_vec(), b"two".to_vec()]);
    assert!(store.was_answered(&id, &[2; 32]).await.unwrap());
    let reused = Taken { version: 4, ..more };
    assert_eq!(store.take(reused).await.unwrap(), Take::Nonce(NonceUse::Answered));
    assert_eq!(take(&store, &id, 4, Some(&nonce(4))).await, Take::Kept(5));
    let end = host().await;
    assert_eq!((end.challenge, end.state), (None, state), "answered, and no other was asked");
    let whole = Taken { part: Some(Part::Whole(b"all")), ..taken(&id, 5, &verdict) };
    assert_eq!(store.take(whole).await.unwrap(), Take::Kept(6));
    assert_eq!(store.parts(&id).await.unwrap(), [b"all".to_vec()]);
    store.remove(&id).await.unwrap();
    assert_eq!(take(&store, &id, 6, None).await, Take::Moved);
    assert!(store.parts(&id).await.unwrap().is_empty());
}

async fn of_many_takes_at_once_one_is_kept(place: &Place) {
    let store = place.open().await;
    store.enrol(&enrolment(1), false).await.unwrap();
    let id: HostId = "h1".parse().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (store, id) = (store.clone(), id.clone());
        tasks.spawn(async move { take(&store, &id, 1, None).await });
    }
    let takes = tasks.join_all().await;
    assert_eq!(takes.iter().filter(|take| **take == Take::Kept(2)).count(), 1);
    assert_eq!(takes.iter().filter(|take| **take == Take::Moved).count(), 19);
}

async fn two_stores_on_one_database_are_one(place: &Place) {
    let stores = [place.open().await, place.open().await];
    stores[0].enrol(&enrolment(1), false).await.unwrap();
    let id: HostId = "h1".parse().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..10_u8 {
        let (store, id) = (stores[usize::from(n % 2)].clone(), id.clone());
        tasks.spawn(async move {
            // As a round does: what was written meanwhile is seen, and none is lost.
            for _ in 0..1000 {
                let host = store.host(&id).await.unwrap();
                let parts = store.parts(&id).await.unwrap().len();
                let verdict = verdict(&id, 3);
                let part = Some(Part::More(&[n]));
                match store.take(Taken { part, ..taken(&id, host.version, &verdict) }).await.unwrap() {
                    Take::Kept(version) => {
                        assert!(version == host.version + 1 && store.parts(&id).await.unwrap().len() > parts);
                        return version;
                    }
                    other => assert_eq!(other, Take::Moved),
                }
            }
            panic!("always too late");
        });
    }
    let mut versions = tasks.join_all().await;
    versions.sort_unstable();
    assert_eq!(versions, (2..12).collect::<Vec<_>>(), "each version is one's");
    assert_eq!(stores[1].host(&id).await.unwrap().version, 11);
    let mut parts = stores[0].parts(&id).await.unwrap();
    parts.sort();
    assert_eq!(parts, (0..10).map(|n| vec![n]).collect::<Vec<_>>());

    // One challenge is answered once, whoever is asked.
    stores[0].issue(&nonce(1), &id, TimeMs(1), TimeMs(9)).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..10 {
        let (store, id) = (stores[n % 2].clone(), id.clone());
        tasks.spawn(async move { store.answer(&nonce(1), &id, TimeMs(2)).await.unwrap() });
    }
    let uses = tasks.join_all().await;
    assert_eq!(uses.iter().filter(|used| **used == NonceUse::Fresh).count(), 1);
    assert_eq!(uses.iter().filter(|used| **used == NonceUse::Answered).count(), 9);
}

async fn texts_of_policies_are_kept_once_and_as_long_as_somebody_has_them(place: &Place) {
    let store = place.open().await;
    let ids: Vec<HostId> = ["h1", "h2"].map(id).to_vec();
    for (n, host) in (1..).zip(&ids) {
        store.enrol(&enrolment_of(host.as_str(), n), false).await.unwrap();
        store.set_policy(host, "same", NOW).await.unwrap();
    }
    store.set_policy(&ids[0], "other", NOW).await.unwrap();
    let hosts = [store.host(&ids[0]).await.unwrap(), store.host(&ids[1]).await.unwrap()];
    assert_eq!(store.policy(&hosts[0]).await.unwrap(), Some((2, "other".into())));
    assert_eq!(store.policy(&hosts[1]).await.unwrap(), Some((1, "same".into())));
    let limits = Limits { challenges: TimeMs(0), audit: None };
    assert_eq!(store.forget(&limits).await.unwrap().policies, 0, "old versions stay");
    store.remove(&ids[1]).await.unwrap();
    assert_eq!(store.forget(&limits).await.unwrap().policies, 0, "the first host had it too");
    store.remove(&ids[0]).await.unwrap();
    assert_eq!(store.forget(&limits).await.unwrap().policies, 2);
    assert_eq!(store.policy_text(&hosts[1].policy.unwrap().digest).await.unwrap(), None);
}

async fn verifiers_know_of_each_other_while_they_are_there(place: &Place) {
    let (a, b) = (place.open().await, place.open().await);
    let long = Duration::from_secs(60);
    assert_eq!(a.present("a", long).await.unwrap(), ["a"]);
    assert_eq!(b.present("b", long).await.unwrap(), ["a", "b"]);
    assert_eq!(a.present("a", long).await.unwrap(), ["a", "b"]);
    assert_eq!(b.present("b", Duration::ZERO).await.unwrap(), ["a"], "it goes");
    b.present("c", Duration::from_millis(1)).await.unwrap();
    let alone = async || a.present("a", long).await.unwrap() == ["a"];
    while !alone().await {
        tokio::task::yield_now().await;
    }
}

async fn a_check_finds_what_cannot_be_read(place: &Place) {
    let store = place.open().await;
    store.enrol(&enrolment(1), false).await.unwrap();
    let id: HostId = "h1".parse().unwrap();
    let verdict = verdict(&id, 3);
    store.take(Taken { part: Some(Part::Whole(b"12345")), ..taken(&id, 1, &verdict) }).await.unwrap();
    let (words, defects) = store.check().await.unwrap();
    assert!(words.ends_with("1 hosts, 5 bytes of evidence in 1 parts") && defects.is_empty(), "{words}, {defects:?}");
    place.execute("UPDATE verdict SET body = (SELECT body FROM part)").await;
    let (_, defects) = store.check().await.unwrap();
    assert!(matches!(&defects[..], [one] if one.contains("a verdict of host h1 that cannot be read")), "{defects:?}");
    assert!(matches!(store.host(&id).await, Err(StoreError::Content { what: "verdict", .. })));
}

async fn one_tpm_joins_as_one_host_however_many_ask(place: &Place) {
    let stores = [place.open().await, place.open().await];
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..8_u8 {
        let store = stores[usize::from(n % 2)].clone();
        tasks.spawn(async move {
            let name = format!("t{n}");
            store.create_token(&token(&name), NOW).await.unwrap();
            let (host, ek) = (enrolment_of(&format!("h{n}"), n), [1]);
            let certificate = issued(&host.id, vec![n], &[n]);
            let join =
                Join { token: &name, host: &host, ek: &ek, vouched: "", url_fixed: false, certificate: &certificate };
            store.join(&join, NOW).await.unwrap().is_ok()
        });
    }
    let joined = tasks.join_all().await;
    assert_eq!(joined.iter().filter(|joined| **joined).count(), 1, "{joined:?}");
    assert_eq!(stores[0].hosts().await.unwrap().len(), 1);
}

fn any_digest() -> onequote_evidence::digest::FileDigest {
    onequote_evidence::digest::FileDigest::sha256(Sha256::ZERO)
}

async fn a_nonce_serves_once(place: &Place) {
    let store = place.open().await;
    store.enrol(&enrolment(1), false).await.unwrap();
    let id: HostId = "h1".parse().unwrap();
    let nonce = Nonce::new(vec![7; 32]).unwrap();
    assert_eq!(store.answer(&nonce, &id, TimeMs(1)).await.unwrap(), NonceUse::Unknown);
    store.issue(&nonce, &id, TimeMs(1), TimeMs(9)).await.unwrap();
    assert!(!store.was_answered(&id, nonce.as_bytes()).await.unwrap());
    assert_eq!(store.answer(&nonce, &"h2".parse().unwrap(), TimeMs(2)).await.unwrap(), NonceUse::Unknown);
    assert_eq!(store.answer(&nonce, &id, TimeMs(2)).await.unwrap(), NonceUse::Fresh);
    assert_eq!(store.answer(&nonce, &id, TimeMs(3)).await.unwrap(), NonceUse::Answered);
    let limits = Limits { challenges: TimeMs(9), audit: None };
    assert_eq!(store.forget(&limits).await.unwrap(), Forgotten::default());
    let limits = Limits { challenges: TimeMs(10), audit: None };
    assert_eq!(store.forget(&limits).await.unwrap(), Forgotten { challenges: 1, ..Forgotten::default() });
    assert!(!store.was_answered(&id, nonce.as_bytes()).await.unwrap());
}

const NOW: TimeMs = TimeMs(1000);

fn id(text: &str) -> HostId {
    text.parse().unwrap()
}

fn token(name: &str) -> Token {
    Token {
        id: name.into(),
        secret: Sha256([1; 32]),
        host: None,
        replace: false,
        software_tpm: true,
        url: None,
        expires: TimeMs(2000),
        uses: 1,
    }
}

fn enrolment_of(host: &str, ak: u8) -> Enrolment {
    let url = "https://127.0.0.1:1".to_owned();
    Enrolment { id: id(host), url, ak: vec![ak], certificate: vec![2], software_tpm: true }
}

/// Joins with a new token, changed by `change`.
async fn join(store: &Database, host: &str, ek: u8, ak: u8, change: fn(&mut Token)) -> Result<(), &'static str> {
    let serial = uuid::Uuid::new_v4().into_bytes();
    let mut token = token(&hex::encode(serial));
    change(&mut token);
    store.create_token(&token, NOW).await.unwrap();
    join_with(store, &token.id, host, ek, ak, &serial).await
}

async fn join_with(
    store: &Database,
    token: &str,
    host: &str,
    ek: u8,
    ak: u8,
    serial: &[u8],
) -> Result<(), &'static str> {
    let host = enrolment_of(host, ak);
    let ek = [ek];
    let certificate = issued(&host.id, vec![ak], serial);
    let url_fixed = store.token(token).await.unwrap().is_some_and(|token| token.url.is_some());
    let join = Join { token, host: &host, ek: &ek, vouched: "", url_fixed, certificate: &certificate };
    let claim = Claim { token, host: &host.id, ek: &ek, ak: &host.ak };
    let may = store.may_join(claim, NOW).await.unwrap();
    let done = store.join(&join, NOW).await.unwrap();
    assert_eq!(may, done, "asked before and done");
    done.map_err(|refusal| refusal.code())
}

fn issued(host: &HostId, ak: Vec<u8>, serial: &[u8]) -> IssuedCertificate {
    IssuedCertificate { serial: serial.to_vec(), host: host.clone(), ak, expires: TimeMs(5000), revoked: false }
}

async fn tokens_are_used_up(place: &Place) {
    let store = place.open().await;
    store.create_token(&token("t"), NOW).await.unwrap();
    assert_eq!(store.token("t").await.unwrap(), Some(token("t")));
    assert_eq!(join_with(&store, "t", "h1", 1, 1, b"1").await, Ok(()));
    assert_eq!(join_with(&store, "t", "h1", 1, 1, b"2").await, Err("token-used"));
    assert_eq!(join_with(&store, "u", "h1", 1, 1, b"2").await, Err("token-unknown"));
    assert_eq!(join(&store, "h1", 1, 1, |t| t.expires = NOW).await, Err("token-expired"));
    assert_eq!(join(&store, "h1", 1, 1, |t| t.host = Some(id("h2"))).await, Err("token-other-host"));
    let many = Token { uses: 2, ..token("many") };
    store.create_token(&many, NOW).await.unwrap();
    assert_eq!(join_with(&store, "many", "h2", 2, 2, b"3").await, Ok(()));
    assert_eq!(join_with(&store, "many", "h3", 3, 3, b"4").await, Ok(()));
    assert_eq!(join_with(&store, "many", "h4", 4, 4, b"5").await, Err("token-used"));
    assert!(matches!(store.host(&id("h4")).await, Err(StoreError::NoHost(_))));
}

async fn ids_and_keys_belong_together(place: &Place) {
    let store = place.open().await;
    join(&store, "h1", 1, 1, |_| {}).await.unwrap();
    assert_eq!(join(&store, "h1", 1, 1, |_| {}).await, Ok(()), "the same TPM again");
    assert_eq!(join(&store, "h1", 2, 1, |_| {}).await, Err("id-other-ek"));
    assert_eq!(join(&store, "h1", 1, 2, |_| {}).await, Err("id-other-ak"));
    assert_eq!(join(&store, "h2", 1, 2, |_| {}).await, Err("ek-in-use"));
    assert_eq!(join(&store, "h2", 2, 1, |_| {}).await, Err("ak-in-use"));
    assert_eq!(join(&store, "h1", 2, 2, |t| (t.host, t.replace) = (Some(id("h1")), true)).await, Ok(()));
    assert_eq!(store.joined(&id("h1")).await.unwrap().1.ek, Some(vec![2]));
    assert_eq!(join(&store, "h2", 1, 1, |_| {}).await, Ok(()), "the first TPM is free again");
    assert_eq!(join(&store, "h1", 1, 3, |t| t.replace = true).await, Err("ek-in-use"), "not even then");
    // By hand: no endorsement key is known.
    store.enrol(&enrolment_of("h5", 5), false).await.unwrap();
    assert_eq!(join(&store, "h5", 5, 6, |_| {}).await, Err("id-other-ak"));
    assert_eq!(join(&store, "h6", 6, 5, |_| {}).await, Err("ak-in-use"));
    assert_eq!(join(&store, "h5", 5, 5, |_| {}).await, Ok(()));
}

async fn withdrawn_hosts(place: &Place) {
    let store = place.open().await;
    join(&store, "h1", 1, 1, |_| {}).await.unwrap();
    store.set_standing(&id("h1"), Standing::Revoked).await.unwrap();
    assert_eq!(store.joined(&id("h1")).await.unwrap().0, Standing::Revoked);
    assert_eq!(join(&store, "h1", 1, 1, |_| {}).await, Err("host-withdrawn"));
    assert_eq!(join(&store, "h2", 1, 1, |_| {}).await, Err("ek-in-use"), "its TPM is not free");
    store.set_standing(&id("h1"), Standing::Retired).await.unwrap();
    assert_eq!(join(&store, "h1", 1, 1, |_| {}).await, Err("host-withdrawn"));
    assert_eq!(join(&store, "h2", 1, 1, |_| {}).await, Ok(()), "now it is");
    assert_eq!(join(&store, "h1", 3, 3, |t| t.replace = true).await, Ok(()));
    assert_eq!(store.joined(&id("h1")).await.unwrap().0, Standing::Enrolled);
    let nobody = store.set_standing(&id("h9"), Standing::Revoked).await;
    assert!(matches!(nobody, Err(StoreError::NoHost(_))));
}

async fn certificates_end_with_the_join_that_gave_them(place: &Place) {
    let store = place.open().await;
    for name in ["a", "b"] {
        store.create_token(&token(name), NOW).await.unwrap();
    }
    join_with(&store, "a", "h1", 1, 1, b"first").await.unwrap();
    let first = store.certificate(b"first").await.unwrap().unwrap();
    assert!(!first.revoked && first.host == id("h1") && first.ak == [1]);
    let renewed = IssuedCertificate { serial: b"renewed".to_vec(), ..first };
    store.add_certificate(&renewed).await.unwrap();
    join_with(&store, "b", "h1", 1, 1, b"second").await.unwrap();
    let revoked = async |serial: &[u8]| store.certificate(serial).await.unwrap().unwrap().revoked;
    assert!(revoked(b"first").await && revoked(b"renewed").await && !revoked(b"second").await);
    store.set_standing(&id("h1"), Standing::Revoked).await.unwrap();
    assert!(revoked(b"second").await);
    assert_eq!(store.certificate(b"none").await.unwrap(), None);
}

async fn addresses_move_unless_they_are_fixed(place: &Place) {
    let store = place.open().await;
    join(&store, "h1", 1, 1, |_| {}).await.unwrap();
    store.move_to(&id("h1"), "https://127.0.0.1:2").await.unwrap();
    assert_eq!(store.host(&id("h1")).await.unwrap().enrolment.url, "https://127.0.0.1:2");
    join(&store, "h1", 1, 1, |t| t.url = Some("https://127.0.0.1:1".into())).await.unwrap();
    store.move_to(&id("h1"), "https://127.0.0.1:3").await.unwrap();
    assert_eq!(store.host(&id("h1")).await.unwrap().enrolment.url, "https://127.0.0.1:1");
}

async fn the_audit_log_is_in_order(place: &Place) {
    let store = place.open().await;
    let entry = |n: u64| AuditEntry {
        time: TimeMs(n),
        who: "operator 0".into(),
        what: "token-create".into(),
        host: (n == 2).then(|| id("h1")),
        result: "ok".into(),
        detail: n.to_string(),
    };
    for n in 1..=3 {
        store.audit(&entry(n)).await.unwrap();
    }
    assert_eq!(store.audit_log(2).await.unwrap(), [entry(2), entry(3)]);
    let limits = Limits { challenges: TimeMs(0), audit: Some(TimeMs(3)) };
    assert_eq!(store.forget(&limits).await.unwrap(), Forgotten { audit: 2, ..Forgotten::default() });
    assert_eq!(store.audit_log(9).await.unwrap(), [entry(3)]);
}

/// Writes verdicts as fast as it can until it is told to stop; gives how many.
fn keep_writing(store: &Database, id: &HostId) -> (Arc<AtomicBool>, tokio::task::JoinHandle<u64>) {
    let (stop, store, id) = (Arc::new(AtomicBool::new(false)), store.clone(), id.clone());
    let told = Arc::clone(&stop);
    let writing = tokio::spawn(async move {
        let mut version = store.version(&id).await.unwrap();
        while !told.load(Ordering::Relaxed) {
            let verdict = verdict(&id, version);
            let taken = Taken { part: Some(Part::More(b"more")), ..taken(&id, version, &verdict) };
            let Take::Kept(next) = store.take(taken).await.unwrap() else { panic!("nobody else writes") };
            version = next;
        }
        version - 1
    });
    (stop, writing)
}

/// A copy is one state: as many parts as takes, and the last one's verdict.
async fn is_whole(copy: &Database, id: &HostId) {
    let (words, defects) = copy.check().await.unwrap();
    assert!(defects.is_empty(), "{words}: {defects:?}");
    let host = copy.host(id).await.unwrap();
    assert!(host.version > 1);
    assert_eq!(copy.parts(id).await.unwrap().len() as u64, host.version - 1);
    assert_eq!(host.verdict.unwrap().time.0, host.version - 1);
    // It goes on from there.
    assert_eq!(take(copy, id, host.version, None).await, Take::Kept(host.version + 1));
}

#[test]
fn a_copy_of_sqlite_in_use_is_restored_by_putting_it_in_place() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let store = Place::Sqlite(dir.path().join("v.sqlite")).open().await;
        store.enrol(&enrolment(1), false).await.unwrap();
        let id: HostId = "h1".parse().unwrap();
        let (stop, writing) = keep_writing(&store, &id);
        while store.version(&id).await.unwrap() < 20 {
            tokio::task::yield_now().await;
        }
        let copy = dir.path().join("copy");
        store.backup(&copy).await.unwrap();
        assert!(store.backup(&copy).await.is_err(), "never over something that is there");
        stop.store(true, Ordering::Relaxed);
        writing.await.unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&copy).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        is_whole(&Database::open(&copy).await.unwrap(), &id).await;
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_dump_of_postgresql_in_use_is_restored_into_an_empty_database() {
    let dir = tempfile::tempdir().unwrap();
    let server = Postgres::start_with(&["fsync=off"]).unwrap();
    let (url, other) = (server.database("first").unwrap(), server.database("second").unwrap());
    block_on(async {
        let store = Database::connect(&url).await.unwrap();
        store.enrol(&enrolment(1), false).await.unwrap();
        let id: HostId = "h1".parse().unwrap();
        let (stop, writing) = keep_writing(&store, &id);
        while store.version(&id).await.unwrap() < 20 {
            tokio::task::yield_now().await;
        }
        let file = dir.path().join("dump").display().to_string();
        server.tool("pg_dump", &["--format=custom", "--file", &file, "first"])?;
        stop.store(true, Ordering::Relaxed);
        writing.await.unwrap();
        server.tool("pg_restore", &["--dbname=second", "--exit-on-error", &file])?;
        is_whole(&Database::connect(&other).await.unwrap(), &id).await;
        let refused = store.backup(&dir.path().join("copy")).await.unwrap_err();
        assert!(std::error::Error::source(&refused).unwrap().to_string().contains("pg_dump"), "{refused:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_server_that_is_away_is_an_error_and_then_everything_goes_on() {
    let mut server = Postgres::start().unwrap();
    let url = server.database("v").unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (store, id) = (runtime.block_on(Database::connect(&url)).unwrap(), "h1".parse().unwrap());
    runtime.block_on(store.enrol(&enrolment(1), false)).unwrap();
    assert_eq!(runtime.block_on(take(&store, &id, 1, None)), Take::Kept(2));
    server.stop().unwrap();
    for _ in 0..2 {
        let away = runtime.block_on(store.take(taken(&id, 2, &verdict(&id, 3)))).unwrap_err();
        assert!(matches!(&away, StoreError::Database { .. }), "{away:?}");
        assert!(matches!(runtime.block_on(store.host(&id)), Err(StoreError::Database { .. })));
    }
    server.resume().unwrap();
    let version = runtime.block_on(store.host(&id)).unwrap().version;
    assert_eq!((version, runtime.block_on(take(&store, &id, 2, None))), (2, Take::Kept(3)));
}

#[test]
fn takes_of_one_host_at_two_replicas_wait_for_each_other() {
    let server = Postgres::start_with(&["fsync=off"]).unwrap();
    let url = server.database("v").unwrap();
    block_on(async {
        let stores = [Database::connect(&url).await?, Database::connect(&url).await?];
        stores[0].enrol(&enrolment(1), false).await?;
        // Somebody has the host's row until both have come to it.
        let mut holder = PgConnection::connect(&url).await?;
        sqlx::raw_sql("BEGIN; SELECT 1 FROM host FOR UPDATE").execute(&mut holder).await?;
        let takes = stores.map(|store| {
            let id: HostId = "h1".parse().unwrap();
            tokio::spawn(async move { take(&store, &id, 1, None).await })
        });
        let mut watcher = PgConnection::connect(&url).await?;
        let sql = "SELECT 1 FROM pg_stat_activity
            WHERE application_name = 'onequote-verifier' AND wait_event_type = 'Lock'";
        while sqlx::query(sql).fetch_all(&mut watcher).await?.len() < 2 {
            assert!(takes.iter().all(|take| !take.is_finished()));
            tokio::task::yield_now().await;
        }
        sqlx::raw_sql("COMMIT").execute(&mut holder).await?;
        let [one, other] = takes;
        let (one, other) = (one.await?, other.await?);
        assert!(
            [(Take::Kept(2), Take::Moved), (Take::Moved, Take::Kept(2))].contains(&(one, other)),
            "{one:?} {other:?}"
        );
        Ok(())
    })
    .unwrap();
}
