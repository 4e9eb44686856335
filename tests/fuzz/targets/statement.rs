//! Statements: what was read, written again, is the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::statement::Statement;

fuzz_target!(|data: &[u8]| {
    if let Ok(statement) = Statement::parse(data) {
        assert_eq!(statement.to_bytes(), data);
    }
});
