//! Joining a verifier: the token, what is signed and proven, and the messages.
//!
//! The messages are JSON, with bytes in hexadecimal; a field that is not known is refused. docs/formats.md has the order in
//! which they are sent and what each side checks.

use std::{fmt, str::FromStr};

use crate::{digest::sha256, id::Sha256};

/// The name in a verifier's own certificates, which no host may have as its id.
pub const VERIFIER_NAME: &str = "onequote-verifier";

/// The label of the exporter value of a TLS connection (RFC 9266), which proofs are bound to: 32 bytes, no context.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-Channel-Binding";

/// Bytes of a token's secret, and of the secret in a credential.
pub const SECRET_SIZE: usize = 32;

/// The longest message in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// What the operator carries to a host: the right to join, and by which key the verifier is known.
///
/// Its text is `oq1.ID.SECRET.PIN`, the three in hexadecimal.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Names the token; no secret.
    pub id: [u8; 8],
    /// Known to verifier and bearer only.
    pub secret: [u8; SECRET_SIZE],
    /// SHA-256 of the `SubjectPublicKeyInfo` of the verifier's own authority.
    pub pin: Sha256,
}

/// Text that is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a token of the form oq1.ID.SECRET.PIN, as onequote-verifier token create prints it")]
pub struct NotAToken;

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "oq1.{}.{}.{}", hex::encode(self.id), hex::encode(self.secret), self.pin)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, secret)", hex::encode(self.id))
    }
}

impl FromStr for JoinToken {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = text.split('.').collect();
        let ["oq1", id, secret, pin] = parts.as_slice() else { return Err(NotAToken) };
        let mut token = Self { id: [0; 8], secret: [0; SECRET_SIZE], pin: Sha256::ZERO };
        hex::decode_to_slice(id, &mut token.id).map_err(|_| NotAToken)?;
        hex::decode_to_slice(secret, &mut token.secret).map_err(|_| NotAToken)?;
        token.pin = pin.parse().map_err(|_| NotAToken)?;
        Ok(token)
    }
}

impl JoinToken {
    /// What the verifier keeps instead of the secret.
    #[must_use]
    pub fn hashed(&self) -> Sha256 {
        sha256(&[&self.secret])
    }
}

/// What shows that the TPM opened the credential: SHA-256(`"onequote.join.v1"` ‖ secret ‖ SHA-256(request) ‖ SHA-256(binding)),
/// where `request` is the join request as it was sent and `binding` the exporter value of the connection that the proof
/// goes over.
#[must_use]
pub fn proof(secret: &[u8; SECRET_SIZE], request: &[u8], binding: &[u8]) -> Sha256 {
    sha256(&[b"onequote.join.v1", secret, sha256(&[request]).as_bytes(), sha256(&[binding]).as_bytes()])
}

/// What the host's new TLS key signs, so that nobody has a key certified that is not theirs:
/// `"onequote.key.v1"` ‖ SHA-256(request) ‖ SHA-256(binding).
#[must_use]
pub fn key_message(request: &[u8], binding: &[u8]) -> Vec<u8> {
    [b"onequote.key.v1".as_slice(), sha256(&[request]).as_bytes(), sha256(&[binding]).as_bytes()].concat()
}

/// The qualifying data of the quote that renews a certificate: SHA-256(`"onequote.renew.v1"` ‖ nonce ‖ SHA-256(request) ‖
/// SHA-256(binding)). It can't be taken for that of evidence, which begins with another word.
#[must_use]
pub fn renewal_data(nonce: &Sha256, request: &[u8], binding: &[u8]) -> Sha256 {
    let (request, binding) = (sha256(&[request]), sha256(&[binding]));
    sha256(&[b"onequote.renew.v1", nonce.as_bytes(), request.as_bytes(), binding.as_bytes()])
}

#[cfg(feature = "json")]
pub use messages::{
    Certified, Here, JoinChallenge, JoinProof, JoinRequest, Refused, RenewChallenge, RenewProof, RenewRequest,
};

#[cfg(feature = "json")]
mod messages {
    use serde::{Deserialize, Serialize};

    use crate::id::{Blob, HostId, Sha256, TimeMs};

    /// `POST /v1/join`: who wants to join.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct JoinRequest {
        /// The token's id.
        pub token: Blob,
        /// The token's secret.
        pub secret: Blob,
        /// The id that the host wants to have.
        pub host: HostId,
        /// Where its proxy is: `https://ADDRESS:PORT`; the address that the request comes from, and `port`, when absent.
        pub url: Option<String>,
        /// The port on which its proxy listens; 0 when it is not known yet.
        pub port: u16,
        /// The endorsement key, `TPM2B_PUBLIC`.
        pub ek: Blob,
        /// The endorsement key's certificate, DER, if there is one.
        pub ek_certificate: Option<Blob>,
        /// Certificates of issuers, DER.
        pub ek_chain: Vec<Blob>,
        /// The attestation key, `TPM2B_PUBLIC`.
        pub ak: Blob,
        /// The TLS key that is to be certified: an uncompressed point on P-256, 65 bytes.
        pub key: Blob,
    }

    /// The answer: a credential that only that TPM with that attestation key opens.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct JoinChallenge {
        /// Names this attempt.
        pub session: Blob,
        /// `TPM2B_ID_OBJECT`.
        pub credential: Blob,
        /// `TPM2B_ENCRYPTED_SECRET`.
        pub encrypted_seed: Blob,
    }

    /// `POST /v1/join/prove`: the credential was opened.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct JoinProof {
        /// Which attempt.
        pub session: Blob,
        /// See [`super::proof`].
        pub proof: Sha256,
        /// The TLS key's signature over [`super::key_message`]: ECDSA with SHA-256, as ASN.1.
        pub key_signature: Blob,
    }

    /// What a host gets: the answer to a proof.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Certified {
        /// The host.
        pub host: HostId,
        /// Its certificate, DER.
        pub certificate: Blob,
        /// The verifier's authority, DER.
        pub authority: Blob,
        /// When the certificate ends, by the verifier's clock.
        pub expires: TimeMs,
        /// How long it holds, in milliseconds.
        pub lifetime: u64,
        /// Whether the verifier takes the TPM for a program.
        pub software_tpm: bool,
    }

    /// `POST /v1/renew`, with the host's certificate: it wants another one.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct RenewRequest {
        /// The new TLS key, as in a join.
        pub key: Blob,
    }

    /// The answer.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct RenewChallenge {
        /// To be quoted on this connection.
        pub nonce: Sha256,
    }

    /// `POST /v1/renew/prove`, on the same connection: a quote by the attestation key.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct RenewProof {
        /// `TPMS_ATTEST` with [`super::renewal_data`].
        pub attest: Blob,
        /// `TPMT_SIGNATURE`.
        pub signature: Blob,
        /// The new TLS key's signature over [`super::key_message`].
        pub key_signature: Blob,
    }

    /// `POST /v1/here`, with the host's certificate: where its proxy is; and the answer, what the verifier goes by.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Here {
        /// `https://ADDRESS:PORT`; the address that the request comes from, and `port`, when absent.
        pub url: Option<String>,
        /// The port.
        pub port: u16,
    }

    /// Any answer that is not 200.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Refused {
        /// The stable word.
        pub code: String,
        /// Why, for people.
        pub error: String,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_text() {
        let token = JoinToken { id: [1; 8], secret: [2; 32], pin: Sha256([3; 32]) };
        let text = token.to_string();
        assert_eq!(text, format!("oq1.{}.{}.{}", "01".repeat(8), "02".repeat(32), "03".repeat(32)));
        assert_eq!(text.parse(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains("0202"));
        for bad in ["", "oq1", &text[1..], &text[..text.len() - 1], &format!("{text}."), &text.replace("oq1", "oq2")] {
            assert_eq!(bad.parse::<JoinToken>(), Err(NotAToken), "{bad}");
        }
    }

    #[test]
    fn proofs_depend_on_every_part() {
        let all = [
            proof(&[1; 32], b"request", b"binding"),
            proof(&[2; 32], b"request", b"binding"),
            proof(&[1; 32], b"requesT", b"binding"),
            proof(&[1; 32], b"request", b"bindinG"),
            renewal_data(&Sha256([1; 32]), b"request", b"binding"),
            renewal_data(&Sha256([2; 32]), b"request", b"binding"),
            renewal_data(&Sha256([1; 32]), b"requesT", b"binding"),
            renewal_data(&Sha256([1; 32]), b"request", b"bindinG"),
        ];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        assert_ne!(key_message(b"a", b"b"), key_message(b"b", b"a"));
    }
}
