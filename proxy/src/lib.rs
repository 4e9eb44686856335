//! The host's attester: meets VMs over QMP, measures, logs, extends, quotes.

pub mod config;
pub mod guest;
pub mod identity;
pub mod inventory;
pub mod sink;
pub mod status;
