//! The image-digest kernel: SHA-256 (FIPS 180-4) of two blocks of 4 KiB at a time with the CPU's SHA extensions
//! (Intel SDM volume 2, `SHA256RNDS2`, `SHA256MSG1`, `SHA256MSG2`).
//!
//! `sha256rnds2` gives its result after four cycles and could begin another one after two, but each round needs the one
//! before: a single stream leaves the unit idle half of the time. Two messages in step fill the gaps. Both have the
//! same length, so they share constants, and their last 64 bytes, the padding, whose schedule is computed when this is
//! compiled.
#![expect(unsafe_code, reason = "CPU extensions: the one place, besides kernel interfaces, that needs it")]

use std::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_blend_epi16, _mm_loadu_si128, _mm_set_epi8, _mm_set_epi32,
    _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8, _mm_shuffle_epi32,
    _mm_storeu_si128,
};

use crate::{BLOCK_SIZE, Digest, block::Block};

/// Proof that this CPU has what the kernel needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ShaNi(());

impl ShaNi {
    /// Asks the CPU; the answer is kept by the standard library.
    pub(crate) fn detect() -> Option<Self> {
        let there = is_x86_feature_detected!("sha")
            && is_x86_feature_detected!("sse2")
            && is_x86_feature_detected!("ssse3")
            && is_x86_feature_detected!("sse4.1");
        there.then_some(Self(()))
    }

    /// The digests of two blocks.
    pub(crate) fn two(self, a: &Block, b: &Block) -> [Digest; 2] {
        // SAFETY: `two` needs sha, sse2, ssse3 and sse4.1, and a `ShaNi` is only made by `detect`, which found them.
        unsafe { two(a, b) }
    }
}

/// FIPS 180-4, section 4.2.2.
#[rustfmt::skip]
const K: [u32; 64] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
    0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
    0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
    0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
    0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
    0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
    0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
    0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
];

/// FIPS 180-4, section 5.3.3.
#[rustfmt::skip]
const INITIAL: [u32; 8] = [
    0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19,
];

/// The padding of a message of [`BLOCK_SIZE`] bytes: the words of its schedule, each with its round's constant added.
const PADDING: [u32; 64] = padding();

const fn padding() -> [u32; 64] {
    let mut w = [0_u32; 64];
    w[0] = 0x8000_0000;
    w[15] = BLOCK_SIZE as u32 * 8;
    let mut t = 16;
    while t < 64 {
        let (x, y) = (w[t - 15], w[t - 2]);
        let s0 = x.rotate_right(7) ^ x.rotate_right(18) ^ (x >> 3);
        let s1 = y.rotate_right(17) ^ y.rotate_right(19) ^ (y >> 10);
        w[t] = s1.wrapping_add(w[t - 7]).wrapping_add(s0).wrapping_add(w[t - 16]);
        t += 1;
    }
    t = 0;
    while t < 64 {
        w[t] = w[t].wrapping_add(K[t]);
        t += 1;
    }
    w
}

/// One message's state.
#[derive(Clone, Copy)]
struct Stream {
    abef: __m128i,
    cdgh: __m128i,
}

/// Four words, the first one lowest.
#[inline]
#[target_feature(enable = "sse2")]
fn words(of: &[u32; 64], at: usize) -> __m128i {
    _mm_set_epi32(of[at + 3].cast_signed(), of[at + 2].cast_signed(), of[at + 1].cast_signed(), of[at].cast_signed())
}

#[inline]
#[target_feature(enable = "sse2")]
fn start() -> Stream {
    // The order in which the instructions keep it, from the highest word down.
    let [a, b, c, d, e, f, g, h] = INITIAL.map(u32::cast_signed);
    Stream { abef: _mm_set_epi32(a, b, e, f), cdgh: _mm_set_epi32(c, d, g, h) }
}

/// 16 words, big-endian in the message.
#[inline]
#[target_feature(enable = "sse2,ssse3")]
fn load(bytes: &[u8; 64]) -> [__m128i; 4] {
    let swap = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
    let at = |n: usize| {
        // SAFETY: n is below 4, so 16 bytes from 16 * n are in the array; `loadu` asks for no alignment.
        unsafe { _mm_loadu_si128(bytes.as_ptr().add(16 * n).cast()) }
    };
    [at(0), at(1), at(2), at(3)].map(|v| _mm_shuffle_epi8(v, swap))
}

/// The next four words of the schedule.
#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
fn schedule(w0: __m128i, w1: __m128i, w2: __m128i, w3: __m128i) -> __m128i {
    let sum = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8(w3, w2, 4));
    _mm_sha256msg2_epu32(sum, w3)
}

/// Four rounds of both streams in step, `wk_…` being words with their constants.
#[inline]
#[target_feature(enable = "sha,sse2")]
fn rounds(a: &mut Stream, b: &mut Stream, wk_a: __m128i, wk_b: __m128i) {
    a.cdgh = _mm_sha256rnds2_epu32(a.cdgh, a.abef, wk_a);
    b.cdgh = _mm_sha256rnds2_epu32(b.cdgh, b.abef, wk_b);
    a.abef = _mm_sha256rnds2_epu32(a.abef, a.cdgh, _mm_shuffle_epi32(wk_a, 0x0e));
    b.abef = _mm_sha256rnds2_epu32(b.abef, b.cdgh, _mm_shuffle_epi32(wk_b, 0x0e));
}

#[inline]
#[target_feature(enable = "sse2")]
fn add(to: &mut Stream, before: Stream) {
    to.abef = _mm_add_epi32(to.abef, before.abef);
    to.cdgh = _mm_add_epi32(to.cdgh, before.cdgh);
}

#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
fn two(a: &Block, b: &Block) -> [Digest; 2] {
    let (mut x, mut y) = (start(), start());
    let pieces = |block| <Block as AsRef<[u8]>>::as_ref(block).as_chunks::<64>().0.iter();
    for (piece_a, piece_b) in pieces(a).zip(pieces(b)) {
        let before = (x, y);
        // The last 16 words of each schedule.
        let (mut v, mut w) = (load(piece_a), load(piece_b));
        // Unrolled: the words' places turn with the rounds.
        macro_rules! first {
            ($n:literal) => {
                let k = words(&K, 4 * $n);
                rounds(&mut x, &mut y, _mm_add_epi32(v[$n], k), _mm_add_epi32(w[$n], k));
            };
        }
        first!(0);
        first!(1);
        first!(2);
        first!(3);
        macro_rules! next {
            ($n:literal, $w0:literal, $w1:literal, $w2:literal, $w3:literal) => {
                let k = words(&K, 4 * $n);
                v[$w0] = schedule(v[$w0], v[$w1], v[$w2], v[$w3]);
                w[$w0] = schedule(w[$w0], w[$w1], w[$w2], w[$w3]);
                rounds(&mut x, &mut y, _mm_add_epi32(v[$w0], k), _mm_add_epi32(w[$w0], k));
            };
        }
        next!(4, 0, 1, 2, 3);
        next!(5, 1, 2, 3, 0);
        next!(6, 2, 3, 0, 1);
        next!(7, 3, 0, 1, 2);
        next!(8, 0, 1, 2, 3);
        next!(9, 1, 2, 3, 0);
        next!(10, 2, 3, 0, 1);
        next!(11, 3, 0, 1, 2);
        next!(12, 0, 1, 2, 3);
        next!(13, 1, 2, 3, 0);
        next!(14, 2, 3, 0, 1);
        next!(15, 3, 0, 1, 2);
        add(&mut x, before.0);
        add(&mut y, before.1);
    }
    let before = (x, y);
    for n in 0..16 {
        let wk = words(&PADDING, 4 * n);
        rounds(&mut x, &mut y, wk, wk);
    }
    add(&mut x, before.0);
    add(&mut y, before.1);
    [finish(x), finish(y)]
}

/// The state as big-endian bytes.
#[inline]
#[target_feature(enable = "sse2,ssse3,sse4.1")]
fn finish(stream: Stream) -> Digest {
    let feba = _mm_shuffle_epi32(stream.abef, 0x1b);
    let dchg = _mm_shuffle_epi32(stream.cdgh, 0xb1);
    let dcba = _mm_blend_epi16(feba, dchg, 0xf0);
    let hgfe = _mm_alignr_epi8(dchg, feba, 8);
    let swap = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
    let mut digest = [0; 32];
    let (low, high) = digest.split_at_mut(16);
    // SAFETY: both halves have 16 bytes; `storeu` asks for no alignment.
    unsafe {
        _mm_storeu_si128(low.as_mut_ptr().cast(), _mm_shuffle_epi8(dcba, swap));
        _mm_storeu_si128(high.as_mut_ptr().cast(), _mm_shuffle_epi8(hgfe, swap));
    }
    digest
}
