//! Keeping what appraisals came to.
//!
//! In SQLite one task writes them: it takes all that wait and commits them in one transaction, so that the price of a
//! commit is shared. Whoever waits is told after the commit, never before. In PostgreSQL each is a transaction of its own,
//! and the database shares its commits itself.

use tokio::sync::{mpsc, oneshot};

use onequote_evidence::id::TimeMs;

use super::{
    driver::{Arg, Driver, Tx},
    failed, number,
};
use crate::store::{NonceUse, Part, StoreError, Take, Taken, form};

/// The most that are written in one transaction.
const MOST: usize = 256;

const DOING: &str = "writing a verdict";

/// What is to be written, in the form in which it is kept.
pub(super) struct Job {
    host: String,
    version: u64,
    nonce: Option<Vec<u8>>,
    now: TimeMs,
    verdict: Vec<u8>,
    accepted: Option<Vec<u8>>,
    trees: Option<Vec<u8>>,
    part: Option<(bool, Vec<u8>)>,
    next: Option<(Vec<u8>, TimeMs)>,
}

impl Job {
    pub(super) fn new(taken: &Taken<'_>) -> Result<Self, StoreError> {
        let fail = |source| StoreError::Database { doing: DOING, source };
        let trees = taken.state.filter(|_| taken.trees);
        Ok(Self {
            host: taken.host.to_string(),
            version: taken.version,
            nonce: taken.nonce.map(|nonce| nonce.as_bytes().to_vec()),
            now: taken.now,
            verdict: form::verdict(taken.verdict).map_err(fail)?,
            accepted: taken.state.map(form::accepted).transpose().map_err(fail)?,
            trees: trees.map(form::trees).transpose().map_err(fail)?,
            part: taken.part.map(|part| match part {
                Part::Whole(bytes) => (true, bytes.to_vec()),
                Part::More(bytes) => (false, bytes.to_vec()),
            }),
            next: taken.next.map(|next| (next.nonce.as_bytes().to_vec(), next.expires)),
        })
    }
}

type Reply = oneshot::Sender<Result<Take, StoreError>>;

/// The way to the task that writes.
#[derive(Debug, Clone)]
pub(super) struct Writer(mpsc::Sender<(Job, Reply)>);

impl Writer {
    /// Starts the task. It ends when nobody has the writer any more.
    pub(super) fn start(driver: Driver) -> Self {
        let (jobs, waiting) = mpsc::channel(MOST);
        tokio::spawn(write(driver, waiting));
        Self(jobs)
    }

    pub(super) async fn take(&self, job: Job) -> Result<Take, StoreError> {
        let (reply, answer) = oneshot::channel();
        let gone = || StoreError::Database { doing: DOING, source: "the task that writes has ended".into() };
        self.0.send((job, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

async fn write(driver: Driver, mut waiting: mpsc::Receiver<(Job, Reply)>) {
    let mut batch = Vec::new();
    while waiting.recv_many(&mut batch, MOST).await > 0 {
        let (jobs, replies): (Vec<Job>, Vec<Reply>) = batch.drain(..).unzip();
        match together(&driver, &jobs).await {
            Ok(taken) => {
                for (reply, take) in replies.into_iter().zip(taken) {
                    // Who does not wait any more need not know.
                    let _ = reply.send(Ok(take));
                }
            }
            Err(e) => {
                for reply in replies {
                    let _ = reply.send(Err(StoreError::Database { doing: DOING, source: e.to_string().into() }));
                }
            }
        }
    }
}

/// All in one transaction, or none.
async fn together(driver: &Driver, jobs: &[Job]) -> Result<Vec<Take>, sqlx::Error> {
    let mut tx = driver.begin().await?;
    let mut taken = Vec::with_capacity(jobs.len());
    for job in jobs {
        taken.push(one(&mut tx, job).await?);
    }
    tx.commit().await?;
    Ok(taken)
}

/// One in a transaction of its own.
pub(super) async fn alone(driver: &Driver, job: &Job) -> Result<Take, StoreError> {
    let mut tx = driver.begin().await.map_err(failed(DOING))?;
    let take = one(&mut tx, job).await.map_err(failed(DOING))?;
    tx.commit().await.map_err(failed(DOING))?;
    Ok(take)
}

/// Writes nothing unless it gives [`Take::Kept`].
async fn one(tx: &mut Tx, job: &Job) -> Result<Take, sqlx::Error> {
    let host = Arg::from(job.host.as_str());
    let sql = tx.locking(
        "SELECT version, challenge, challenge_expires, answered FROM host WHERE id = $1",
        "SELECT version, challenge, challenge_expires, answered FROM host WHERE id = $1 FOR UPDATE",
    );
    let Some(row) = tx.row(sql, &[host]).await? else { return Ok(Take::Moved) };
    if row.number("version")? != job.version {
        return Ok(Take::Moved);
    }
    let challenge = row.maybe_bytes("challenge")?;
    let mut answered = row.maybe_bytes("answered")?;
    let mut open = challenge.clone().zip(row.maybe_int("challenge_expires")?);
    if let Some(nonce) = &job.nonce {
        if challenge.as_ref() == Some(nonce) {
            (answered, open) = (challenge, None);
        } else if answered.as_ref() == Some(nonce) {
            return Ok(Take::Nonce(NonceUse::Answered));
        } else {
            let sql = "UPDATE nonce SET answered = $3 WHERE nonce = $1 AND host = $2 AND answered IS NULL";
            if tx.run(sql, &[nonce.as_slice().into(), host, number(job.now)]).await? != 1 {
                let sql = "SELECT 1 FROM nonce WHERE nonce = $1 AND host = $2";
                let known = tx.row(sql, &[nonce.as_slice().into(), host]).await?.is_some();
                return Ok(Take::Nonce(if known { NonceUse::Answered } else { NonceUse::Unknown }));
            }
        }
    }
    if let Some((nonce, expires)) = &job.next {
        open = Some((nonce.clone(), i64::try_from(expires.0).unwrap_or(i64::MAX)));
    }
    let (challenge, expires) = open.unzip();
    let args = [host, Arg::Bytes(challenge.as_deref()), Arg::Int(expires), Arg::Bytes(answered.as_deref())];
    let sql =
        "UPDATE host SET version = version + 1, challenge = $2, challenge_expires = $3, answered = $4 WHERE id = $1";
    tx.run(sql, &args).await?;
    let sql = "INSERT INTO verdict (host, body) VALUES ($1, $2) ON CONFLICT (host) DO UPDATE SET body = excluded.body";
    tx.run(sql, &[host, job.verdict.as_slice().into()]).await?;
    state(tx, host, job.accepted.as_deref(), job.trees.as_deref()).await?;
    if let Some((whole, bytes)) = &job.part {
        if *whole {
            tx.run("DELETE FROM part WHERE host = $1", &[host]).await?;
        }
        let sql = "INSERT INTO part (host, seq, body)
            SELECT $1, coalesce(max(seq), 0) + 1, $2 FROM part WHERE host = $1";
        tx.run(sql, &[host, bytes.as_slice().into()]).await?;
    }
    Ok(Take::Kept(job.version + 1))
}

/// Writes what there is of a state.
pub(super) async fn state(
    tx: &mut Tx,
    host: Arg<'_>,
    accepted: Option<&[u8]>,
    trees: Option<&[u8]>,
) -> Result<(), sqlx::Error> {
    if let Some(bytes) = accepted {
        let sql =
            "INSERT INTO accepted (host, body) VALUES ($1, $2) ON CONFLICT (host) DO UPDATE SET body = excluded.body";
        tx.run(sql, &[host, bytes.into()]).await?;
    }
    if let Some(bytes) = trees {
        let sql = "INSERT INTO tree (host, body) VALUES ($1, $2) ON CONFLICT (host) DO UPDATE SET body = excluded.body";
        tx.run(sql, &[host, bytes.into()]).await?;
    }
    Ok(())
}
