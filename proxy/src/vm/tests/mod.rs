//! The life cycle against the real QEMU, without guests: machines that never run more than firmware.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod control;
mod gate;
mod intercept;
mod life;
mod loaded;
mod look;
mod more;
mod who;
mod world;
