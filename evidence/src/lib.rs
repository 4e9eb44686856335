//! Formats, parsers and replay of onequote evidence.
//!
//! Everything that the attester (proxy and shim) and the verifier must agree on, to the byte, is here; nothing else
//! is. The crate reads no file, no clock and no socket: bytes come in, typed values or a [`Malformed`] that names
//! the place go out. Every parser is total (any input gives a value or an error), bounded (it allocates no more than
//! a small multiple of its input) and refuses trailing bytes.
//!
//! A type that was parsed is not a type that is true. What a caller must check before believing a value is said at
//! the value: a [`record::Record`] is what a file says, a [`log::Replay`] ties it to register values, and only a
//! quote ([`tpm::Attest`]) whose signature and nonce were checked ties those to a TPM.
//!
//! The rooms, from the TPM outwards:
//! - [`digest`], [`pcr`]: hash algorithms, registers and how an extend changes them.
//! - [`tpm`]: the TPM's own structures (`TPMS_ATTEST`, `TPMT_SIGNATURE`, `TPMT_PUBLIC`).
//! - [`event`], [`record`], [`log`]: the measurement log and its replay to PCR 12 and 13.
//! - [`firmware`]: the firmware's event log, its replay to the registers of the boot, and what it proves.
//! - [`ima`]: IMA's binary measurement list and its replay to PCR 10.
//! - [`guest_frame`]: what the shim and the proxy say to each other over vsock.
//! - [`join`]: what a host and a verifier say to each other before the first quote.
//! - [`nonce_tree`], [`statement`], [`stream`]: one quote for many challenges, and the evidence that goes with it.
//! - [`report`]: what a host that reports and a verifier say to each other.

pub mod cbor;
pub mod digest;
mod error;
pub mod event;
pub mod firmware;
pub mod guest_frame;
pub mod id;
pub mod ima;
pub mod join;
pub mod log;
pub mod nonce_tree;
pub mod pcr;
mod reader;
pub mod record;
pub mod report;
pub mod statement;
pub mod stream;
pub mod tpm;

pub use error::{Malformed, MalformedKind};
