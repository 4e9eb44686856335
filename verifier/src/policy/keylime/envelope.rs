//! The envelope of a signed policy: DSSE (Dead Simple Signing Envelope, `github.com/secure-systems-lab/dsse`).
//!
//! ```json
//! {"payload": BASE64, "payloadType": "application/vnd.keylime+json", "signatures": [{"keyid": …, "sig": BASE64}]}
//! ```
//!
//! What is signed is `DSSEv1 LENGTH TYPE LENGTH PAYLOAD`, lengths in decimal. Keylime signs with ECDSA and SHA-256. The
//! key's id in the envelope is a hint that a signer chooses, and is not used: the key is the one that the operator gives.

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE},
};
use serde::Deserialize;

use super::KeylimeError;
use crate::policy::SigningKey;

/// What Keylime calls the payload (`keylime/policy/sign_runtime_policy.py`).
const PAYLOAD_TYPE: &str = "application/vnd.keylime+json";

/// The most signatures that are tried.
const MAX_SIGNATURES: usize = 64;

/// Whose word a policy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authenticity {
    /// Of whoever has the key that was given.
    Signed,
    /// It is signed, but nobody looked by whom.
    Unchecked,
    /// It has no signature.
    Plain,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    payload: String,
    #[serde(rename = "payloadType")]
    payload_type: String,
    signatures: Vec<Signature>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Signature {
    #[serde(default)]
    #[allow(dead_code, reason = "it is allowed to be there")]
    keyid: Option<String>,
    sig: String,
}

/// Takes a policy out of its envelope, if it is in one. `danger_unchecked` takes it without a look at its signatures.
///
/// # Errors
/// [`KeylimeError`].
pub(super) fn open(
    text: &str,
    key: Option<&SigningKey>,
    danger_unchecked: bool,
) -> Result<(String, Authenticity), KeylimeError> {
    #[derive(Deserialize)]
    struct Outer {
        payload: Option<serde_json::Value>,
    }
    let outer: Outer = serde_json::from_str(text)?;
    if outer.payload.is_none() {
        return match key {
            Some(_) => Err(KeylimeError::NotSigned),
            None => Ok((text.to_owned(), Authenticity::Plain)),
        };
    }
    let envelope: Envelope = serde_json::from_str(text)?;
    if envelope.payload_type != PAYLOAD_TYPE {
        return Err(KeylimeError::PayloadType { found: envelope.payload_type, expected: PAYLOAD_TYPE });
    }
    let payload = decode(&envelope.payload)?;
    let authenticity = match key {
        Some(key) => {
            let length = envelope.payload_type.len();
            let head = format!("DSSEv1 {length} {} {} ", envelope.payload_type, payload.len());
            let message = [head.as_bytes(), &payload].concat();
            let mut good = false;
            for signature in envelope.signatures.iter().take(MAX_SIGNATURES) {
                good |= key.signed_message(&message, &decode(&signature.sig)?);
            }
            if !good {
                return Err(KeylimeError::Signature);
            }
            Authenticity::Signed
        }
        None if danger_unchecked => Authenticity::Unchecked,
        None => return Err(KeylimeError::NoKey),
    };
    Ok((String::from_utf8(payload).map_err(|_| KeylimeError::Encoding)?, authenticity))
}

fn decode(text: &str) -> Result<Vec<u8>, KeylimeError> {
    STANDARD.decode(text).or_else(|_| URL_SAFE.decode(text)).map_err(|_| KeylimeError::Encoding)
}
