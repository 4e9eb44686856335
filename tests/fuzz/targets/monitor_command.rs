//! Clients' commands at an intercepted monitor: however they arrive they are cut alike, and QEMU gets what was read.
#![no_main]

use libfuzzer_sys::fuzz_target;

// The first byte: in pieces of how many bytes it arrives, and whether out-of-band commands are enabled.
fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    onequote_proxy::intercept::fuzzing::commands(data, usize::from(choice >> 1), choice % 2 == 1);
});
