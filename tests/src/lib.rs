//! End-to-end tests on real QEMU and a real TPM stack, and the [`lab`] in which they run.

pub mod lab;
