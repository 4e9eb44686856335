//! A fleet of hosts in one process, for what no single machine has room for: thousands of hosts with hundreds of VMs each.
//!
//! A [`Host`] is the proxy's own rooms (recorder, journal, inventory, attester) around a TPM that is a program ([`Chip`]), a
//! log in memory ([`Disk`]) and guests' lists ([`GuestLists`]). So its keys sign true quotes over true registers, its log
//! replays, and what it sends is made by the code that a real proxy sends with. What is simulated is what happens:
//! VMs that start and stop, guests that run programs, reboots.
//!
//! The [`Fleet`] lets its hosts report by the proxy's own report room over true mTLS to a [`Verifier`], a process of its own.
//! What happens follows from a seed. One host in some is an attacker ([`Attack`]); at the end every honest host must be known
//! at the verifier exactly as it is, and every attacker by its finding.

mod attack;
pub mod catalogue;
mod disk;
mod enrol;
mod guests;
mod host;
mod line;
mod meter;
mod network;
mod run;
mod tpm;
mod trial;
mod verifier;
mod wire;

pub use attack::Attack;
pub use catalogue::Catalogue;
pub use disk::{Disk, SavedDisk};
pub use guests::GuestLists;
pub use host::{Host, Surroundings, Truth, now, step_clocks};
pub use meter::{Meter, Times, Told, Totals};
pub use network::Network;
pub use run::{Fleet, Life, Member, Plan};
pub use tpm::{Chip, SavedChip};
pub use trial::{Outcome, Trial, raise_descriptors};
pub use verifier::{Verifier, own_cpu, own_peak};
pub use wire::Wire;
