//! Strict CBOR: one value has one encoding.
//!
//! Values are written with the shortest integer and length forms, definite lengths and map keys in ascending order
//! (RFC 8949 section 4.2.1). A decoder accepts only what its own encoder would have written: it decodes, encodes
//! again and compares. So unknown keys, doubled keys, longer forms and trailing bytes are all refused by one rule.

use minicbor::{Decode, Decoder, Encode};

use crate::{Malformed, MalformedKind};

/// The canonical encoding of a value.
pub fn encode<T: Encode<()>>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    // Writing to a Vec cannot fail and no Encode of this crate raises an error of its own.
    #[allow(clippy::expect_used)]
    minicbor::encode(value, &mut out).expect("writing to memory");
    out
}

/// Decodes exactly one value that fills `bytes`.
///
/// # Errors
/// [`Malformed`] when the input is longer than `limit` bytes, is not the canonical encoding of a `T`, or goes on
/// after it.
pub fn decode<T>(what: &'static str, bytes: &[u8], limit: usize) -> Result<T, Malformed>
where
    T: for<'b> Decode<'b, ()> + Encode<()>,
{
    if bytes.len() > limit {
        return Err(Malformed::new(what, 0, MalformedKind::TooLarge { limit }));
    }
    let (value, len) = decode_first(what, bytes)?;
    if len != bytes.len() {
        return Err(Malformed::new(what, len, MalformedKind::Trailing));
    }
    Ok(value)
}

/// Decodes the first value of a CBOR sequence and tells its length in bytes.
///
/// # Errors
/// [`Malformed`]; [`Malformed::is_truncated`] holds when the input ends inside the value.
pub fn decode_first<T>(what: &'static str, bytes: &[u8]) -> Result<(T, usize), Malformed>
where
    T: for<'b> Decode<'b, ()> + Encode<()>,
{
    let mut decoder = Decoder::new(bytes);
    let value: T = decoder.decode().map_err(|e| {
        let kind = if e.is_end_of_input() { MalformedKind::Truncated } else { MalformedKind::Cbor(e.to_string()) };
        Malformed::new(what, e.position().unwrap_or_else(|| decoder.position()), kind)
    })?;
    let len = decoder.position();
    if encode(&value) != bytes[..len] {
        return Err(Malformed::new(what, 0, MalformedKind::NotCanonical));
    }
    Ok((value, len))
}
