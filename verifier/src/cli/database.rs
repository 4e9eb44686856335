//! `db …`: looking after the database.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Subcommand;
use onequote_evidence::id::TimeMs;

use super::{
    CliError,
    commands::{Site, open, say},
};
use crate::{
    challenge::MEMORY,
    source::{Source, System},
    store::{Limits, Store as _},
};

/// What to do with the database.
#[derive(Debug, Subcommand)]
pub enum DatabaseCommand {
    /// Bring the database to this version's form; every other command does so too, and older versions refuse it then
    Migrate,
    /// Read everything that is kept, and say what cannot be read; ends with 1 then
    Check,
    /// Copy the SQLite database into a new file while it is in use (for PostgreSQL: pg_dump)
    Backup {
        /// The new file
        file: PathBuf,
    },
    /// Forget challenges that ended a week ago, policies that belong to no host, and old lines of the audit log if asked
    Prune {
        /// Lines of the audit log that are older than this: 365d; all are kept unless given
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        audit: Option<Duration>,
    },
}

/// Carries it out.
pub(super) async fn run(state: &Site, command: DatabaseCommand) -> Result<ExitCode, CliError> {
    let store = open(state).await?;
    match command {
        DatabaseCommand::Migrate => say(&format!("{}\n", store.check().await?.0))?,
        DatabaseCommand::Check => {
            let (words, defects) = store.check().await?;
            say(&format!("{words}\n"))?;
            for defect in &defects {
                say(&format!("cannot be read: {defect}\n"))?;
            }
            if !defects.is_empty() {
                return Ok(ExitCode::from(1));
            }
        }
        DatabaseCommand::Backup { file } => {
            store.backup(&file).await?;
            say(&format!("{}\n", file.display()))?;
        }
        DatabaseCommand::Prune { audit } => {
            let forgotten = store.forget(&limits(System.now(), audit)).await?;
            let (challenges, lines, policies) = (forgotten.challenges, forgotten.audit, forgotten.policies);
            say(&format!("forgotten: {challenges} challenges, {lines} lines of the audit log, {policies} policies\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What is forgotten now, if lines of the audit log are kept this long.
pub(crate) fn limits(now: TimeMs, audit: Option<Duration>) -> Limits {
    let before = |age: u64| TimeMs(now.0.saturating_sub(age));
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Limits { challenges: before(MEMORY), audit: audit.map(|age| before(millis(age))) }
}
