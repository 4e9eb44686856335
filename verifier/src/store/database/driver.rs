//! The two databases as one: statements that both understand, with arguments and columns of three types.
//!
//! Statements number their arguments (`$1`), and whole numbers and truth values are 64-bit integers in both.

use std::{future::Future, time::Duration};

use sqlx::{
    PgPool, Postgres, Row as _, Sqlite, SqlitePool, Transaction,
    postgres::{PgArguments, PgRow},
    query::Query,
    sqlite::{SqliteArguments, SqliteRow},
};

/// An argument of a statement.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg<'a> {
    /// `INTEGER` or `BIGINT`.
    Int(Option<i64>),
    /// `TEXT`.
    Text(Option<&'a str>),
    /// `BLOB` or `BYTEA`.
    Bytes(Option<&'a [u8]>),
}

impl From<i64> for Arg<'_> {
    fn from(number: i64) -> Self {
        Self::Int(Some(number))
    }
}

impl From<u64> for Arg<'_> {
    fn from(number: u64) -> Self {
        Self::Int(Some(i64::try_from(number).unwrap_or(i64::MAX)))
    }
}

impl From<bool> for Arg<'_> {
    fn from(yes: bool) -> Self {
        Self::Int(Some(yes.into()))
    }
}

impl<'a> From<&'a str> for Arg<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(Some(text))
    }
}

impl<'a> From<Option<&'a str>> for Arg<'a> {
    fn from(text: Option<&'a str>) -> Self {
        Self::Text(text)
    }
}

impl<'a> From<&'a [u8]> for Arg<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(Some(bytes))
    }
}

impl<'a> From<Option<&'a [u8]>> for Arg<'a> {
    fn from(bytes: Option<&'a [u8]>) -> Self {
        Self::Bytes(bytes)
    }
}

/// A row of an answer.
pub(super) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

impl Row {
    pub(super) fn int(&self, column: &str) -> Result<i64, sqlx::Error> {
        self.maybe_int(column)?.ok_or_else(|| missing(column))
    }

    pub(super) fn maybe_int(&self, column: &str) -> Result<Option<i64>, sqlx::Error> {
        match self {
            Self::Sqlite(row) => row.try_get(column),
            Self::Postgres(row) => row.try_get(column),
        }
    }

    /// A number that is never below zero.
    pub(super) fn number(&self, column: &str) -> Result<u64, sqlx::Error> {
        Ok(self.int(column)?.unsigned_abs())
    }

    pub(super) fn truth(&self, column: &str) -> Result<bool, sqlx::Error> {
        Ok(self.int(column)? != 0)
    }

    pub(super) fn text(&self, column: &str) -> Result<String, sqlx::Error> {
        self.maybe_text(column)?.ok_or_else(|| missing(column))
    }

    pub(super) fn maybe_text(&self, column: &str) -> Result<Option<String>, sqlx::Error> {
        match self {
            Self::Sqlite(row) => row.try_get(column),
            Self::Postgres(row) => row.try_get(column),
        }
    }

    pub(super) fn bytes(&self, column: &str) -> Result<Vec<u8>, sqlx::Error> {
        self.maybe_bytes(column)?.ok_or_else(|| missing(column))
    }

    pub(super) fn maybe_bytes(&self, column: &str) -> Result<Option<Vec<u8>>, sqlx::Error> {
        match self {
            Self::Sqlite(row) => row.try_get(column),
            Self::Postgres(row) => row.try_get(column),
        }
    }
}

fn missing(column: &str) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.to_owned(), source: "it is null".into() }
}

/// Where statements are carried out.
#[derive(Debug, Clone)]
pub(super) enum Driver {
    /// Any number may read while one writes.
    Sqlite {
        /// For statements that only read.
        read: SqlitePool,
        /// One connection: writers of this process wait for each other here, in turn, and not in the database.
        write: SqlitePool,
    },
    /// All connections are alike.
    Postgres(PgPool),
}

impl Driver {
    /// What the two say differently.
    pub(super) fn either<T>(&self, sqlite: T, postgres: T) -> T {
        match self {
            Self::Sqlite { .. } => sqlite,
            Self::Postgres(_) => postgres,
        }
    }

    /// Begins a transaction that writes.
    pub(super) async fn begin(&self) -> Result<Tx, sqlx::Error> {
        match self {
            Self::Sqlite { write, .. } => Ok(Tx::Sqlite(write.begin_with("BEGIN IMMEDIATE").await?)),
            Self::Postgres(pool) => Ok(Tx::Postgres(in_time(pool.begin()).await?)),
        }
    }

    /// Begins a transaction that only reads.
    pub(super) async fn begin_read(&self) -> Result<Tx, sqlx::Error> {
        match self {
            Self::Sqlite { read, .. } => Ok(Tx::Sqlite(read.begin().await?)),
            Self::Postgres(pool) => Ok(Tx::Postgres(in_time(pool.begin()).await?)),
        }
    }

    /// Carries out one statement that writes; tells how many rows it touched.
    pub(super) async fn run(&self, sql: &'static str, args: &[Arg<'_>]) -> Result<u64, sqlx::Error> {
        match self {
            Self::Sqlite { write, .. } => Ok(sqlite(sql, args).execute(write).await?.rows_affected()),
            Self::Postgres(pool) => Ok(in_time(postgres(sql, args).execute(pool)).await?.rows_affected()),
        }
    }

    /// Carries out one statement that reads.
    pub(super) async fn rows(&self, sql: &'static str, args: &[Arg<'_>]) -> Result<Vec<Row>, sqlx::Error> {
        match self {
            Self::Sqlite { read, .. } => rows(sqlite(sql, args).fetch_all(read), Row::Sqlite).await,
            Self::Postgres(pool) => rows(in_time(postgres(sql, args).fetch_all(pool)), Row::Postgres).await,
        }
    }

    /// As [`Self::rows`], of a statement that gives one row at most.
    pub(super) async fn row(&self, sql: &'static str, args: &[Arg<'_>]) -> Result<Option<Row>, sqlx::Error> {
        match self {
            Self::Sqlite { read, .. } => Ok(sqlite(sql, args).fetch_optional(read).await?.map(Row::Sqlite)),
            Self::Postgres(pool) => Ok(in_time(postgres(sql, args).fetch_optional(pool)).await?.map(Row::Postgres)),
        }
    }
}

/// A transaction. What is not committed is undone.
pub(super) enum Tx {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

impl Tx {
    pub(super) async fn run(&mut self, sql: &'static str, args: &[Arg<'_>]) -> Result<u64, sqlx::Error> {
        match self {
            Self::Sqlite(tx) => Ok(sqlite(sql, args).execute(&mut **tx).await?.rows_affected()),
            Self::Postgres(tx) => Ok(in_time(postgres(sql, args).execute(&mut **tx)).await?.rows_affected()),
        }
    }

    pub(super) async fn rows(&mut self, sql: &'static str, args: &[Arg<'_>]) -> Result<Vec<Row>, sqlx::Error> {
        match self {
            Self::Sqlite(tx) => rows(sqlite(sql, args).fetch_all(&mut **tx), Row::Sqlite).await,
            Self::Postgres(tx) => rows(in_time(postgres(sql, args).fetch_all(&mut **tx)), Row::Postgres).await,
        }
    }

    pub(super) async fn row(&mut self, sql: &'static str, args: &[Arg<'_>]) -> Result<Option<Row>, sqlx::Error> {
        match self {
            Self::Sqlite(tx) => Ok(sqlite(sql, args).fetch_optional(&mut **tx).await?.map(Row::Sqlite)),
            Self::Postgres(tx) => Ok(in_time(postgres(sql, args).fetch_optional(&mut **tx)).await?.map(Row::Postgres)),
        }
    }

    /// Several statements without arguments.
    pub(super) async fn script(&mut self, sql: &'static str) -> Result<(), sqlx::Error> {
        match self {
            Self::Sqlite(tx) => sqlx::raw_sql(sql).execute(&mut **tx).await.map(|_| ()),
            Self::Postgres(tx) => sqlx::raw_sql(sql).execute(&mut **tx).await.map(|_| ()),
        }
    }

    /// Waits until nobody else holds this lock, and holds it to the transaction's end. In SQLite one writes at a time
    /// anyway.
    pub(super) async fn alone(&mut self, lock: i64) -> Result<(), sqlx::Error> {
        match self {
            Self::Sqlite(_) => Ok(()),
            Self::Postgres(_) => self.rows("SELECT 1 FROM pg_advisory_xact_lock($1)", &[lock.into()]).await.map(|_| ()),
        }
    }

    /// The statement that reads a row which this transaction will change. SQLite, where one writes at a time, needs no word
    /// for that.
    pub(super) fn locking(&self, plain: &'static str, locking: &'static str) -> &'static str {
        match self {
            Self::Sqlite(_) => plain,
            Self::Postgres(_) => locking,
        }
    }

    pub(super) async fn commit(self) -> Result<(), sqlx::Error> {
        match self {
            Self::Sqlite(tx) => tx.commit().await,
            Self::Postgres(tx) => in_time(tx.commit()).await,
        }
    }
}

/// How long PostgreSQL may take for one statement: one that cannot be reached any more gives no error by itself.
const STATEMENT: Duration = Duration::from_secs(30);

async fn in_time<T>(answer: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    match tokio::time::timeout(STATEMENT, answer).await {
        Ok(answer) => answer,
        Err(_) => {
            Err(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "the database does not answer")))
        }
    }
}

async fn rows<T>(
    answer: impl Future<Output = Result<Vec<T>, sqlx::Error>>,
    of: fn(T) -> Row,
) -> Result<Vec<Row>, sqlx::Error> {
    Ok(answer.await?.into_iter().map(of).collect())
}

fn sqlite<'q>(sql: &'static str, args: &[Arg<'_>]) -> Query<'q, Sqlite, SqliteArguments> {
    args.iter().fold(sqlx::query(sql), |query, arg| match *arg {
        Arg::Int(value) => query.bind(value),
        Arg::Text(value) => query.bind(value),
        Arg::Bytes(value) => query.bind(value),
    })
}

fn postgres<'q>(sql: &'static str, args: &[Arg<'_>]) -> Query<'q, Postgres, PgArguments> {
    args.iter().fold(sqlx::query(sql), |query, arg| match *arg {
        Arg::Int(value) => query.bind(value),
        Arg::Text(value) => query.bind(value),
        Arg::Bytes(value) => query.bind(value),
    })
}
