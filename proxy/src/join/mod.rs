//! Joining a verifier with a token, and staying a member.
//!
//! `join` shows the verifier the TPM's endorsement key and our attestation key, opens the credential that comes back in the TPM,
//! and keeps the certificate that this is worth ([`membership`]). Without a resource manager a TPM has one user: while the
//! proxy runs, it is the proxy that joins ([`members`]). The [`keeper`] runs in the proxy: it tells the verifier where
//! the proxy is, and renews the certificate at two thirds of its life. What is sent is in docs/formats.md.

mod connection;
mod keeper;
mod members;
mod membership;

use std::{io, path::Path};

use onequote_evidence::{
    id::{Blob, HostId, TimeMs},
    join::{Certified, JoinChallenge, JoinProof, JoinRequest, JoinToken, SECRET_SIZE, key_message, proof},
    tpm::Public,
};
use rcgen::{PublicKeyData as _, SigningKey as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _};
use serde::{Deserialize, Serialize};

pub(crate) use connection::Dialled;
pub(crate) use keeper::{Own, dial_member};
pub use members::Members;
pub use membership::{Details, Membership};

use crate::{
    config::Config,
    identity::IdentityError,
    log::{LogHandle, RecorderError},
    tpm::{EsapiTpm, GivenCertificate, Tpm, TpmError, TpmOptions},
    vm::is_valid_name,
};
use connection::{Connection, Known, address, message};

/// Joining failed, or a membership cannot be kept up.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The URL.
    #[error("{0:?} is not a URL of the form https://ADDRESS:PORT")]
    Url(String),
    /// The name.
    #[error("{0:?} is no name for a verifier: 1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first; give --name")]
    Name(String),
    /// Nobody answers.
    #[error("cannot reach the verifier at {address}: {source}")]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// Somebody answers who is not the verifier, or does not take us.
    #[error("no trusted connection with {address}: {why}")]
    Tls {
        /// Where.
        address: String,
        /// Why.
        why: String,
    },
    /// It does not speak what was wanted.
    #[error("the verifier does not take reports")]
    Protocol,
    /// The verifier says no.
    #[error("the verifier refuses ({code}): {error}")]
    Refused {
        /// The stable word.
        code: String,
        /// In words.
        error: String,
    },
    /// The verifier's answer is none.
    #[error("the verifier's answer cannot be used: {0}")]
    Broken(String),
    /// The TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// The log, which has the TPM.
    #[error(transparent)]
    Log(#[from] RecorderError),
    /// What was joined cannot be put in force.
    #[error("joined, but not in force before a restart of the proxy: {0}")]
    Identity(Box<IdentityError>),
    /// Too early.
    #[error("the proxy is still starting: it measures the VMs that there are; try again in a moment")]
    Starting,
    /// A file.
    #[error("{0}")]
    File(#[from] io::Error),
    /// A key cannot be made or used.
    #[error("cannot make a key: {0}")]
    Key(#[from] rcgen::Error),
    /// The log, which has the TPM.
    #[error("the attestation key cannot sign: {0}")]
    Quote(String),
}

/// What a join asks for. As JSON it is what the command line hands to a proxy that runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    /// The verifier.
    pub url: String,
    /// The token.
    #[serde(with = "as_text")]
    pub token: JoinToken,
    /// The verifier's name with us; that in its URL when absent.
    pub name: Option<String>,
    /// Where verifiers reach this proxy; the address that the verifier sees, and the port of `listen`, when absent.
    pub own_url: Option<String>,
}

/// A join that succeeded.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {
    /// The verifier's name with us.
    pub name: String,
    /// What it gave.
    pub certified: Certified,
}

mod as_text {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use super::JoinToken;

    pub(super) fn serialize<S: Serializer>(token: &JoinToken, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(token)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<JoinToken, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// How a join reaches the TPM.
enum TpmAccess {
    /// Nobody else uses it. None until it is opened, and while it works.
    Own(TpmOptions, Option<EsapiTpm>),
    /// Through the log, whose TPM it is.
    Log(LogHandle),
}

impl TpmAccess {
    async fn with<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut dyn Tpm) -> Result<T, TpmError> + Send + 'static,
    ) -> Result<T, JoinError> {
        match self {
            Self::Log(log) => Ok(log.with_tpm(work).await?),
            Self::Own(options, opened) => {
                let (options, there) = (options.clone(), opened.take());
                let worked = tokio::task::spawn_blocking(move || {
                    let mut tpm = there.map_or_else(|| EsapiTpm::open_with(&options), Ok)?;
                    work(&mut tpm).map(|result| (tpm, result))
                });
                let (tpm, result) = worked.await.map_err(io::Error::other)??;
                *opened = Some(tpm);
                Ok(result)
            }
        }
    }
}

/// What a verifier gave, not kept yet.
struct Joined {
    name: String,
    details: Details,
    certified: Certified,
    key: rcgen::KeyPair,
}

impl Joined {
    /// The memberships whose place it takes.
    fn replaces(&self, state: &Path) -> Result<Vec<String>, JoinError> {
        Ok(Membership::replaced_by(state, &self.name, &self.certified.authority.0)?)
    }

    /// Keeps it, and forgets those whose place it takes.
    fn keep(&self, state: &Path) -> Result<(), JoinError> {
        let replaced = self.replaces(state)?;
        Membership::create(state, &self.name, &self.details, &self.certified, &self.key)?;
        for name in replaced.iter().filter(|name| **name != self.name) {
            tracing::info!(verifier = %name, now = %self.name, "the same verifier under another name: the old one goes");
            Membership::forget(state, name)?;
        }
        Ok(())
    }

    fn done(self) -> Done {
        Done { name: self.name, certified: self.certified }
    }
}

/// Joins. The caller has made sure that no proxy uses the TPM.
///
/// # Errors
/// [`JoinError`]; nothing is kept then.
pub async fn join(config: &Config, wish: Wish, now: TimeMs) -> Result<Done, JoinError> {
    let tpm = TpmAccess::Own(config.tpm.options()?, None);
    let joined = request(config, wish, now, config.listen.port(), tpm).await?;
    joined.keep(&config.state_dir)?;
    Ok(joined.done())
}

/// Joins for a proxy in memory, whose TPM is behind its log. Nothing is kept on disk: the membership goes with the process.
///
/// # Errors
/// [`JoinError`].
pub async fn join_in_memory(config: &Config, wish: Wish, log: LogHandle, now: TimeMs) -> Result<Membership, JoinError> {
    let Joined { name, details, certified, key } =
        request(config, wish, now, config.listen.port(), TpmAccess::Log(log)).await?;
    let (authority, certificate) = (certified.authority.0.into(), certified.certificate.0.into());
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok(Membership::in_memory(&name, details, authority, certificate, key))
}

/// Everything of a join but keeping what it gives. `port` is that of the proxy.
async fn request(config: &Config, wish: Wish, now: TimeMs, port: u16, mut tpm: TpmAccess) -> Result<Joined, JoinError> {
    let at = address(&wish.url).ok_or_else(|| JoinError::Url(wish.url.clone()))?;
    let name = wish.name.clone().unwrap_or_else(|| at.rsplit_once(':').map_or("", |(host, _)| host).to_owned());
    if !is_valid_name(&name) {
        return Err(JoinError::Name(name));
    }
    if let Some(url) = wish.own_url.as_ref().filter(|url| address(url).is_none()) {
        return Err(JoinError::Url(url.clone()));
    }
    let given = config.tpm.ek_certificate.as_deref().map(given_certificate).transpose()?;
    let kind = config.tpm.ek;
    let found = tpm.with(move |tpm| {
        let ek = tpm.endorsement(kind, given.as_ref())?;
        Ok((ek, tpm.ak_public().to_vec()))
    });
    let (ek, ak_public) = found.await?;
    let ak = Public::parse(&ak_public).map_err(|e| JoinError::Broken(e.to_string()))?.name();

    let key = rcgen::KeyPair::generate()?;
    let request = message(&JoinRequest {
        token: Blob(wish.token.id.to_vec()),
        secret: Blob(wish.token.secret.to_vec()),
        host: config.host_id.clone(),
        url: wish.own_url.clone(),
        port,
        ek: Blob(ek.public.clone()),
        ek_certificate: ek.certificate.clone().map(Blob),
        ek_chain: ek.chain.iter().cloned().map(Blob).collect(),
        ak: Blob(ak_public),
        key: Blob(key.der_bytes().to_vec()),
    })?;
    let mut connection = Connection::open(&wish.url, Known::Pin(wish.token.pin)).await?;
    let challenge: JoinChallenge = connection.send("/v1/join", request.clone()).await?;
    let opened = tpm.with(move |tpm| tpm.activate(&ek, &challenge.credential.0, &challenge.encrypted_seed.0));
    let secret: [u8; SECRET_SIZE] =
        opened.await?.try_into().map_err(|_| JoinError::Broken("a credential of odd size".to_owned()))?;
    let shown = JoinProof {
        session: challenge.session,
        proof: proof(&secret, &request, &connection.binding),
        key_signature: Blob(key.sign(&key_message(&request, &connection.binding))?),
    };
    let certified: Certified = connection.send("/v1/join/prove", message(&shown)?).await?;
    check(&certified, &config.host_id, &wish.token)?;
    let details = Details {
        url: wish.url,
        host: config.host_id.clone(),
        ak: Blob(ak),
        own_url: wish.own_url,
        received: now,
        lifetime: certified.lifetime,
    };
    Ok(Joined { name, details, certified, key })
}

/// Whether the verifier gave what was asked for, under the authority that the token names.
fn check(certified: &Certified, host: &HostId, token: &JoinToken) -> Result<(), JoinError> {
    if certified.host != *host {
        return Err(JoinError::Broken(format!("a certificate for {}", certified.host)));
    }
    let authority = CertificateDer::from(certified.authority.0.clone());
    let parsed = rustls::server::ParsedCertificate::try_from(&authority);
    let pinned = parsed
        .is_ok_and(|authority| onequote_evidence::digest::sha256(&[&authority.subject_public_key_info()]) == token.pin);
    if !pinned {
        return Err(JoinError::Broken("another authority than the token's".to_owned()));
    }
    Ok(())
}

fn given_certificate(path: &Path) -> Result<GivenCertificate, JoinError> {
    let named = |why: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {why}", path.display()));
    let bytes = std::fs::read(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
    if bytes.starts_with(&[0x30]) {
        return Ok(GivenCertificate { certificate: bytes, chain: Vec::new() });
    }
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let mut all = all.map_err(|e| named(e.to_string()))?.into_iter().map(|der| der.to_vec());
    let certificate = all.next().ok_or_else(|| named("it has no certificate".to_owned()))?;
    Ok(GivenCertificate { certificate, chain: all.collect() })
}
