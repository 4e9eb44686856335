//! The guest's serial console: its log file, and the commands that `init.sh` takes.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::process;

/// After how much silence an empty line is sent, which the guest ignores: an emulated serial port now and then forgets to ask
/// its driver for more, and does so when something comes in.
const POKE: Duration = Duration::from_secs(3);

/// What a command in the guest answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Exit code; 64 for a command that `init.sh` does not know.
    pub status: i32,
    /// What it wrote.
    pub output: String,
}

/// One guest's console.
#[derive(Debug, Clone)]
pub struct Console {
    socket: PathBuf,
    log: PathBuf,
    number: u64,
}

impl Console {
    /// The console of the VM in `folder`.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { socket: folder.join("console.sock"), log: folder.join("console.log"), number: 0 }
    }

    /// All that the guest wrote since QEMU started.
    #[must_use]
    pub fn text(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// How often the guest became ready since QEMU started: more than once after it was reset.
    #[must_use]
    pub fn boots(&self) -> usize {
        self.text().lines().filter(|line| line.ends_with("onequote-guest: ready")).count()
    }

    /// Gives a command and waits for its answer. The commands are in `image/init.sh`.
    ///
    /// # Errors
    /// QEMU is gone, or there is no whole answer within `limit`.
    pub fn ask(&mut self, command: &str, limit: Duration) -> Result<Answer> {
        self.number += 1;
        let number = self.number;
        let mut stream =
            UnixStream::connect(&self.socket).with_context(|| format!("no console at {}", self.socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        stream.write_all(format!("{number} {command}\n").as_bytes())?;
        let start = Instant::now();
        let mut heard = start;
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => bail!("QEMU closed the console during `{command}`"),
                Ok(count) => {
                    heard = Instant::now();
                    bytes.extend(&buffer[..count]);
                    if let Some(answer) = find_answer(&String::from_utf8_lossy(&bytes), number) {
                        return Ok(answer);
                    }
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error).context("the console broke"),
            }
            if heard.elapsed() > POKE {
                heard = Instant::now();
                stream.write_all(b"\n")?;
            }
            if start.elapsed() > limit {
                bail!(
                    "no answer to `{command}` after {} s; the console ends:\n{}",
                    limit.as_secs(),
                    process::tail(&self.log, 20)
                );
            }
        }
    }
}

fn find_answer(text: &str, number: u64) -> Option<Answer> {
    let begin = format!("onequote-guest: begin {number}\n");
    let body = &text[text.find(&begin)? + begin.len()..];
    let end = format!("onequote-guest: end {number} ");
    let at = body.find(&end)?;
    let (status, _) = body[at + end.len()..].split_once('\n')?;
    Some(Answer { status: status.trim().parse().ok()?, output: body[..at].to_owned() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_when_it_is_whole() {
        let text = "noise\nonequote-guest: begin 7\nhello\nonequote-guest: end 7 0";
        assert_eq!(find_answer(text, 7), None);
        let whole = format!("{text}\n");
        let answer = Answer { status: 0, output: "hello\n".to_owned() };
        assert_eq!(find_answer(&whole, 7), Some(answer));
        assert_eq!(find_answer(&whole, 8), None);
    }
}
