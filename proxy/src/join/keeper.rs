//! Keeps a membership up while the proxy runs.
//!
//! One task for each verifier that was joined. It tells the verifier where the proxy is, until that has worked once, and
//! renews the certificate at two thirds of its life. A verifier that is away is asked again, after growing pauses; the
//! certificate in force goes on until its end. A renewal is signed by the attestation key, through the log, which has
//! the TPM.

use std::{
    sync::{Arc, PoisonError, RwLock, Weak},
    time::Duration,
};

use onequote_evidence::{
    id::{Blob, Sha256, TimeMs},
    join::{Certified, Here, RenewChallenge, RenewProof, RenewRequest, key_message, renewal_data},
};
use rcgen::{PublicKeyData as _, SigningKey as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tracing::{error, info, warn};

use super::{
    JoinError, Membership,
    connection::{Connection, Dialled, Known, dial, message},
    members::Members,
};
use crate::log::LogHandle;

/// The first pause after a failure, and the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// How long the task sleeps at most: clocks are set.
const LONGEST_SLEEP: Duration = Duration::from_secs(600);

/// What the keeper needs.
pub(super) struct Keeper {
    /// The way to the attestation key.
    pub(super) log: LogHandle,
    /// Where certificates are in force; gone when the proxy ends.
    pub(super) members: Weak<Members>,
    /// By what its reports connect.
    pub(super) own: Arc<RwLock<Own>>,
    /// The port on which the proxy listens.
    pub(super) port: u16,
    /// The host's clock.
    pub(super) now: fn() -> TimeMs,
}

/// Keeps a membership up until it is stopped.
pub(super) async fn keep(keeper: Keeper, mut membership: Membership) {
    let (mut told, mut pause) = (false, FIRST_PAUSE);
    let name = membership.name.clone();
    loop {
        let outcome = if !told {
            keeper.tell(&membership).await.map(|url| {
                told = true;
                info!(verifier = %name, url, "the verifier knows where this proxy is");
            })
        } else {
            match until_renewal(&membership, (keeper.now)()) {
                Duration::ZERO => keeper.renew(&mut membership).await.inspect(|()| {
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
                let tenth = Duration::from_millis(membership.details.lifetime / 10);
                tokio::time::sleep(pause.min(tenth.max(FIRST_PAUSE)).mul_f64(0.5 + rand::random::<f64>())).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

impl Keeper {
    /// Tells the verifier where the proxy is. Gives the address that it goes by.
    async fn tell(&self, membership: &Membership) -> Result<String, JoinError> {
        let mut connection = connect(membership).await?;
        let here = Here { url: membership.details.own_url.clone(), port: self.port };
        let known: Here = connection.send("/v1/here", message(&here)?).await?;
        Ok(known.url.unwrap_or_default())
    }

    async fn renew(&self, membership: &mut Membership) -> Result<(), JoinError> {
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
        if certified.host != membership.details.host || certified.authority.0 != membership.authority.as_ref() {
            return Err(JoinError::Broken("a certificate for another host, or of another authority".to_owned()));
        }
        let Some(members) = self.members.upgrade() else { return Ok(()) };
        members.change(|_| Ok(membership.renew(&certified, &key, (self.now)())?))?;
        *self.own.write().unwrap_or_else(PoisonError::into_inner) = Own::of(membership);
        Ok(())
    }
}

/// By what a member connects with its verifier.
pub(crate) struct Own {
    url: String,
    authority: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    /// When the certificate came, by the host's clock.
    pub(crate) received: TimeMs,
}

impl Own {
    pub(crate) fn of(membership: &Membership) -> Self {
        let Membership { details, authority, certificate, key, .. } = membership;
        Self {
            url: details.url.clone(),
            authority: authority.clone(),
            certificate: certificate.clone(),
            key: key.clone_key(),
            received: details.received,
        }
    }
}

/// Connects with the verifier as a member, for a protocol other than HTTP.
pub(crate) async fn dial_member(own: &RwLock<Own>, protocol: &[u8]) -> Result<Dialled, JoinError> {
    let (url, authority, own) = {
        let own = own.read().unwrap_or_else(PoisonError::into_inner);
        (own.url.clone(), own.authority.clone(), (own.certificate.clone(), own.key.clone_key()))
    };
    dial(&url, Known::Authority { authority: &authority, own }, Some(protocol)).await
}

async fn connect(membership: &Membership) -> Result<Connection, JoinError> {
    let own = (membership.certificate.clone(), membership.key.clone_key());
    Connection::open(&membership.details.url, Known::Authority { authority: &membership.authority, own }).await
}

/// How long it is until two thirds of the certificate's life are over. A clock that was set back says nothing of its age.
fn until_renewal(membership: &Membership, now: TimeMs) -> Duration {
    let (received, lifetime) = (membership.details.received.0, membership.details.lifetime);
    let due = received.saturating_add(lifetime / 3 * 2);
    if now.0 < received { Duration::ZERO } else { Duration::from_millis(due.saturating_sub(now.0)) }
}
