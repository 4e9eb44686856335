//! The store in one SQLite file, in write-ahead mode.
//!
//! A transaction survives the end of the process at once and a loss of power with the next checkpoint: what can be
//! lost then is the newest state and challenges. An answer to a lost challenge is refused, and a state that is a
//! little older takes in the same log again.

mod enrol;

use std::{path::Path, time::Duration};

use sqlx::{
    ConnectOptions as _, Row, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous},
};

use onequote_evidence::id::{HostId, Nonce, TimeMs};

use super::{Enrolment, Host, NonceUse, Store, StoreError};
use crate::{appraise::state::HostState, result::Verdict};

/// One step a version; the database's `user_version` counts the steps taken.
const MIGRATIONS: &[&str] = &[FIRST, ENROLMENT, EVIDENCE];

const FIRST: &str = "CREATE TABLE host (
        id TEXT PRIMARY KEY, url TEXT NOT NULL, ak BLOB NOT NULL, certificate BLOB NOT NULL,
        software_tpm INTEGER NOT NULL, policy INTEGER, state TEXT, version INTEGER NOT NULL, verdict TEXT
    ) STRICT;
    CREATE TABLE policy (
        host TEXT NOT NULL REFERENCES host (id) ON DELETE CASCADE, version INTEGER NOT NULL, text TEXT NOT NULL,
        time INTEGER NOT NULL, PRIMARY KEY (host, version)
    ) STRICT;
    CREATE TABLE nonce (
        nonce BLOB PRIMARY KEY, host TEXT NOT NULL REFERENCES host (id) ON DELETE CASCADE,
        issued INTEGER NOT NULL, expires INTEGER NOT NULL, answered INTEGER
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX nonce_expires ON nonce (expires);";

/// Joining: an endorsement key is one host's, unless that is retired.
const ENROLMENT: &str = "ALTER TABLE host ADD COLUMN ek BLOB;
    ALTER TABLE host ADD COLUMN vouched TEXT;
    ALTER TABLE host ADD COLUMN issued INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE host ADD COLUMN url_fixed INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE host ADD COLUMN standing TEXT NOT NULL DEFAULT 'enrolled'
        CHECK (standing IN ('enrolled', 'revoked', 'retired'));
    CREATE UNIQUE INDEX host_ek ON host (ek) WHERE standing <> 'retired';
    CREATE TABLE token (
        id TEXT PRIMARY KEY, secret BLOB NOT NULL, host TEXT, \"replace\" INTEGER NOT NULL,
        software_tpm INTEGER NOT NULL, url TEXT, created INTEGER NOT NULL, expires INTEGER NOT NULL,
        uses INTEGER NOT NULL CHECK (uses >= 0)
    ) STRICT;
    CREATE TABLE certificate (
        serial BLOB PRIMARY KEY, host TEXT NOT NULL REFERENCES host (id) ON DELETE CASCADE, ak BLOB NOT NULL,
        expires INTEGER NOT NULL, revoked INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX certificate_host ON certificate (host);
    CREATE TABLE audit (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, time INTEGER NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL,
        host TEXT, result TEXT NOT NULL, detail TEXT NOT NULL
    ) STRICT;";

/// The last evidence that was accepted of each host, so that only what is new need be sent.
const EVIDENCE: &str = "CREATE TABLE evidence (
        host TEXT PRIMARY KEY REFERENCES host (id) ON DELETE CASCADE, stream BLOB NOT NULL
    ) STRICT;";

/// The store.
#[derive(Debug, Clone)]
pub struct Sqlite {
    pool: SqlitePool,
}

impl Sqlite {
    /// Opens the database file, makes it when it is not there, and brings it to this version's form.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(Duration::from_secs(10))
            .foreign_keys(true)
            .disable_statement_logging();
        let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await;
        let store = Self { pool: pool.map_err(failed("opening it"))? };
        store.migrate().await?;
        Ok(store)
    }

    async fn migrate(&self) -> Result<(), StoreError> {
        let doing = "bringing it to this version";
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(failed(doing))?;
        let row = sqlx::query("SELECT user_version FROM pragma_user_version").fetch_one(&mut *tx).await;
        let done: i64 = row.map_err(failed(doing))?.get(0);
        let done = usize::try_from(done).unwrap_or(usize::MAX);
        if done > MIGRATIONS.len() {
            let why = "it was written by a newer verifier";
            return Err(StoreError::Database { doing, source: why.into() });
        }
        for (i, step) in MIGRATIONS.iter().enumerate().skip(done) {
            sqlx::raw_sql(*step).execute(&mut *tx).await.map_err(failed(doing))?;
            let count = sqlx::AssertSqlSafe(format!("PRAGMA user_version = {}", i + 1));
            sqlx::raw_sql(count).execute(&mut *tx).await.map_err(failed(doing))?;
        }
        tx.commit().await.map_err(failed(doing))
    }
}

impl Store for Sqlite {
    async fn enrol(&self, host: &Enrolment, replace: bool) -> Result<(), StoreError> {
        let sql = if replace {
            "INSERT INTO host (id, url, ak, certificate, software_tpm, version) VALUES (?1, ?2, ?3, ?4, ?5, 1)
             ON CONFLICT (id) DO UPDATE SET
                url = ?2, certificate = ?4, software_tpm = ?5, version = version + 1,
                state = CASE WHEN ak = ?3 THEN state END, verdict = CASE WHEN ak = ?3 THEN verdict END, ak = ?3,
                ek = NULL, vouched = NULL, issued = 0, url_fixed = 0, standing = 'enrolled'"
        } else {
            "INSERT INTO host (id, url, ak, certificate, software_tpm, version) VALUES (?1, ?2, ?3, ?4, ?5, 1)
             ON CONFLICT (id) DO UPDATE SET url = ?2, software_tpm = ?5, version = version + 1
                WHERE ak = ?3 AND certificate = ?4"
        };
        let query = sqlx::query(sql).bind(host.id.as_str()).bind(&host.url).bind(&host.ak).bind(&host.certificate);
        let done = query.bind(host.software_tpm).execute(&self.pool).await.map_err(failed("enrolling a host"))?;
        match done.rows_affected() {
            0 => Err(StoreError::HostExists(host.id.clone())),
            _ => Ok(()),
        }
    }

    async fn remove(&self, id: &HostId) -> Result<(), StoreError> {
        let query = sqlx::query("DELETE FROM host WHERE id = ?").bind(id.as_str()).execute(&self.pool);
        match query.await.map_err(failed("removing a host"))?.rows_affected() {
            0 => Err(StoreError::NoHost(id.clone())),
            _ => Ok(()),
        }
    }

    async fn hosts(&self) -> Result<Vec<HostId>, StoreError> {
        let rows = sqlx::query("SELECT id FROM host ORDER BY id").fetch_all(&self.pool);
        rows.await.map_err(failed("listing hosts"))?.iter().map(host_id).collect()
    }

    async fn host(&self, id: &HostId) -> Result<Host, StoreError> {
        let sql = "SELECT h.id, url, ak, certificate, software_tpm, state, h.version, verdict,
                standing, ek, vouched, issued, url_fixed,
                p.version AS policy_version, p.text AS policy
            FROM host h LEFT JOIN policy p ON p.host = h.id AND p.version = h.policy WHERE h.id = ?";
        let row = sqlx::query(sql).bind(id.as_str()).fetch_optional(&self.pool).await;
        let row = row.map_err(failed("reading a host"))?.ok_or_else(|| StoreError::NoHost(id.clone()))?;
        let json = |what, column: &str| row.get::<Option<String>, _>(column).map(|text| (what, text));
        let content =
            |what| move |e: serde_json::Error| StoreError::Content { what, host: id.to_string(), source: Box::new(e) };
        let state = json("state", "state").map(|(what, text)| serde_json::from_str(&text).map_err(content(what)));
        let verdict = json("verdict", "verdict").map(|(what, text)| serde_json::from_str(&text).map_err(content(what)));
        let policy = row.get::<Option<i64>, _>("policy_version").zip(row.get::<Option<String>, _>("policy"));
        Ok(Host {
            enrolment: Enrolment {
                id: host_id(&row)?,
                url: row.get("url"),
                ak: row.get("ak"),
                certificate: row.get("certificate"),
                software_tpm: row.get("software_tpm"),
            },
            policy: policy.map(|(version, text)| (version.unsigned_abs(), text)),
            state: state.transpose()?.unwrap_or_default(),
            version: row.get::<i64, _>("version").unsigned_abs(),
            verdict: verdict.transpose()?,
            standing: enrol::standing(&row),
            joined: enrol::joined(&row),
        })
    }

    async fn set_policy(&self, id: &HostId, text: &str, now: TimeMs) -> Result<u64, StoreError> {
        let doing = "putting a policy in force";
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(failed(doing))?;
        let sql = "INSERT INTO policy (host, version, text, time)
            SELECT id, 1 + coalesce((SELECT max(version) FROM policy WHERE host = ?1), 0), ?2, ?3
            FROM host WHERE id = ?1 RETURNING version";
        let row = sqlx::query(sql).bind(id.as_str()).bind(text).bind(number(now)).fetch_optional(&mut *tx).await;
        let row = row.map_err(failed(doing))?.ok_or_else(|| StoreError::NoHost(id.clone()))?;
        let version: i64 = row.get(0);
        let sql = "UPDATE host SET policy = ?2, version = version + 1 WHERE id = ?1";
        sqlx::query(sql).bind(id.as_str()).bind(version).execute(&mut *tx).await.map_err(failed(doing))?;
        tx.commit().await.map_err(failed(doing))?;
        Ok(version.unsigned_abs())
    }

    async fn issue(&self, nonce: &Nonce, id: &HostId, issued: TimeMs, expires: TimeMs) -> Result<(), StoreError> {
        let sql = "INSERT INTO nonce (nonce, host, issued, expires) VALUES (?, ?, ?, ?)";
        let query = sqlx::query(sql).bind(nonce.as_bytes()).bind(id.as_str());
        let query = query.bind(number(issued)).bind(number(expires));
        query.execute(&self.pool).await.map_err(failed("writing down a challenge")).map(|_| ())
    }

    async fn answer(&self, nonce: &Nonce, id: &HostId, now: TimeMs) -> Result<NonceUse, StoreError> {
        let sql = "UPDATE nonce SET answered = ?3 WHERE nonce = ?1 AND host = ?2 AND answered IS NULL";
        let query = sqlx::query(sql).bind(nonce.as_bytes()).bind(id.as_str()).bind(number(now));
        let done = query.execute(&self.pool).await.map_err(failed("marking a challenge as answered"))?;
        if done.rows_affected() == 1 {
            return Ok(NonceUse::Fresh);
        }
        Ok(if self.was_answered(nonce.as_bytes()).await? { NonceUse::Answered } else { NonceUse::Unknown })
    }

    async fn was_answered(&self, nonce: &[u8]) -> Result<bool, StoreError> {
        let sql = "SELECT 1 FROM nonce WHERE nonce = ? AND answered IS NOT NULL";
        let row = sqlx::query(sql).bind(nonce).fetch_optional(&self.pool).await;
        Ok(row.map_err(failed("looking up a challenge"))?.is_some())
    }

    async fn prune(&self, before: TimeMs) -> Result<(), StoreError> {
        let query = sqlx::query("DELETE FROM nonce WHERE expires < ?").bind(number(before)).execute(&self.pool);
        query.await.map_err(failed("forgetting old challenges")).map(|_| ())
    }

    async fn evidence(&self, id: &HostId) -> Result<Option<Vec<u8>>, StoreError> {
        let row = sqlx::query("SELECT stream FROM evidence WHERE host = ?").bind(id.as_str());
        let row = row.fetch_optional(&self.pool).await.map_err(failed("reading evidence"))?;
        Ok(row.map(|row| row.get("stream")))
    }

    async fn keep_evidence(&self, id: &HostId, stream: &[u8]) -> Result<(), StoreError> {
        // A host that was removed meanwhile has no place for it.
        let sql = "INSERT INTO evidence (host, stream) SELECT id, ?2 FROM host WHERE id = ?1
            ON CONFLICT (host) DO UPDATE SET stream = ?2";
        let query = sqlx::query(sql).bind(id.as_str()).bind(stream).execute(&self.pool);
        query.await.map_err(failed("keeping evidence")).map(|_| ())
    }

    async fn commit(
        &self,
        id: &HostId,
        version: u64,
        state: Option<&HostState>,
        verdict: Option<&Verdict>,
    ) -> Result<bool, StoreError> {
        let doing = "writing a verdict";
        let json = |e: serde_json::Error| StoreError::Database { doing, source: Box::new(e) };
        let state = state.map(serde_json::to_string).transpose().map_err(json)?;
        let verdict = verdict.map(serde_json::to_string).transpose().map_err(json)?;
        // A verdict alone counts too: one that rests on older evidence must not replace it.
        let sql = "UPDATE host SET state = coalesce(?3, state), verdict = coalesce(?4, verdict),
            version = version + 1 WHERE id = ?1 AND version = ?2";
        let query = sqlx::query(sql).bind(id.as_str()).bind(i64::try_from(version).unwrap_or(i64::MAX));
        let done = query.bind(state).bind(verdict).execute(&self.pool).await.map_err(failed(doing))?;
        Ok(done.rows_affected() == 1)
    }
}

fn host_id(row: &SqliteRow) -> Result<HostId, StoreError> {
    let id: String = row.get("id");
    id.parse().map_err(|e: &str| StoreError::Content { what: "name", host: id, source: e.into() })
}

fn number(time: TimeMs) -> i64 {
    i64::try_from(time.0).unwrap_or(i64::MAX)
}

fn failed(doing: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |e| StoreError::Database { doing, source: Box::new(e) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn enrolment(ak: u8) -> Enrolment {
        Enrolment {
            id: "h1".parse().unwrap(),
            url: "https://127.0.0.1:1".into(),
            ak: vec![ak],
            certificate: vec![2],
            software_tpm: true,
        }
    }

    #[tokio::test]
    async fn hosts_policies_and_states() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("verifier.sqlite");
        let store = Sqlite::open(&path).await.unwrap();
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
        assert_eq!(host.policy, Some((2, "b".into())));

        let mut state = HostState::default();
        state.accept_image("00000000-0000-0000-0000-000000000001".parse().unwrap(), "disk0", any_digest());
        assert!(store.commit(&id, host.version, Some(&state), None).await.unwrap());
        assert!(!store.commit(&id, host.version, Some(&state), None).await.unwrap(), "the version is an old one");
        let finding = crate::finding::Finding::new(crate::finding::Code::Unreachable, "h1");
        let verdict = Verdict::without_evidence(id.clone(), finding, None, TimeMs(3));
        let version = store.host(&id).await.unwrap().version;
        assert!(store.commit(&id, version, None, Some(&verdict)).await.unwrap());
        assert!(!store.commit(&id, version, None, Some(&verdict)).await.unwrap(), "a verdict alone counts too");
        drop(store);
        let store = Sqlite::open(&path).await.unwrap();
        assert_eq!(store.host(&id).await.unwrap().state, state);
        store.enrol(&enrolment(1), true).await.unwrap();
        assert_eq!(store.host(&id).await.unwrap().state, state, "the same key keeps the state");
        store.enrol(&enrolment(9), true).await.unwrap();
        assert_eq!(store.host(&id).await.unwrap().state, HostState::default());
        assert_eq!(store.hosts().await.unwrap(), std::slice::from_ref(&id));
        store.remove(&id).await.unwrap();
        assert!(store.hosts().await.unwrap().is_empty());
    }

    fn any_digest() -> onequote_evidence::digest::FileDigest {
        onequote_evidence::digest::FileDigest::sha256(onequote_evidence::id::Sha256::ZERO)
    }

    #[tokio::test]
    async fn a_nonce_serves_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = Sqlite::open(&dir.path().join("v.sqlite")).await.unwrap();
        store.enrol(&enrolment(1), false).await.unwrap();
        let id: HostId = "h1".parse().unwrap();
        let nonce = Nonce::new(vec![7; 32]).unwrap();
        assert_eq!(store.answer(&nonce, &id, TimeMs(1)).await.unwrap(), NonceUse::Unknown);
        store.issue(&nonce, &id, TimeMs(1), TimeMs(9)).await.unwrap();
        assert!(!store.was_answered(nonce.as_bytes()).await.unwrap());
        assert_eq!(store.answer(&nonce, &"h2".parse().unwrap(), TimeMs(2)).await.unwrap(), NonceUse::Unknown);
        assert_eq!(store.answer(&nonce, &id, TimeMs(2)).await.unwrap(), NonceUse::Fresh);
        assert_eq!(store.answer(&nonce, &id, TimeMs(3)).await.unwrap(), NonceUse::Answered);
        store.prune(TimeMs(10)).await.unwrap();
        assert!(!store.was_answered(nonce.as_bytes()).await.unwrap());
    }
}
