//! Takes over Keylime's runtime policies (`keylime/ima/ima.py`, version 1), plain or in a signed envelope.
//!
//! | there | here |
//! | --- | --- |
//! | `digests` | the allow list; algorithms by the digests' lengths |
//! | `excludes` | `ima_exclude`, each anchored at the path's beginning as `re.match` does |
//! | `keyrings`, `ima.ignored_keyrings` | `ima_keyrings`, `ima_ignored_keyrings` |
//! | `ima-buf` | `ima_buf` |
//! | `verification-keys` | `ima_keys`, with the ids given there |
//! | `ima.log_hash_alg` | not needed: a list's entries tell their size, and each is checked |
//! | `meta`, `release` | a comment |
//!
//! What cannot be taken over with its meaning is refused by name: unknown keys, `ima.dm_policy`, digests of other lengths
//! than ours, expressions that mean otherwise here.

mod envelope;
mod excludes;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;

use std::{collections::BTreeMap, fmt::Write as _};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;

use onequote_evidence::digest::HashAlg;

pub use envelope::Authenticity;

use super::{
    SigningKey,
    keys::KeyError,
    text::{comment, quote},
};

/// The only version there is.
const VERSION: u64 = 1;

/// A policy that cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum KeylimeError {
    /// It is not JSON, or lacks something, or has what is not known.
    #[error("not a Keylime runtime policy: {0}")]
    Json(#[from] serde_json::Error),
    /// A part is not base64, or not UTF-8.
    #[error("the envelope is not base64 of UTF-8")]
    Encoding,
    /// The envelope holds something else.
    #[error("the envelope holds {found:?}, not {expected:?}")]
    PayloadType {
        /// What it says.
        found: String,
        /// What it should say.
        expected: &'static str,
    },
    /// It is signed, and there is no key.
    #[error(
        "the policy is signed: give the signer's key with --key, or take it unchecked with --danger-unchecked-signature"
    )]
    NoKey,
    /// There is a key, and it is not signed.
    #[error("a key was given, but the policy is not signed")]
    NotSigned,
    /// No signature is the key's.
    #[error("the policy is not signed by this key")]
    Signature,
    /// Something in it is not taken over.
    #[error("{what}: {why}")]
    Unsupported {
        /// What.
        what: String,
        /// Why not.
        why: String,
    },
    /// A key in it.
    #[error("verification-keys: key {index}")]
    Key {
        /// Which, from 0.
        index: usize,
        /// What is wrong with it.
        source: KeyError,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuntimePolicy {
    meta: Meta,
    release: u64,
    digests: BTreeMap<String, Vec<String>>,
    excludes: Vec<String>,
    keyrings: BTreeMap<String, Vec<String>>,
    ima: Ima,
    #[serde(rename = "ima-buf")]
    ima_buf: BTreeMap<String, Vec<String>>,
    #[serde(rename = "verification-keys")]
    verification_keys: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Meta {
    version: u64,
    generator: u64,
    timestamp: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ima {
    ignored_keyrings: Vec<String>,
    log_hash_alg: String,
    dm_policy: serde_json::Value,
}

#[derive(Deserialize)]
struct Keyring {
    keyids: Vec<u32>,
    pubkeys: Vec<String>,
}

/// What a policy becomes.
#[derive(Debug, Clone)]
pub struct Import {
    /// The allow list, for `ima_file`.
    pub list: String,
    /// The lines of a rule that use it, where it is called so.
    pub rule: String,
    /// What the operator should know.
    pub notes: Vec<String>,
    /// Whose word it is.
    pub authenticity: Authenticity,
}

/// Takes a policy over. `list` is the name that the allow list will have; `danger_unchecked` takes a signed policy without
/// a look at its signatures.
///
/// # Errors
/// [`KeylimeError`]; nothing is taken over in part.
pub fn import(
    text: &str,
    key: Option<&SigningKey>,
    danger_unchecked: bool,
    list: &str,
) -> Result<Import, KeylimeError> {
    let (text, authenticity) = envelope::open(text, key, danger_unchecked)?;
    let policy: RuntimePolicy = serde_json::from_str(&text)?;
    let unsupported = |what: &str, why: String| Err(KeylimeError::Unsupported { what: what.into(), why });
    if policy.meta.version != VERSION {
        return unsupported("meta.version", format!("{} is not {VERSION}", policy.meta.version));
    }
    if !policy.ima.dm_policy.is_null() {
        return unsupported("ima.dm_policy", "rules about device-mapper tables are not taken over".into());
    }
    if policy.ima.log_hash_alg.parse::<HashAlg>().is_err() {
        return unsupported("ima.log_hash_alg", format!("{:?} is not known", policy.ima.log_hash_alg));
    }
    let mut notes = Vec::new();
    let mut rule = String::from("# From a Keylime runtime policy");
    let _ = write!(rule, ", release {}, generator {}", policy.release, policy.meta.generator);
    if let Some(timestamp) = &policy.meta.timestamp {
        let _ = write!(rule, ", of {}", comment(timestamp));
    }
    rule.push('\n');
    if authenticity == Authenticity::Unchecked {
        notes.push("the policy's signature was not checked".to_owned());
        rule += "# Its signature was not checked.\n";
    }
    let _ = writeln!(rule, "ima_file = {}", quote(list));
    strings(&mut rule, "ima_exclude", &excludes(&policy.excludes)?);
    let keys = keys(&policy.verification_keys)?;
    if !keys.is_empty() {
        let _ = writeln!(rule, "ima_keys = [\n    {},\n]", keys.join(",\n    "));
    }
    for name in &policy.ima.ignored_keyrings {
        if name != "*" && name.contains(['*', '?']) {
            return unsupported("ima.ignored_keyrings", format!("{name:?} would be a pattern here"));
        }
    }
    strings(&mut rule, "ima_ignored_keyrings", &policy.ima.ignored_keyrings);
    table(&mut rule, "ima_keyrings", &digests("keyrings", &policy.keyrings)?);
    table(&mut rule, "ima_buf", &digests("ima-buf", &policy.ima_buf)?);
    if !policy.keyrings.is_empty() {
        notes.push(
            "Keylime also takes the keys that it allows on keyrings for file signatures; here only ima_keys are: add their \
             certificates there if files are signed with them"
                .to_owned(),
        );
    }
    let mut out = String::from("# Allow list from a Keylime runtime policy.\n");
    for (path, digests) in digests("digests", &policy.digests)? {
        let digests: Vec<String> = digests.iter().map(|digest| quote(digest)).collect();
        let _ = writeln!(out, "{} = [{}]", quote(path), digests.join(", "));
    }
    Ok(Import { list: out, rule, notes, authenticity })
}

/// Digests with the algorithm that has their length. Keylime compares the digits alone.
fn digests<'p>(
    table: &str,
    map: &'p BTreeMap<String, Vec<String>>,
) -> Result<BTreeMap<&'p str, Vec<String>>, KeylimeError> {
    let mut out = BTreeMap::new();
    for (path, list) in map {
        let fail = |why: String| KeylimeError::Unsupported { what: format!("{table}, {path:?}"), why };
        if list.is_empty() {
            return Err(fail("there is no digest".into()));
        }
        let mut digests = Vec::new();
        for text in list {
            let digits = text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c));
            let alg = HashAlg::ALL.into_iter().find(|alg| digits && alg.size() * 2 == text.len());
            let alg =
                alg.ok_or_else(|| fail(format!("{text:?} is not a digest of SHA-1, SHA-256, SHA-384 or SHA-512")))?;
            digests.push(format!("{alg}:{text}"));
        }
        out.insert(path.as_str(), digests);
    }
    Ok(out)
}

fn excludes(expressions: &[String]) -> Result<Vec<String>, KeylimeError> {
    let translated = expressions.iter().map(|expression| {
        excludes::translate(expression)
            .map_err(|why| KeylimeError::Unsupported { what: format!("excludes, {expression:?}"), why })
    });
    translated.collect()
}

/// Keys as TOML, from a text that is JSON (and may be JSON of JSON, as Keylime's database has it).
fn keys(text: &str) -> Result<Vec<String>, KeylimeError> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let mut value: serde_json::Value = serde_json::from_str(text)?;
    if let serde_json::Value::String(inner) = &value {
        value = serde_json::from_str(inner)?;
    }
    let ring: Keyring = serde_json::from_value(value)?;
    let mut out = Vec::new();
    for (index, encoded) in ring.pubkeys.iter().enumerate() {
        let der = STANDARD.decode(encoded).map_err(|_| KeylimeError::Encoding)?;
        let key = SigningKey::from_der(&der).map_err(|source| KeylimeError::Key { index, source })?;
        let id =
            ring.keyids.get(index).map(|id| id.to_be_bytes()).filter(|id| key.ids().iter().all(|own| own.0 != *id));
        let pem = quote(&key.pem());
        out.push(id.map_or_else(|| pem.clone(), |id| format!("{{ key = {pem}, id = \"{}\" }}", hex::encode(id))));
    }
    Ok(out)
}

fn strings(out: &mut String, key: &str, values: &[String]) {
    if values.is_empty() {
        return;
    }
    let _ = writeln!(out, "{key} = [");
    for value in values {
        let _ = writeln!(out, "    {},", quote(value));
    }
    out.push_str("]\n");
}

/// On one line, so that what follows belongs to the rule still.
fn table(out: &mut String, key: &str, map: &BTreeMap<&str, Vec<String>>) {
    if map.is_empty() {
        return;
    }
    let one = |(name, digests): (&&str, &Vec<String>)| {
        let digests: Vec<String> = digests.iter().map(|digest| quote(digest)).collect();
        format!("{} = [{}]", quote(name), digests.join(", "))
    };
    let _ = writeln!(out, "{key} = {{ {} }}", map.iter().map(one).collect::<Vec<_>>().join(", "));
}
