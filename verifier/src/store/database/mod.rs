//! The store in a database: SQLite in a file of its own, or PostgreSQL.
//!
//! What is written is the same in both, and so are nearly all statements; [`driver`] knows the differences.
//!
//! *SQLite*, in write-ahead mode: a transaction survives the end of the process at once and a loss of power with the next
//! checkpoint: what can be lost then is the newest state and challenges. An answer to a lost challenge is refused, and a
//! state that is a little older takes in the same log again.
//!
//! *PostgreSQL* is as durable as it was set up to be; by its defaults what was committed survives.

mod care;
mod driver;
mod enrol;
mod migrate;
mod take;

use std::{path::Path, time::Duration};

use sqlx::{
    ConnectOptions as _,
    postgres::{PgConnectOptions, PgPoolOptions},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use onequote_evidence::{
    digest::sha256,
    id::{HostId, Nonce, Sha256, TimeMs},
};

use super::{Enrolment, Forgotten, Host, Limits, NonceUse, PolicyInForce, Store, StoreError, Take, Taken, form};
use crate::{appraise::state::HostState, challenge::Challenge};
use driver::{Arg, Driver, Row, Tx};
use take::{Job, Writer};

/// Connections to PostgreSQL, and those that read SQLite.
const CONNECTIONS: u32 = 8;
const READERS: u32 = 4;

/// How long to wait for a database or for a connection.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a process waits for another that writes the same file.
const BUSY: Duration = Duration::from_secs(20);

/// The lock under which names, keys and policies change.
const NAMES: i64 = 0x6f6e_6571_0000_0002;

/// The store.
#[derive(Debug, Clone)]
pub struct Database {
    driver: Driver,
    /// Writes verdicts; none where each writes its own.
    writer: Option<Writer>,
}

impl Database {
    /// Opens a SQLite file, makes it when it is not there, and brings it to this version's form.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(BUSY)
            .foreign_keys(true)
            .disable_statement_logging();
        let pool = |most| SqlitePoolOptions::new().max_connections(most).acquire_timeout(BUSY * 2);
        let write = pool(1).connect_with(options.clone()).await.map_err(failed("opening it"))?;
        let read = pool(READERS).connect_with(options).await.map_err(failed("opening it"))?;
        let driver = Driver::Sqlite { read, write };
        migrate::migrate(&driver).await?;
        let writer = Some(Writer::start(driver.clone()));
        Ok(Self { driver, writer })
    }

    /// Connects to a PostgreSQL database, `postgres://…`, and brings it to this version's form.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn connect(url: &str) -> Result<Self, StoreError> {
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            let why = "it does not begin with postgres://";
            return Err(StoreError::Database { doing: "reading its URL", source: why.into() });
        }
        let options: PgConnectOptions = url.parse().map_err(failed("reading its URL"))?;
        let options = options.application_name("onequote-verifier").disable_statement_logging();
        let pool = PgPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(PATIENCE);
        let driver = Driver::Postgres(pool.connect_with(options).await.map_err(failed("connecting to it"))?);
        migrate::migrate(&driver).await?;
        Ok(Self { driver, writer: None })
    }

    /// Copies a SQLite database into a new file while it is in use: one state of it, as of the copy's beginning.
    ///
    /// # Errors
    /// [`StoreError`]; with PostgreSQL always, which has its own means.
    pub async fn backup(&self, path: &Path) -> Result<(), StoreError> {
        care::backup(&self.driver, path).await
    }

    /// Reads everything that is kept. Gives what is there in words, and what cannot be read.
    ///
    /// # Errors
    /// [`StoreError`]: the database does not answer.
    pub async fn check(&self) -> Result<(String, Vec<String>), StoreError> {
        care::check(self).await
    }

    async fn begin(&self, doing: &'static str) -> Result<Tx, StoreError> {
        self.driver.begin().await.map_err(failed(doing))
    }
}

impl Store for Database {
    async fn enrol(&self, host: &Enrolment, replace: bool) -> Result<(), StoreError> {
        let doing = "enrolling a host";
        let mut tx = self.begin(doing).await?;
        tx.alone(NAMES).await.map_err(failed(doing))?;
        let sql = if replace {
            forget_unless_same(&mut tx, &host.id, &host.ak).await?;
            "INSERT INTO host (id, url, ak, certificate, software_tpm, version) VALUES ($1, $2, $3, $4, $5, 1)
             ON CONFLICT (id) DO UPDATE SET
                url = $2, certificate = $4, software_tpm = $5, version = host.version + 1, ak = $3,
                ek = NULL, vouched = NULL, issued = 0, url_fixed = 0, standing = 'enrolled'"
        } else {
            "INSERT INTO host (id, url, ak, certificate, software_tpm, version) VALUES ($1, $2, $3, $4, $5, 1)
             ON CONFLICT (id) DO UPDATE SET url = $2, software_tpm = $5, version = host.version + 1
                WHERE host.ak = $3 AND host.certificate = $4"
        };
        let Enrolment { id, url, ak, certificate, software_tpm } = host;
        let args = [id.as_str().into(), url.as_str().into(), ak.as_slice().into(), certificate.as_slice().into()];
        let args = [args.as_slice(), &[(*software_tpm).into()]].concat();
        if tx.run(sql, &args).await.map_err(failed(doing))? == 0 {
            return Err(StoreError::HostExists(host.id.clone()));
        }
        tx.commit().await.map_err(failed(doing))
    }

    async fn remove(&self, id: &HostId) -> Result<(), StoreError> {
        let done = self.driver.run("DELETE FROM host WHERE id = $1", &[id.as_str().into()]).await;
        match done.map_err(failed("removing a host"))? {
            0 => Err(StoreError::NoHost(id.clone())),
            _ => Ok(()),
        }
    }

    async fn hosts(&self) -> Result<Vec<HostId>, StoreError> {
        let rows = self.driver.rows("SELECT id FROM host ORDER BY id", &[]).await;
        rows.map_err(failed("listing hosts"))?.iter().map(host_id).collect()
    }

    async fn host(&self, id: &HostId) -> Result<Host, StoreError> {
        let doing = "reading a host";
        let sql = "SELECT h.id, h.url, h.ak, h.certificate, h.software_tpm, h.version, h.standing, h.ek, h.vouched,
                h.issued, h.url_fixed, h.challenge, h.challenge_expires,
                v.body AS verdict, a.body AS accepted, t.body AS trees,
                p.version AS policy_version, p.digest AS policy_digest
            FROM host h LEFT JOIN verdict v ON v.host = h.id LEFT JOIN accepted a ON a.host = h.id
                LEFT JOIN tree t ON t.host = h.id
                LEFT JOIN policy_version p ON p.host = h.id AND p.version = h.policy
            WHERE h.id = $1";
        let row = self.driver.row(sql, &[id.as_str().into()]).await.map_err(failed(doing))?;
        let row = row.ok_or_else(|| StoreError::NoHost(id.clone()))?;
        read_host(&row, id)
    }

    async fn version(&self, id: &HostId) -> Result<u64, StoreError> {
        let doing = "reading a host";
        let row = self.driver.row("SELECT version FROM host WHERE id = $1", &[id.as_str().into()]).await;
        let row = row.map_err(failed(doing))?.ok_or_else(|| StoreError::NoHost(id.clone()))?;
        row.number("version").map_err(failed(doing))
    }

    async fn set_policy(&self, id: &HostId, text: &str, now: TimeMs) -> Result<u64, StoreError> {
        let doing = "putting a policy in force";
        let mut tx = self.begin(doing).await?;
        tx.alone(NAMES).await.map_err(failed(doing))?;
        let digest = sha256(&[text.as_bytes()]);
        let sql = "INSERT INTO policy_text (digest, text) VALUES ($1, $2) ON CONFLICT (digest) DO NOTHING";
        tx.run(sql, &[bytes(&digest), text.into()]).await.map_err(failed(doing))?;
        let sql = "INSERT INTO policy_version (host, version, digest, time)
            SELECT id, 1 + coalesce((SELECT max(version) FROM policy_version WHERE host = $1), 0), $2, $3
            FROM host WHERE id = $1 RETURNING version";
        let row = tx.row(sql, &[id.as_str().into(), bytes(&digest), number(now)]).await.map_err(failed(doing))?;
        let row = row.ok_or_else(|| StoreError::NoHost(id.clone()))?;
        let version = row.number("version").map_err(failed(doing))?;
        let sql = "UPDATE host SET policy = $2, version = version + 1 WHERE id = $1";
        tx.run(sql, &[id.as_str().into(), version.into()]).await.map_err(failed(doing))?;
        tx.commit().await.map_err(failed(doing))?;
        Ok(version)
    }

    async fn policy_text(&self, digest: &Sha256) -> Result<Option<String>, StoreError> {
        let doing = "reading a policy";
        let row = self.driver.row("SELECT text FROM policy_text WHERE digest = $1", &[bytes(digest)]).await;
        row.map_err(failed(doing))?.map(|row| row.text("text")).transpose().map_err(failed(doing))
    }

    async fn issue(&self, nonce: &Nonce, id: &HostId, issued: TimeMs, expires: TimeMs) -> Result<(), StoreError> {
        let sql = "INSERT INTO nonce (nonce, host, issued, expires) VALUES ($1, $2, $3, $4)";
        let args = [nonce.as_bytes().into(), id.as_str().into(), number(issued), number(expires)];
        self.driver.run(sql, &args).await.map_err(failed("writing down a challenge")).map(|_| ())
    }

    async fn answer(&self, nonce: &Nonce, id: &HostId, now: TimeMs) -> Result<NonceUse, StoreError> {
        let sql = "UPDATE nonce SET answered = $3 WHERE nonce = $1 AND host = $2 AND answered IS NULL";
        let args = [nonce.as_bytes().into(), id.as_str().into(), number(now)];
        if self.driver.run(sql, &args).await.map_err(failed("marking a challenge as answered"))? == 1 {
            return Ok(NonceUse::Fresh);
        }
        Ok(if self.was_answered(id, nonce.as_bytes()).await? { NonceUse::Answered } else { NonceUse::Unknown })
    }

    async fn was_answered(&self, id: &HostId, nonce: &[u8]) -> Result<bool, StoreError> {
        let sql = "SELECT 1 FROM nonce WHERE nonce = $1 AND host = $2 AND answered IS NOT NULL
            UNION ALL SELECT 1 FROM host WHERE id = $2 AND answered = $1";
        let rows = self.driver.rows(sql, &[nonce.into(), id.as_str().into()]).await;
        Ok(!rows.map_err(failed("looking up a challenge"))?.is_empty())
    }

    async fn forget(&self, limits: &Limits) -> Result<Forgotten, StoreError> {
        care::forget(&self.driver, limits).await
    }

    async fn present(&self, replica: &str, lease: Duration) -> Result<Vec<String>, StoreError> {
        care::present(&self.driver, replica, lease).await
    }

    async fn take(&self, taken: Taken<'_>) -> Result<Take, StoreError> {
        let job = Job::new(&taken)?;
        match &self.writer {
            Some(writer) => writer.take(job).await,
            None => take::alone(&self.driver, &job).await,
        }
    }

    async fn parts(&self, id: &HostId) -> Result<Vec<Vec<u8>>, StoreError> {
        let doing = "reading evidence";
        let rows = self.driver.rows("SELECT body FROM part WHERE host = $1 ORDER BY seq", &[id.as_str().into()]).await;
        rows.map_err(failed(doing))?.iter().map(|row| row.bytes("body").map_err(failed(doing))).collect()
    }

    async fn put_state(&self, id: &HostId, version: u64, state: &HostState) -> Result<bool, StoreError> {
        let doing = "writing a state";
        let fail = |source| StoreError::Database { doing, source };
        let (accepted, trees) = (form::accepted(state).map_err(fail)?, form::trees(state).map_err(fail)?);
        let mut tx = self.begin(doing).await?;
        let sql = "UPDATE host SET version = version + 1 WHERE id = $1 AND version = $2";
        if tx.run(sql, &[id.as_str().into(), version.into()]).await.map_err(failed(doing))? == 0 {
            return Ok(false);
        }
        take::state(&mut tx, id.as_str().into(), Some(&accepted), Some(&trees)).await.map_err(failed(doing))?;
        tx.commit().await.map_err(failed(doing))?;
        Ok(true)
    }
}

fn read_host(row: &Row, id: &HostId) -> Result<Host, StoreError> {
    let fail = failed("reading a host");
    let content = |what| move |source| StoreError::Content { what, host: id.to_string(), source };
    let kept = |column| row.maybe_bytes(column).map_err(&fail);
    let (accepted, trees) = (kept("accepted")?, kept("trees")?);
    let state = form::state(accepted.as_deref(), trees.as_deref()).map_err(content("state"))?;
    let verdict = kept("verdict")?.map(|bytes| form::read_verdict(&bytes)).transpose().map_err(content("verdict"))?;
    let policy = match (row.maybe_int("policy_version").map_err(&fail)?, kept("policy_digest")?) {
        (Some(version), Some(digest)) => {
            let digest = digest.try_into().map_err(|_| content("policy")("a hash of odd size".into()))?;
            Some(PolicyInForce { version: version.unsigned_abs(), digest: Sha256(digest) })
        }
        _ => None,
    };
    let challenge = match (kept("challenge")?, row.maybe_int("challenge_expires").map_err(&fail)?) {
        (Some(nonce), Some(expires)) => {
            let nonce = Nonce::new(nonce).ok_or_else(|| content("challenge")("a nonce of odd size".into()))?;
            Some(Challenge { nonce, expires: TimeMs(expires.unsigned_abs()) })
        }
        _ => None,
    };
    Ok(Host {
        enrolment: Enrolment {
            id: host_id(row)?,
            url: row.text("url").map_err(&fail)?,
            ak: row.bytes("ak").map_err(&fail)?,
            certificate: row.bytes("certificate").map_err(&fail)?,
            software_tpm: row.truth("software_tpm").map_err(&fail)?,
        },
        policy,
        state,
        version: row.number("version").map_err(&fail)?,
        verdict,
        challenge,
        standing: enrol::standing(row)?,
        joined: enrol::joined(row)?,
    })
}

/// What was kept of a host ends when another attestation key takes its place.
async fn forget_unless_same(tx: &mut Tx, id: &HostId, ak: &[u8]) -> Result<(), StoreError> {
    let doing = "enrolling a host";
    let args = [id.as_str().into(), ak.into()];
    let row = tx.row("SELECT 1 FROM host WHERE id = $1 AND ak <> $2", &args).await.map_err(failed(doing))?;
    if row.is_none() {
        return Ok(());
    }
    for sql in [
        "DELETE FROM verdict WHERE host = $1",
        "DELETE FROM accepted WHERE host = $1",
        "DELETE FROM tree WHERE host = $1",
        "DELETE FROM part WHERE host = $1",
        "UPDATE host SET challenge = NULL, challenge_expires = NULL, answered = NULL WHERE id = $1",
    ] {
        tx.run(sql, &[id.as_str().into()]).await.map_err(failed(doing))?;
    }
    Ok(())
}

fn host_id(row: &Row) -> Result<HostId, StoreError> {
    let id = row.text("id").map_err(failed("reading a host's name"))?;
    id.parse().map_err(|e: &str| StoreError::Content { what: "name", host: id, source: e.into() })
}

fn bytes(digest: &Sha256) -> Arg<'_> {
    digest.as_bytes().into()
}

fn number(time: TimeMs) -> Arg<'static> {
    time.0.into()
}

fn failed(doing: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |e| StoreError::Database {
        doing,
        source: match e {
            sqlx::Error::PoolTimedOut => {
                format!("no connection in {} s: is it running, and can it be reached from here?", PATIENCE.as_secs())
                    .into()
            }
            e => Box::new(e),
        },
    }
}
