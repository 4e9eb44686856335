//! The TPM: registers are read and extended, quotes made.
//!
//! [`Tpm`] is all that the rest of the proxy knows of a TPM; [`EsapiTpm`] is a real one, over `/dev/tpmrm0`,
//! `/dev/tpm0` or swtpm. Calls block: one thread owns the TPM (see [`crate::log`]) and nothing else talks to it.
//!
//! # What is trusted
//! The TPM and its firmware. The bus to it isn't: every command that changes or attests something runs in an HMAC
//! session salted with the endorsement key, so that what the TPM answered can't be altered on the way, and the first
//! parameter of a quote goes encrypted (AES-128-CFB) where the command has one to encrypt. The endorsement key
//! itself is believed as the TPM shows it; binding it to a certificate is the verifier's task at enrolment.
//! `TPM2_PCR_Read` runs without a session: its values count only together with a quote over them.
//!
//! # The attestation key
//! A primary key (P-256, or RSA by choice) of the *endorsement* hierarchy: in the other hierarchies a TPM masks resetCount, restartCount
//! and firmwareVersion of what it signs with a value of its own (TPM 2.0 Part 1, section 36.7), and the epochs of the log
//! and the verifier's check against roll-back need the true ones. A primary key follows from the hierarchy's seed and
//! the template alone: nothing has to be stored, and a lost state folder or a new disk does not change it. Where making it
//! takes long (RSA on a chip), the operator can have it kept at a persistent handle.
//!
//! # Left-overs
//! A killed proxy leaves its objects and sessions in the TPM. Behind a resource manager (`/dev/tpmrm0`, tabrmd) they
//! disappear with the connection. Elsewhere the next opening removes every transient object and loaded session that
//! it finds, whoever made them: without a resource manager a TPM has one user, or none is safe.

mod endorse;
mod error;
mod esapi;
mod esys;
mod noise;
mod options;
mod template;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(crate) mod fake;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(crate) mod swtpm;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;

pub use endorse::{Endorsement, GivenCertificate};
pub use error::{TpmError, TpmErrorKind};
pub use esapi::EsapiTpm;
pub use noise::silence_tss_log;
pub use options::{AkKind, AuthFiles, Authorisations, EkKind, TpmOptions};

use onequote_evidence::{
    digest::{BankDigest, HashAlg},
    pcr::{Register, Registers},
};

/// A TPM, as far as the proxy uses it.
///
/// After an error of [`TpmErrorKind::is_fatal`] the value is of no more use: drop it and open another. Whether the
/// command that failed was carried out is then unknown, for an extend too.
pub trait Tpm: Send {
    /// The PCR banks in which at least one register is allocated, in ascending order of their algorithm; never none.
    ///
    /// # Errors
    /// Also when a bank is active whose algorithm we can't compute: it would stay without our extends, and whoever
    /// quotes that bank would see registers that nobody measured into.
    fn active_banks(&mut self) -> Result<Vec<HashAlg>, TpmError>;

    /// Reads registers, all as they were at one moment.
    ///
    /// # Errors
    /// Also when a register is not allocated, or others keep extending so fast that no moment could be had.
    fn pcr_read(&mut self, registers: &[Register]) -> Result<Registers, TpmError>;

    /// Extends a register in several banks by one command: in all of them or in none. Banks that are not named are
    /// extended by nothing.
    ///
    /// # Errors
    /// After a fatal error the extend may or may not have happened.
    fn extend(&mut self, pcr: u8, digests: &[BankDigest]) -> Result<(), TpmError>;

    /// Signs the values of `registers` together with at most 64 bytes of qualifying data.
    ///
    /// The registers stand in the quote in ascending order of bank and index.
    ///
    /// # Errors
    /// See [`TpmError`].
    fn quote(&mut self, qualifying_data: &[u8], registers: &[Register]) -> Result<Quote, TpmError>;

    /// The TPM's clock and counters, as the TPM says without signing it.
    ///
    /// # Errors
    /// See [`TpmError`].
    fn clock(&mut self) -> Result<Clock, TpmError>;

    /// Finds the endorsement key, see [`EsapiTpm::endorsement`]. A TPM in memory has none that anybody vouches for.
    ///
    /// # Errors
    /// Also when no key belongs to the certificate.
    fn endorsement(
        &mut self,
        _kind: Option<EkKind>,
        _given: Option<&GivenCertificate>,
    ) -> Result<Endorsement, TpmError> {
        Err(without_endorsement(self.model(), "TPM2_CreatePrimary (endorsement key)"))
    }

    /// Opens a credential that was made for `ek` and our attestation key, see [`EsapiTpm::activate`].
    ///
    /// # Errors
    /// Also when it was made for another.
    fn activate(&mut self, _ek: &Endorsement, _blob: &[u8], _secret: &[u8]) -> Result<Vec<u8>, TpmError> {
        Err(without_endorsement(self.model(), "TPM2_ActivateCredential"))
    }

    /// The public area of the attestation key, `TPM2B_PUBLIC` (TPM 2.0 Part 2, section 12.2.5).
    fn ak_public(&self) -> &[u8];

    /// Whether the TPM says that it is a program and not a chip. A hint for people: only an endorsement certificate
    /// tells the truth.
    fn is_software(&self) -> bool;

    /// Manufacturer and model as the TPM gives them, printable, for people.
    fn model(&self) -> &str;
}

fn without_endorsement(model: &str, command: &'static str) -> TpmError {
    let kind = TpmErrorKind::NoEndorsement { why: "this TPM has no endorsement key".to_owned() };
    TpmError { tcti: model.to_owned(), command, kind }
}

/// A signed statement of register values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quote {
    /// What was signed: `TPMS_ATTEST`, big-endian.
    pub attest: Vec<u8>,
    /// The signature over it: `TPMT_SIGNATURE`, big-endian.
    pub signature: Vec<u8>,
}

/// `TPMS_CLOCK_INFO` (TPM 2.0 Part 2, section 10.11.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// Milliseconds that the TPM was powered, not counting back over a TPM reset.
    pub clock: u64,
    /// Number of TPM resets: `TPM2_Startup(CLEAR)` after a loss of power or a reboot. Registers begin anew.
    pub reset_count: u32,
    /// Number of TPM restarts and resumes (hibernation, suspend) since the last reset.
    pub restart_count: u32,
    /// False when `clock` may be lower than one given before.
    pub safe: bool,
}
