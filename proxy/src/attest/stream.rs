//! An evidence stream on its way out.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use hyper::body::{Body, Bytes, Frame, SizeHint};

/// An evidence stream, piece by piece. The bytes that others get too are shared, not copied.
#[derive(Debug, Clone)]
pub struct Stream {
    parts: VecDeque<Bytes>,
    left: u64,
}

impl Stream {
    /// The first frame, and the second in parts.
    pub(super) fn new(first: Vec<u8>, second: &[Bytes]) -> Self {
        let parts: VecDeque<Bytes> = std::iter::once(Bytes::from(first)).chain(second.iter().cloned()).collect();
        let left = parts.iter().map(|part| part.len() as u64).sum();
        Self { parts, left }
    }

    /// Bytes that are still to come.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The next piece; none at the end.
    ///
    /// # Errors
    /// When evidence that was put aside cannot be read back.
    pub async fn next(&mut self) -> io::Result<Option<Bytes>> {
        Ok(self.take())
    }

    /// All that is still to come, in one.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub async fn bytes(mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(part) = self.next().await? {
            all.extend_from_slice(&part);
        }
        Ok(all)
    }

    fn take(&mut self) -> Option<Bytes> {
        let part = self.parts.pop_front()?;
        self.left -= part.len() as u64;
        Some(part)
    }
}

impl From<Vec<u8>> for Stream {
    fn from(whole: Vec<u8>) -> Self {
        Self::new(whole, &[])
    }
}

impl Body for Stream {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        Poll::Ready(self.take().map(|part| Ok(Frame::data(part))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
