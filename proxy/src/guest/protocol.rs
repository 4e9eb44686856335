//! One connection of a guest's shim, from hello to end.
//!
//! ```text
//! accepted ──Hello──► begun ──(Have sent) Resume──► streaming ──Entries, Heartbeat, Collected──► …
//!     │                  │                             │
//!     └── anything else, or silence for too long: the connection ends, the list stays as it is ──┘
//! ```
//!
//! Entries are handed to the room's one writer and read on only while few of them are on the way ([`WINDOW`]): a
//! guest that floods waits for its own entries, nobody else does.

use std::{sync::Arc, time::Duration};

use onequote_evidence::{
    Malformed,
    event::VmRef,
    guest_frame::{self, GuestFrame, HostFrame},
    id::Sha256,
    ima::Aggregate,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::{Semaphore, mpsc},
    time::timeout,
};

use super::room::{Room, RoomError, Token};

/// Frames of one guest that may wait for the log at a time.
pub(super) const WINDOW: usize = 8;

/// A shim that says nothing for this long is gone: it sends a heartbeat every [`guest_frame::HEARTBEAT_SECONDS`].
const SILENCE: Duration = Duration::from_secs(4 * guest_frame::HEARTBEAT_SECONDS);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The other end closed it, or reading or writing failed.
    #[error("connection closed: {0}")]
    Io(#[from] std::io::Error),
    /// Nothing came for too long.
    #[error("no frame for {} s", SILENCE.as_secs())]
    Silent,
    /// A frame is not one.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// A frame that does not belong here.
    #[error("protocol: {0}")]
    Protocol(&'static str),
    /// The room refused.
    #[error(transparent)]
    Room(#[from] RoomError),
    /// Another connection of the same VM took over.
    #[error("replaced by a newer connection")]
    Replaced,
}

/// Speaks with one shim until the connection ends. `vm` is what the host knows of the connection's other end.
///
/// # Errors
/// Always one, saying why the connection ended.
pub async fn serve<S>(room: &Arc<Room>, vm: VmRef, stream: S) -> SessionError
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (token, mut list, mut collect) = match begin(room, vm, &mut reader, &mut writer).await {
        Ok(begun) => begun,
        Err(e) => return e,
    };
    let window = Arc::new(Semaphore::new(WINDOW));
    let frames = async {
        loop {
            if let Err(e) = one_frame(room, &token, &mut list, &window, &mut reader).await {
                return e;
            }
        }
    };
    let requests = async {
        while let Some(id) = collect.recv().await {
            let frame = guest_frame::to_wire(&HostFrame::Collect { id });
            if let Err(e) = writer.write_all(&frame).await {
                return SessionError::Io(e);
            }
        }
        SessionError::Replaced
    };
    let why = tokio::select! { why = frames => why, why = requests => why };
    room.disconnected(&token, &why.to_string()).await;
    why
}

async fn begin<R, W>(
    room: &Arc<Room>,
    vm: VmRef,
    reader: &mut R,
    writer: &mut W,
) -> Result<(Token, Aggregate, mpsc::Receiver<u64>), SessionError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let GuestFrame::Hello { version, boot_id, hash_size, count: _ } = parse(&read_frame(reader).await?)? else {
        return Err(SessionError::Protocol("the first frame is not hello"));
    };
    if version != guest_frame::VERSION {
        return Err(SessionError::Protocol("the shim speaks another version"));
    }
    let (token, have, collect) = room.hello(vm, boot_id, hash_size).await?;
    writer.write_all(&guest_frame::to_wire(&HostFrame::Have { count: have.count, aggregate: have.value })).await?;
    let GuestFrame::Resume { count, aggregate } = parse(&read_frame(reader).await?)? else {
        return Err(SessionError::Protocol("the second frame is not resume"));
    };
    if count != have.count || aggregate != have.value {
        let claimed: (u64, Sha256) = (count, aggregate);
        room.rewound(&token, claimed, boot_id).await?;
        return Err(SessionError::Protocol("the guest claims another past"));
    }
    Ok((token, have, collect))
}

/// `list` is where the guest's list stands.
async fn one_frame<R>(
    room: &Arc<Room>,
    token: &Token,
    list: &mut Aggregate,
    window: &Arc<Semaphore>,
    reader: &mut R,
) -> Result<(), SessionError>
where
    R: AsyncRead + Unpin,
{
    let frame = read_frame(reader).await?;
    if let Some((first, entries)) = guest_frame::entries(&frame) {
        let (before, hash_size) = (*list, token.hash_size as u8);
        let cut = room.dictionary().cut(entries, hash_size, before)?;
        // Not held while the frame waits for the log.
        drop(frame);
        if cut.len() == 0 {
            return Err(SessionError::Protocol("entries without an entry"));
        }
        if first != before.count {
            return Err(RoomError::OutOfOrder { expected: before.count, found: first }.into());
        }
        let after = cut.after;
        let permit = Arc::clone(window).acquire_owned().await;
        let permit = permit.map_err(|_| SessionError::Replaced)?;
        room.entries(token, before, cut, permit).await?;
        *list = after;
        return Ok(());
    }
    match parse(&frame)? {
        GuestFrame::Heartbeat { count } => room.alive(token, count, None)?,
        GuestFrame::Collected { id, count } => room.alive(token, count, Some(id))?,
        GuestFrame::Entries { .. } => return Err(SessionError::Protocol("entries without an entry")),
        GuestFrame::Hello { .. } | GuestFrame::Resume { .. } => {
            return Err(SessionError::Protocol("hello or resume in the middle"));
        }
    }
    Ok(())
}

fn parse(frame: &[u8]) -> Result<GuestFrame, SessionError> {
    Ok(GuestFrame::parse(frame)?)
}

/// The next frame's body.
async fn read_frame<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Vec<u8>, SessionError> {
    let read = async {
        let mut prefix = [0; 4];
        reader.read_exact(&mut prefix).await?;
        let mut body = vec![0; guest_frame::body_len(prefix)?];
        reader.read_exact(&mut body).await?;
        Ok(body)
    };
    timeout(SILENCE, read).await.map_err(|_| SessionError::Silent)?
}
