//! Firmware logs: what is read are the log's bytes, every event can be shown, and types play no part.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::{
    digest::HashAlg,
    firmware::{FirmwareLog, LoadOption, Meaning, SignatureLists},
};

fuzz_target!(|data: &[u8]| {
    let Ok(log) = FirmwareLog::parse(data) else { return };
    let content = &data[..log.content_len()];
    assert!(data[content.len()..].windows(2).all(|pair| pair[0] == pair[1]));
    // Without its padding it is the same log.
    assert_eq!(FirmwareLog::parse(content).as_ref(), Ok(&log));
    assert!(log.events().windows(2).all(|pair| pair[0].offset < pair[1].offset));
    assert_eq!(log.registers().len(), 24 * log.banks().len());
    for event in log.events() {
        for bank in HashAlg::ALL {
            assert_eq!(event.digest(bank).is_none_or(|digest| digest.len() == bank.size()), true);
            let shown = log.describe(event, bank);
            assert!(!shown.chars().any(char::is_control), "{shown:?}");
            let (Meaning::Variable(variable) | Meaning::Content(variable)) = event.meaning(bank) else { continue };
            assert_eq!(variable.to_bytes(), event.data);
            let entries = SignatureLists::new(variable.data).map_while(Result::ok);
            assert!(entries.map(|entry| 16 + entry.data.len()).sum::<usize>() <= variable.data.len());
            let _ = LoadOption::parse(variable.data);
        }
    }
});
