//! What a client sends, cut into JSON values.
//!
//! QEMU does not read lines but values: several may be on one line, one may be over several lines, and strings may be
//! in single quotes (QEMU `qobject/json-lexer.c`). So do we. What cannot be the beginning of a command, or goes over a
//! limit, is told once and left out up to the next line end or the byte FF, by which clients of QEMU clear the line.

/// One thing that a client sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// A value from its first to its last bracket, strings in double quotes. Only brackets are known to be in order.
    Value(Vec<u8>),
    /// Something that is none, in QEMU's words.
    Bad(&'static str),
}

/// QEMU's words for a scalar where a command should be.
pub(super) const NO_OBJECT: &str = "QMP input must be a JSON object";

const STRAY: &str = "JSON parse error, stray input";
const CONTROL: &str = "JSON parse error, control character in the input";
const TOO_LONG: &str = "JSON token size limit exceeded";
const TOO_DEEP: &str = "JSON nesting depth limit exceeded";

/// Cuts the bytes of one client. Holds at most the longest value.
#[derive(Debug)]
pub(super) struct Framer {
    longest: usize,
    deepest: usize,
    value: Vec<u8>,
    depth: usize,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between values.
    Between,
    /// In a value, and in no string.
    Inside,
    /// In a string that began with this quote.
    Text(u8),
    /// Behind a backslash in that string.
    Escaped(u8),
    /// Leaving out.
    Skipping,
}

impl Framer {
    /// Values of at most `longest` bytes and `deepest` brackets within one another.
    pub(super) fn new(longest: usize, deepest: usize) -> Self {
        Self { longest, deepest, value: Vec::new(), depth: 0, state: State::Between }
    }

    /// The next frame that ends within `input`, which is left with what comes behind it.
    pub(super) fn next(&mut self, input: &mut &[u8]) -> Option<Frame> {
        while let Some((&byte, rest)) = input.split_first() {
            *input = rest;
            if let Some(frame) = self.take(byte) {
                return Some(frame);
            }
        }
        None
    }

    fn take(&mut self, byte: u8) -> Option<Frame> {
        let space = matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
        if self.state == State::Skipping {
            if matches!(byte, b'\n' | 0xff) {
                self.state = State::Between;
            }
            return None;
        }
        // A line end in a string is a control character, too: half a string hides no further line.
        let in_text = matches!(self.state, State::Text(_) | State::Escaped(_));
        if byte >= 0xfe || (byte < 0x20 && (in_text || !space)) {
            return self.refuse(byte, CONTROL);
        }
        match (self.state, byte) {
            (State::Between, _) if space => return None,
            (State::Between, b'{' | b'[') => {
                (self.state, self.depth) = (State::Inside, 1);
                self.value.push(byte);
            }
            (State::Between, b'"' | b'\'' | b'-' | b'0'..=b'9') => return self.refuse(byte, NO_OBJECT),
            (State::Between, _) => return self.refuse(byte, STRAY),
            (State::Inside, b'"' | b'\'') => {
                self.state = State::Text(byte);
                self.value.push(b'"');
            }
            (State::Inside, b'{' | b'[') => {
                self.depth += 1;
                if self.depth > self.deepest {
                    return self.refuse(byte, TOO_DEEP);
                }
                self.value.push(byte);
            }
            (State::Inside, b'}' | b']') => {
                self.depth -= 1;
                self.value.push(byte);
                if self.depth == 0 {
                    self.state = State::Between;
                    return Some(Frame::Value(std::mem::take(&mut self.value)));
                }
            }
            (State::Text(quote), b'\\') => self.state = State::Escaped(quote),
            (State::Text(quote), _) if byte == quote => {
                self.state = State::Inside;
                self.value.push(b'"');
            }
            (State::Text(_), b'"') => self.value.extend_from_slice(b"\\\""),
            (State::Escaped(quote), _) => {
                self.state = State::Text(quote);
                // JSON has no escaped single quote.
                if byte != b'\'' {
                    self.value.push(b'\\');
                }
                self.value.push(byte);
            }
            (State::Inside | State::Text(_) | State::Skipping, _) => self.value.push(byte),
        }
        if self.value.len() > self.longest { self.refuse(byte, TOO_LONG) } else { None }
    }

    fn refuse(&mut self, byte: u8, why: &'static str) -> Option<Frame> {
        self.value = Vec::new();
        self.depth = 0;
        self.state = if matches!(byte, b'\n' | 0xff) { State::Between } else { State::Skipping };
        Some(Frame::Bad(why))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames(bytes: &[u8], step: usize) -> Vec<Frame> {
        let mut framer = Framer::new(64, 4);
        let mut found = Vec::new();
        for mut piece in bytes.chunks(step) {
            while let Some(frame) = framer.next(&mut piece) {
                found.push(frame);
            }
            assert!(framer.value.len() <= 66);
        }
        found
    }

    fn values(bytes: &str) -> Vec<Result<String, &'static str>> {
        let readable = |frame| match frame {
            Frame::Value(value) => Ok(String::from_utf8(value).unwrap()),
            Frame::Bad(why) => Err(why),
        };
        frames(bytes.as_bytes(), 3).into_iter().map(readable).collect()
    }

    #[test]
    fn values_are_cut_as_qemu_cuts_them() {
        assert_eq!(values("{\"a\": 1}{}\r\n{ \"b\"\n: [1] }[2]\n").concat_ok(), "{\"a\": 1}|{}|{ \"b\"\n: [1] }|[2]");
        assert_eq!(values("{\"}{\": \"\\\"}\", \"c\\\\\": 1}").concat_ok(), "{\"}{\": \"\\\"}\", \"c\\\\\": 1}");
        assert_eq!(values("{'it\\'s': 'say \"x\"'}").concat_ok(), "{\"it's\": \"say \\\"x\\\"\"}");
        assert_eq!(values("{\"a\": {").concat_ok(), "");
    }

    #[test]
    fn what_is_none_is_told_once_a_line_and_the_next_line_counts() {
        for (bad, why) in [
            ("GET / HTTP/1.1 {}", STRAY),
            ("} {}", STRAY),
            ("5 {}", NO_OBJECT),
            ("'x' {}", NO_OBJECT),
            ("{\"a\": \"half a string", CONTROL),
            ("{\"a\": \u{1}}", CONTROL),
            ("[[[[[", TOO_DEEP),
        ] {
            assert_eq!(values(&format!("{bad}\n{{}}")), [Err(why), Ok("{}".to_owned())], "{bad}");
        }
        assert_eq!(values(&format!("{{\"{}\n{{}}", "x".repeat(500))), [Err(TOO_LONG), Ok("{}".to_owned())]);
        assert_eq!(frames(b"{\"a\xff{}", 1), [Frame::Bad(CONTROL), Frame::Value(b"{}".to_vec())]);
    }

    trait ConcatOk {
        fn concat_ok(self) -> String;
    }

    impl ConcatOk for Vec<Result<String, &'static str>> {
        fn concat_ok(self) -> String {
            self.into_iter().map(Result::unwrap).collect::<Vec<_>>().join("|")
        }
    }

    proptest! {
        #[test]
        fn how_the_bytes_arrive_changes_nothing(bytes in prop::collection::vec(prop_oneof![
            Just(b'{'), Just(b'}'), Just(b'['), Just(b']'), Just(b'"'), Just(b'\''), Just(b'\\'), Just(b'\n'), any::<u8>(),
        ], 0..300), step in 1_usize..50) {
            prop_assert_eq!(frames(&bytes, step), frames(&bytes, bytes.len().max(1)));
        }

        #[test]
        fn after_any_rubbish_the_next_line_counts(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            // FF ends whatever was begun, as it does in QEMU.
            let with = [bytes.as_slice(), b"\xff\n{\"good\": 1}\n"].concat();
            prop_assert_eq!(frames(&with, 7).pop(), Some(Frame::Value(b"{\"good\": 1}".to_vec())));
        }
    }
}
