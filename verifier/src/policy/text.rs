//! Writing TOML: strings and comments that whoever chose their text cannot break out of.

use std::fmt::Write as _;

/// A TOML basic string.
pub(super) fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() || is_hidden(c) => {
                let _ = write!(out, "\\u{:04X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out + "\""
}

/// Text for a comment: what somebody else chose must not end the line.
pub(super) fn comment(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || is_hidden(c) { '?' } else { c }).collect()
}

/// Characters that change how the text around them is shown: direction marks and overrides, line separators, joiners
/// of no width. All of them are below U+10000.
fn is_hidden(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}
