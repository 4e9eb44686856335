//! What an event's digest proves.

use crate::digest::HashAlg;

use super::{Event, Variable, variable};

/// What kind of separator: the digest is that of four bytes (PFP section 10.4.1, `EV_SEPARATOR`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Separator {
    /// 00000000 or FFFFFFFF: what comes before it in its register was measured before the boot loader was called.
    Boot,
    /// 00000001: the firmware could not measure what it had to.
    Error,
}

/// What is known of an event from its digest alone, or from data that the digest covers. The type of the event plays
/// no part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning<'a> {
    /// A separator.
    Separator(Separator),
    /// A UEFI variable, name and content.
    Variable(Variable<'a>),
    /// The content of a UEFI variable. Its name is the log's word: firmware hashes boot entries so.
    Content(Variable<'a>),
    /// What GRUB did, without the word before it: a command or a command line.
    Command {
        /// `grub_cmd`, `kernel_cmdline`, `module_cmdline`: the log's word.
        word: &'a str,
        /// The text.
        text: &'a str,
    },
    /// Text: what firmware and boot loader say that they did.
    Text(&'a str),
    /// Text in UTF-16, without its NUL: a kernel command line that systemd-stub measured.
    Wide(&'a [u8]),
    /// Other data.
    Data(&'a [u8]),
    /// Nothing but the digest, which is that of something that the log does not hold: an image, a file.
    Digest,
    /// Not extended: nothing.
    Nothing,
}

/// The words before what GRUB's command measurement hashes (GRUB `grub-core/kern/tpm.c`, `grub_tpm_verify_string`).
const GRUB_WORDS: [&str; 3] = ["grub_cmd", "kernel_cmdline", "module_cmdline"];

impl<'a> Event<'a> {
    /// Which separator it is, by its digest alone.
    #[must_use]
    pub fn separator(&self, bank: HashAlg) -> Option<Separator> {
        for (bytes, separator) in
            [([0; 4], Separator::Boot), ([0xff; 4], Separator::Boot), ([1, 0, 0, 0], Separator::Error)]
        {
            if self.is_digest_of(bank, &[&bytes]) {
                return Some(separator);
            }
        }
        None
    }

    /// The UEFI variable that it measures, name and content, if the digest covers both.
    #[must_use]
    pub fn variable(&self, bank: HashAlg) -> Option<Variable<'a>> {
        let variable = Variable::parse(self.data).ok()?;
        self.proves_data(bank).then_some(variable)
    }

    /// What its digest in `bank` proves. The caller must know that the register replays.
    #[must_use]
    pub fn meaning(&self, bank: HashAlg) -> Meaning<'a> {
        if !self.is_extended() {
            return Meaning::Nothing;
        }
        if let Some(separator) = self.separator(bank) {
            return Meaning::Separator(separator);
        }
        if self.proves_data(bank) {
            return match (Variable::parse(self.data), text(self.data)) {
                (Ok(variable), _) => Meaning::Variable(variable),
                (_, Some(text)) => Meaning::Text(text),
                _ => variable::wide(self.data).map_or(Meaning::Data(self.data), Meaning::Wide),
            };
        }
        if let Some((word, text)) = command(self.data)
            && self.is_digest_of(bank, &[text.as_bytes()])
        {
            return Meaning::Command { word, text };
        }
        match Variable::parse(self.data) {
            Ok(variable) if self.is_digest_of(bank, &[variable.data]) => Meaning::Content(variable),
            _ => Meaning::Digest,
        }
    }
}

/// Printable text, with or without NUL at its end.
pub(super) fn text(data: &[u8]) -> Option<&str> {
    let text = data.strip_suffix(&[0]).unwrap_or(data);
    let printable = !text.is_empty() && !text.iter().any(u8::is_ascii_control);
    std::str::from_utf8(text).ok().filter(|_| printable)
}

/// `WORD: TEXT`, with one of GRUB's words. The text is hashed without NUL.
fn command(data: &[u8]) -> Option<(&str, &str)> {
    let data = std::str::from_utf8(data.strip_suffix(&[0]).unwrap_or(data)).ok()?;
    data.split_once(": ").filter(|(word, _)| GRUB_WORDS.contains(word))
}
