//! QEMU's argument vector, as another user may have given it, and configuration files that it names.
#![no_main]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use libfuzzer_sys::fuzz_target;
use onequote_proxy::measure::Arguments;

// Arguments end with a zero byte, as in /proc/PID/cmdline; what is behind two of them is a configuration file.
fuzz_target!(|data: &[u8]| {
    let at = data.windows(2).position(|pair| pair == [0, 0]).unwrap_or(data.len());
    let (vector, config) = data.split_at(at);
    let words: Vec<&OsStr> = vector.split(|byte| *byte == 0).map(OsStr::from_bytes).collect();
    let mut arguments = Arguments::parse(&words);
    let (given, files) = (arguments.given.len(), arguments.files.len());
    arguments.add_config(config);
    // Reading on takes nothing away.
    assert!(arguments.given.len() >= given && arguments.files.len() >= files);
});
