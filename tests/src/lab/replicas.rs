//! Several verifiers on one database, and one address for all of them.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{process::Process, wait, world::World};

const LIMIT: Duration = Duration::from_secs(60);

/// What replicas of one verifier have in common beside the database.
const COMMON: [&str; 3] = ["identity.pem", "certificate.pem", "authority.pem"];

/// A verifier that serves, beside others on the same database. It ends with this value.
#[derive(Debug)]
pub struct Replica {
    process: Process,
    state: PathBuf,
}

impl Replica {
    /// Starts one with a copy of what the world's verifier is known by.
    ///
    /// # Errors
    /// It cannot be started, or does not listen in time.
    pub fn start(world: &World, name: &str, more: &[&str]) -> Result<Self> {
        let database = world.database.as_deref().context("this world's verifier has no database of its own")?;
        let state = world.folder().join(name);
        fs::create_dir_all(&state)?;
        for file in COMMON {
            fs::copy(world.verifier_state().join(file), state.join(file)).with_context(|| file.to_owned())?;
        }
        let mut command = Command::new(&world.assets().verifier);
        command.arg("--state").arg(&state).args(["--database", database, "serve", "--listen", "127.0.0.1:0"]);
        command.args(["--enrol-listen", "127.0.0.1:0", "--no-reports"]).args(more);
        let log = world.folder().join(format!("log/{name}.log"));
        let mut process = Process::spawn(name, &command, &log, false)?;
        wait::for_true("a replica to listen", LIMIT, || {
            process.check_alive()?;
            let there = |file: &str| fs::metadata(state.join(file)).is_ok_and(|data| data.len() > 0);
            Ok(there("serve.addr") && there("enrol.addr"))
        })?;
        Ok(Self { process, state })
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Where hosts join.
    ///
    /// # Errors
    /// It does not say.
    pub fn door(&self) -> Result<SocketAddr> {
        Ok(fs::read_to_string(self.state.join("enrol.addr"))?.trim().parse()?)
    }

    /// A request without a body at its API: the status and the answer's JSON.
    ///
    /// # Errors
    /// It does not answer.
    pub fn ask(&self, request: &str) -> Result<(u16, Value)> {
        let address: SocketAddr = fs::read_to_string(self.state.join("serve.addr"))?.trim().parse()?;
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(LIMIT))?;
        write!(stream, "{request} HTTP/1.1\r\nHost: verifier\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok((status, serde_json::from_str(body).unwrap_or_else(|_| body.into())))
    }

    /// How often its log has these words.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn said(&self, words: &str) -> Result<usize> {
        Ok(fs::read_to_string(self.process.log())?.matches(words).count())
    }
}

/// One address in front of several: connections go to them in turn, or to one. It ends with this value, and so do its
/// connections.
#[derive(Debug)]
pub struct Forwarder {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    behind: Mutex<Vec<SocketAddr>>,
    next: AtomicUsize,
    open: Mutex<Vec<TcpStream>>,
}

impl Forwarder {
    /// Listens at a free port of the loopback.
    ///
    /// # Errors
    /// There is none.
    pub fn start(behind: Vec<SocketAddr>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared { behind: Mutex::new(behind), ..Shared::default() });
        let own = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                if Arc::strong_count(&own) == 1 {
                    return;
                }
                // Whoever finds nobody behind it sees a connection that ends.
                let _ = own.connect(client);
            }
        });
        Ok(Self { address, shared })
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on new connections go to these.
    pub fn lead_to(&self, behind: Vec<SocketAddr>) {
        *self.shared.behind.lock().unwrap_or_else(PoisonError::into_inner) = behind;
    }

    /// Ends all connections.
    pub fn cut(&self) {
        for stream in self.shared.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.cut();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    /// The first that takes the connection, from the next one in turn on.
    fn connect(&self, client: TcpStream) -> io::Result<()> {
        let behind = self.behind.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let turns = (0..behind.len()).map(|n| behind[(first + n) % behind.len()]);
        let Some(server) = turns.map(TcpStream::connect).find_map(Result::ok) else {
            return client.shutdown(Shutdown::Both);
        };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.extend([client.try_clone()?, server.try_clone()?]);
        for (from, to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
            thread::spawn(move || copy(from, to));
        }
        Ok(())
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    // However it ends, both ends hear of it.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

impl World {
    /// The verifier of this world keeps everything in this database from now on.
    pub fn use_database(&mut self, url: String) {
        self.database = Some(url);
    }

    /// Joins a verifier whose door is there, with this token.
    ///
    /// # Errors
    /// The verifier refuses.
    pub fn join_at(&self, door: SocketAddr, token: &str) -> Result<()> {
        let file = self.folder().join("token");
        fs::write(&file, format!("{token}\n"))?;
        let url = format!("https://{door}");
        let run = self.proxy_command(&["join", &url, "--token-file", &file.to_string_lossy(), "--name", "lab"])?;
        ensure!(run.code == 0, "{}", run.errors);
        Ok(())
    }
}
