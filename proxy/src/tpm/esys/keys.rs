//! The calls for enrolment: endorsement keys, persistent objects, NV, credentials.

use std::ptr;

use tss_esapi::{constants::tss, tss2_esys as sys};

use super::{Answer, Esys, Handle, Rc, check, marshal};

/// An entity whose authorisation value the operator can have set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::tpm) enum Hierarchy {
    Owner,
    Endorsement,
    Lockout,
}

impl Hierarchy {
    fn handle(self) -> sys::ESYS_TR {
        match self {
            Self::Owner => sys::ESYS_TR_RH_OWNER,
            Self::Endorsement => sys::ESYS_TR_RH_ENDORSEMENT,
            Self::Lockout => sys::ESYS_TR_RH_LOCKOUT,
        }
    }
}

/// What `TPM2_ReadPublic` tells of an object.
pub(in crate::tpm) struct Described {
    /// `TPM2B_PUBLIC`, size first.
    pub(in crate::tpm) public: Vec<u8>,
    /// The name.
    pub(in crate::tpm) name: Vec<u8>,
    /// The qualified name: over the names of all parents.
    pub(in crate::tpm) qualified_name: Vec<u8>,
}

impl Esys {
    /// Sets the authorisation value that the library uses for a hierarchy. Sends nothing to the TPM.
    pub(in crate::tpm) fn set_authorisation(&mut self, of: Hierarchy, value: &[u8]) -> Result<(), Rc> {
        let mut auth = sys::TPM2B_AUTH::default();
        auth.size = fill(&mut auth.buffer, value)?;
        // SAFETY: the context is valid while self lives; the value outlives the call, which copies it.
        check(unsafe { sys::Esys_TR_SetAuth(self.context, of.handle(), &raw const auth) })
    }

    /// A handle for something that is in the TPM already, by the TPM's own number: a persistent object or an NV index.
    pub(in crate::tpm) fn existing(&mut self, number: u32) -> Result<Handle, Rc> {
        let mut handle = Handle::NONE;
        // SAFETY: the context is valid while self lives; the place to write to is ours.
        check(unsafe {
            sys::Esys_TR_FromTPMPublic(
                self.context,
                number,
                Handle::NONE.0,
                Handle::NONE.0,
                Handle::NONE.0,
                &raw mut handle.0,
            )
        })?;
        Ok(handle)
    }

    /// `TPM2_ReadPublic`.
    pub(in crate::tpm) fn read_public(&mut self, object: Handle) -> Result<Described, Rc> {
        let mut public = Answer::<sys::TPM2B_PUBLIC>::empty();
        let mut name = Answer::<sys::TPM2B_NAME>::empty();
        let mut qualified = Answer::<sys::TPM2B_NAME>::empty();
        // SAFETY: the context is valid while self lives; the places to write to are ours.
        check(unsafe {
            sys::Esys_ReadPublic(
                self.context,
                object.0,
                Handle::NONE.0,
                Handle::NONE.0,
                Handle::NONE.0,
                public.place(),
                name.place(),
                qualified.place(),
            )
        })?;
        let bytes = |name: &sys::TPM2B_NAME| name.name.get(..usize::from(name.size)).map(<[u8]>::to_vec);
        Ok(Described {
            public: marshal(&*public.filled()?, sys::Tss2_MU_TPM2B_PUBLIC_Marshal)?,
            name: bytes(&*name.filled()?).ok_or(Rc::MALFORMED)?,
            qualified_name: bytes(&*qualified.filled()?).ok_or(Rc::MALFORMED)?,
        })
    }

    /// `TPM2_EvictControl` by the owner: keeps `object` at the persistent handle `number`.
    pub(in crate::tpm) fn make_persistent(
        &mut self,
        session: Handle,
        object: Handle,
        number: u32,
    ) -> Result<Handle, Rc> {
        let mut handle = Handle::NONE;
        // SAFETY: the context is valid while self lives; the place to write to is ours.
        check(unsafe {
            sys::Esys_EvictControl(
                self.context,
                sys::ESYS_TR_RH_OWNER,
                object.0,
                session.0,
                Handle::NONE.0,
                Handle::NONE.0,
                number,
                &raw mut handle.0,
            )
        })?;
        Ok(handle)
    }

    /// The size in bytes of what an NV index holds.
    pub(in crate::tpm) fn nv_size(&mut self, index: Handle) -> Result<u16, Rc> {
        let mut public = Answer::<sys::TPM2B_NV_PUBLIC>::empty();
        let mut name = Answer::<sys::TPM2B_NAME>::empty();
        // SAFETY: the context is valid while self lives; the places to write to are ours.
        check(unsafe {
            sys::Esys_NV_ReadPublic(
                self.context,
                index.0,
                Handle::NONE.0,
                Handle::NONE.0,
                Handle::NONE.0,
                public.place(),
                name.place(),
            )
        })?;
        let _ = name.filled()?;
        Ok(public.filled()?.nvPublic.dataSize)
    }

    /// `TPM2_NV_Read` with the index's own authorisation, which is empty for certificates.
    pub(in crate::tpm) fn nv_read(
        &mut self,
        session: Handle,
        index: Handle,
        size: u16,
        offset: u16,
    ) -> Result<Vec<u8>, Rc> {
        let mut data = Answer::<sys::TPM2B_MAX_NV_BUFFER>::empty();
        // SAFETY: the context is valid while self lives; the place to write to is ours.
        check(unsafe {
            sys::Esys_NV_Read(
                self.context,
                index.0,
                index.0,
                session.0,
                Handle::NONE.0,
                Handle::NONE.0,
                size,
                offset,
                data.place(),
            )
        })?;
        let data = data.filled()?;
        data.buffer.get(..usize::from(data.size)).map(<[u8]>::to_vec).ok_or(Rc::MALFORMED)
    }

    /// `TPM2_StartAuthSession` without salt: for a policy, or for the one HMAC that comes before there is a key to salt with.
    pub(in crate::tpm) fn start_unsalted_session(&mut self, policy: bool) -> Result<Handle, Rc> {
        let symmetric = sys::TPMT_SYM_DEF { algorithm: tss::TPM2_ALG_NULL, ..Default::default() };
        let kind = if policy { tss::TPM2_SE_POLICY } else { tss::TPM2_SE_HMAC };
        let mut session = Handle::NONE;
        // SAFETY: the context is valid while self lives; arguments outlive the call; a null nonce lets the library
        // draw one.
        check(unsafe {
            sys::Esys_StartAuthSession(
                self.context,
                Handle::NONE.0,
                Handle::NONE.0,
                Handle::NONE.0,
                Handle::NONE.0,
                Handle::NONE.0,
                ptr::null(),
                kind,
                &raw const symmetric,
                tss::TPM2_ALG_SHA256,
                &raw mut session.0,
            )
        })?;
        Ok(session)
    }

    /// `TPM2_PolicySecret` with the endorsement hierarchy, which the policy of low-range endorsement keys wants.
    pub(in crate::tpm) fn policy_secret(&mut self, session: Handle, policy: Handle) -> Result<(), Rc> {
        let mut timeout = Answer::<sys::TPM2B_TIMEOUT>::empty();
        let mut ticket = Answer::<sys::TPMT_TK_AUTH>::empty();
        // SAFETY: the context is valid while self lives; the library takes null for the three absent arguments; the
        // places to write to are ours.
        check(unsafe {
            sys::Esys_PolicySecret(
                self.context,
                sys::ESYS_TR_RH_ENDORSEMENT,
                policy.0,
                session.0,
                Handle::NONE.0,
                Handle::NONE.0,
                ptr::null(),
                ptr::null(),
                ptr::null(),
                0,
                timeout.place(),
                ticket.place(),
            )
        })?;
        let (_, _) = (timeout.filled()?, ticket.filled()?);
        Ok(())
    }

    /// `TPM2_ActivateCredential`: `blob` and `secret` without their sizes.
    pub(in crate::tpm) fn activate_credential(
        &mut self,
        (key, key_session): (Handle, Handle),
        (ek, ek_session): (Handle, Handle),
        blob: &[u8],
        secret: &[u8],
    ) -> Result<Vec<u8>, Rc> {
        let mut credential = sys::TPM2B_ID_OBJECT::default();
        credential.size = fill(&mut credential.credential, blob)?;
        let mut encrypted = sys::TPM2B_ENCRYPTED_SECRET::default();
        encrypted.size = fill(&mut encrypted.secret, secret)?;
        let mut info = Answer::<sys::TPM2B_DIGEST>::empty();
        // SAFETY: the context is valid while self lives; arguments outlive the call; the place to write to is ours.
        check(unsafe {
            sys::Esys_ActivateCredential(
                self.context,
                key.0,
                ek.0,
                key_session.0,
                ek_session.0,
                Handle::NONE.0,
                &raw const credential,
                &raw const encrypted,
                info.place(),
            )
        })?;
        let info = info.filled()?;
        info.buffer.get(..usize::from(info.size)).map(<[u8]>::to_vec).ok_or(Rc::MALFORMED)
    }

    /// `TPM2_DictionaryAttackLockReset` with the lockout authorisation.
    pub(in crate::tpm) fn reset_lockout(&mut self, session: Handle) -> Result<(), Rc> {
        // SAFETY: the context is valid while self lives.
        check(unsafe {
            sys::Esys_DictionaryAttackLockReset(
                self.context,
                sys::ESYS_TR_RH_LOCKOUT,
                session.0,
                Handle::NONE.0,
                Handle::NONE.0,
            )
        })
    }
}

/// Reads a `TPMT_PUBLIC` that fills `bytes`, as templates are kept in NV.
pub(in crate::tpm) fn unmarshal_template(bytes: &[u8]) -> Result<sys::TPM2B_PUBLIC, Rc> {
    let mut template = sys::TPM2B_PUBLIC::default();
    let mut used = 0;
    // SAFETY: the function reads at most the given size, counts in `used`, and writes one structure that is ours.
    check(unsafe {
        sys::Tss2_MU_TPMT_PUBLIC_Unmarshal(
            bytes.as_ptr(),
            bytes.len() as sys::size_t,
            &raw mut used,
            &raw mut template.publicArea,
        )
    })?;
    if used as usize != bytes.len() {
        return Err(Rc::MALFORMED);
    }
    Ok(template)
}

/// Copies into a TPM2B's buffer; gives its size.
fn fill(buffer: &mut [u8], bytes: &[u8]) -> Result<u16, Rc> {
    buffer.get_mut(..bytes.len()).ok_or(Rc::MALFORMED)?.copy_from_slice(bytes);
    u16::try_from(bytes.len()).map_err(|_| Rc::MALFORMED)
}
