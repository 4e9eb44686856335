//! Exclude expressions: from the syntax of Python's `re` to that of the `regex` crate, where both mean the same.
//!
//! What has no counterpart (look-around, back-references, conditions, possessive repeats, atomic groups), or one that
//! means something else (word boundaries, inline flags), is refused. The rest is written anew, character by character,
//! so that nothing that is plain text for one is a command for the other: `[a&&b]`, `\<`, `{`.
//!
//! One difference stays: Python's `$` also fits before a newline at the end. Here it does not, so that fewer paths
//! are excluded and not more.

use std::{fmt::Write as _, iter::Peekable, str::Chars};

/// `\s` of Python: what Unicode calls white space, and four separators.
const SPACE: &str = r"\s\x1c-\x1f";

/// `\w` of Python: letters, numbers, underscore. That of `regex` has more.
const WORD: &str = r"\p{L}\p{N}_";

/// Translates an expression.
///
/// # Errors
/// What in it cannot be taken over.
pub(super) fn translate(expression: &str) -> Result<String, String> {
    if expression.is_empty() {
        return Err("an empty expression fits, and so excludes, everything".into());
    }
    let mut parser = Parser { chars: expression.chars().peekable(), out: String::new(), depth: 0, last: Last::Nothing };
    while let Some(c) = parser.chars.next() {
        parser.take(c)?;
    }
    if parser.depth > 0 {
        return Err("a group is not closed".into());
    }
    regex::Regex::new(&format!("^(?:{})", parser.out)).map_err(|e| e.to_string())?;
    Ok(parser.out)
}

/// What a repeat would be for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    Nothing,
    Atom,
    Repeat,
}

struct Parser<'a> {
    chars: Peekable<Chars<'a>>,
    out: String,
    depth: usize,
    last: Last,
}

/// A backslash and what follows.
enum Escape {
    Char(char),
    /// A set as it stands in a class, and whether it is the complement that is meant.
    Set(&'static str, bool),
    /// Where the text begins or ends.
    Anchor(&'static str),
}

impl Parser<'_> {
    fn take(&mut self, c: char) -> Result<(), String> {
        match c {
            '\\' => match self.escape(false)? {
                Escape::Char(c) => self.literal(c),
                Escape::Set(set, complement) => {
                    let not = if complement { "^" } else { "" };
                    self.atom(&format!("[{not}{set}]"));
                }
                Escape::Anchor(anchor) => self.no_atom(anchor),
            },
            '[' => {
                let class = self.class()?;
                self.atom(&class);
            }
            '(' => self.group()?,
            ')' => {
                self.depth = self.depth.checked_sub(1).ok_or("a parenthesis is closed that was not opened")?;
                self.atom(")");
            }
            '*' | '+' | '?' => self.repeat(&c.to_string())?,
            '{' => match self.counts() {
                Some(counts) => self.repeat(&counts)?,
                None => self.literal('{'),
            },
            '.' => self.atom("."),
            '^' => self.no_atom("^"),
            '$' => self.no_atom("$"),
            '|' => self.no_atom("|"),
            c => self.literal(c),
        }
        Ok(())
    }

    fn atom(&mut self, text: &str) {
        self.out.push_str(text);
        self.last = Last::Atom;
    }

    fn no_atom(&mut self, text: &str) {
        self.out.push_str(text);
        self.last = Last::Nothing;
    }

    fn literal(&mut self, c: char) {
        self.atom(&regex::escape(c.encode_utf8(&mut [0; 4])));
    }

    fn next_is(&mut self, c: char) -> bool {
        self.chars.next_if_eq(&c).is_some()
    }

    fn repeat(&mut self, text: &str) -> Result<(), String> {
        match self.last {
            Last::Nothing => return Err(format!("{text} repeats nothing")),
            Last::Repeat => return Err(format!("{text} repeats a repeat")),
            Last::Atom => {}
        }
        self.out.push_str(text);
        if self.next_is('?') {
            self.out.push('?');
        } else if self.chars.peek() == Some(&'+') {
            return Err(format!("{text}+ is a possessive repeat"));
        }
        self.last = Last::Repeat;
        Ok(())
    }

    /// What follows `{`, if that makes it a repeat; otherwise nothing is taken.
    fn counts(&mut self) -> Option<String> {
        let mut ahead = self.chars.clone();
        if ahead.peek() == Some(&'}') {
            return None;
        }
        let mut number = || {
            let mut digits = String::new();
            while let Some(digit) = ahead.next_if(char::is_ascii_digit) {
                digits.push(digit);
            }
            let comma = ahead.next_if_eq(&',').is_some();
            (digits, comma)
        };
        let (low, comma) = number();
        let (high, second) = if comma { number() } else { (low.clone(), false) };
        if second || ahead.next() != Some('}') {
            return None;
        }
        self.chars = ahead;
        let low = if low.is_empty() { "0" } else { &low };
        Some(if comma { format!("{{{low},{high}}}") } else { format!("{{{low}}}") })
    }

    fn group(&mut self) -> Result<(), String> {
        if self.next_is('?') {
            match self.chars.next() {
                Some(':') => {}
                Some('P') => match self.chars.next() {
                    Some('<') => {
                        let name: String = self.chars.by_ref().take_while(|&c| c != '>').collect();
                        if name.is_empty()
                            || name.starts_with(|c: char| c.is_ascii_digit())
                            || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
                        {
                            return Err(format!("{name:?} is not a group's name"));
                        }
                    }
                    Some('=') => return Err("(?P=…) is a back-reference".into()),
                    _ => return Err("(?P is followed by what is not known".into()),
                },
                Some('=' | '!') => return Err("(?= and (?! are look-ahead".into()),
                Some('<') => return Err("(?<= and (?<! are look-behind".into()),
                Some('>') => return Err("(?> is an atomic group".into()),
                Some('(') => return Err("(?( is a condition".into()),
                Some('#') => {
                    // What stood before the comment can still be repeated.
                    return match self.chars.by_ref().find(|&c| c == ')') {
                        Some(_) => Ok(()),
                        None => Err("a comment is not closed".into()),
                    };
                }
                _ => return Err("(? sets flags, or is not known".into()),
            }
        }
        self.depth += 1;
        self.no_atom("(?:");
        Ok(())
    }

    /// A class, `[` having been taken. Written so that only what we write is a command in it.
    fn class(&mut self) -> Result<String, String> {
        let mut out = String::from("[");
        if self.next_is('^') {
            out.push('^');
        }
        let unclosed = "a class is not closed";
        let mut first = true;
        loop {
            let c = self.chars.next().ok_or(unclosed)?;
            if c == ']' && !first {
                break;
            }
            first = false;
            let low = match self.member(c)? {
                Ok(low) => low,
                Err((set, complement)) => {
                    if complement {
                        let _ = write!(out, "[^{set}]");
                    } else {
                        out.push_str(set);
                    }
                    // Python refuses a range that begins with a set; a hyphen before the end is one of the members.
                    if self.chars.peek() == Some(&'-') && self.chars.clone().nth(1) != Some(']') {
                        return Err("a range begins with a set".into());
                    }
                    continue;
                }
            };
            let mut high = low;
            if self.chars.peek() == Some(&'-') && self.chars.clone().nth(1).ok_or(unclosed)? != ']' {
                self.chars.next();
                let c = self.chars.next().ok_or(unclosed)?;
                high = self.member(c)?.map_err(|_| "a range ends with a set")?;
                if high < low {
                    return Err(format!("the range {low}-{high} is the wrong way round"));
                }
            }
            let _ = write!(out, "\\x{{{:X}}}", u32::from(low));
            if high != low {
                let _ = write!(out, "-\\x{{{:X}}}", u32::from(high));
            }
        }
        out.push(']');
        Ok(out)
    }

    /// A member of a class: a character, or else a set.
    #[allow(clippy::type_complexity, reason = "the inner result is one of two, not a failure")]
    fn member(&mut self, c: char) -> Result<Result<char, (&'static str, bool)>, String> {
        if c != '\\' {
            return Ok(Ok(c));
        }
        match self.escape(true)? {
            Escape::Char(c) => Ok(Ok(c)),
            Escape::Set(set, complement) => Ok(Err((set, complement))),
            Escape::Anchor(_) => Err("an anchor in a class".into()),
        }
    }

    /// What a backslash means, which was taken.
    fn escape(&mut self, class: bool) -> Result<Escape, String> {
        let c = self.chars.next().ok_or("a backslash at the end")?;
        Ok(match c {
            'd' => Escape::Set(r"\d", false),
            'D' => Escape::Set(r"\d", true),
            's' => Escape::Set(SPACE, false),
            'S' => Escape::Set(SPACE, true),
            'w' => Escape::Set(WORD, false),
            'W' => Escape::Set(WORD, true),
            'A' if !class => Escape::Anchor(r"\A"),
            'Z' if !class => Escape::Anchor(r"\z"),
            'b' if class => Escape::Char('\u{8}'),
            'b' | 'B' if !class => return Err(format!("\\{c} is a word boundary, and words are others here")),
            'a' => Escape::Char('\u{7}'),
            'f' => Escape::Char('\u{c}'),
            'n' => Escape::Char('\n'),
            'r' => Escape::Char('\r'),
            't' => Escape::Char('\t'),
            'v' => Escape::Char('\u{b}'),
            'x' => Escape::Char(self.code(c, 2)?),
            'u' => Escape::Char(self.code(c, 4)?),
            'U' => Escape::Char(self.code(c, 8)?),
            '0'..='9' => Escape::Char(self.octal(c, class)?),
            c if c.is_ascii_alphabetic() => return Err(format!("\\{c} is not known")),
            c => Escape::Char(c),
        })
    }

    /// A character by so many hexadecimal digits.
    fn code(&mut self, letter: char, digits: usize) -> Result<char, String> {
        let text: String = self.chars.by_ref().take(digits).collect();
        let hex = text.len() == digits && text.bytes().all(|c| c.is_ascii_hexdigit());
        let code = u32::from_str_radix(&text, 16).ok().filter(|_| hex).and_then(char::from_u32);
        code.ok_or_else(|| format!("\\{letter}{text} is not a character"))
    }

    /// A character by octal digits: up to three after `\0` or in a class, else exactly three; less is a reference to a
    /// group.
    fn octal(&mut self, first: char, class: bool) -> Result<char, String> {
        let mut text = String::from(first);
        while text.len() < 3 {
            match self.chars.next_if(|c| ('0'..='7').contains(c)) {
                Some(digit) => text.push(digit),
                None => break,
            }
        }
        if !class && first != '0' && (text.len() < 3 || first > '7') {
            return Err(format!("\\{text} is a back-reference"));
        }
        let code = u32::from_str_radix(&text, 8).ok().filter(|code| *code <= 0o377).and_then(char::from_u32);
        code.ok_or_else(|| format!("\\{text} is not a character"))
    }
}
