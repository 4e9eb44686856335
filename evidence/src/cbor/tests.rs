//! What an unknown value may be, and what it may not.

use minicbor::Decoder;
use proptest::prelude::*;

use super::*;

fn skip(bytes: &[u8]) -> Result<usize, Error> {
    let mut d = Decoder::new(bytes);
    skip_canonical(&mut d)?;
    Ok(d.position())
}

/// Writes any canonical value that the format uses, by what the numbers say.
fn write(out: &mut Vec<u8>, numbers: &mut impl Iterator<Item = u64>, depth: usize) {
    let mut e = minicbor::Encoder::new(out);
    let n = numbers.next().unwrap_or(0);
    match n % if depth < MAX_DEPTH { 8 } else { 6 } {
        0 => e.u64(n).map(drop).unwrap(),
        1 => e.u64(n % 64).map(drop).unwrap(),
        2 => e.int(Int::try_from(-1 - i128::from(n)).unwrap()).map(drop).unwrap(),
        3 => e.bytes(&n.to_le_bytes()[..n as usize / 8 % 9]).map(drop).unwrap(),
        4 => e.str(&"x".repeat(n as usize / 8 % 300)).map(drop).unwrap(),
        5 if (n / 8).is_multiple_of(2) => e.null().map(drop).unwrap(),
        5 => e.bool((n / 16).is_multiple_of(2)).map(drop).unwrap(),
        6 => {
            let len = n / 8 % 4;
            e.array(len).unwrap();
            let out = e.into_writer();
            (0..len).for_each(|_| write(out, numbers, depth + 1));
        }
        _ => {
            let len = n / 8 % 4;
            e.map(len).unwrap();
            let out = e.into_writer();
            for key in 0..len {
                out.push(key as u8);
                write(out, numbers, depth + 1);
            }
        }
    }
}

proptest! {
    #[test]
    fn canonical_values_pass_and_their_parts_do_not(numbers in prop::collection::vec(any::<u64>(), 1..40)) {
        let mut bytes = Vec::new();
        write(&mut bytes, &mut numbers.into_iter(), 1);
        prop_assert_eq!(skip(&bytes).unwrap(), bytes.len());
        for cut in 0..bytes.len() {
            prop_assert!(skip(&bytes[..cut]).unwrap_err().is_end_of_input());
        }
    }

    #[test]
    fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        if let Ok(len) = skip(&bytes) {
            prop_assert!(len <= bytes.len());
        }
    }
}

#[test]
fn other_forms_are_refused() {
    for hex in [
        "1800",                 // 0 in two bytes
        "190017",               // 23 in three
        "3800",                 // −1 in two
        "5800",                 // no bytes, length in two
        "780161",               // "a", length in two
        "9800",                 // empty array, length in two
        "b800",                 // empty map, length in two
        "9fff",                 // array of unknown length
        "bfff",                 // map of unknown length
        "5fff",                 // bytes of unknown length
        "a200000000",           // a key twice
        "a201000000",           // keys descending
        "a100ff",               // a break as a value
        "f800",                 // an ill-formed simple value
        "f97e00",               // a float
        "f7",                   // undefined
        "c000",                 // a tag
        "61ff",                 // text that is not UTF-8
        "9bffffffffffffffff00", // more items than there are
    ] {
        let bytes = hex::decode(hex).unwrap();
        assert!(skip(&bytes).is_err(), "{hex}");
    }
}

#[test]
fn depth_is_bounded() {
    let nested = |depth: usize| [vec![0x81; depth - 1], vec![0x00]].concat();
    assert!(skip(&nested(MAX_DEPTH)).is_ok());
    assert!(skip(&nested(MAX_DEPTH + 1)).is_err());
    assert!(skip(&vec![0x81; 1_000_000]).is_err());
}

#[test]
fn too_many_items_are_refused_before_they_are_read() {
    let mut bytes = vec![0x9b];
    bytes.extend_from_slice(&u64::MAX.to_be_bytes());
    let err = at_most::<4, (), u8>(&mut Decoder::new(&bytes), &mut ()).unwrap_err();
    assert!(!err.is_end_of_input());
    assert_eq!(at_most::<4, (), u8>(&mut Decoder::new(&[0x82, 1, 2]), &mut ()).unwrap(), [1, 2]);
}
