//! The tables, and the steps that lead to them from those of earlier versions.

use super::{
    driver::{Driver, Tx},
    failed,
};
use crate::{
    appraise::state::HostState,
    result::Verdict,
    store::{StoreError, form},
};
use onequote_evidence::digest::sha256;

/// The lock under which a database is brought to this version.
const LOCK: i64 = 0x6f6e_6571_0000_0001;

/// The number of the present form.
pub(super) const PRESENT: i64 = 4;

/// Steps of SQLite, counted by its `user_version`.
const SQLITE: &[&str] = &[FIRST, ENROLMENT, EVIDENCE];

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

/// What changes often stands apart from what does not, a policy's text is kept once, and evidence comes in parts.
const APART: &str = "ALTER TABLE host ADD COLUMN challenge BLOB;
    ALTER TABLE host ADD COLUMN challenge_expires INTEGER;
    ALTER TABLE host ADD COLUMN answered BLOB;
    CREATE TABLE verdict (host TEXT PRIMARY KEY REFERENCES host (id) ON DELETE CASCADE, body BLOB NOT NULL) STRICT;
    CREATE TABLE accepted (host TEXT PRIMARY KEY REFERENCES host (id) ON DELETE CASCADE, body BLOB NOT NULL) STRICT;
    CREATE TABLE tree (host TEXT PRIMARY KEY REFERENCES host (id) ON DELETE CASCADE, body BLOB NOT NULL) STRICT;
    CREATE TABLE part (
        host TEXT NOT NULL REFERENCES host (id) ON DELETE CASCADE, seq INTEGER NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (host, seq)
    ) STRICT;
    CREATE TABLE policy_text (digest BLOB PRIMARY KEY, text TEXT NOT NULL) STRICT;
    CREATE TABLE policy_version (
        host TEXT NOT NULL REFERENCES host (id) ON DELETE CASCADE, version INTEGER NOT NULL,
        digest BLOB NOT NULL REFERENCES policy_text (digest), time INTEGER NOT NULL, PRIMARY KEY (host, version)
    ) STRICT;
    CREATE INDEX policy_version_digest ON policy_version (digest);
    CREATE TABLE replica (id TEXT PRIMARY KEY, until INTEGER NOT NULL) STRICT;";

/// What has moved away.
const APART_REST: &str = "DROP TABLE policy;
    DROP TABLE evidence;
    ALTER TABLE host DROP COLUMN state;
    ALTER TABLE host DROP COLUMN verdict;";

/// The same in PostgreSQL, which began with this form.
const POSTGRES: &str = "CREATE TABLE form (number BIGINT NOT NULL);
    CREATE TABLE host (
        id TEXT COLLATE \"C\" PRIMARY KEY, url TEXT NOT NULL, ak BYTEA NOT NULL, certificate BYTEA NOT NULL,
        software_tpm BIGINT NOT NULL, policy BIGINT, version BIGINT NOT NULL,
        ek BYTEA, vouched TEXT, issued BIGINT NOT NULL DEFAULT 0, url_fixed BIGINT NOT NULL DEFAULT 0,
        standing TEXT NOT NULL DEFAULT 'enrolled' CHECK (standing IN ('enrolled', 'revoked', 'retired')),
        challenge BYTEA, challenge_expires BIGINT, answered BYTEA
    );
    CREATE UNIQUE INDEX host_ek ON host (ek) WHERE standing <> 'retired';
    CREATE TABLE verdict (host TEXT COLLATE \"C\" PRIMARY KEY REFERENCES host (id) ON DELETE CASCADE, body BYTEA NOT NULL);
    CREATE TABLE accepted (host TEXT COLLATE \"C\" PRIMARY KEY REFERENCES host (id) ON DELETE CASCADE, body BYTEA NOT NULL);
    CREATE TABLE tree (host TEXT COLLATE \"C\" PRIMARY KEY REFERENCES host (id) ON DELETE CASCADE, body BYTEA NOT NULL);
    CREATE TABLE part (
        host TEXT COLLATE \"C\" NOT NULL REFERENCES host (id) ON DELETE CASCADE, seq BIGINT NOT NULL,
        body BYTEA NOT NULL, PRIMARY KEY (host, seq)
    );
    ALTER TABLE verdict ALTER body SET STORAGE EXTERNAL;
    ALTER TABLE accepted ALTER body SET STORAGE EXTERNAL;
    ALTER TABLE tree ALTER body SET STORAGE EXTERNAL;
    ALTER TABLE part ALTER body SET STORAGE EXTERNAL;
    CREATE TABLE policy_text (digest BYTEA PRIMARY KEY, text TEXT NOT NULL);
    CREATE TABLE policy_version (
        host TEXT COLLATE \"C\" NOT NULL REFERENCES host (id) ON DELETE CASCADE, version BIGINT NOT NULL,
        digest BYTEA NOT NULL REFERENCES policy_text (digest), time BIGINT NOT NULL, PRIMARY KEY (host, version)
    );
    CREATE INDEX policy_version_digest ON policy_version (digest);
    CREATE TABLE nonce (
        nonce BYTEA PRIMARY KEY, host TEXT COLLATE \"C\" NOT NULL REFERENCES host (id) ON DELETE CASCADE,
        issued BIGINT NOT NULL, expires BIGINT NOT NULL, answered BIGINT
    );
    CREATE INDEX nonce_expires ON nonce (expires);
    CREATE INDEX nonce_host ON nonce (host);
    CREATE TABLE token (
        id TEXT PRIMARY KEY, secret BYTEA NOT NULL, host TEXT, \"replace\" BIGINT NOT NULL,
        software_tpm BIGINT NOT NULL, url TEXT, created BIGINT NOT NULL, expires BIGINT NOT NULL,
        uses BIGINT NOT NULL CHECK (uses >= 0)
    );
    CREATE TABLE certificate (
        serial BYTEA PRIMARY KEY, host TEXT COLLATE \"C\" NOT NULL REFERENCES host (id) ON DELETE CASCADE,
        ak BYTEA NOT NULL, expires BIGINT NOT NULL, revoked BIGINT NOT NULL
    );
    CREATE INDEX certificate_host ON certificate (host);
    CREATE TABLE audit (
        seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, time BIGINT NOT NULL, who TEXT NOT NULL,
        what TEXT NOT NULL, host TEXT, result TEXT NOT NULL, detail TEXT NOT NULL
    );
    CREATE TABLE replica (id TEXT PRIMARY KEY, until BIGINT NOT NULL);";

/// Brings a database to the present form, in one transaction.
pub(super) async fn migrate(driver: &Driver) -> Result<(), StoreError> {
    let mut tx = driver.begin().await.map_err(failed(DOING))?;
    tx.alone(LOCK).await.map_err(failed(DOING))?;
    match tx {
        Tx::Sqlite(_) => sqlite(&mut tx).await?,
        Tx::Postgres(_) => postgres(&mut tx).await?,
    }
    tx.commit().await.map_err(failed(DOING))
}

const DOING: &str = "bringing it to this version";

async fn sqlite(tx: &mut Tx) -> Result<(), StoreError> {
    let row = tx.row("SELECT user_version FROM pragma_user_version", &[]).await.map_err(failed(DOING))?;
    let done = row.map_or(Ok(0), |row| row.int("user_version")).map_err(failed(DOING))?;
    known(done)?;
    let skip = usize::try_from(done).unwrap_or(usize::MAX);
    for step in SQLITE.iter().skip(skip) {
        tx.script(step).await.map_err(failed(DOING))?;
    }
    if done < 4 {
        tx.script(APART).await.map_err(failed(DOING))?;
        move_apart(tx).await?;
        tx.script(APART_REST).await.map_err(failed(DOING))?;
        tx.script("PRAGMA user_version = 4").await.map_err(failed(DOING))?;
    }
    Ok(())
}

/// Takes states, verdicts, evidence and policies from where they were.
async fn move_apart(tx: &mut Tx) -> Result<(), StoreError> {
    let hosts = tx.rows("SELECT id, state, verdict FROM host", &[]).await.map_err(failed(DOING))?;
    for row in &hosts {
        let id = row.text("id").map_err(failed(DOING))?;
        let content = |what, source| StoreError::Content { what, host: id.clone(), source };
        if let Some(text) = row.maybe_text("state").map_err(failed(DOING))? {
            let state: HostState = serde_json::from_str(&text).map_err(|e| content("state", e.into()))?;
            let accepted = form::accepted(&state).map_err(|e| content("state", e))?;
            let trees = form::trees(&state).map_err(|e| content("state", e))?;
            let args = [id.as_str().into(), accepted.as_slice().into()];
            tx.run("INSERT INTO accepted (host, body) VALUES ($1, $2)", &args).await.map_err(failed(DOING))?;
            let args = [id.as_str().into(), trees.as_slice().into()];
            tx.run("INSERT INTO tree (host, body) VALUES ($1, $2)", &args).await.map_err(failed(DOING))?;
        }
        if let Some(text) = row.maybe_text("verdict").map_err(failed(DOING))? {
            let verdict: Verdict = serde_json::from_str(&text).map_err(|e| content("verdict", e.into()))?;
            let bytes = form::verdict(&verdict).map_err(|e| content("verdict", e))?;
            let args = [id.as_str().into(), bytes.as_slice().into()];
            tx.run("INSERT INTO verdict (host, body) VALUES ($1, $2)", &args).await.map_err(failed(DOING))?;
        }
    }
    let sql = "INSERT INTO part (host, seq, body) SELECT host, 1, stream FROM evidence";
    tx.run(sql, &[]).await.map_err(failed(DOING))?;
    let policies = tx.rows("SELECT host, version, text, time FROM policy", &[]).await.map_err(failed(DOING))?;
    for row in &policies {
        let (host, text) = (row.text("host").map_err(failed(DOING))?, row.text("text").map_err(failed(DOING))?);
        let version = row.int("version").map_err(failed(DOING))?;
        let time = row.int("time").map_err(failed(DOING))?;
        let digest = sha256(&[text.as_bytes()]);
        let args = [digest.as_bytes().into(), text.as_str().into()];
        let sql = "INSERT INTO policy_text (digest, text) VALUES ($1, $2) ON CONFLICT (digest) DO NOTHING";
        tx.run(sql, &args).await.map_err(failed(DOING))?;
        let args = [host.as_str().into(), version.into(), digest.as_bytes().into(), time.into()];
        let sql = "INSERT INTO policy_version (host, version, digest, time) VALUES ($1, $2, $3, $4)";
        tx.run(sql, &args).await.map_err(failed(DOING))?;
    }
    Ok(())
}

async fn postgres(tx: &mut Tx) -> Result<(), StoreError> {
    let sql = "SELECT to_regclass('form')::text AS name";
    let there = tx.row(sql, &[]).await.map_err(failed(DOING))?;
    let there = there.map_or(Ok(None), |row| row.maybe_text("name")).map_err(failed(DOING))?.is_some();
    if !there {
        tx.script(POSTGRES).await.map_err(failed(DOING))?;
        tx.run("INSERT INTO form (number) VALUES ($1)", &[PRESENT.into()]).await.map_err(failed(DOING))?;
        return Ok(());
    }
    let row = tx.row("SELECT number FROM form", &[]).await.map_err(failed(DOING))?;
    known(row.map_or(Ok(0), |row| row.int("number")).map_err(failed(DOING))?)
}

fn known(form: i64) -> Result<(), StoreError> {
    if form > PRESENT {
        return Err(StoreError::Database { doing: DOING, source: "it was written by a newer verifier".into() });
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use onequote_evidence::id::{HostId, TimeMs};
    use serde_json::json;

    use super::*;
    use crate::{
        finding::{Code, Finding},
        store::{Database, Store as _},
    };

    /// A database as the first `steps` steps left it, and what was written then.
    async fn old(path: &std::path::Path, steps: usize, rows: &'static str) {
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path).create_if_missing(true);
        let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
        for step in &SQLITE[..steps] {
            sqlx::raw_sql(*step).execute(&pool).await.unwrap();
        }
        let count = sqlx::AssertSqlSafe(format!("PRAGMA user_version = {steps}"));
        sqlx::raw_sql(count).execute(&pool).await.unwrap();
        sqlx::raw_sql(rows).execute(&pool).await.unwrap();
        pool.close().await;
    }

    const HOST: &str = "INSERT INTO host (id, url, ak, certificate, software_tpm, version)
        VALUES ('h1', 'https://127.0.0.1:1', x'05', x'02', 1, 3);
        INSERT INTO policy VALUES ('h1', 1, 'p', 7); UPDATE host SET policy = 1;";

    #[tokio::test]
    async fn a_database_of_the_first_version_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sqlite");
        old(&path, 1, HOST).await;
        for _ in 0..2 {
            let store = Database::open(&path).await.unwrap();
            let host = store.host(&"h1".parse().unwrap()).await.unwrap();
            assert_eq!((host.enrolment.ak.as_slice(), host.version), ([5].as_slice(), 3));
            assert_eq!(store.policy(&host).await.unwrap(), Some((1, "p".into())));
            assert_eq!((host.verdict, host.joined, host.state), (None, Default::default(), Default::default()));
        }
    }

    #[tokio::test]
    async fn what_the_third_version_kept_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sqlite");
        old(&path, 3, HOST).await;
        let id: HostId = "h1".parse().unwrap();
        let finding = Finding::new(Code::Unreachable, "h1");
        let verdict = Verdict::without_evidence(id.clone(), finding, None, TimeMs(3));
        let mut state = HostState::default();
        state.accept_image("00000000-0000-0000-0000-000000000001".parse().unwrap(), "disk0", {
            onequote_evidence::digest::FileDigest::sha256(onequote_evidence::id::Sha256::ZERO)
        });
        let mut written = serde_json::to_value(&state).unwrap();
        // As the third version wrote it, later items apart.
        let value = json!([{"bank": "sha256", "pcr": 12, "value": "aa".repeat(32)}]);
        written["accepted"] = json!({
            "epoch": {"number": 2, "id": "0b".repeat(16)}, "records": 12, "registers": value, "history_accepted": true,
            "clock": {"clock": 1000, "reset_count": 3, "restart_count": 0, "safe": true},
        });
        written["guests"] = json!([{"session": "0c".repeat(8), "boot": 1, "count": 9, "aggregate": "0d".repeat(32)}]);
        let pool = sqlx::SqlitePool::connect(path.to_str().unwrap()).await.unwrap();
        let set = sqlx::query("UPDATE host SET state = ?, verdict = ?").bind(written.to_string());
        set.bind(serde_json::to_string(&verdict).unwrap()).execute(&pool).await.unwrap();
        sqlx::raw_sql("INSERT INTO evidence VALUES ('h1', x'0102')").execute(&pool).await.unwrap();
        pool.close().await;

        let store = Database::open(&path).await.unwrap();
        let host = store.host(&id).await.unwrap();
        assert_eq!(host.verdict, Some(verdict));
        assert_eq!(serde_json::to_value(&host.state.tree).unwrap(), written["tree"]);
        assert_eq!(serde_json::to_value(&host.state.base).unwrap(), written["base"]);
        let accepted = host.state.accepted.unwrap();
        assert_eq!((accepted.records, accepted.clock.reset_count, accepted.boot_id), (12, 3, None));
        assert_eq!(serde_json::to_value(&accepted.registers).unwrap(), value);
        assert_eq!(serde_json::to_value(&host.state.guests).unwrap(), written["guests"]);
        assert_eq!(store.parts(&id).await.unwrap(), [vec![1, 2]]);
    }

    #[tokio::test]
    async fn a_newer_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sqlite");
        old(&path, 3, "PRAGMA user_version = 99").await;
        let refused = Database::open(&path).await.unwrap_err();
        assert!(std::error::Error::source(&refused).unwrap().to_string().contains("newer"), "{refused:?}");
    }
}
