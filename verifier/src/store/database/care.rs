//! What operators do with a database: forgetting, copying, checking; and who works on it.

use std::{os::unix::fs::OpenOptionsExt as _, path::Path, time::Duration};

use super::{Database, driver::Driver, failed, migrate, number};
use crate::store::{Forgotten, Limits, Store as _, StoreError};

pub(super) async fn forget(driver: &Driver, limits: &Limits) -> Result<Forgotten, StoreError> {
    let doing = "forgetting what is old";
    let sql = "DELETE FROM nonce WHERE expires < $1";
    let challenges = driver.run(sql, &[number(limits.challenges)]).await.map_err(failed(doing))?;
    let audit = match limits.audit {
        Some(before) => {
            driver.run("DELETE FROM audit WHERE time < $1", &[number(before)]).await.map_err(failed(doing))?
        }
        None => 0,
    };
    let sql = "DELETE FROM policy_text WHERE NOT EXISTS
        (SELECT 1 FROM policy_version WHERE policy_version.digest = policy_text.digest)";
    // One that is just being set is not in anybody's list yet: both wait for each other.
    let mut tx = driver.begin().await.map_err(failed(doing))?;
    tx.alone(super::NAMES).await.map_err(failed(doing))?;
    let policies = tx.run(sql, &[]).await.map_err(failed(doing))?;
    tx.commit().await.map_err(failed(doing))?;
    Ok(Forgotten { challenges, audit, policies })
}

pub(super) async fn present(driver: &Driver, replica: &str, lease: Duration) -> Result<Vec<String>, StoreError> {
    let doing = "saying that this verifier is there";
    let lease = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
    let sql = driver.either(
        "INSERT INTO replica (id, until) VALUES ($1, CAST(unixepoch('subsec') * 1000 AS INTEGER) + $2)
            ON CONFLICT (id) DO UPDATE SET until = excluded.until",
        "INSERT INTO replica (id, until) VALUES ($1, (extract(epoch FROM clock_timestamp()) * 1000)::bigint + $2)
            ON CONFLICT (id) DO UPDATE SET until = excluded.until",
    );
    driver.run(sql, &[replica.into(), lease.into()]).await.map_err(failed(doing))?;
    let sql = driver.either(
        "DELETE FROM replica WHERE until <= CAST(unixepoch('subsec') * 1000 AS INTEGER)",
        "DELETE FROM replica WHERE until <= (extract(epoch FROM clock_timestamp()) * 1000)::bigint",
    );
    driver.run(sql, &[]).await.map_err(failed(doing))?;
    let rows = driver.rows("SELECT id FROM replica ORDER BY id", &[]).await.map_err(failed(doing))?;
    rows.iter().map(|row| row.text("id").map_err(failed(doing))).collect()
}

pub(super) async fn backup(driver: &Driver, path: &Path) -> Result<(), StoreError> {
    let doing = "copying it";
    let fail = |source: Box<dyn std::error::Error + Send + Sync>| StoreError::Database { doing, source };
    let Driver::Sqlite { .. } = driver else {
        return Err(fail("it is PostgreSQL: use pg_dump --format=custom, which copies it while it is in use".into()));
    };
    // Ours alone, and not over something that is there.
    let named = |e: std::io::Error| fail(format!("{}: {e}", path.display()).into());
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(named)?;
    let name = path.to_str().ok_or_else(|| fail("the file's name is not UTF-8".into()))?;
    driver.rows("VACUUM INTO $1", &[name.into()]).await.map_err(failed(doing))?;
    file.sync_all().map_err(named)
}

pub(super) async fn check(database: &Database) -> Result<(String, Vec<String>), StoreError> {
    let doing = "checking it";
    let driver = &database.driver;
    let mut defects = Vec::new();
    if let Driver::Sqlite { .. } = driver {
        for row in driver
            .rows("SELECT integrity_check AS said FROM pragma_integrity_check", &[])
            .await
            .map_err(failed(doing))?
        {
            let said = row.text("said").map_err(failed(doing))?;
            if said != "ok" {
                defects.push(said);
            }
        }
        let broken = driver.rows("SELECT \"table\" AS name FROM pragma_foreign_key_check", &[]).await;
        for row in broken.map_err(failed(doing))? {
            defects.push(format!("a row of the table {} belongs to nothing", row.text("name").map_err(failed(doing))?));
        }
    }
    let hosts = database.hosts().await?;
    let (mut parts, mut bytes) = (0, 0);
    for id in &hosts {
        match database.host(id).await {
            Ok(host) => {
                if let Err(e) = database.policy(&host).await {
                    defects.push(words(&e));
                }
            }
            Err(e @ StoreError::Content { .. }) => defects.push(words(&e)),
            // Removed meanwhile.
            Err(StoreError::NoHost(_)) => {}
            Err(e) => return Err(e),
        }
        let kept = database.parts(id).await?;
        parts += kept.len();
        bytes += kept.iter().map(Vec::len).sum::<usize>();
    }
    let kind = driver.either("SQLite", "PostgreSQL");
    let (form, hosts) = (migrate::PRESENT, hosts.len());
    Ok((format!("{kind}, form {form}: {hosts} hosts, {bytes} bytes of evidence in {parts} parts"), defects))
}

fn words(e: &StoreError) -> String {
    std::error::Error::source(e).map_or_else(|| e.to_string(), |source| format!("{e}: {source}"))
}
