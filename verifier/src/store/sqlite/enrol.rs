//! Enrolment in SQLite.

use sqlx::{Row as _, Sqlite as Db, Transaction, sqlite::SqliteRow};

use onequote_evidence::id::{HostId, Sha256, TimeMs};

use super::{Sqlite, failed, number};
use crate::store::{
    Enrolment, StoreError,
    enrol::{AuditEntry, Claim, EnrolStore, IssuedCertificate, Join, JoinRefusal, Joined, Standing, Token},
};

/// How many lines back the refusals are kept that anybody can cause without a token. All other lines stay: nobody can push
/// them out.
const MAX_NOISE: i64 = 100_000;

/// How long a certificate is remembered after its end, in milliseconds: a month.
const MEMORY: u64 = 30 * 24 * 3600 * 1000;

impl EnrolStore for Sqlite {
    async fn create_token(&self, token: &Token, now: TimeMs) -> Result<(), StoreError> {
        let sql = "INSERT INTO token (id, secret, host, \"replace\", software_tpm, url, created, expires, uses)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)";
        let query = sqlx::query(sql).bind(&token.id).bind(token.secret.as_bytes());
        let query = query.bind(token.host.as_ref().map(HostId::as_str)).bind(token.replace).bind(token.software_tpm);
        let query = query.bind(&token.url).bind(number(now)).bind(number(token.expires)).bind(token.uses);
        query.execute(&self.pool).await.map_err(failed("keeping a token")).map(|_| ())
    }

    async fn token(&self, id: &str) -> Result<Option<Token>, StoreError> {
        let doing = "looking up a token";
        let mut tx = self.pool.begin().await.map_err(failed(doing))?;
        token(&mut tx, id).await
    }

    async fn may_join(&self, claim: Claim<'_>, now: TimeMs) -> Result<Result<(), JoinRefusal>, StoreError> {
        let mut tx = self.pool.begin().await.map_err(failed("looking whether a host may join"))?;
        allowed(&mut tx, claim, now).await
    }

    async fn join(&self, join: &Join<'_>, now: TimeMs) -> Result<Result<(), JoinRefusal>, StoreError> {
        let doing = "enrolling a host";
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(failed(doing))?;
        let Join { token, host, ek, vouched, url_fixed, certificate } = join;
        let claim = Claim { token, host: &host.id, ek, ak: &host.ak };
        if let Err(refusal) = allowed(&mut tx, claim, now).await? {
            return Ok(Err(refusal));
        }
        let used = sqlx::query("UPDATE token SET uses = uses - 1 WHERE id = ? AND uses > 0").bind(*token);
        if used.execute(&mut *tx).await.map_err(failed(doing))?.rows_affected() != 1 {
            return Ok(Err(JoinRefusal::TokenUsed));
        }
        let sql = "INSERT INTO host (id, url, ak, certificate, software_tpm, version, ek, vouched, issued, url_fixed)
            VALUES (?1, ?2, ?3, ?4, ?5, 1, ?6, ?7, 1, ?8)
            ON CONFLICT (id) DO UPDATE SET
                url = ?2, certificate = ?4, software_tpm = ?5, version = version + 1,
                state = CASE WHEN ak = ?3 THEN state END, verdict = CASE WHEN ak = ?3 THEN verdict END, ak = ?3,
                ek = ?6, vouched = ?7, issued = 1, url_fixed = ?8, standing = 'enrolled'";
        let Enrolment { id, url, ak, certificate: anchor, software_tpm } = host;
        let query = sqlx::query(sql).bind(id.as_str()).bind(url).bind(ak).bind(anchor).bind(software_tpm);
        let query = query.bind(*ek).bind(*vouched).bind(url_fixed);
        query.execute(&mut *tx).await.map_err(failed(doing))?;
        revoke_certificates(&mut tx, id).await?;
        add(&mut tx, certificate).await?;
        let old = sqlx::query("DELETE FROM certificate WHERE expires < ?").bind(number(before(now)));
        old.execute(&mut *tx).await.map_err(failed(doing))?;
        tx.commit().await.map_err(failed(doing))?;
        Ok(Ok(()))
    }

    async fn joined(&self, id: &HostId) -> Result<(Standing, Joined), StoreError> {
        let sql = "SELECT standing, ek, vouched, issued, url_fixed FROM host WHERE id = ?";
        let row = sqlx::query(sql).bind(id.as_str()).fetch_optional(&self.pool).await;
        let row = row.map_err(failed("reading a host"))?.ok_or_else(|| StoreError::NoHost(id.clone()))?;
        Ok((standing(&row), joined(&row)))
    }

    async fn set_standing(&self, id: &HostId, standing: Standing) -> Result<(), StoreError> {
        let doing = "withdrawing a host";
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(failed(doing))?;
        let sql = "UPDATE host SET standing = ?2, version = version + 1, verdict = NULL WHERE id = ?1";
        let done = sqlx::query(sql).bind(id.as_str()).bind(standing.as_str()).execute(&mut *tx).await;
        if done.map_err(failed(doing))?.rows_affected() == 0 {
            return Err(StoreError::NoHost(id.clone()));
        }
        if standing != Standing::Enrolled {
            revoke_certificates(&mut tx, id).await?;
        }
        tx.commit().await.map_err(failed(doing))
    }

    async fn move_to(&self, id: &HostId, url: &str) -> Result<(), StoreError> {
        let sql = "UPDATE host SET url = ?2, version = version + 1 WHERE id = ?1 AND NOT url_fixed AND url <> ?2";
        let query = sqlx::query(sql).bind(id.as_str()).bind(url).execute(&self.pool);
        query.await.map_err(failed("writing a host's address")).map(|_| ())
    }

    async fn add_certificate(&self, certificate: &IssuedCertificate) -> Result<(), StoreError> {
        let doing = "keeping a certificate";
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(failed(doing))?;
        add(&mut tx, certificate).await?;
        tx.commit().await.map_err(failed(doing))
    }

    async fn certificate(&self, serial: &[u8]) -> Result<Option<IssuedCertificate>, StoreError> {
        let sql = "SELECT serial, host AS id, ak, expires, revoked FROM certificate WHERE serial = ?";
        let row = sqlx::query(sql).bind(serial).fetch_optional(&self.pool).await;
        let Some(row) = row.map_err(failed("looking up a certificate"))? else { return Ok(None) };
        Ok(Some(IssuedCertificate {
            serial: row.get("serial"),
            host: super::host_id(&row)?,
            ak: row.get("ak"),
            expires: time(&row, "expires"),
            revoked: row.get("revoked"),
        }))
    }

    async fn audit(&self, entry: &AuditEntry) -> Result<(), StoreError> {
        let doing = "writing the audit log";
        let sql = "INSERT INTO audit (time, who, what, host, result, detail) VALUES (?, ?, ?, ?, ?, ?)";
        let query = sqlx::query(sql).bind(number(entry.time)).bind(&entry.who).bind(&entry.what);
        let query = query.bind(entry.host.as_ref().map(HostId::as_str)).bind(&entry.result).bind(&entry.detail);
        let row = query.execute(&self.pool).await.map_err(failed(doing))?.last_insert_rowid();
        if row % 1000 == 0 {
            let sql = "DELETE FROM audit WHERE seq <= ?
                AND result IN ('request-malformed', 'token-unknown', 'host-reserved', 'no-attempt', 'certificate-refused')";
            let old = sqlx::query(sql).bind(row - MAX_NOISE);
            old.execute(&self.pool).await.map_err(failed(doing))?;
        }
        Ok(())
    }

    async fn audit_log(&self, most: u32) -> Result<Vec<AuditEntry>, StoreError> {
        let sql = "SELECT * FROM (SELECT * FROM audit ORDER BY seq DESC LIMIT ?) ORDER BY seq";
        let rows = sqlx::query(sql).bind(most).fetch_all(&self.pool).await.map_err(failed("reading the audit log"))?;
        let entry = |row: &SqliteRow| AuditEntry {
            time: time(row, "time"),
            who: row.get("who"),
            what: row.get("what"),
            host: row.get::<Option<String>, _>("host").and_then(|host| host.parse().ok()),
            result: row.get("result"),
            detail: row.get("detail"),
        };
        Ok(rows.iter().map(entry).collect())
    }
}

async fn token(tx: &mut Transaction<'_, Db>, id: &str) -> Result<Option<Token>, StoreError> {
    let row = sqlx::query("SELECT * FROM token WHERE id = ?").bind(id).fetch_optional(&mut **tx).await;
    let Some(row) = row.map_err(failed("looking up a token"))? else { return Ok(None) };
    let content = |e: &str| StoreError::Content { what: "token", host: id.to_owned(), source: e.into() };
    let secret: [u8; 32] = row.get::<Vec<u8>, _>("secret").try_into().map_err(|_| content("a hash of odd size"))?;
    let host = row.get::<Option<String>, _>("host").map(|host| host.parse()).transpose().map_err(content)?;
    Ok(Some(Token {
        id: id.to_owned(),
        secret: Sha256(secret),
        host,
        replace: row.get("replace"),
        software_tpm: row.get("software_tpm"),
        url: row.get("url"),
        expires: time(&row, "expires"),
        uses: u32::try_from(row.get::<i64, _>("uses")).unwrap_or_default(),
    }))
}

/// The rules about tokens, names and keys, in one transaction.
async fn allowed(
    tx: &mut Transaction<'_, Db>,
    claim: Claim<'_>,
    now: TimeMs,
) -> Result<Result<(), JoinRefusal>, StoreError> {
    let doing = "looking whether a host may join";
    let Some(token) = token(tx, claim.token).await? else { return Ok(Err(JoinRefusal::TokenUnknown)) };
    if token.expires <= now {
        return Ok(Err(JoinRefusal::TokenExpired));
    }
    if token.uses == 0 {
        return Ok(Err(JoinRefusal::TokenUsed));
    }
    if let Some(host) = token.host.filter(|host| host != claim.host) {
        return Ok(Err(JoinRefusal::TokenOtherHost(host)));
    }
    let sql = "SELECT id, ek, ak, standing FROM host WHERE id = ?1 OR ek = ?2 OR ak = ?3";
    let query = sqlx::query(sql).bind(claim.host.as_str()).bind(claim.ek).bind(claim.ak);
    for row in query.fetch_all(&mut **tx).await.map_err(failed(doing))? {
        let (host, standing) = (super::host_id(&row)?, standing(&row));
        let (ek, ak) = (row.get::<Option<Vec<u8>>, _>("ek"), row.get::<Vec<u8>, _>("ak"));
        let same_ek = ek.as_deref() == Some(claim.ek);
        if host != *claim.host {
            // Another host has one of the keys. What is retired gives its keys back.
            if standing == Standing::Retired {
                continue;
            }
            return Ok(Err(if same_ek { JoinRefusal::EkInUse(host) } else { JoinRefusal::AkInUse(host) }));
        }
        if token.replace {
            continue;
        }
        if standing != Standing::Enrolled {
            return Ok(Err(JoinRefusal::Withdrawn(host, standing)));
        }
        // One that was enrolled by hand has shown no endorsement key yet; its attestation key must be the same.
        if ek.is_some() && !same_ek {
            return Ok(Err(JoinRefusal::OtherEk(host)));
        }
        if ak != claim.ak {
            return Ok(Err(JoinRefusal::OtherAk(host)));
        }
    }
    Ok(Ok(()))
}

async fn add(tx: &mut Transaction<'_, Db>, certificate: &IssuedCertificate) -> Result<(), StoreError> {
    let sql = "INSERT INTO certificate (serial, host, ak, expires, revoked) VALUES (?, ?, ?, ?, ?)";
    let query = sqlx::query(sql).bind(&certificate.serial).bind(certificate.host.as_str()).bind(&certificate.ak);
    let query = query.bind(number(certificate.expires)).bind(certificate.revoked);
    query.execute(&mut **tx).await.map_err(failed("keeping a certificate")).map(|_| ())
}

async fn revoke_certificates(tx: &mut Transaction<'_, Db>, id: &HostId) -> Result<(), StoreError> {
    let query = sqlx::query("UPDATE certificate SET revoked = 1 WHERE host = ?").bind(id.as_str());
    query.execute(&mut **tx).await.map_err(failed("taking certificates back")).map(|_| ())
}

pub(super) fn joined(row: &SqliteRow) -> Joined {
    Joined {
        ek: row.get("ek"),
        vouched: row.get("vouched"),
        issued: row.get("issued"),
        url_fixed: row.get("url_fixed"),
    }
}

pub(super) fn standing(row: &SqliteRow) -> Standing {
    match row.get::<&str, _>("standing") {
        "enrolled" => Standing::Enrolled,
        "retired" => Standing::Retired,
        // The table allows no other word.
        _ => Standing::Revoked,
    }
}

fn time(row: &SqliteRow, column: &str) -> TimeMs {
    TimeMs(row.get::<i64, _>(column).unsigned_abs())
}

fn before(now: TimeMs) -> TimeMs {
    TimeMs(now.0.saturating_sub(MEMORY))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::store::Store as _;

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

    async fn store() -> (tempfile::TempDir, Sqlite) {
        let dir = tempfile::tempdir().unwrap();
        let store = Sqlite::open(&dir.path().join("v.sqlite")).await.unwrap();
        (dir, store)
    }

    fn enrolment(host: &str, ak: u8) -> Enrolment {
        let url = "https://127.0.0.1:1".to_owned();
        Enrolment { id: id(host), url, ak: vec![ak], certificate: vec![2], software_tpm: true }
    }

    /// Joins with a new token, changed by `change`.
    async fn join(store: &Sqlite, host: &str, ek: u8, ak: u8, change: fn(&mut Token)) -> Result<(), &'static str> {
        let mut serial = [0; 8];
        rand::Rng::fill(&mut rand::rng(), &mut serial);
        let mut token = token(&hex::encode(serial));
        change(&mut token);
        store.create_token(&token, NOW).await.unwrap();
        join_with(store, &token.id, host, ek, ak, &serial).await
    }

    async fn join_with(
        store: &Sqlite,
        token: &str,
        host: &str,
        ek: u8,
        ak: u8,
        serial: &[u8],
    ) -> Result<(), &'static str> {
        let host = enrolment(host, ak);
        let ek = [ek];
        let certificate = IssuedCertificate {
            serial: serial.to_vec(),
            host: host.id.clone(),
            ak: vec![ak],
            expires: TimeMs(5000),
            revoked: false,
        };
        let join = Join { token, host: &host, ek: &ek, vouched: "", url_fixed: false, certificate: &certificate };
        let claim = Claim { token, host: &host.id, ek: &ek, ak: &host.ak };
        let may = store.may_join(claim, NOW).await.unwrap();
        let done = store.join(&join, NOW).await.unwrap();
        assert_eq!(may, done, "asked before and done");
        done.map_err(|refusal| refusal.code())
    }

    #[tokio::test]
    async fn tokens_are_used_up() {
        let (_dir, store) = store().await;
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

    #[tokio::test]
    async fn ids_and_keys_belong_together() {
        let (_dir, store) = store().await;
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
        store.enrol(&enrolment("h5", 5), false).await.unwrap();
        assert_eq!(join(&store, "h5", 5, 6, |_| {}).await, Err("id-other-ak"));
        assert_eq!(join(&store, "h6", 6, 5, |_| {}).await, Err("ak-in-use"));
        assert_eq!(join(&store, "h5", 5, 5, |_| {}).await, Ok(()));
    }

    #[tokio::test]
    async fn withdrawn_hosts() {
        let (_dir, store) = store().await;
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

    #[tokio::test]
    async fn certificates_end_with_the_join_that_gave_them() {
        let (_dir, store) = store().await;
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

    #[tokio::test]
    async fn addresses_move_unless_they_are_fixed() {
        let (_dir, store) = store().await;
        join(&store, "h1", 1, 1, |_| {}).await.unwrap();
        store.move_to(&id("h1"), "https://127.0.0.1:2").await.unwrap();
        assert_eq!(store.host(&id("h1")).await.unwrap().enrolment.url, "https://127.0.0.1:2");
        sqlx::query("UPDATE host SET url_fixed = 1").execute(&store.pool).await.unwrap();
        store.move_to(&id("h1"), "https://127.0.0.1:3").await.unwrap();
        assert_eq!(store.host(&id("h1")).await.unwrap().enrolment.url, "https://127.0.0.1:2");
    }

    #[tokio::test]
    async fn the_audit_log_is_in_order() {
        let (_dir, store) = store().await;
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
    }

    #[tokio::test]
    async fn a_database_of_the_first_version_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sqlite");
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path).create_if_missing(true);
        let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
        sqlx::raw_sql(super::super::MIGRATIONS[0]).execute(&pool).await.unwrap();
        let old = "PRAGMA user_version = 1;
            INSERT INTO host (id, url, ak, certificate, software_tpm, version)
            VALUES ('h1', 'https://127.0.0.1:1', x'05', x'02', 1, 3);
            INSERT INTO policy VALUES ('h1', 1, 'p', 7); UPDATE host SET policy = 1";
        sqlx::raw_sql(old).execute(&pool).await.unwrap();
        pool.close().await;
        let store = Sqlite::open(&path).await.unwrap();
        let host = store.host(&id("h1")).await.unwrap();
        assert_eq!((&host.enrolment, host.version), (&enrolment("h1", 5), 3));
        assert_eq!(host.policy, Some((1, "p".into())));
        assert_eq!(store.joined(&id("h1")).await.unwrap(), (Standing::Enrolled, Joined::default()));
        assert_eq!(join(&store, "h1", 5, 5, |_| {}).await, Ok(()));
        drop(store);
        Sqlite::open(&path).await.unwrap();
    }
}
