//! Descriptions of VMs: refused with a line that the text has, or planned as a VM that waits to be measured.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use onequote_proxy::launch::{Description, DescriptionError, HostVsock, Launch, TakenCids};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // Any file that is there serves as image or kernel: the folder is one that has some.
    let description = match Description::parse(text, Path::new("/proc/self/vm.toml")) {
        Ok(description) => description,
        Err(DescriptionError::Value { line, .. }) => {
            assert!((1..=text.split('\n').count()).contains(&line));
            return;
        }
        Err(_) => return,
    };
    // Which accelerator works is found out by trying, which is not what is looked for here.
    if !text.contains("\"tcg\"") || text.contains("\"auto\"") || text.contains("\"kvm\"") {
        return;
    }
    let host = HostVsock { device: false, taken: Ok(TakenCids::new()) };
    let Ok(launch) = Launch::described(&description, None, "/run/onequote/vms".into(), host) else { return };
    let Ok(planned) = launch.plan() else { return };
    assert!(planned.command.iter().any(|word| word == "-S"));
    assert!(planned.command.iter().any(|word| word.to_string_lossy().contains("/run/onequote/vms/")));
});
