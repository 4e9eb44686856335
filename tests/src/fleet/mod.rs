//! A fleet of hosts in one process, for what no single machine has room for: thousands of hosts with hundreds of VMs each.
//!
//! A [`Host`] is the proxy's own rooms (recorder, journal, inventory, attester) around a TPM that is a program ([`Chip`]), a
//! log in memory ([`Disk`]) and guests' lists ([`GuestLists`]). So its keys sign true quotes over true registers, its log
//! replays, and what it sends is made by the code that a real proxy sends with. What is simulated is what happens:
//! VMs that start and stop, guests that run programs, reboots.

mod attack;
pub mod catalogue;
mod disk;
mod guests;
mod host;
mod tpm;

pub use attack::Attack;
pub use catalogue::Catalogue;
pub use disk::{Disk, SavedDisk};
pub use guests::GuestLists;
pub use host::{Host, Surroundings, Truth, now};
pub use tpm::{Chip, SavedChip};
