//! The few calls of libtss2-esys that we need, each with its pointers kept inside this file.
//!
//! `tss_esapi::Context` would be the safe way in, and its types and templates are used all the same; but version 7.7
//! can't name an swtpm by its socket (only by host and port, where any local user could talk to it), has no
//! `TPM2_ReadClock`, gives response codes without the layer they came from, and keeps banks in a hash map, in no fixed
//! order. So the calls are made here, on the bindings that tss-esapi exports.
//!
//! One rule makes all of it sound: [`Esys`] owns both contexts alone, and every call takes `&mut self`. The library
//! keeps no global state beside its logging and no pointer to our arguments after a call returns; what it allocates
//! is freed by [`Answer`].
#![allow(unsafe_code)]

use std::{ffi::CString, ops::Deref, ptr};

use tss_esapi::{constants::tss, tss2_esys as sys};

use super::error::Rc;

mod keys;

pub(super) use keys::{Hierarchy, unmarshal_template};

/// A handle inside the library: of a key, a session or a permanent entity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Handle(sys::ESYS_TR);

impl Handle {
    const NONE: Self = Self(sys::ESYS_TR_NONE);
    /// The empty password.
    pub(super) const PASSWORD: Self = Self(sys::ESYS_TR_PASSWORD);
}

/// What a session does beside authorising.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Nothing: for commands without a parameter to encrypt.
    Plain,
    /// Encrypts the first parameter of command and response.
    Encrypt,
}

/// The library's context together with the connection under it.
pub(super) struct Esys {
    context: *mut sys::ESYS_CONTEXT,
    tcti: *mut sys::TSS2_TCTI_CONTEXT,
}

// SAFETY: both contexts are plain heap memory with a file descriptor, bound to no thread, and `Esys` is their only
// owner; `&mut self` on every call keeps them to one thread at a time.
unsafe impl Send for Esys {}

impl Esys {
    /// Connects through a TCTI named as libtss2-tctildr wants it, `NAME:CONFIGURATION`.
    pub(super) fn connect(name_conf: &CString) -> Result<Self, Rc> {
        let mut esys = Self { context: ptr::null_mut(), tcti: ptr::null_mut() };
        // SAFETY: the name is a terminated string that outlives the call, the place to write to is ours.
        check(unsafe { sys::Tss2_TctiLdr_Initialize(name_conf.as_ptr(), &raw mut esys.tcti) })?;
        // SAFETY: the TCTI context was just initialised; a null ABI version means the library's own. If this fails
        // `context` stays null and Drop frees only the TCTI.
        check(unsafe { sys::Esys_Initialize(&raw mut esys.context, esys.tcti, ptr::null_mut()) })?;
        Ok(esys)
    }

    /// `TPM2_GetCapability`: also whether there is more.
    pub(super) fn capability(
        &mut self,
        capability: u32,
        property: u32,
        count: u32,
    ) -> Result<(Answer<sys::TPMS_CAPABILITY_DATA>, bool), Rc> {
        let mut more = 0;
        let mut data = Answer::<sys::TPMS_CAPABILITY_DATA>::empty();
        // SAFETY: the context is valid while self lives; the places to write to are ours.
        check(unsafe {
            sys::Esys_GetCapability(
                self.context,
                Handle::NONE.0,
                Handle::NONE.0,
                Handle::NONE.0,
                capability,
                property,
                count,
                &raw mut more,
                data.place(),
            )
        })?;
        Ok((data.filled()?, more != 0))
    }

    /// The handles of a type (`0x80000000` transient objects, `0x02000000` loaded sessions), as the TPM numbers them.
    pub(super) fn tpm_handles(&mut self, first: u32) -> Result<Vec<u32>, Rc> {
        let (data, _more) = self.capability(tss::TPM2_CAP_HANDLES, first, 254)?;
        if data.capability != tss::TPM2_CAP_HANDLES {
            return Err(Rc::MALFORMED);
        }
        // SAFETY: `capability` is the union's selector and says `handles`; all its bit patterns are valid integers.
        let list = unsafe { data.data.handles };
        Ok(list.handle.into_iter().take(list.count as usize).collect())
    }

    /// The allocation of banks: `TPM_CAP_PCRS`.
    pub(super) fn allocated_banks(&mut self) -> Result<sys::TPML_PCR_SELECTION, Rc> {
        let (data, _more) = self.capability(tss::TPM2_CAP_PCRS, 0, 16)?;
        if data.capability != tss::TPM2_CAP_PCRS {
            return Err(Rc::MALFORMED);
        }
        // SAFETY: `capability` is the union's selector and says `assignedPCR`, made of integers only.
        Ok(unsafe { data.data.assignedPCR })
    }

    /// Fixed properties as pairs of tag and value, beginning with `first`.
    pub(super) fn properties(&mut self, first: u32, count: u32) -> Result<Vec<(u32, u32)>, Rc> {
        let (data, _more) = self.capability(tss::TPM2_CAP_TPM_PROPERTIES, first, count)?;
        if data.capability != tss::TPM2_CAP_TPM_PROPERTIES {
            return Err(Rc::MALFORMED);
        }
        // SAFETY: `capability` is the union's selector and says `tpmProperties`, made of integers only.
        let list = unsafe { data.data.tpmProperties };
        Ok(list.tpmProperty.iter().take(list.count as usize).map(|p| (p.property, p.value)).collect())
    }

    /// `TPM2_FlushContext` of a handle as the TPM numbers it, for objects and sessions of somebody else.
    pub(super) fn flush_tpm_handle(&mut self, handle: u32) -> Result<(), Rc> {
        let mut inner = ptr::null_mut();
        // SAFETY: the context is valid while self lives. The inner context belongs to it, is used for one whole
        // command between two ESYS commands (ESYS prepares it anew for each of its own), and isn't kept.
        check(unsafe { sys::Esys_GetSysContext(self.context, &raw mut inner) })?;
        // SAFETY: as above.
        check(unsafe { sys::Tss2_Sys_FlushContext(inner, handle) })
    }

    /// `TPM2_FlushContext` of one of our own handles.
    pub(super) fn flush(&mut self, handle: Handle) -> Result<(), Rc> {
        // SAFETY: the context is valid while self lives; the library checks the handle.
        check(unsafe { sys::Esys_FlushContext(self.context, handle.0) })
    }

    /// `TPM2_CreatePrimary` in the endorsement hierarchy with an empty password for the key.
    pub(super) fn create_endorsement_primary(
        &mut self,
        session: Handle,
        template: &sys::TPM2B_PUBLIC,
    ) -> Result<(Handle, Answer<sys::TPM2B_PUBLIC>), Rc> {
        let sensitive = sys::TPM2B_SENSITIVE_CREATE::default();
        let outside = sys::TPM2B_DATA::default();
        let no_pcrs = sys::TPML_PCR_SELECTION::default();
        let mut handle = Handle::NONE;
        let mut public = Answer::<sys::TPM2B_PUBLIC>::empty();
        let mut creation_data = Answer::<sys::TPM2B_CREATION_DATA>::empty();
        let mut creation_hash = Answer::<sys::TPM2B_DIGEST>::empty();
        let mut ticket = Answer::<sys::TPMT_TK_CREATION>::empty();
        // SAFETY: the context is valid while self lives; arguments outlive the call; the places to write to are ours.
        check(unsafe {
            sys::Esys_CreatePrimary(
                self.context,
                sys::ESYS_TR_RH_ENDORSEMENT,
                session.0,
                Handle::NONE.0,
                Handle::NONE.0,
                &raw const sensitive,
                template,
                &raw const outside,
                &raw const no_pcrs,
                &raw mut handle.0,
                public.place(),
                creation_data.place(),
                creation_hash.place(),
                ticket.place(),
            )
        })?;
        Ok((handle, public.filled()?))
    }

    /// `TPM2_StartAuthSession`: HMAC with SHA-256, salted to `key`, AES-128-CFB for parameters.
    pub(super) fn start_salted_session(&mut self, key: Handle) -> Result<Handle, Rc> {
        let symmetric = sys::TPMT_SYM_DEF {
            algorithm: tss::TPM2_ALG_AES,
            keyBits: sys::TPMU_SYM_KEY_BITS { aes: 128 },
            mode: sys::TPMU_SYM_MODE { aes: tss::TPM2_ALG_CFB },
        };
        let mut session = Handle::NONE;
        // SAFETY: the context is valid while self lives; arguments outlive the call; a null nonce lets the library
        // draw one.
        check(unsafe {
            sys::Esys_StartAuthSession(
                self.context,
                key.0,
                Handle::NONE.0,
                Handle::NONE.0,
                Handle::NONE.0,
                Handle::NONE.0,
                ptr::null(),
                tss::TPM2_SE_HMAC,
                &raw const symmetric,
                tss::TPM2_ALG_SHA256,
                &raw mut session.0,
            )
        })?;
        Ok(session)
    }

    /// Sets what a session does from the next command on. Sends nothing to the TPM.
    pub(super) fn set_use(&mut self, session: Handle, purpose: Use) -> Result<(), Rc> {
        const CONTINUE: u8 = 0x01;
        const DECRYPT: u8 = 0x20;
        const ENCRYPT: u8 = 0x40;
        let flags = match purpose {
            Use::Plain => CONTINUE,
            Use::Encrypt => CONTINUE | DECRYPT | ENCRYPT,
        };
        // SAFETY: the context is valid while self lives; the library checks the handle.
        check(unsafe { sys::Esys_TRSess_SetAttributes(self.context, session.0, flags, 0xFF) })
    }

    /// `TPM2_PCR_Read`: the update counter, which registers were read, and their values.
    #[allow(clippy::type_complexity)]
    pub(super) fn pcr_read(
        &mut self,
        selection: &sys::TPML_PCR_SELECTION,
    ) -> Result<(u32, Answer<sys::TPML_PCR_SELECTION>, Answer<sys::TPML_DIGEST>), Rc> {
        let mut counter = 0;
        let mut read = Answer::<sys::TPML_PCR_SELECTION>::empty();
        let mut values = Answer::<sys::TPML_DIGEST>::empty();
        // SAFETY: the context is valid while self lives; arguments outlive the call; the places to write to are ours.
        check(unsafe {
            sys::Esys_PCR_Read(
                self.context,
                Handle::NONE.0,
                Handle::NONE.0,
                Handle::NONE.0,
                selection,
                &raw mut counter,
                read.place(),
                values.place(),
            )
        })?;
        Ok((counter, read.filled()?, values.filled()?))
    }

    /// `TPM2_PCR_Extend`.
    pub(super) fn pcr_extend(&mut self, session: Handle, pcr: u8, digests: &sys::TPML_DIGEST_VALUES) -> Result<(), Rc> {
        // SAFETY: the context is valid while self lives; arguments outlive the call. The library's handle of a PCR is
        // its index.
        check(unsafe {
            sys::Esys_PCR_Extend(self.context, u32::from(pcr), session.0, Handle::NONE.0, Handle::NONE.0, digests)
        })
    }

    /// `TPM2_Quote` with the scheme of the key: `TPMS_ATTEST` and `TPMT_SIGNATURE` as bytes.
    pub(super) fn quote(
        &mut self,
        session: Handle,
        key: Handle,
        qualifying_data: &sys::TPM2B_DATA,
        selection: &sys::TPML_PCR_SELECTION,
    ) -> Result<(Vec<u8>, Vec<u8>), Rc> {
        let scheme = sys::TPMT_SIG_SCHEME { scheme: tss::TPM2_ALG_NULL, ..Default::default() };
        let mut attest = Answer::<sys::TPM2B_ATTEST>::empty();
        let mut signature = Answer::<sys::TPMT_SIGNATURE>::empty();
        // SAFETY: the context is valid while self lives; arguments outlive the call; the places to write to are ours.
        check(unsafe {
            sys::Esys_Quote(
                self.context,
                key.0,
                session.0,
                Handle::NONE.0,
                Handle::NONE.0,
                qualifying_data,
                &raw const scheme,
                selection,
                attest.place(),
                signature.place(),
            )
        })?;
        let (attest, signature) = (attest.filled()?, signature.filled()?);
        let attest = attest.attestationData.get(..usize::from(attest.size)).ok_or(Rc::MALFORMED)?.to_vec();
        // SAFETY (of the call inside): see `marshal`.
        let signature = marshal(&*signature, sys::Tss2_MU_TPMT_SIGNATURE_Marshal)?;
        Ok((attest, signature))
    }

    /// `TPM2_ReadClock`.
    pub(super) fn read_clock(&mut self) -> Result<sys::TPMS_CLOCK_INFO, Rc> {
        let mut time = Answer::<sys::TPMS_TIME_INFO>::empty();
        // SAFETY: the context is valid while self lives; the place to write to is ours.
        check(unsafe {
            sys::Esys_ReadClock(self.context, Handle::NONE.0, Handle::NONE.0, Handle::NONE.0, time.place())
        })?;
        Ok(time.filled()?.clockInfo)
    }
}

impl Drop for Esys {
    fn drop(&mut self) {
        // SAFETY: nothing else has these pointers. Each is null or was initialised by the library, and both functions
        // accept the first, free the second and set it to null. The context goes before the connection it uses.
        unsafe {
            if !self.context.is_null() {
                sys::Esys_Finalize(&raw mut self.context);
            }
            if !self.tcti.is_null() {
                sys::Tss2_TctiLdr_Finalize(&raw mut self.tcti);
            }
        }
    }
}

/// `TPM2B_PUBLIC` as bytes, size first.
pub(super) fn marshal_public(public: &sys::TPM2B_PUBLIC) -> Result<Vec<u8>, Rc> {
    marshal(public, sys::Tss2_MU_TPM2B_PUBLIC_Marshal)
}

/// One of the library's marshalling functions; all have this form.
type Marshal<T> = unsafe extern "C" fn(*const T, *mut u8, sys::size_t, *mut sys::size_t) -> sys::TSS2_RC;

fn marshal<T>(value: &T, function: Marshal<T>) -> Result<Vec<u8>, Rc> {
    // The form on the wire is never larger than in memory, where unions and buffers have their full size.
    let mut bytes = vec![0; size_of::<T>() + 16];
    let mut used = 0;
    // SAFETY: the function is a marshalling function of libtss2-mu for T; it writes at most the given size and counts
    // in `used`. It reads of unions only the member that the selector names, and the value came from the library.
    check(unsafe { function(value, bytes.as_mut_ptr(), bytes.len() as sys::size_t, &raw mut used) })?;
    bytes.truncate(used as usize);
    Ok(bytes)
}

impl Rc {
    /// The code that the ESYS layer has for a response that does not parse.
    const MALFORMED: Self = Self(7 << 16 | 17);
}

fn check(code: sys::TSS2_RC) -> Result<(), Rc> {
    if code == 0 { Ok(()) } else { Err(Rc(code)) }
}

/// A value that the library allocated; freed with it.
pub(super) struct Answer<T>(*mut T);

impl<T> Answer<T> {
    fn empty() -> Self {
        Self(ptr::null_mut())
    }

    /// Where the library writes the pointer. Called once for each answer.
    fn place(&mut self) -> *mut *mut T {
        &raw mut self.0
    }

    /// The answer, if the library did fill it.
    fn filled(self) -> Result<Self, Rc> {
        if self.0.is_null() { Err(Rc::MALFORMED) } else { Ok(self) }
    }
}

impl<T> Deref for Answer<T> {
    type Target = T;

    fn deref(&self) -> &T {
        assert!(!self.0.is_null(), "only filled answers leave this file");
        // SAFETY: not null, so the library allocated and filled it, and it is freed only when self goes. The T's in
        // use consist of integers, arrays of them and unions of such: any bytes are valid.
        unsafe { &*self.0 }
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        // SAFETY: null, or allocated by the library and freed nowhere else.
        unsafe { sys::Esys_Free(self.0.cast()) }
    }
}
