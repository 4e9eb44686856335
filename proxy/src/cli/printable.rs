//! Text of others on the operator's terminal.

use std::borrow::Cow;

/// Names of programs, arguments and errors can be chosen by any user of the host, and reasons by guests: control and
/// direction characters are escaped, so that they neither move the cursor nor hide anything.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    if !text.contains(hidden) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if hidden(c) { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out.into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn nobody_draws_on_the_terminal() {
        assert_eq!(printable("/usr/bin/qemu – ä"), "/usr/bin/qemu – ä");
        assert_eq!(printable("a\u{1b}[2J\nb\u{202e}"), "a\\u{1b}[2J\\u{a}b\\u{202e}");
    }
}
