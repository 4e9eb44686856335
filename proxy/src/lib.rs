//! The host's attester: meets VMs over QMP, measures, logs, extends, quotes.
//!
//! Rooms in the order in which data passes: [`log`] and [`tpm`] (one thread owns both), [`guest`] (what guests' kernels
//! measure), [`attest`] (challenges to evidence), [`serve`] (doors), [`report`] (to verifiers that were joined). [`inventory`] is what the log says is there.

pub mod app;
pub mod attest;
pub mod cli;
pub mod config;
mod folder;
pub mod guest;
pub mod identity;
pub mod intercept;
pub mod inventory;
pub mod join;
pub mod launch;
pub mod log;
pub mod measure;
pub mod nbd;
mod notify;
pub mod qmp;
pub mod rate;
pub mod report;
pub mod serve;
pub mod sink;
pub mod status;
pub mod tpm;
pub mod vm;
