//! Reading lines with a bound on their length.

use tokio::io::{AsyncRead, AsyncReadExt};

use super::QmpError;

/// Reads one line after the other. Safe to cancel: what was read stays in the buffer.
pub(super) struct LineReader<R> {
    source: R,
    buffer: Vec<u8>,
    /// Bytes at the buffer's start that are known to hold no line end.
    searched: usize,
    limit: usize,
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    pub(super) fn new(source: R, limit: usize) -> Self {
        Self { source, buffer: Vec::with_capacity(16 * 1024), searched: 0, limit }
    }

    /// The next line that is not empty, without its end; none at the end of the stream.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, QmpError> {
        loop {
            while let Some(line) = self.take_line()? {
                if !line.is_empty() {
                    return Ok(Some(line));
                }
            }
            self.buffer.reserve(16 * 1024);
            if self.source.read_buf(&mut self.buffer).await? == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(QmpError::Closed),
                };
            }
        }
    }

    fn take_line(&mut self) -> Result<Option<Vec<u8>>, QmpError> {
        let end = self.buffer[self.searched..].iter().position(|&b| b == b'\n').map(|at| at + self.searched);
        if end.unwrap_or(self.buffer.len()) > self.limit {
            return Err(QmpError::LineTooLong(self.limit));
        }
        let Some(end) = end else {
            self.searched = self.buffer.len();
            return Ok(None);
        };
        let line = self.buffer[..end].trim_ascii_end().to_vec();
        self.buffer.drain(..=end);
        self.searched = 0;
        Ok(Some(line))
    }
}
