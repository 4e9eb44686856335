//! Records of the measurement log: TCG Canonical Event Log in CBOR.
//!
//! One record is a map `{0: recnum, 1: pcr, 3: digests, 20305: content}` (TCG Canonical Event Log Format 1.0,
//! section 5.2: the record's number, the register, the digests by `TPM_ALG_ID`, and one content type). The content
//! type 20305 (`OQ` in ASCII) is ours: a byte string that holds the canonical CBOR array of [`Event`]s. The digest in
//! each bank is the hash of exactly these bytes, and that digest is what the register was extended with.

use std::collections::BTreeMap;

use minicbor::{
    Decode, Decoder, Encode, Encoder, decode,
    encode::{self, Write},
};

use crate::{Malformed, cbor, digest::HashAlg, event::Event, id::Blob};

/// Number of our content type.
pub const CONTENT_TYPE: u16 = 20305;

/// Its name in CEL-JSON.
pub const CONTENT_TYPE_NAME: &str = "onequote";

/// The longest content in bytes.
pub const MAX_CONTENT: usize = 1024 * 1024;

/// The longest record in bytes.
pub const MAX_RECORD: usize = MAX_CONTENT + 512;

/// The most events in one record.
pub const MAX_EVENTS: usize = 16 * 1024;

/// Bytes of the head of an array of at most [`MAX_EVENTS`].
const ARRAY_HEAD: usize = 3;

const WHAT: &str = "log record";

/// One record as a log holds it. Whether the register ever saw it is for [`crate::log::Replay`] to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Counts up from 0 in an epoch, over both registers.
    pub recnum: u64,
    /// The register that was extended.
    pub pcr: u8,
    /// The digest of `content` in each active bank.
    pub digests: BTreeMap<HashAlg, Blob>,
    /// The events' bytes.
    pub content: Blob,
}

impl Record {
    /// How many of the first of these events fit into one record. 0 when the first alone is too long for one: its
    /// maker has to cut its texts.
    #[must_use]
    pub fn fitting(events: &[Event]) -> usize {
        let mut len = ARRAY_HEAD;
        events
            .iter()
            .take(MAX_EVENTS)
            .take_while(|event| {
                len += cbor::encode(*event).len();
                len <= MAX_CONTENT
            })
            .count()
    }

    /// Makes the record of these events, with its digest in each of `banks`. They must be at least one and fit
    /// ([`Record::fitting`]); otherwise nobody can read the record again.
    #[must_use]
    pub fn new(recnum: u64, pcr: u8, banks: &[HashAlg], events: &[Event]) -> Self {
        let content = cbor::encode(&events);
        let digests = banks.iter().map(|&bank| (bank, Blob(bank.hash(&content)))).collect();
        Self { recnum, pcr, digests, content: Blob(content) }
    }

    /// The record's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        cbor::encode(self)
    }

    /// Reads the first record of `bytes` and tells its length.
    ///
    /// # Errors
    /// [`Malformed`]; [`Malformed::is_truncated`] holds when the input ends inside the record.
    pub fn parse_first(bytes: &[u8]) -> Result<(Self, usize), Malformed> {
        let window = &bytes[..bytes.len().min(MAX_RECORD)];
        cbor::decode_first(WHAT, window).map_err(|e| match e.is_truncated() && window.len() < bytes.len() {
            true => Malformed::new(WHAT, 0, crate::MalformedKind::TooLarge { limit: MAX_RECORD }),
            false => e,
        })
    }

    /// Whether every digest is that of the content.
    #[must_use]
    pub fn digests_match(&self) -> bool {
        !self.digests.is_empty() && self.digests.iter().all(|(bank, digest)| bank.hash(&self.content.0) == digest.0)
    }

    /// Reads the events.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn events(&self) -> Result<Vec<Event>, Malformed> {
        let events: Events = cbor::decode("record content", &self.content.0, MAX_CONTENT)?;
        if events.0.is_empty() {
            return Err(Malformed::invalid("record content", 0, "no event"));
        }
        Ok(events.0)
    }

    /// The record as CEL-JSON, with our content written out for people.
    ///
    /// # Errors
    /// [`Malformed`] when the content is not a list of events.
    #[cfg(feature = "json")]
    pub fn to_json(&self) -> Result<serde_json::Value, Malformed> {
        let digests: Vec<_> = self
            .digests
            .iter()
            .map(|(bank, digest)| serde_json::json!({"hashAlg": bank.name(), "digest": digest}))
            .collect();
        Ok(serde_json::json!({
            "recnum": self.recnum,
            "pcr": self.pcr,
            "digests": digests,
            "content_type": CONTENT_TYPE_NAME,
            "content": { "events": self.events()?, "cbor": self.content },
        }))
    }
}

/// A record's content.
#[derive(Encode, Decode)]
#[cbor(transparent)]
struct Events(#[cbor(n(0), decode_with = "cbor::at_most::<MAX_EVENTS, _, _>")] Vec<Event>);

impl<C> Encode<C> for Record {
    fn encode<W: Write>(&self, e: &mut Encoder<W>, ctx: &mut C) -> Result<(), encode::Error<W::Error>> {
        e.map(4)?;
        e.u8(0)?.u64(self.recnum)?;
        e.u8(1)?.u8(self.pcr)?;
        e.u8(3)?.encode_with(&self.digests, ctx)?;
        e.u16(CONTENT_TYPE)?.encode_with(&self.content, ctx)?.ok()
    }
}

impl<'b, C> Decode<'b, C> for Record {
    fn decode(d: &mut Decoder<'b>, ctx: &mut C) -> Result<Self, decode::Error> {
        let at = d.position();
        if d.map()? != Some(4) {
            return Err(decode::Error::message("a record is a map of 4").at(at));
        }
        key(d, 0)?;
        let recnum = d.u64()?;
        key(d, 1)?;
        let pcr = d.u8()?;
        if pcr >= crate::pcr::PCR_COUNT {
            return Err(decode::Error::message("register out of range").at(d.position()));
        }
        key(d, 3)?;
        let digests: BTreeMap<HashAlg, Blob> = d.decode_with(ctx)?;
        if digests.iter().any(|(bank, digest)| digest.0.len() != bank.size()) {
            return Err(decode::Error::message("digest has not its bank's size").at(d.position()));
        }
        key(d, CONTENT_TYPE)?;
        Ok(Self { recnum, pcr, digests, content: d.decode_with(ctx)? })
    }
}

fn key(d: &mut Decoder<'_>, expected: u16) -> Result<(), decode::Error> {
    let at = d.position();
    if d.u16()? == expected { Ok(()) } else { Err(decode::Error::message("unexpected record key").at(at)) }
}
