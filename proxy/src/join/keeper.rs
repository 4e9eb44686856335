//! Keeps a membership up while the proxy runs.
//!
//! One task for each verifier that was joined. It tells the verifier where the proxy is, until that has worked once, and
//! renews the certificate at two thirds of its life. A verifier that is away is asked again, after growing pauses; the
//! certificate in force goes on until its end. A renewal is signed by the attestation key, through the log, which has
//! the TPM.

use std::{
    sync::{Arc, RwLock},
    time::Duration,
};

use onequote_evidence::{
    id::{Blob, Sha256, TimeMs},
    join::{Certified, Here, RenewChallenge, RenewProof, RenewRequest, key_message, renewal_data},
};
use rcgen::{PublicKeyData as _, SigningKey as _};
use tracing::{error, info, warn};

use super::{
    JoinError, Membership,
    connection::{Connection, Known, message},
};
use crate::{identity::Trust, log::LogHandle};

/// The first pause after a failure, and the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// How long the task sleeps at most: clocks are set.
const LONGEST_SLEEP: Duration = Duration::from_secs(600);

/// What the keeper needs.
#[derive(Clone)]
pub struct Keeper {
    /// The way to the attestation key.
    pub log: LogHandle,
    /// Where certificates are in force.
    pub trust: Arc<Trust>,
    /// The port on which the proxy listens.
    pub port: u16,
    /// The host's clock.
    pub now: fn() -> TimeMs,
}

/// Keeps a membership up until the process ends.
pub async fn keep(keeper: Keeper, membership: Arc<RwLock<Membership>>) {
    let (mut told, mut pause) = (false, FIRST_PAUSE);
    let name = read(&membership, |m| m.name.clone());
    loop {
        let outcome = if !told {
            keeper.tell(&membership).await.map(|url| {
                told = true;
                info!(verifier = %name, url, "the verifier knows where this proxy is");
            })
        } else {
            match until_renewal(&membership, (keeper.now)()) {
                Duration::ZERO => keeper.renew(&membership).await.inspect(|()| {
                    info!(verifier = %name, "the certificate was renewed");
                }),
                wait => {
                    tokio::time::sleep(wait.min(LONGEST_SLEEP)).await;
                    Ok(())
                }
            }
        };
        match outcome {
            Ok(()) => pause = FIRST_PAUSE,
            Err(e) => {
                match &e {
                    JoinError::Refused { .. } => error!(verifier = %name, "not a member any more? {e}"),
                    _ => warn!(verifier = %name, "the membership could not be kept up; trying again: {e}"),
                }
                // A tenth of the life at most: a renewal has a third of it.
                let tenth = Duration::from_millis(read(&membership, |m| m.details.lifetime / 10));
                tokio::time::sleep(pause.min(tenth.max(FIRST_PAUSE)).mul_f64(0.5 + rand::random::<f64>())).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

impl Keeper {
    /// Tells the verifier where the proxy is. Gives the address that it goes by.
    async fn tell(&self, membership: &RwLock<Membership>) -> Result<String, JoinError> {
        let mut connection = connect(membership).await?;
        let here = Here { url: read(membership, |m| m.details.own_url.clone()), port: self.port };
        let known: Here = connection.send("/v1/here", message(&here)?).await?;
        Ok(known.url.unwrap_or_default())
    }

    async fn renew(&self, membership: &RwLock<Membership>) -> Result<(), JoinError> {
        let key = rcgen::KeyPair::generate()?;
        let request = message(&RenewRequest { key: Blob(key.der_bytes().to_vec()) })?;
        let mut connection = connect(membership).await?;
        let challenge: RenewChallenge = connection.send("/v1/renew", request.clone()).await?;
        let data: Sha256 = renewal_data(&challenge.nonce, &request, &connection.binding);
        let quoted = self.log.quote(move |_| data).await.map_err(|e| JoinError::Quote(e.to_string()))?;
        let shown = RenewProof {
            attest: Blob(quoted.quote.attest),
            signature: Blob(quoted.quote.signature),
            key_signature: Blob(key.sign(&key_message(&request, &connection.binding))?),
        };
        let certified: Certified = connection.send("/v1/renew/prove", message(&shown)?).await?;
        let mut kept = membership.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if certified.host != kept.details.host || certified.authority.0 != kept.authority.as_ref() {
            return Err(JoinError::Broken("a certificate for another host, or of another authority".to_owned()));
        }
        kept.renew(&certified, &key, (self.now)())?;
        self.trust.renewed(&kept).map_err(|e| JoinError::Broken(e.to_string()))
    }
}

async fn connect(membership: &RwLock<Membership>) -> Result<Connection, JoinError> {
    let (url, authority, own) =
        read(membership, |m| (m.details.url.clone(), m.authority.clone(), (m.certificate.clone(), m.key.clone_key())));
    Connection::open(&url, Known::Authority { authority: &authority, own }).await
}

/// How long it is until two thirds of the certificate's life are over. A clock that was set back says nothing of its age.
fn until_renewal(membership: &RwLock<Membership>, now: TimeMs) -> Duration {
    let (received, lifetime) = read(membership, |m| (m.details.received.0, m.details.lifetime));
    let due = received.saturating_add(lifetime / 3 * 2);
    if now.0 < received { Duration::ZERO } else { Duration::from_millis(due.saturating_sub(now.0)) }
}

fn read<T>(membership: &RwLock<Membership>, read: impl FnOnce(&Membership) -> T) -> T {
    read(&membership.read().unwrap_or_else(std::sync::PoisonError::into_inner))
}
