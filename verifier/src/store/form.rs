//! The form in which states and verdicts are kept.
//!
//! | what | form |
//! | --- | --- |
//! | accepted | CBOR `[accepted, guests]` |
//! | trees | JSON `[base, tree]`, zstd |
//! | verdict | JSON, zstd |

use std::io::Read as _;

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    appraise::state::{Accepted, AcceptedGuest, HostState, Tree},
    result::Verdict,
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Fast, and JSON still shrinks to a tenth.
const LEVEL: i32 = 1;

/// The most that a tree or a verdict may be when it is expanded, in bytes.
const MAX_JSON: u64 = 256 * 1024 * 1024;

/// What changes with every evidence.
pub(super) fn accepted(state: &HostState) -> Result<Vec<u8>, Failure> {
    Ok(minicbor::to_vec((&state.accepted, &state.guests))?)
}

/// What changes when an image or a VM does.
pub(super) fn trees(state: &HostState) -> Result<Vec<u8>, Failure> {
    pack(&(&state.base, &state.tree))
}

/// A host's state from its two parts.
pub(super) fn state(accepted: Option<&[u8]>, trees: Option<&[u8]>) -> Result<HostState, Failure> {
    let (accepted, guests) = match accepted {
        Some(bytes) => minicbor::decode::<(Option<Accepted>, Vec<AcceptedGuest>)>(bytes)?,
        None => Default::default(),
    };
    let (base, tree) = match trees {
        Some(bytes) => unpack::<(Tree, Tree)>(bytes)?,
        None => Default::default(),
    };
    Ok(HostState { accepted, base, tree, guests })
}

/// A verdict to be kept.
pub(super) fn verdict(verdict: &Verdict) -> Result<Vec<u8>, Failure> {
    pack(verdict)
}

/// A kept verdict.
pub(super) fn read_verdict(bytes: &[u8]) -> Result<Verdict, Failure> {
    unpack(bytes)
}

fn pack<T: Serialize>(value: &T) -> Result<Vec<u8>, Failure> {
    let json = serde_json::to_vec(value)?;
    Ok(zstd::bulk::compress(&json, LEVEL)?)
}

fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    let mut json = Vec::new();
    zstd::Decoder::new(bytes)?.take(MAX_JSON).read_to_end(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}
