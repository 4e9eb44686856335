//! A relay in front of a software TPM: it times each command, and can lose one on demand.
//!
//! The time of a command is that from its last byte being handed to the TPM to the answer's last byte: the TPM's own
//! time and two local socket hops.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::tpm::TpmCommand;
use super::world::World;

/// No command or answer is longer (the TPM's own buffers have 4 KiB).
const MAX_MESSAGE: usize = 64 * 1024;

/// Bytes of a command's or answer's head: tag u16, size u32, code u32, big-endian.
const HEAD: usize = 10;

/// `TPM_RC_RETRY` in an answer without anything else (TPM 2.0 Part 2, tables 16 and 19; Part 3, section 5.2).
const RETRY: [u8; HEAD] = [0x80, 1, 0, 0, 0, 10, 0, 0, 9, 0x22];

/// When a command is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The TPM never sees it.
    Before,
    /// The TPM does it, and its answer is lost.
    After,
}

/// The relay. It ends with the process.
#[derive(Debug)]
pub struct TpmRelay {
    path: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The next command of this code is lost, and the TPM is away from then on.
    lose: Option<(TpmCommand, Loss)>,
    away: bool,
    /// How often each command is refused before it is passed on.
    busy: u32,
    /// How often the present command was refused: the TPM library connects anew for each.
    refused: u32,
    spent: BTreeMap<TpmCommand, (u64, Duration)>,
    /// Commands that take longer than they do.
    delays: BTreeMap<TpmCommand, Duration>,
}

impl TpmRelay {
    /// A relay to the world's TPM, and the proxy of the world configured to use it.
    ///
    /// # Errors
    /// The world has no TPM of its own.
    pub fn start(world: &mut World) -> Result<Self> {
        let upstream = world.folder().join("tpm/tpm");
        ensure!(upstream.exists(), "this world has no TPM of its own");
        let path = world.folder().join("tpm/relay");
        // The TCTI wants a control socket beside the data socket; nothing is to be learnt there.
        std::os::unix::fs::symlink(world.folder().join("tpm/tpm.ctrl"), world.folder().join("tpm/relay.ctrl"))?;
        let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (own, upstream) = (Arc::clone(&own), upstream.clone());
                // An error is one end or the other having closed: both are closed then.
                std::thread::spawn(move || own.serve(client, &upstream));
            }
        });
        let relay = Self { path, shared };
        world.settings().tcti = Some(relay.tcti());
        Ok(relay)
    }

    /// The TCTI by which it is reached.
    #[must_use]
    pub fn tcti(&self) -> String {
        format!("swtpm:path={}", self.path.display())
    }

    /// From the next command of this code on, the TPM is away.
    pub fn lose(&self, command: TpmCommand, loss: Loss) {
        self.shared.state().lose = Some((command, loss));
    }

    /// From now on each command is refused so many times, as a TPM does that is busy with others' commands.
    pub fn keep_busy(&self, times: u32) {
        self.shared.state().busy = times;
    }

    /// From now on commands of this code take `longer`, as those of a slower TPM do.
    pub fn delay(&self, command: TpmCommand, longer: Duration) {
        self.shared.state().delays.insert(command, longer);
    }

    /// Whether the TPM is away.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.shared.state().away
    }

    /// The TPM is back.
    pub fn mend(&self) {
        *self.shared.state() = State::default();
    }

    /// Number of commands by code, and their time together, since the last call.
    #[must_use]
    pub fn take_spent(&self) -> BTreeMap<TpmCommand, (u64, Duration)> {
        std::mem::take(&mut self.shared.state().spent)
    }
}

impl State {
    /// Whether the command is refused once more. One user's commands come one after the other.
    fn refuse(&mut self) -> bool {
        let more = self.refused < self.busy;
        self.refused = if more { self.refused.saturating_add(1) } else { 0 };
        more
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, mut client: UnixStream, upstream: &Path) -> Result<()> {
        let mut tpm: Option<UnixStream> = None;
        loop {
            let message = read_message(&mut client)?;
            if self.state().refuse() {
                client.write_all(&RETRY)?;
                continue;
            }
            let code = TpmCommand(u32::from_be_bytes([message[6], message[7], message[8], message[9]]));
            let loss = {
                let mut state = self.state();
                let loss = state.lose.take_if(|(command, _)| *command == code).map(|(_, loss)| loss);
                state.away |= loss.is_some();
                if state.away && loss != Some(Loss::After) {
                    bail!("away");
                }
                loss
            };
            let tpm = match &mut tpm {
                Some(tpm) => tpm,
                None => tpm.insert(UnixStream::connect(upstream)?),
            };
            let start = Instant::now();
            tpm.write_all(&message)?;
            let answer = read_message(tpm)?;
            let delay = self.state().delays.get(&code).copied();
            if let Some(delay) = delay {
                std::thread::sleep(delay);
            }
            let took = start.elapsed();
            if loss.is_some() {
                bail!("away");
            }
            {
                let mut state = self.state();
                let (count, time) = state.spent.entry(code).or_default();
                *count += 1;
                *time += took;
            }
            client.write_all(&answer)?;
        }
    }
}

fn read_message(stream: &mut UnixStream) -> Result<Vec<u8>> {
    let mut message = vec![0; HEAD];
    stream.read_exact(&mut message)?;
    let size = u32::from_be_bytes([message[2], message[3], message[4], message[5]]) as usize;
    ensure!((HEAD..=MAX_MESSAGE).contains(&size), "a message of {size} bytes");
    message.resize(size, 0);
    stream.read_exact(&mut message[HEAD..])?;
    Ok(message)
}

impl Drop for TpmRelay {
    fn drop(&mut self) {
        // Nobody finds it any more; the folder goes with its world anyway.
        let _ = fs::remove_file(&self.path);
    }
}
