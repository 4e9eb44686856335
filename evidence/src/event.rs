//! Events of the measurement log: what happened to the host's attester, to a VM or to a guest's list.
//!
//! An event is a CBOR map `{0: kind, 1: time, 2: VM UUID, 3: session, 4: body}`; 2 and 3 are there together, or not at
//! all for an event of the host. The body is a map of its own for each kind. A kind that this version does not know
//! is kept as [`EventBody::Unknown`] with its bytes, so that it can be shown and found, never skipped.

use minicbor::{
    Decode, Decoder, Encode, Encoder,
    data::Type,
    decode,
    encode::{self, Write},
};

mod body;

pub use body::*;

use crate::id::{Blob, SessionId, TimeMs, VmId};

/// One QEMU process of one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "json", derive(serde::Serialize))]
pub struct VmRef {
    /// The VM.
    pub vm: VmId,
    /// The QEMU process.
    pub session: SessionId,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "json", derive(serde::Serialize))]
pub struct Event {
    /// When it was seen, by the host's clock.
    pub time: TimeMs,
    /// The VM it is about; none for events of the host.
    #[cfg_attr(feature = "json", serde(flatten, skip_serializing_if = "Option::is_none"))]
    pub vm: Option<VmRef>,
    /// What happened.
    #[cfg_attr(feature = "json", serde(flatten))]
    pub body: EventBody,
}

/// The longest name of a kind.
pub const MAX_KIND: usize = 64;

/// Whether a kind that is unknown to this version has a name that a kind can have: lower-case letters, digits and
/// hyphens.
fn is_kind(name: &str) -> bool {
    let letter = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    (1..=MAX_KIND).contains(&name.len()) && name.bytes().all(letter)
}

macro_rules! event_bodies {
    ($($(#[$doc:meta])* $variant:ident = $kind:literal,)*) => {
        /// What happened, by kind.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[cfg_attr(feature = "json", derive(serde::Serialize))]
        #[cfg_attr(feature = "json", serde(tag = "event", content = "body"))]
        pub enum EventBody {
            $($(#[$doc])* #[cfg_attr(feature = "json", serde(rename = $kind))] $variant($variant),)*
            /// A kind that this version does not know.
            #[cfg_attr(feature = "json", serde(rename = "unknown"))]
            Unknown {
                /// The kind's name.
                kind: String,
                /// The body's CBOR bytes: one map in canonical encoding.
                body: Blob,
            },
        }

        impl EventBody {
            /// The kinds that this version knows.
            pub const KINDS: &[&str] = &[$($kind,)*];

            /// Whether it is about a guest's list: such events are in the other register than a VM's life.
            #[must_use]
            pub fn is_guest(&self) -> bool {
                self.kind().starts_with("guest-")
            }

            /// The kind's name as logged.
            #[must_use]
            pub fn kind(&self) -> &str {
                match self {
                    $(Self::$variant(_) => $kind,)*
                    Self::Unknown { kind, .. } => kind,
                }
            }

            fn encode_body<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
                match self {
                    $(Self::$variant(body) => body.encode(e, &mut ()),)*
                    Self::Unknown { body, .. } => e.writer_mut().write_all(&body.0).map_err(encode::Error::write),
                }
            }

            fn decode_body(kind: &str, d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
                match kind {
                    $($kind => Ok(Self::$variant(d.decode()?)),)*
                    _ => {
                        let start = d.position();
                        if !is_kind(kind) || d.datatype()? != Type::Map {
                            return Err(decode::Error::message("unknown event without a kind or a map body").at(start));
                        }
                        crate::cbor::skip_canonical(d)?;
                        let body = d.input()[start..d.position()].to_vec();
                        Ok(Self::Unknown { kind: kind.to_owned(), body: Blob(body) })
                    }
                }
            }
        }

        $(impl From<$variant> for EventBody {
            fn from(body: $variant) -> Self {
                Self::$variant(body)
            }
        })*
    };
}

event_bodies! {
    /// The proxy began to write.
    ProxyStart = "proxy-start",
    /// A VM was found or launched.
    VmCreate = "vm-create",
    /// Everything that a VM starts from was measured before it ran.
    VmStart = "vm-start",
    /// Everything that a VM started from was measured while it already ran.
    VmAttach = "vm-attach",
    /// A VM was not let run.
    VmRefuse = "vm-refuse",
    /// The VM's processors stopped.
    VmPause = "vm-pause",
    /// The VM's processors run (again).
    VmResume = "vm-resume",
    /// The VM was reset.
    VmReset = "vm-reset",
    /// The QEMU process ended.
    VmStop = "vm-stop",
    /// The guest did not end by itself.
    VmCrash = "vm-crash",
    /// The operator says that the VM will not come back.
    VmDelete = "vm-delete",
    /// A removable medium was changed.
    MediumChange = "medium-change",
    /// The VM's state was saved inside its images.
    SnapshotSave = "snapshot-save",
    /// The VM went back to a state saved before.
    SnapshotLoad = "snapshot-load",
    /// The VM's state goes to another QEMU, or to a file.
    MigrateOut = "migrate-out",
    /// The VM's state comes from another QEMU, or from a file.
    MigrateIn = "migrate-in",
    /// A command to the VM's monitor that passed the proxy.
    MonitorCommand = "monitor-command",
    /// Something about a VM is not as it was measured.
    ConfigChange = "config-change",
    /// A QEMU process that the proxy does not manage.
    UnmanagedVm = "unmanaged-vm",
    /// The log does not cover everything.
    LogGap = "log-gap",
    /// The log goes on in a new file.
    LogSegment = "log-segment",
    /// A guest's shim connected.
    GuestHello = "guest-hello",
    /// Entries of a guest's IMA list arrived.
    GuestEntries = "guest-entries",
    /// A guest's connection was lost.
    GuestLost = "guest-lost",
    /// A guest claimed another past.
    GuestRewind = "guest-rewind",
    /// A guest went over a limit.
    GuestOverflow = "guest-overflow",
}

impl<C> Encode<C> for Event {
    fn encode<W: Write>(&self, e: &mut Encoder<W>, ctx: &mut C) -> Result<(), encode::Error<W::Error>> {
        e.map(if self.vm.is_some() { 5 } else { 3 })?;
        e.u8(0)?.str(self.body.kind())?;
        e.u8(1)?.encode_with(self.time, ctx)?;
        if let Some(vm) = &self.vm {
            e.u8(2)?.encode_with(vm.vm, ctx)?;
            e.u8(3)?.encode_with(vm.session, ctx)?;
        }
        e.u8(4)?;
        self.body.encode_body(e)
    }
}

impl<'b, C> Decode<'b, C> for Event {
    fn decode(d: &mut Decoder<'b>, ctx: &mut C) -> Result<Self, decode::Error> {
        let at = d.position();
        let has_vm = match d.map()? {
            Some(3) => false,
            Some(5) => true,
            _ => return Err(decode::Error::message("an event is a map of 3 or 5").at(at)),
        };
        key(d, 0)?;
        let kind = d.str()?;
        key(d, 1)?;
        let time = d.decode_with(ctx)?;
        let vm = if has_vm {
            key(d, 2)?;
            let vm = d.decode_with(ctx)?;
            key(d, 3)?;
            Some(VmRef { vm, session: d.decode_with(ctx)? })
        } else {
            None
        };
        key(d, 4)?;
        Ok(Self { time, vm, body: EventBody::decode_body(kind, d)? })
    }
}

fn key(d: &mut Decoder<'_>, expected: u8) -> Result<(), decode::Error> {
    let at = d.position();
    if d.u8()? == expected { Ok(()) } else { Err(decode::Error::message("event keys out of order").at(at)) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
