//! The TPM's endorsement key: which it is, what vouches for it, and opening what was encrypted to it.
//!
//! The key belongs to a certificate. Where the TPM has one in NV, the key is the persistent object or the primary key
//! whose public value the certificate holds. Without a certificate the key follows from the template alone.

use onequote_evidence::tpm::{StorageKey, StorageParameters};
use tss_esapi::{constants::tss, tss2_esys as sys};

use super::{
    EkKind, TpmError, TpmErrorKind,
    error::Rc,
    esapi::EsapiTpm,
    esys::{self, Handle, Use},
    template,
};

/// Certificates of issuers, one after the other (EK Credential Profile 2.5, section 2.2.1.5.2).
const CHAIN_FIRST: u32 = 0x01C0_0100;
const CHAIN_LAST: u32 = 0x01C0_01FF;

/// The most bytes that are read of one NV index, and of all that hold the chain.
const MAX_NV: u16 = 8192;
const MAX_CHAIN: usize = 64 * 1024;

/// Persistent handles that the TCG reserves for endorsement keys.
const EK_HANDLES: std::ops::RangeInclusive<u32> = 0x8101_0000..=0x8101_FFFF;

/// An endorsement key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endorsement {
    /// Its public area, `TPM2B_PUBLIC`.
    pub public: Vec<u8>,
    /// Its certificate, DER; none where the TPM has none.
    pub certificate: Option<Vec<u8>>,
    /// Certificates of issuers that the TPM has, DER.
    pub chain: Vec<Vec<u8>>,
    kind: EkKind,
    /// A persistent object's number.
    persistent: Option<u32>,
}

impl Endorsement {
    /// The key of a TPM in memory: nobody vouches for it, and only that TPM knows where it is.
    #[must_use]
    pub fn in_memory(public: Vec<u8>) -> Self {
        Self { public, certificate: None, chain: Vec::new(), kind: EkKind::EccP256, persistent: None }
    }
}

/// A certificate that the operator has for a TPM without one.
#[derive(Debug, Clone, Default)]
pub struct GivenCertificate {
    /// The certificate, DER.
    pub certificate: Vec<u8>,
    /// Certificates of issuers, DER.
    pub chain: Vec<Vec<u8>>,
}

/// A key that a certificate is for.
struct Found {
    public: Vec<u8>,
    persistent: Option<u32>,
}

impl EsapiTpm {
    /// Finds the endorsement key: of this kind, or of the first kind for which the TPM has a certificate. A `given`
    /// certificate takes the place of the TPM's own.
    ///
    /// # Errors
    /// Also when no key belongs to the certificate.
    pub fn endorsement(
        &mut self,
        kind: Option<EkKind>,
        given: Option<&GivenCertificate>,
    ) -> Result<Endorsement, TpmError> {
        let indices = self.call("TPM2_GetCapability (NV indices)", |tpm| tpm.esys.tpm_handles(0x0100_0000))?;
        let has = |kind: &EkKind| indices.contains(&kind.certificate_index());
        let kinds = match (kind, given) {
            (Some(kind), _) => vec![kind],
            (None, Some(_)) => EkKind::ALL.to_vec(),
            (None, None) => vec![EkKind::ALL.into_iter().find(has).unwrap_or(EkKind::EccP256)],
        };
        let (certificate, chain) = match given {
            Some(given) => (Some(given.certificate.clone()), given.chain.clone()),
            None => {
                let index = kinds.first().filter(|kind| has(kind)).map(|kind| kind.certificate_index());
                let certificate = index.map(|index| self.nv(index).map(|bytes| trimmed(&bytes))).transpose()?;
                (certificate.flatten(), self.chain(&indices)?)
            }
        };
        for kind in kinds {
            if let Some(Found { public, persistent }) = self.find(kind, certificate.as_deref(), &indices)? {
                return Ok(Endorsement { public, certificate, chain, kind, persistent });
            }
        }
        let why = "no key of this TPM has the public value that is in the certificate".to_owned();
        Err(self.error("TPM2_CreatePrimary (endorsement key)", TpmErrorKind::NoEndorsement { why }))
    }

    /// Opens a credential (`TPM2B_ID_OBJECT` and `TPM2B_ENCRYPTED_SECRET`) that was made for `ek` and our attestation key.
    ///
    /// # Errors
    /// [`TpmErrorKind::OtherCredential`] when it was made for another.
    pub fn activate(&mut self, ek: &Endorsement, blob: &[u8], secret: &[u8]) -> Result<Vec<u8>, TpmError> {
        const COMMAND: &str = "TPM2_ActivateCredential";
        let bad = TpmErrorKind::Argument { what: "a credential whose size is not what it says" };
        let (Some(blob), Some(secret)) = (without_size(blob), without_size(secret)) else {
            return Err(self.error(COMMAND, bad));
        };
        let (key, template) = self.load(ek)?;
        let opened = self.activate_with(key, template::user_with_auth(&template), blob, secret);
        if ek.persistent.is_none() {
            self.call("TPM2_FlushContext", |tpm| tpm.esys.flush(key))?;
        }
        opened
    }

    fn activate_with(
        &mut self,
        key: Handle,
        by_password: bool,
        blob: &[u8],
        secret: &[u8],
    ) -> Result<Vec<u8>, TpmError> {
        const COMMAND: &str = "TPM2_ActivateCredential";
        // Each attempt has a session of its own: a refusal may end it.
        self.call(COMMAND, |tpm| {
            let session = match by_password {
                true => tpm.esys.start_salted_session(key)?,
                false => tpm.esys.start_unsalted_session(true)?,
            };
            let opened = tpm.authorise(session, by_password).and_then(|()| {
                tpm.esys.set_use(tpm.session, Use::Encrypt)?;
                tpm.esys.activate_credential((tpm.ak, tpm.session), (key, session), blob, secret)
            });
            let _ = tpm.esys.flush(session);
            opened
        })
        .map_err(|e| match e.kind {
            // TPM_RC_INTEGRITY, TPM_RC_VALUE, TPM_RC_SIZE, TPM_RC_ECC_POINT of a parameter.
            TpmErrorKind::Refused { code }
                if code & 0xC0 == 0xC0 && matches!(code & 0x3F, 0x1F | 0x04 | 0x15 | 0x27) =>
            {
                TpmError { kind: TpmErrorKind::OtherCredential { code }, ..e }
            }
            _ => e,
        })
    }

    fn authorise(&mut self, session: Handle, by_password: bool) -> Result<(), Rc> {
        if by_password {
            return self.esys.set_use(session, Use::Plain);
        }
        self.esys.set_use(self.session, Use::Plain)?;
        self.esys.policy_secret(self.session, session)
    }

    /// The key of this kind that the certificate is for: its public area, and its number if it is persistent.
    fn find(&mut self, kind: EkKind, certificate: Option<&[u8]>, indices: &[u32]) -> Result<Option<Found>, TpmError> {
        if let Some(certificate) = certificate {
            let persistent = self.call("TPM2_GetCapability (handles)", |tpm| tpm.esys.tpm_handles(0x8100_0000))?;
            for number in persistent.into_iter().filter(|number| EK_HANDLES.contains(number)) {
                let described = self.call("TPM2_ReadPublic", |tpm| {
                    let object = tpm.esys.existing(number)?;
                    tpm.esys.read_public(object)
                })?;
                if certifies(certificate, &described.public) {
                    return Ok(Some(Found { public: described.public, persistent: Some(number) }));
                }
            }
        }
        for template in self.templates(kind, indices)? {
            let (key, public) = self.make(&template)?;
            self.call("TPM2_FlushContext", |tpm| tpm.esys.flush(key))?;
            if certificate.is_none_or(|certificate| certifies(certificate, &public)) {
                return Ok(Some(Found { public, persistent: None }));
            }
        }
        Ok(None)
    }

    /// The templates that a key of this kind can have been made from: that in NV, if there is one, or the usual one; a nonce
    /// in NV fills either's `unique`.
    fn templates(&mut self, kind: EkKind, indices: &[u32]) -> Result<Vec<sys::TPM2B_PUBLIC>, TpmError> {
        let (template, nonce) = kind.template_indices();
        let malformed = |tpm: &Self, rc: Rc| tpm.error("endorsement key template", rc.kind(1));
        let nonce = match nonce.filter(|nonce| indices.contains(nonce)) {
            Some(index) => self.nv(index)?,
            None => Vec::new(),
        };
        if indices.contains(&template) {
            let bytes = self.nv(template)?;
            let filled = if nonce.is_empty() { None } else { template::with_nonce(&bytes, &nonce) };
            let template = esys::unmarshal_template(filled.as_deref().unwrap_or(&bytes));
            return template.map(|template| vec![template]).map_err(|rc| malformed(self, rc));
        }
        kind.template(&nonce).map(|template| vec![template]).map_err(|rc| malformed(self, rc))
    }

    fn make(&mut self, template: &sys::TPM2B_PUBLIC) -> Result<(Handle, Vec<u8>), TpmError> {
        const COMMAND: &str = "TPM2_CreatePrimary (endorsement key)";
        let (key, public) = self.call(COMMAND, |tpm| {
            tpm.esys.set_use(tpm.session, Use::Encrypt)?;
            tpm.esys.create_endorsement_primary(tpm.session, template)
        })?;
        let public = esys::marshal_public(&public).map_err(|rc| self.error(COMMAND, rc.kind(1)))?;
        Ok((key, public))
    }

    /// Loads the key again, and gives its public area with it.
    fn load(&mut self, ek: &Endorsement) -> Result<(Handle, sys::TPM2B_PUBLIC), TpmError> {
        let template = ek.public.get(2..).ok_or(Rc(7 << 16 | 17)).and_then(esys::unmarshal_template);
        let template = template.map_err(|rc| self.error("TPM2B_PUBLIC", rc.kind(1)))?;
        if let Some(number) = ek.persistent {
            return Ok((self.call("TPM2_ReadPublic", |tpm| tpm.esys.existing(number))?, template));
        }
        let indices = self.call("TPM2_GetCapability (NV indices)", |tpm| tpm.esys.tpm_handles(0x0100_0000))?;
        for made_from in self.templates(ek.kind, &indices)? {
            let (key, public) = self.make(&made_from)?;
            if public == ek.public {
                return Ok((key, template));
            }
            self.call("TPM2_FlushContext", |tpm| tpm.esys.flush(key))?;
        }
        let why = "the TPM made another one than before: it was cleared meanwhile".to_owned();
        Err(self.error("TPM2_CreatePrimary (endorsement key)", TpmErrorKind::NoEndorsement { why }))
    }

    /// What an NV index holds.
    fn nv(&mut self, number: u32) -> Result<Vec<u8>, TpmError> {
        const COMMAND: &str = "TPM2_NV_Read";
        const BUFFER_MAX: u32 = tss::TPM2_PT_NV_BUFFER_MAX;
        let block = self.call("TPM2_GetCapability", |tpm| tpm.esys.properties(BUFFER_MAX, 1))?;
        let block = block.into_iter().find(|(tag, _)| *tag == BUFFER_MAX).map_or(512, |(_, size)| size.clamp(64, 1024));
        let (index, size) = self.call("TPM2_NV_ReadPublic", |tpm| {
            let index = tpm.esys.existing(number)?;
            Ok((index, tpm.esys.nv_size(index)?))
        })?;
        if size > MAX_NV {
            return Err(self.error(COMMAND, TpmErrorKind::Nonsense { what: "a certificate of more than 8 KiB" }));
        }
        let mut bytes = Vec::new();
        while bytes.len() < usize::from(size) {
            let offset = bytes.len() as u16;
            let part = (size - offset).min(block as u16);
            let read = self.call(COMMAND, |tpm| {
                tpm.esys.set_use(tpm.session, Use::Plain)?;
                tpm.esys.nv_read(tpm.session, index, part, offset)
            })?;
            if read.len() != usize::from(part) {
                return Err(self.error(COMMAND, TpmErrorKind::Nonsense { what: "less than was asked for" }));
            }
            bytes.extend(read);
        }
        Ok(bytes)
    }

    fn chain(&mut self, indices: &[u32]) -> Result<Vec<Vec<u8>>, TpmError> {
        let mut indices: Vec<u32> =
            indices.iter().copied().filter(|index| (CHAIN_FIRST..=CHAIN_LAST).contains(index)).collect();
        indices.sort_unstable();
        let mut bytes = Vec::new();
        for index in indices {
            bytes.extend(self.nv(index)?);
            bytes.truncate(MAX_CHAIN);
        }
        let (mut rest, mut chain) = (bytes.as_slice(), Vec::new());
        while let Some(size) = der_size(rest) {
            chain.push(rest[..size].to_vec());
            rest = &rest[size..];
        }
        Ok(chain)
    }
}

/// The bytes of the first DER sequence, whatever pads them; none when there is no whole one.
fn trimmed(bytes: &[u8]) -> Option<Vec<u8>> {
    der_size(bytes).map(|size| bytes[..size].to_vec())
}

/// Size with its head of the DER sequence at the start of `bytes`, if it is whole and shorter than 64 KiB.
fn der_size(bytes: &[u8]) -> Option<usize> {
    let (head, size) = match bytes {
        [0x30, 0x82, high, low, ..] => (4, usize::from(u16::from_be_bytes([*high, *low]))),
        [0x30, 0x81, size, ..] => (3, usize::from(*size)),
        [0x30, size @ 1..=0x7F, ..] => (2, usize::from(*size)),
        _ => return None,
    };
    (head + size <= bytes.len()).then_some(head + size)
}

/// Whether the certificate holds the key's public value. Only for choosing a key: it is the verifier who believes it.
fn certifies(certificate: &[u8], public: &[u8]) -> bool {
    let Ok(key) = StorageKey::parse(public) else { return false };
    let value = match key.key {
        StorageParameters::Rsa(rsa) => rsa.modulus,
        StorageParameters::Ecc { x, y, .. } => [x, y].concat(),
    };
    certificate.windows(value.len()).any(|window| window == value)
}

fn without_size(tpm2b: &[u8]) -> Option<&[u8]> {
    let (size, rest) = tpm2b.split_at_checked(2)?;
    (usize::from(u16::from_be_bytes([size[0], size[1]])) == rest.len()).then_some(rest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_cut_from_what_pads_them() {
        assert_eq!(trimmed(&[0x30, 2, 5, 0, 0xFF, 0xFF]), Some(vec![0x30, 2, 5, 0]));
        assert_eq!(trimmed(&[0x30, 0x81, 2, 5, 0]), Some(vec![0x30, 0x81, 2, 5, 0]));
        let long = [&[0x30, 0x82, 1, 0][..], &[7; 256], &[0; 9]].concat();
        assert_eq!(trimmed(&long).unwrap().len(), 260);
        for bad in [&[][..], &[0x30], &[0x30, 3, 0], &[0x31, 1, 0], &[0xFF; 9], &[0x30, 0x80, 0, 0], &[0x30, 0x82, 9]] {
            assert_eq!(trimmed(bad), None, "{bad:?}");
        }
        assert_eq!(without_size(&[0, 1, 9]), Some(&[9][..]));
        assert_eq!(without_size(&[0, 2, 9]), None);
        assert_eq!(without_size(&[0]), None);
    }
}
