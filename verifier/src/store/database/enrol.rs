//! Enrolment in the database. Whatever looks at names, keys and tokens before it changes them does so under one lock.

use onequote_evidence::id::{HostId, Sha256, TimeMs};

use super::{
    Database, NAMES,
    driver::{Arg, Row, Tx},
    failed, forget_unless_same, number,
};
use crate::store::{
    Enrolment, StoreError,
    enrol::{AuditEntry, Claim, EnrolStore, IssuedCertificate, Join, JoinRefusal, Joined, Standing, Token},
};

/// How many lines back the refusals are kept that anybody can cause without a token. All other lines stay: nobody can push
/// them out.
const MAX_NOISE: i64 = 100_000;

/// How long a certificate is remembered after its end, in milliseconds: a month.
const MEMORY: u64 = 30 * 24 * 3600 * 1000;

impl EnrolStore for Database {
    async fn create_token(&self, token: &Token, now: TimeMs) -> Result<(), StoreError> {
        let sql = "INSERT INTO token (id, secret, host, \"replace\", software_tpm, url, created, expires, uses)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)";
        let args = [
            token.id.as_str().into(),
            token.secret.as_bytes().into(),
            token.host.as_ref().map(HostId::as_str).into(),
            token.replace.into(),
            token.software_tpm.into(),
            token.url.as_deref().into(),
            number(now),
            number(token.expires),
            u64::from(token.uses).into(),
        ];
        self.driver.run(sql, &args).await.map_err(failed("keeping a token")).map(|_| ())
    }

    async fn token(&self, id: &str) -> Result<Option<Token>, StoreError> {
        let mut tx = self.driver.begin_read().await.map_err(failed("looking up a token"))?;
        token(&mut tx, id).await
    }

    async fn may_join(&self, claim: Claim<'_>, now: TimeMs) -> Result<Result<(), JoinRefusal>, StoreError> {
        let mut tx = self.driver.begin_read().await.map_err(failed("looking whether a host may join"))?;
        allowed(&mut tx, claim, now).await
    }

    async fn join(&self, join: &Join<'_>, now: TimeMs) -> Result<Result<(), JoinRefusal>, StoreError> {
        let doing = "enrolling a host";
        let mut tx = self.begin(doing).await?;
        tx.alone(NAMES).await.map_err(failed(doing))?;
        let Join { token, host, ek, vouched, url_fixed, certificate } = *join;
        let claim = Claim { token, host: &host.id, ek, ak: &host.ak };
        if let Err(refusal) = allowed(&mut tx, claim, now).await? {
            return Ok(Err(refusal));
        }
        let sql = "UPDATE token SET uses = uses - 1 WHERE id = $1 AND uses > 0";
        if tx.run(sql, &[token.into()]).await.map_err(failed(doing))? != 1 {
            return Ok(Err(JoinRefusal::TokenUsed));
        }
        forget_unless_same(&mut tx, &host.id, &host.ak).await?;
        let sql = "INSERT INTO host (id, url, ak, certificate, software_tpm, version, ek, vouched, issued, url_fixed)
            VALUES ($1, $2, $3, $4, $5, 1, $6, $7, 1, $8)
            ON CONFLICT (id) DO UPDATE SET
                url = $2, certificate = $4, software_tpm = $5, version = host.version + 1, ak = $3,
                ek = $6, vouched = $7, issued = 1, url_fixed = $8, standing = 'enrolled'";
        let Enrolment { id, url, ak, certificate: anchor, software_tpm } = host;
        let args = [
            id.as_str().into(),
            url.as_str().into(),
            ak.as_slice().into(),
            anchor.as_slice().into(),
            (*software_tpm).into(),
            ek.into(),
            vouched.into(),
            url_fixed.into(),
        ];
        tx.run(sql, &args).await.map_err(failed(doing))?;
        revoke_certificates(&mut tx, id).await?;
        add(&mut tx, certificate).await?;
        let before = TimeMs(now.0.saturating_sub(MEMORY));
        tx.run("DELETE FROM certificate WHERE expires < $1", &[number(before)]).await.map_err(failed(doing))?;
        tx.commit().await.map_err(failed(doing))?;
        Ok(Ok(()))
    }

    async fn joined(&self, id: &HostId) -> Result<(Standing, Joined), StoreError> {
        let sql = "SELECT standing, ek, vouched, issued, url_fixed FROM host WHERE id = $1";
        let row = self.driver.row(sql, &[id.as_str().into()]).await;
        let row = row.map_err(failed("reading a host"))?.ok_or_else(|| StoreError::NoHost(id.clone()))?;
        Ok((standing(&row)?, joined(&row)?))
    }

    async fn set_standing(&self, id: &HostId, standing: Standing) -> Result<(), StoreError> {
        let doing = "withdrawing a host";
        let mut tx = self.begin(doing).await?;
        tx.alone(NAMES).await.map_err(failed(doing))?;
        let sql = "UPDATE host SET standing = $2, version = version + 1 WHERE id = $1";
        let done = tx.run(sql, &[id.as_str().into(), standing.as_str().into()]).await;
        if done.map_err(failed(doing))? == 0 {
            return Err(StoreError::NoHost(id.clone()));
        }
        tx.run("DELETE FROM verdict WHERE host = $1", &[id.as_str().into()]).await.map_err(failed(doing))?;
        if standing != Standing::Enrolled {
            revoke_certificates(&mut tx, id).await?;
        }
        tx.commit().await.map_err(failed(doing))
    }

    async fn move_to(&self, id: &HostId, url: &str) -> Result<(), StoreError> {
        let sql = "UPDATE host SET url = $2, version = version + 1 WHERE id = $1 AND url_fixed = 0 AND url <> $2";
        let done = self.driver.run(sql, &[id.as_str().into(), url.into()]).await;
        done.map_err(failed("writing a host's address")).map(|_| ())
    }

    async fn add_certificate(&self, certificate: &IssuedCertificate) -> Result<(), StoreError> {
        let doing = "keeping a certificate";
        let mut tx = self.begin(doing).await?;
        add(&mut tx, certificate).await?;
        tx.commit().await.map_err(failed(doing))
    }

    async fn certificate(&self, serial: &[u8]) -> Result<Option<IssuedCertificate>, StoreError> {
        let fail = failed("looking up a certificate");
        let sql = "SELECT serial, host AS id, ak, expires, revoked FROM certificate WHERE serial = $1";
        let Some(row) = self.driver.row(sql, &[serial.into()]).await.map_err(&fail)? else { return Ok(None) };
        Ok(Some(IssuedCertificate {
            serial: row.bytes("serial").map_err(&fail)?,
            host: super::host_id(&row)?,
            ak: row.bytes("ak").map_err(&fail)?,
            expires: TimeMs(row.number("expires").map_err(&fail)?),
            revoked: row.truth("revoked").map_err(&fail)?,
        }))
    }

    async fn audit(&self, entry: &AuditEntry) -> Result<(), StoreError> {
        let doing = "writing the audit log";
        let sql = "INSERT INTO audit (time, who, what, host, result, detail) VALUES ($1, $2, $3, $4, $5, $6)
            RETURNING seq";
        let args = [
            number(entry.time),
            entry.who.as_str().into(),
            entry.what.as_str().into(),
            entry.host.as_ref().map(HostId::as_str).into(),
            entry.result.as_str().into(),
            entry.detail.as_str().into(),
        ];
        let mut tx = self.begin(doing).await?;
        let row = tx.row(sql, &args).await.map_err(failed(doing))?;
        let seq = row.map_or(Ok(0), |row| row.int("seq")).map_err(failed(doing))?;
        if seq % 1000 == 0 {
            let sql = "DELETE FROM audit WHERE seq <= $1
                AND result IN ('request-malformed', 'token-unknown', 'host-reserved', 'no-attempt', 'certificate-refused')";
            tx.run(sql, &[(seq - MAX_NOISE).into()]).await.map_err(failed(doing))?;
        }
        tx.commit().await.map_err(failed(doing))
    }

    async fn audit_log(&self, most: u32) -> Result<Vec<AuditEntry>, StoreError> {
        let fail = failed("reading the audit log");
        let sql = "SELECT * FROM (SELECT * FROM audit ORDER BY seq DESC LIMIT $1) AS last ORDER BY seq";
        let rows = self.driver.rows(sql, &[u64::from(most).into()]).await.map_err(&fail)?;
        let entry = |row: &Row| {
            Ok(AuditEntry {
                time: TimeMs(row.number("time")?),
                who: row.text("who")?,
                what: row.text("what")?,
                host: row.maybe_text("host")?.and_then(|host| host.parse().ok()),
                result: row.text("result")?,
                detail: row.text("detail")?,
            })
        };
        rows.iter().map(|row| entry(row).map_err(&fail)).collect()
    }
}

async fn token(tx: &mut Tx, id: &str) -> Result<Option<Token>, StoreError> {
    let fail = failed("looking up a token");
    let row = tx.row("SELECT * FROM token WHERE id = $1", &[id.into()]).await;
    let Some(row) = row.map_err(&fail)? else { return Ok(None) };
    let content = |e: &str| StoreError::Content { what: "token", host: id.to_owned(), source: e.into() };
    let secret = row.bytes("secret").map_err(&fail)?.try_into().map_err(|_| content("a hash of odd size"))?;
    let host = row.maybe_text("host").map_err(&fail)?.map(|host| host.parse()).transpose().map_err(content)?;
    Ok(Some(Token {
        id: id.to_owned(),
        secret: Sha256(secret),
        host,
        replace: row.truth("replace").map_err(&fail)?,
        software_tpm: row.truth("software_tpm").map_err(&fail)?,
        url: row.maybe_text("url").map_err(&fail)?,
        expires: TimeMs(row.number("expires").map_err(&fail)?),
        uses: u32::try_from(row.int("uses").map_err(&fail)?).unwrap_or_default(),
    }))
}

/// The rules about tokens, names and keys, in one transaction.
async fn allowed(tx: &mut Tx, claim: Claim<'_>, now: TimeMs) -> Result<Result<(), JoinRefusal>, StoreError> {
    let fail = failed("looking whether a host may join");
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
    let sql = "SELECT id, ek, ak, standing FROM host WHERE id = $1 OR ek = $2 OR ak = $3";
    for row in tx.rows(sql, &[claim.host.as_str().into(), claim.ek.into(), claim.ak.into()]).await.map_err(&fail)? {
        let (host, standing) = (super::host_id(&row)?, standing(&row)?);
        let (ek, ak) = (row.maybe_bytes("ek").map_err(&fail)?, row.bytes("ak").map_err(&fail)?);
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

async fn add(tx: &mut Tx, certificate: &IssuedCertificate) -> Result<(), StoreError> {
    let sql = "INSERT INTO certificate (serial, host, ak, expires, revoked) VALUES ($1, $2, $3, $4, $5)";
    let IssuedCertificate { serial, host, ak, expires, revoked } = certificate;
    let args: [Arg<'_>; 5] =
        [serial.as_slice().into(), host.as_str().into(), ak.as_slice().into(), number(*expires), (*revoked).into()];
    tx.run(sql, &args).await.map_err(failed("keeping a certificate")).map(|_| ())
}

async fn revoke_certificates(tx: &mut Tx, id: &HostId) -> Result<(), StoreError> {
    let done = tx.run("UPDATE certificate SET revoked = 1 WHERE host = $1", &[id.as_str().into()]).await;
    done.map_err(failed("taking certificates back")).map(|_| ())
}

pub(super) fn joined(row: &Row) -> Result<Joined, StoreError> {
    let fail = failed("reading a host");
    Ok(Joined {
        ek: row.maybe_bytes("ek").map_err(&fail)?,
        vouched: row.maybe_text("vouched").map_err(&fail)?,
        issued: row.truth("issued").map_err(&fail)?,
        url_fixed: row.truth("url_fixed").map_err(&fail)?,
    })
}

pub(super) fn standing(row: &Row) -> Result<Standing, StoreError> {
    Ok(match row.text("standing").map_err(failed("reading a host"))?.as_str() {
        "enrolled" => Standing::Enrolled,
        "retired" => Standing::Retired,
        // The table allows no other word.
        _ => Standing::Revoked,
    })
}
