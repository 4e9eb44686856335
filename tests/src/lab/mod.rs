//! The lab: real QEMU, real TPM stack, real guests, for end-to-end tests, benches and the demo.
//!
//! A [`World`] is one host: a folder of its own, a software TPM, a proxy, a verifier, and VMs. Everything it
//! starts is a child process in a process group of its own, dies with the world (also when the test panics or
//! is killed), and writes to a log file in the world's folder, shown when the test fails.
//!
//! What guests are made of is built once from Debian's packages and kept in the user's cache folder
//! ([`Assets`]); no step of that needs root.
//!
//! Another QEMU than the installed one is used when its folder stands first in `PATH`; it must be in place as its package
//! has it, since it looks for its firmware where it was built for.
//!
//! Nothing here sleeps to wait: [`wait::until`] polls a condition and names what never came.
//!
//! Errors are `anyhow`'s, although this is a library: nobody handles them, people read them.

mod assets;
mod bare;
mod base64;
mod cache;
mod command;
mod console;
mod distribution;
mod firmware;
mod image;
mod logview;
mod machine;
mod maker;
pub mod monitor_double;
mod nested;
mod peer;
mod postgres;
mod process;
mod proxy;
mod qmp;
mod random;
mod relay;
mod replicas;
mod report;
pub mod story;
mod tools;
mod tpm;
pub mod trees;
mod verdict;
mod verifier;
mod vm;
mod vsock;
pub mod wait;
mod world;

pub use assets::{Assets, verifier_program};
pub use bare::{Act, Bare};
pub use console::{Answer, Console};
pub use distribution::{Distribution, SMALL_PACKAGE, ShimStart};
pub use firmware::{BootedBy, FirmwareBoot};
pub use logview::LogView;
pub use machine::Machine;
pub use maker::Maker;
pub use nested::NestedHost;
pub use peer::{Contradiction, Guest, Peer, ShimConnection};
pub use postgres::{Postgres, block_on};
pub use process::Process;
pub use proxy::ProxySettings;
pub use qmp::Qmp;
pub use random::Random;
pub use relay::{Loss, TpmRelay};
pub use replicas::{Forwarder, Replica};
pub use report::{note, skip};
pub use tools::python_library;
pub use tpm::{Tpm, TpmCommand, authority_certificates};
pub use verdict::{Judged, Verdict};
pub use verifier::Run;
pub use vm::{Vm, VmSpec};
pub use world::{Options, World};
