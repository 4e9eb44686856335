//! Strict CBOR: one value has one encoding.
//!
//! Values are written with the shortest integer and length forms, definite lengths and map keys in ascending order
//! (RFC 8949 section 4.2.1). A decoder accepts only what its own encoder would have written: it decodes, encodes
//! again and compares. So unknown keys, doubled keys, longer forms and trailing bytes are all refused by one rule.

use minicbor::{
    Decode, Decoder, Encode,
    data::{Int, Type},
    decode::Error,
};

use crate::{Malformed, MalformedKind};

/// The deepest nesting of a value whose form is not known to this version.
pub const MAX_DEPTH: usize = 16;

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

/// The length in bytes of the first value of a CBOR sequence, which must be canonical as far as its form tells
/// ([`skip_canonical`]). An error at the end of the input says that more bytes are needed.
pub(crate) fn first_len(bytes: &[u8]) -> Result<usize, Error> {
    let mut decoder = Decoder::new(bytes);
    skip_canonical(&mut decoder)?;
    Ok(decoder.position())
}

/// Decodes an array of at most `N` items; a longer one is refused before its items are read.
pub(crate) fn at_most<'b, const N: usize, C, T: Decode<'b, C>>(
    d: &mut Decoder<'b>,
    ctx: &mut C,
) -> Result<Vec<T>, Error> {
    let at = d.position();
    match d.array()? {
        Some(len) if len <= N as u64 => (0..len).map(|_| d.decode_with(ctx)).collect(),
        _ => Err(Error::message("more items than can be, or their number is missing").at(at)),
    }
}

/// Steps over one value of unknown form. Only canonical values of the part of CBOR that this crate writes pass:
/// integers, byte and text strings, arrays, maps with ascending keys, booleans and null, at most [`MAX_DEPTH`] deep.
pub(crate) fn skip_canonical(d: &mut Decoder<'_>) -> Result<(), Error> {
    skip_at(d, MAX_DEPTH)
}

fn skip_at(d: &mut Decoder<'_>, depth: usize) -> Result<(), Error> {
    let at = d.position();
    let bad = |why| Error::message(why).at(at);
    let Some(depth) = depth.checked_sub(1) else {
        return Err(bad("nested too deeply"));
    };
    // The value's argument (RFC 8949 section 3) and the length of what follows the head.
    let (argument, inner) = match d.datatype()? {
        Type::U8 | Type::U16 | Type::U32 | Type::U64 => (d.u64()?, 0),
        Type::I8 | Type::I16 | Type::I32 | Type::I64 | Type::Int => (negative_argument(d.int()?), 0),
        Type::Bytes => string(d.bytes()?),
        Type::String => string(d.str()?.as_bytes()),
        Type::Array => {
            let len = d.array()?.ok_or_else(|| bad("an array of unknown length"))?;
            let start = d.position();
            for _ in 0..len {
                skip_at(d, depth)?;
            }
            (len, d.position() - start)
        }
        Type::Map => {
            let len = d.map()?.ok_or_else(|| bad("a map of unknown length"))?;
            let start = d.position();
            let mut last: &[u8] = &[];
            for _ in 0..len {
                let key = d.position();
                skip_at(d, depth)?;
                let key = &d.input()[key..d.position()];
                if key <= last {
                    return Err(bad("map keys are not in ascending order"));
                }
                last = key;
                skip_at(d, depth)?;
            }
            (len, d.position() - start)
        }
        Type::Bool => {
            d.bool()?;
            return Ok(());
        }
        Type::Null => return d.null(),
        _ => return Err(bad("not a kind of value that is used here")),
    };
    if d.position() - at == head_len(argument) + inner { Ok(()) } else { Err(bad("not the shortest form")) }
}

fn string(bytes: &[u8]) -> (u64, usize) {
    (bytes.len() as u64, bytes.len())
}

/// The argument n of the negative integer −1 − n.
fn negative_argument(int: Int) -> u64 {
    u64::try_from(-1 - i128::from(int)).unwrap_or_default()
}

/// Bytes of the shortest head that holds this argument.
pub(crate) fn head_len(argument: u64) -> usize {
    match argument {
        0..=0x17 => 1,
        0x18..=0xff => 2,
        0x100..=0xffff => 3,
        0x1_0000..=0xffff_ffff => 5,
        _ => 9,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
