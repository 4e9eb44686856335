//! What can go wrong with a TPM, and the meaning of response codes.

use onequote_evidence::pcr::Register;

/// A TPM command that failed, or the opening of a TPM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("TPM {tcti}, {command}: {kind}")]
pub struct TpmError {
    /// How the TPM is reached, as configured.
    pub tcti: String,
    /// The command by its name in TPM 2.0 Part 3, or what was being done.
    pub command: &'static str,
    /// What happened.
    pub kind: TpmErrorKind,
}

/// What happened to a TPM command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TpmErrorKind {
    /// No TPM is reached, or the connection to it broke.
    #[error("no connection to the TPM (TSS code {code:#010x}){hint}")]
    Gone {
        /// The TSS's response code.
        code: u32,
        /// What the operating system says about the device or socket, beginning with `: `; or nothing.
        hint: String,
    },
    /// The TPM was asked several times and stayed busy.
    #[error("the TPM was still busy after {attempts} attempts (code {code:#010x}); try again later")]
    Busy {
        /// The TPM's last response code.
        code: u32,
        /// How often it was asked.
        attempts: u32,
    },
    /// The TPM refuses authorisations after too many wrong ones.
    #[error(
        "the TPM is in dictionary-attack lock-out; `tpm2_dictionarylockout --clear-lockout` ends it, and so does the \
         proxy when the configuration's `tpm.auth` has `lockout`"
    )]
    LockedOut,
    /// Other programs hold all that the TPM has room for.
    #[error(
        "the TPM has no room (code {code:#010x}, after {attempts} attempts): other programs hold keys or sessions in \
         it; use /dev/tpmrm0 where there is one"
    )]
    Full {
        /// The TPM's last response code.
        code: u32,
        /// How often it was asked.
        attempts: u32,
    },
    /// An authorisation value is not the right one.
    #[error("an authorisation value is wrong (code {code:#010x}): see `tpm.auth` in the configuration")]
    WrongAuthorisation {
        /// The TPM's response code.
        code: u32,
    },
    /// A credential that this TPM cannot open with this key.
    #[error("the credential is for another TPM or for another attestation key (code {code:#010x})")]
    OtherCredential {
        /// The TPM's response code.
        code: u32,
    },
    /// At the persistent handle there is something else.
    #[error("handle {handle:#010x} is taken by another key: {why}")]
    Taken {
        /// The handle.
        handle: u32,
        /// How it differs.
        why: &'static str,
    },
    /// The endorsement key that was asked for cannot be had.
    #[error("no endorsement key: {why}")]
    NoEndorsement {
        /// Why.
        why: String,
    },
    /// The TPM no longer knows our key or session: it was restarted, or another program removed them.
    #[error(
        "the TPM no longer has our key or session (code {code:#010x}): it was restarted or another program uses it"
    )]
    Forgotten {
        /// The TPM's response code.
        code: u32,
    },
    /// The TPM needs `TPM2_Startup`, a reboot or a self-test before it does anything.
    #[error("the TPM does not work (code {code:#010x}): it failed a self-test or was not started by the firmware")]
    Failed {
        /// The TPM's response code.
        code: u32,
    },
    /// The TPM's answer to the session was wrong: altered on the way.
    #[error("the TPM's answer was altered on its way: the session's HMAC is wrong")]
    Tampered,
    /// Any other refusal.
    #[error("refused with code {code:#010x}; `tpm2_rc_decode {code:#x}` explains it")]
    Refused {
        /// The response code, with the TSS's layer in its upper half.
        code: u32,
    },
    /// The configuration names no TPM that we can use.
    #[error("not a way to a TPM: {why}; use device:/dev/tpmrm0 or swtpm:path=SOCKET")]
    BadTcti {
        /// What is wrong with it.
        why: &'static str,
    },
    /// No bank is active.
    #[error("no PCR bank is active; activate SHA-256 in the firmware's settings")]
    NoBank,
    /// A bank is active that we can't extend.
    #[error(
        "the PCR bank of algorithm {algorithm:#06x} is active and not supported; switch it off in the firmware's settings"
    )]
    UnsupportedBank {
        /// Its `TPM_ALG_ID`.
        algorithm: u16,
    },
    /// A register that was asked for is not allocated in that bank.
    #[error("{register} is not allocated")]
    NoRegister {
        /// The register.
        register: Register,
    },
    /// Others extended registers each time while we read them.
    #[error("the registers changed during each of {attempts} attempts to read them")]
    Unsteady {
        /// How often they were read.
        attempts: u32,
    },
    /// An argument that no TPM takes.
    #[error("{what}")]
    Argument {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The TPM answered something that its specification rules out.
    #[error("the TPM gave an impossible answer: {what}")]
    Nonsense {
        /// What was impossible.
        what: &'static str,
    },
}

impl TpmErrorKind {
    /// Whether the connection, our key or our session is lost, or in doubt: open the TPM anew.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::Gone { .. }
                | Self::Forgotten { .. }
                | Self::Failed { .. }
                | Self::Tampered
                | Self::Refused { .. }
                | Self::WrongAuthorisation { .. }
                | Self::Nonsense { .. }
        )
    }
}

/// A response code of the TSS: the layer that speaks in the upper 16 bits, its code in the lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rc(pub(super) u32);

impl Rc {
    /// The TPM, or a resource manager that speaks for it, and not a layer of the TSS.
    fn tpm_code(self) -> Option<u32> {
        const TPM: u32 = 0;
        const RESOURCE_MANAGER_AS_TPM: u32 = 12;
        matches!(self.0 >> 16, TPM | RESOURCE_MANAGER_AS_TPM).then_some(self.0 & 0xFFFF)
    }

    /// Whether the command was not begun and may be sent again.
    pub(super) fn is_busy(self) -> bool {
        // TPM_RC_YIELDED, _TESTING, _NV_RATE, _RETRY, _NV_UNAVAILABLE (TPM 2.0 Part 2, table 16).
        matches!(self.tpm_code(), Some(0x908 | 0x90A | 0x920 | 0x922 | 0x923)) || self.is_full()
    }

    /// Whether there was no room for an object or session: others may give some back.
    fn is_full(self) -> bool {
        // TPM_RC_OBJECT_MEMORY, _SESSION_MEMORY, _MEMORY, _SESSION_HANDLES, _OBJECT_HANDLES.
        matches!(self.tpm_code(), Some(0x902..=0x906))
    }

    /// What the code means to us; `attempts` is how often the command was sent.
    pub(super) fn kind(self, attempts: u32) -> TpmErrorKind {
        let code = self.0;
        if self.is_full() {
            return TpmErrorKind::Full { code, attempts };
        }
        if self.is_busy() {
            return TpmErrorKind::Busy { code, attempts };
        }
        match self.tpm_code() {
            Some(tpm) => Self::tpm_kind(code, tpm),
            None => Self::tss_kind(code),
        }
    }

    fn tpm_kind(code: u32, tpm: u32) -> TpmErrorKind {
        const FORMAT_ONE: u32 = 0x80;
        if tpm & FORMAT_ONE != 0 {
            return match tpm & 0x3F {
                // TPM_RC_HANDLE: the handle is of nothing that is loaded.
                0x0B => TpmErrorKind::Forgotten { code },
                // TPM_RC_AUTH_FAIL, TPM_RC_BAD_AUTH.
                0x0E | 0x22 => TpmErrorKind::WrongAuthorisation { code },
                _ => TpmErrorKind::Refused { code },
            };
        }
        match tpm {
            // TPM_RC_REFERENCE_H0 to _H6 and _S0 to _S6.
            0x910..=0x916 | 0x918..=0x91E => TpmErrorKind::Forgotten { code },
            // TPM_RC_LOCKOUT.
            0x921 => TpmErrorKind::LockedOut,
            // TPM_RC_INITIALIZE, _FAILURE, _REBOOT, _NEEDS_TEST.
            0x100 | 0x101 | 0x130 | 0x153 => TpmErrorKind::Failed { code },
            _ => TpmErrorKind::Refused { code },
        }
    }

    fn tss_kind(code: u32) -> TpmErrorKind {
        const TCTI_LAYER: u32 = 10;
        // TSS2_BASE_RC_* (TCG TSS 2.0 Overview and Common Structures, section 5.4).
        const NO_CONNECTION: u32 = 8;
        const IO_ERROR: u32 = 10;
        const MALFORMED_RESPONSE: u32 = 17;
        const INSUFFICIENT_RESPONSE: u32 = 19;
        const RSP_AUTH_FAILED: u32 = 27;
        match code & 0xFFFF {
            RSP_AUTH_FAILED => TpmErrorKind::Tampered,
            IO_ERROR | NO_CONNECTION => TpmErrorKind::Gone { code, hint: String::new() },
            MALFORMED_RESPONSE | INSUFFICIENT_RESPONSE => {
                TpmErrorKind::Nonsense { what: "a response that does not parse" }
            }
            _ if code >> 16 == TCTI_LAYER => TpmErrorKind::Gone { code, hint: String::new() },
            _ => TpmErrorKind::Refused { code },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layer_decides_what_a_code_means() {
        assert!(matches!(Rc(0x000A_000A).kind(1), TpmErrorKind::Gone { .. }));
        assert!(matches!(Rc(0x0007_000A).kind(1), TpmErrorKind::Gone { .. }));
        assert!(matches!(Rc(0x0000_0922).kind(8), TpmErrorKind::Busy { attempts: 8, .. }));
        assert!(matches!(Rc(0x000C_0922).kind(8), TpmErrorKind::Busy { .. }), "a resource manager's retry");
        assert!(matches!(Rc(0x0000_0902).kind(8), TpmErrorKind::Full { attempts: 8, .. }));
        assert!(Rc(0x000C_0903).is_busy(), "a resource manager without room for a session");
        assert!(matches!(Rc(0x0000_0921).kind(1), TpmErrorKind::LockedOut));
        assert!(matches!(Rc(0x0000_09A2).kind(1), TpmErrorKind::WrongAuthorisation { .. }));
        assert!(matches!(Rc(0x0000_098E).kind(1), TpmErrorKind::WrongAuthorisation { .. }));
        assert!(matches!(Rc(0x0000_0910).kind(1), TpmErrorKind::Forgotten { .. }));
        assert!(matches!(Rc(0x0000_0918).kind(1), TpmErrorKind::Forgotten { .. }));
        assert!(matches!(Rc(0x0000_018B).kind(1), TpmErrorKind::Forgotten { .. }), "TPM_RC_HANDLE of handle 1");
        assert!(matches!(Rc(0x0000_0100).kind(1), TpmErrorKind::Failed { .. }));
        assert!(matches!(Rc(0x0000_02C4).kind(1), TpmErrorKind::Refused { code: 0x2C4 }));
        assert!(matches!(Rc(0x0007_001B).kind(1), TpmErrorKind::Tampered));
    }

    #[test]
    fn the_text_names_the_tpm_and_the_command() {
        let error = TpmError { tcti: "swtpm:path=/x".to_owned(), command: "TPM2_Quote", kind: Rc(0x000A_000A).kind(1) };
        assert_eq!(error.to_string(), "TPM swtpm:path=/x, TPM2_Quote: no connection to the TPM (TSS code 0x000a000a)");
    }
}
