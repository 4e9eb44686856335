//! The host daemon.

pub mod tpm;
