//! Names and fixed-size values: each its own type, so that a session is never taken for an epoch.

use std::{fmt, str::FromStr};

use minicbor::{
    Decode, Decoder, Encode, Encoder,
    bytes::{ByteArray, ByteSlice},
    decode, encode,
};

/// Serialises a type through its text form.
#[cfg(feature = "json")]
macro_rules! serde_as_text {
    ($name:ty) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
#[cfg(feature = "json")]
pub(crate) use serde_as_text;

macro_rules! fixed_bytes {
    ($(#[$doc:meta])* $name:ident, $size:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $size]);

        impl $name {
            /// Size in bytes.
            pub const SIZE: usize = $size;

            /// All bits zero.
            pub const ZERO: Self = Self([0; $size]);

            /// The bytes.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = &'static str;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let mut bytes = [0; $size];
                hex::decode_to_slice(text, &mut bytes)
                    .map_err(|_| concat!("not ", stringify!($size), " bytes in hexadecimal"))?;
                Ok(Self(bytes))
            }
        }

        impl<C> Encode<C> for $name {
            fn encode<W: encode::Write>(&self, e: &mut Encoder<W>, _: &mut C) -> Result<(), encode::Error<W::Error>> {
                e.bytes(&self.0)?.ok()
            }
        }

        impl<'b, C> Decode<'b, C> for $name {
            fn decode(d: &mut Decoder<'b>, ctx: &mut C) -> Result<Self, decode::Error> {
                let bytes: ByteArray<$size> = d.decode_with(ctx)?;
                Ok(Self(bytes.into()))
            }
        }

        #[cfg(feature = "json")]
        serde_as_text!($name);
    };
}

fixed_bytes!(
    /// A SHA-256 digest or register value.
    Sha256,
    32
);
fixed_bytes!(
    /// One QEMU process. Computed by [`SessionId::of_process`].
    SessionId,
    8
);
fixed_bytes!(
    /// One life of the measurement log: from a TPM reset to the next. Random.
    EpochId,
    16
);
fixed_bytes!(
    /// A kernel's boot id (`/proc/sys/kernel/random/boot_id`), of the host or as a guest claims it.
    BootId,
    16
);

impl SessionId {
    /// The session of a QEMU process: the first 8 bytes of
    /// SHA-256(`"onequote.session.v1"` ‖ host boot id ‖ pid u32 LE ‖ start time u64 LE).
    ///
    /// `start_time` is field 22 of `/proc/PID/stat` (clock ticks since boot). The same process gives the same session
    /// before and after a restart of the proxy; a reused pid does not.
    #[must_use]
    pub fn of_process(boot: BootId, pid: u32, start_time: u64) -> Self {
        let whole =
            crate::digest::sha256(&[b"onequote.session.v1", &boot.0, &pid.to_le_bytes(), &start_time.to_le_bytes()]);
        let mut short = [0; 8];
        short.copy_from_slice(&whole.0[..8]);
        Self(short)
    }
}

impl BootId {
    /// Reads the kernel's text form (a UUID with hyphens, maybe a line end).
    #[must_use]
    pub fn from_kernel(text: &str) -> Option<Self> {
        uuid::Uuid::parse_str(text.trim()).ok().map(|id| Self(*id.as_bytes()))
    }
}

/// Bytes of any length; hexadecimal for people.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Blob(pub Vec<u8>);

impl fmt::Display for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blob({self})")
    }
}

impl FromStr for Blob {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        hex::decode(text).map(Self).map_err(|_| "not hexadecimal")
    }
}

impl From<Vec<u8>> for Blob {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl<C> Encode<C> for Blob {
    fn encode<W: encode::Write>(&self, e: &mut Encoder<W>, _: &mut C) -> Result<(), encode::Error<W::Error>> {
        e.bytes(&self.0)?.ok()
    }
}

impl<'b, C> Decode<'b, C> for Blob {
    fn decode(d: &mut Decoder<'b>, ctx: &mut C) -> Result<Self, decode::Error> {
        let bytes: &ByteSlice = d.decode_with(ctx)?;
        Ok(Self(bytes.to_vec()))
    }
}

/// A virtual machine's UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub uuid::Uuid);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl VmId {
    /// The UUID of a VM that QEMU was given none for: a version 8 UUID (RFC 9562) over
    /// SHA-256(`"onequote.vm.v1"` ‖ host id ‖ 00 ‖ name).
    #[must_use]
    pub fn from_name(host: &HostId, name: &str) -> Self {
        let whole = crate::digest::sha256(&[b"onequote.vm.v1", host.as_str().as_bytes(), &[0], name.as_bytes()]);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&whole.0[..16]);
        Self(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }
}

impl FromStr for VmId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        uuid::Uuid::parse_str(text).map(Self).map_err(|_| "not a UUID")
    }
}

impl<C> Encode<C> for VmId {
    fn encode<W: encode::Write>(&self, e: &mut Encoder<W>, _: &mut C) -> Result<(), encode::Error<W::Error>> {
        e.bytes(self.0.as_bytes())?.ok()
    }
}

impl<'b, C> Decode<'b, C> for VmId {
    fn decode(d: &mut Decoder<'b>, ctx: &mut C) -> Result<Self, decode::Error> {
        let bytes: ByteArray<16> = d.decode_with(ctx)?;
        Ok(Self(uuid::Uuid::from_bytes(bytes.into())))
    }
}

/// A host's name: 1 to 63 characters of `a-z`, `0-9`, `-` and `.`, beginning and ending with a letter or digit, so
/// that it can stand in a certificate as a DNS name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(String);

impl HostId {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for HostId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let word = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let bytes = text.as_bytes();
        let ends = bytes.first().copied().is_some_and(word) && bytes.last().copied().is_some_and(word);
        let labels = !text.contains("..") && !text.contains(".-") && !text.contains("-.");
        if bytes.len() <= 63 && ends && labels && bytes.iter().all(|&c| word(c) || c == b'-' || c == b'.') {
            Ok(Self(text.to_owned()))
        } else {
            Err("a host id is 1 to 63 characters of a-z, 0-9, - and ., beginning and ending with a letter or digit")
        }
    }
}

impl<C> Encode<C> for HostId {
    fn encode<W: encode::Write>(&self, e: &mut Encoder<W>, _: &mut C) -> Result<(), encode::Error<W::Error>> {
        e.str(&self.0)?.ok()
    }
}

impl<'b, C> Decode<'b, C> for HostId {
    fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
        let at = d.position();
        d.str()?.parse().map_err(|e: &'static str| decode::Error::message(e).at(at))
    }
}

/// One life of a host's measurement log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize))]
#[cbor(map)]
pub struct Epoch {
    /// Counts up on one host, from 1.
    #[n(0)]
    pub number: u64,
    /// Random, so that two logs with the same number are told apart.
    #[n(1)]
    pub id: EpochId,
}

/// A verifier's challenge: 16 to 32 bytes. Not more, so that a nonce is never as long as one with the channel binding
/// that follows it in a leaf; see [`crate::nonce_tree`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Nonce(Vec<u8>);

impl Nonce {
    /// The fewest bytes.
    pub const MIN: usize = 16;

    /// The most bytes.
    pub const MAX: usize = 32;

    /// Takes 16 to 32 bytes, or nothing.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        (Self::MIN..=Self::MAX).contains(&bytes.len()).then_some(Self(bytes))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl FromStr for Nonce {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = hex::decode(text).map_err(|_| "a nonce is hexadecimal")?;
        Self::new(bytes).ok_or("a nonce is 16 to 32 bytes")
    }
}

/// Milliseconds since 1970-01-01T00:00:00Z, by the host's clock. Nothing in appraisal rests on its truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize))]
#[cbor(transparent)]
pub struct TimeMs(#[n(0)] pub u64);

#[cfg(feature = "json")]
mod json {
    use super::{Blob, HostId, Nonce, VmId};
    serde_as_text!(Blob);
    serde_as_text!(HostId);
    serde_as_text!(Nonce);
    serde_as_text!(VmId);
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
