//! The memberships of a running proxy: whom it lets in because of them, and one keeper and one reporter for each.
//!
//! A host may join while its proxy runs: the command line hands the wish over, and the proxy, which has the TPM, joins and
//! lets the verifier in from then on. What is in force is always what is on disk: after a join and after a renewal all
//! memberships are read again.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError, RwLock},
};

use onequote_evidence::id::TimeMs;
use tokio::task::JoinHandle;
use tracing::info;

use super::{
    Done, JoinError, Membership, TpmAccess, Wish,
    keeper::{Keeper, Own, keep},
    request,
};
use crate::{
    config::Config,
    identity::{Access, Identity, IdentityError},
    log::LogHandle,
    report::{self, Reporter, Reports},
};

/// The memberships of a running proxy.
pub struct Members {
    config: Config,
    identity: Identity,
    log: LogHandle,
    access: Arc<Access>,
    now: fn() -> TimeMs,
    /// The port on which the proxy listens, once it does.
    port: OnceLock<u16>,
    /// What is on disk and what is in force change together.
    changing: Mutex<()>,
    /// Where evidence for reports comes from; none where the operator wants no reports.
    reporting: OnceLock<Option<report::Proxy>>,
    reports: Arc<Reports>,
    /// Keeper and reporter by the verifier's name. One join at a time.
    keepers: tokio::sync::Mutex<BTreeMap<String, Vec<JoinHandle<()>>>>,
}

impl Members {
    /// Lets in the verifiers of the configuration and those of `memberships`, which are all that there are.
    ///
    /// # Errors
    /// A certificate that cannot be used.
    pub fn new(
        config: &Config,
        identity: Identity,
        memberships: &[Membership],
        log: LogHandle,
        now: fn() -> TimeMs,
    ) -> Result<Arc<Self>, IdentityError> {
        let access = Arc::new(Access::default());
        identity.admit(&access, &config.verifiers, memberships)?;
        let (config, keepers) = (config.clone(), tokio::sync::Mutex::default());
        Ok(Arc::new(Self {
            config,
            identity,
            log,
            access,
            now,
            port: OnceLock::new(),
            changing: Mutex::default(),
            reporting: OnceLock::new(),
            reports: Arc::default(),
            keepers,
        }))
    }

    /// Who is let in.
    #[must_use]
    pub fn access(&self) -> Arc<Access> {
        Arc::clone(&self.access)
    }

    /// How reporting to verifiers goes.
    #[must_use]
    pub fn reports(&self) -> Arc<Reports> {
        Arc::clone(&self.reports)
    }

    /// Keeps all memberships up from now on, and reports evidence from there, if that is wanted; the proxy listens on this
    /// port.
    pub async fn start(self: &Arc<Self>, memberships: Vec<Membership>, port: u16, reporting: Option<report::Proxy>) {
        let mut keepers = self.keepers.lock().await;
        let _ = self.reporting.set(reporting);
        let _ = self.port.set(port);
        for membership in memberships {
            self.keep(&mut keepers, membership, port);
        }
    }

    /// Joins a verifier. Waits until the proxy listens.
    ///
    /// # Errors
    /// [`JoinError`]; earlier memberships stay as they are then.
    pub async fn join(self: &Arc<Self>, wish: Wish) -> Result<Done, JoinError> {
        let mut keepers = self.keepers.lock().await;
        let port = *self.port.get().ok_or(JoinError::Starting)?;
        let joined = request(&self.config, wish, (self.now)(), port, TpmAccess::Log(self.log.clone())).await?;
        // A keeper must not write what it knew into the folder of the new membership.
        for name in joined.replaces(&self.config.state_dir)? {
            end(keepers.remove(&name)).await;
            self.reports.remove(&name);
        }
        self.change(|state| joined.keep(state))?;
        let mut all = Membership::all(&self.config.state_dir)?;
        if let Some(at) = all.iter().position(|membership| membership.name == joined.name) {
            self.keep(&mut keepers, all.swap_remove(at), port);
        }
        info!(verifier = %joined.name, host = %joined.certified.host, "joined");
        Ok(joined.done())
    }

    /// Changes what is on disk, then what is in force.
    pub(super) fn change(&self, change: impl FnOnce(&Path) -> Result<(), JoinError>) -> Result<(), JoinError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        change(&self.config.state_dir)?;
        let memberships = Membership::all(&self.config.state_dir)?;
        let admitted = self.identity.admit(&self.access, &self.config.verifiers, &memberships);
        admitted.map_err(|e| JoinError::Identity(Box::new(e)))
    }

    fn keep(self: &Arc<Self>, keepers: &mut BTreeMap<String, Vec<JoinHandle<()>>>, membership: Membership, port: u16) {
        let name = membership.name.clone();
        let own = Arc::new(RwLock::new(Own::of(&membership)));
        let mut tasks = Vec::new();
        if let Some(Some(attest)) = self.reporting.get() {
            let reporter = Reporter {
                verifier: name.clone(),
                host: self.config.host_id.clone(),
                attest: Arc::new(report::Proxy { verifier: name.clone(), ..attest.clone() }),
                connect: report::Dial::new(Arc::clone(&own)),
                changes: self.config.report.changes,
                status: self.reports.add(&name),
                now: self.now,
            };
            tasks.push(tokio::spawn(reporter.run()));
        }
        let keeper = Keeper { log: self.log.clone(), members: Arc::downgrade(self), own, port, now: self.now };
        tasks.push(tokio::spawn(keep(keeper, membership)));
        keepers.insert(name, tasks);
    }

    /// Ends all keepers. The TPM can be closed when this has returned.
    pub async fn stop(&self) {
        for (_, tasks) in std::mem::take(&mut *self.keepers.lock().await) {
            end(Some(tasks)).await;
        }
    }
}

async fn end(tasks: Option<Vec<JoinHandle<()>>>) {
    for task in tasks.into_iter().flatten() {
        task.abort();
        let _ = task.await;
    }
}
