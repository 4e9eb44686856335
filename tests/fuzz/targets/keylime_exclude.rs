//! Exclude expressions of Keylime's policies: what is taken over compiles, alone and anchored, and has no capture groups,
//! and an expression of plain characters fits what begins with it.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../../verifier/src/policy/keylime/excludes.rs"]
mod excludes;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(translated) = excludes::translate(text) else { return };
    let alone = regex::Regex::new(&translated).expect("it compiles");
    assert_eq!(alone.captures_len(), 1);
    let anchored = regex::Regex::new(&format!("^(?:{translated})")).expect("it compiles as a part");
    if text.chars().all(|c| c.is_alphanumeric() || c == '/') {
        assert!(anchored.is_match(&format!("{text}/more")));
    }
});
