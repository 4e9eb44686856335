//! Kernels' ELF headers: every segment lies within the file and the address space.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| onequote_proxy::measure::fuzz_elf(data));
