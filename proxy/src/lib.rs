//! The host daemon.

pub mod log;
pub mod tpm;
