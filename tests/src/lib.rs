//! End-to-end tests on real QEMU and a real TPM stack, and the [`lab`] in which they run; the simulator of a [`fleet`].

pub mod fleet;
pub mod lab;
