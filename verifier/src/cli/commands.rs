//! Carries the commands out.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use onequote_evidence::{id::HostId, stream::Head, tpm::Public};
use tokio::net::TcpListener;

use super::{Cli, Command, Enrol, Serve, Verify, export, firmware, policy, table};
use crate::{
    api::Server,
    appraise::{Context, Received, Shared, appraise, freshness::Freshness, state::HostState},
    enrol::{self, EnrolError, Identity, authority::Authority},
    expectation::{self, HostTree, VmTree},
    finding::Code,
    intake::Intake,
    policy::{Policy, PolicyError, tree::TreeError},
    report::Reporting,
    result::{Skipped, State, Verdict},
    round::{Fault, Times, Verifier},
    source::{Source, System},
    store::{Database, Store, StoreError, enrol::Standing},
};

const DATABASE: &str = "verifier.sqlite";

/// The file with the URL of a PostgreSQL database, if that is used: a URL can have a password, and everybody on a machine can
/// read a command line.
const DATABASE_URL: &str = "database.url";

/// The file with the address that `serve` listens on.
const ADDRESS_FILE: &str = "serve.addr";

/// The longest evidence file that is read, in bytes.
const MAX_EVIDENCE: u64 = 64 * 1024 * 1024;

/// A command that could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Enrolment or identity.
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A file tree.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A round.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// A file.
    #[error("{doing} {path}")]
    File {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The address to listen on.
    #[error("cannot listen on {address}")]
    Listen {
        /// It.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Standard output, or the server's listener.
    #[error("cannot go on")]
    Io(#[from] std::io::Error),
    /// Nothing can be learned.
    #[error("nothing can be learned from this evidence:\n{0}")]
    NotWhole(String),
    /// A wrong call.
    #[error("{0}")]
    Usage(String),
}

/// Where the verifier keeps what it keeps.
pub(super) struct Site {
    folder: PathBuf,
    /// As given on the command line.
    database: Option<String>,
}

impl std::ops::Deref for Site {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.folder
    }
}

impl Site {
    /// The URL of the PostgreSQL database: as given on the command line, else as the folder's file has it. None for the
    /// folder's own SQLite file.
    fn database(&self) -> Result<Option<String>, CliError> {
        if let Some(url) = &self.database {
            return Ok(Some(url.clone()));
        }
        let path = self.join(DATABASE_URL);
        match std::fs::read_to_string(&path) {
            Ok(url) => Ok(Some(url.trim().to_owned())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CliError::File { doing: "cannot read", path, source }),
        }
    }
}

/// Carries a command out.
///
/// # Errors
/// [`CliError`]; the process should then end with 2.
pub async fn run(cli: Cli) -> Result<ExitCode, CliError> {
    let state = Site { folder: cli.state, database: cli.database };
    let done = ExitCode::SUCCESS;
    match cli.command {
        Command::Init => {
            let path = Identity::create(&state)?;
            open(&state).await?;
            say(&format!("{}\n", path.display()))?;
        }
        Command::Enrol(args) => enrol_host(&state, args).await?,
        Command::Remove { host } => {
            let store = open(&state).await?;
            store.remove(&host).await?;
            super::enrol::audit(&store, "remove", Some(&host), "").await?;
        }
        Command::Hosts { json } => hosts(&open(&state).await?, json).await?,
        Command::Attest { host, json, save, timeout } => {
            let times = Times { challenge: Duration::from_secs(timeout), ..Times::default() };
            let verifier = verifier(&state, times).await?;
            let round = match &save {
                Some(_) => verifier.attest_for_evidence(&host).await?,
                None => verifier.attest(&host).await?,
            };
            if let (Some(path), Some(evidence)) = (&save, &round.evidence) {
                write(path, evidence)?;
            }
            // Not part of the verdict: how much was new since the last time.
            tracing::info!(bytes = round.received, "evidence received");
            show(&round.verdict, json)?;
            return Ok(exit_code(&round.verdict));
        }
        Command::Verify(args) => return verify(&state, args).await,
        Command::FirmwareLog { file, bank } => firmware::show(&file, bank)?,
        Command::Policy(command) => policy::run(&state, command).await?,
        Command::Token(command) => super::enrol::token(&state, command).await?,
        Command::Revoke { host } => super::enrol::withdraw(&state, &host, Standing::Revoked).await?,
        Command::Retire { host } => super::enrol::withdraw(&state, &host, Standing::Retired).await?,
        Command::Audit { last, json } => super::enrol::show_audit(&state, last, json).await?,
        Command::Serve(args) => serve(&state, args).await?,
        Command::Expectations { host, vm, json } => {
            expectations(&open(&state).await?, host, vm.as_deref(), json).await?;
        }
        Command::Db(command) => return super::database::run(&state, command).await,
        Command::Codes => {
            let mut out = String::from("| code | what it means | what to do |\n| --- | --- | --- |\n");
            for code in Code::ALL {
                out += &format!("| `{code}` | {} | {} |\n", code.meaning(), code.advice());
            }
            say(&out)?;
        }
    }
    Ok(done)
}

async fn serve(state: &Site, args: Serve) -> Result<(), CliError> {
    let Serve { listen, period, lifetime, keep_audit, door } = args;
    let period = Duration::from_secs(period);
    let times = Times { verdict: lifetime.map_or(period * 3, Duration::from_secs), ..Times::default() };
    let fail = |source| CliError::Listen { address: listen.to_string(), source };
    // One authority for both doors: made now if hosts are to join.
    if door.enrol_listen.is_some() {
        Authority::open(state, Arc::new(System))?;
    }
    raise_descriptors();
    let verifier = Arc::new(verifier(state, times).await?);
    let authority = verifier.authority.clone();
    let reporting = Reporting::new(std::thread::available_parallelism().map_or(2, std::num::NonZero::get));
    let server = Server::new(Arc::clone(&verifier), period, keep_audit, reporting.clone());
    let listener = TcpListener::bind(listen).await.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    let hosts = super::enrol::serve_hosts(state, door, authority, (verifier, reporting, period), stop_signal());
    let asked = async {
        write(&state.join(ADDRESS_FILE), address.to_string().as_bytes())?;
        tracing::info!(%address, "serving");
        if !address.ip().is_loopback() {
            tracing::warn!("whoever reaches {address} can read all verdicts: there is no authentication");
        }
        Ok::<_, CliError>(server.run(listener, stop_signal()).await?)
    };
    // Both end when they are told to, or the first of them that fails ends all.
    tokio::try_join!(hosts, asked)?;
    Ok(())
}

/// Every host that reports holds a connection: as many as we may have.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(?current, "the limit of open files cannot be raised: {e}");
    }
}

async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let term = async {
        match signal(SignalKind::terminate()) {
            Ok(mut term) => {
                term.recv().await;
            }
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = term => {}
    }
}

async fn enrol_host(state: &Site, args: Enrol) -> Result<(), CliError> {
    let Enrol { host, ak, certificate, url, policy, software_tpm, replace } = args;
    let enrolment = enrol::read_enrolment(host.clone(), &url, &ak, &certificate, software_tpm)?;
    let policy = policy.map(|path| Policy::load(&path)).transpose()?;
    let store = open(state).await?;
    store.enrol(&enrolment, replace).await?;
    let detail = if replace { "by hand, in place of what was there" } else { "by hand" };
    super::enrol::audit(&store, "enrol", Some(&host), detail).await?;
    if let Some((_, text)) = policy {
        store.set_policy(&host, &text, System.now()).await?;
    }
    Ok(())
}

async fn hosts(store: &Database, json: bool) -> Result<(), CliError> {
    let mut hosts = Vec::new();
    for id in store.hosts().await? {
        let mut host = store.host(&id).await?;
        host.verdict = host.verdict.map(|verdict| verdict.at(System.now()));
        hosts.push(host);
    }
    if json {
        let list: Vec<_> = (hosts.iter())
            .map(|host| {
                serde_json::json!({
                    "id": host.enrolment.id,
                    "url": host.enrolment.url,
                    "software_tpm": host.enrolment.software_tpm,
                    "standing": host.standing,
                    "joined": host.joined.issued,
                    "vouched": host.joined.vouched,
                    "policy": host.policy.map(|policy| policy.version),
                    "state": host.verdict.as_ref().map(|v| v.host.state),
                    "vms": host.verdict.as_ref().map(|v| v.vms.len()),
                })
            })
            .collect();
        return say(&format!("{:#}\n", serde_json::Value::Array(list)));
    }
    say(&table::hosts(&hosts))
}

async fn expectations(store: &Database, host: Option<HostId>, vm: Option<&str>, json: bool) -> Result<(), CliError> {
    let ids = match host {
        Some(host) => vec![host],
        None => store.hosts().await?,
    };
    let mut hosts = Vec::new();
    for id in ids {
        let kept = store.host(&id).await?;
        let policy = store.policy(&kept).await?;
        let policy = policy.map(|(_, text)| Policy::parse(&text, "the policy in force")).transpose()?;
        hosts.push(HostTree::new(&id, &kept.state, policy.as_ref()));
    }
    let root = expectation::root(&hosts);
    if let Some(vm) = vm {
        let fits = |tree: &VmTree| tree.name == vm || tree.uuid.to_string() == vm;
        hosts.iter_mut().for_each(|host| host.vms.retain(fits));
        if hosts.iter().all(|host| host.vms.is_empty()) {
            return Err(CliError::Usage(format!("no VM called {vm} was ever seen on that host")));
        }
    }
    if json {
        let tree = serde_json::json!({ "digest": root, "hosts": hosts });
        return say(&format!("{tree:#}\n"));
    }
    say(&table::expectations(&hosts))
}

async fn verify(state: &Site, args: Verify) -> Result<ExitCode, CliError> {
    let bytes = read_evidence(&args.file)?;
    let mut ours = None;
    let mut stored = None;
    let (key, ak, software_tpm) = match (&args.ak, &args.host) {
        (Some(path), _) => {
            let (key, ak) = enrol::read_ak(path)?;
            (key, ak, false)
        }
        (None, Some(host)) => {
            let store = open(state).await?;
            let host = store.host(host).await?;
            ours = Some(host.enrolment.id.clone());
            stored = store.policy(&host).await?;
            let fault = |source| Fault::Key { host: host.enrolment.id.clone(), source };
            let ak = Public::parse(&host.enrolment.ak).map_err(fault)?;
            (host.enrolment.ak, ak, host.enrolment.software_tpm)
        }
        (None, None) => return Err(CliError::Usage("give --ak or --host".into())),
    };
    let policy = match (&args.policy, stored) {
        (Some(path), _) => Some((Policy::load(path)?.0, 0)),
        (None, Some((version, text))) => Some((Policy::parse(&text, "policy in force")?, version)),
        (None, None) => None,
    };
    let freshness = Freshness::Offline { nonce: args.nonce };
    let context = Context {
        host: ours.as_ref(),
        ak: &ak,
        software_tpm,
        freshness: &freshness,
        state: &HostState::default(),
        policy: policy.as_ref().map(|(policy, version)| (policy, *version)),
        now: System.now(),
        lifetime: 0,
        facts: false,
        shared: &Shared::default(),
    };
    let mut exported = None;
    let mut verdict = match Received::read(&bytes) {
        Ok(received) => {
            if let Some(folder) = &args.export {
                exported = Some(export_quote(folder, &received.head, &key)?);
            }
            appraise(&received, &context).verdict
        }
        Err(finding) => {
            // "unknown" is a host id.
            #[allow(clippy::expect_used)]
            let id = ours.clone().unwrap_or_else(|| "unknown".parse().expect("a host id"));
            Verdict::without_evidence(id, finding, None, System.now())
        }
    };
    verdict.skipped.push(Skipped::new("accepted-state", "saved evidence is judged without what came before it"));
    show(&verdict, args.json)?;
    match exported {
        Some(words) if !args.json => say(&words)?,
        _ => {}
    }
    Ok(exit_code(&verdict))
}

/// Writes the quote's files. Gives what to say of them.
fn export_quote(folder: &Path, head: &Head, key: &[u8]) -> Result<String, CliError> {
    let (Some(files), Some(qualifying)) = (export::files(head, key), export::qualifying_data(head)) else {
        return Err(CliError::Usage("the evidence's nonce or path has not the right form: nothing to export".into()));
    };
    let made = std::fs::create_dir_all(folder);
    made.map_err(|source| CliError::File { doing: "cannot make the folder", path: folder.to_owned(), source })?;
    for (name, bytes) in files {
        write(&folder.join(name), &bytes)?;
    }
    Ok(export::words(folder, &qualifying.to_string()))
}

pub(super) async fn open(state: &Site) -> Result<Database, CliError> {
    if !state.join(enrol::IDENTITY_FILE).exists() {
        let path = state.join(enrol::IDENTITY_FILE);
        return Err(EnrolError::NoIdentity { path, state: state.to_path_buf() }.into());
    }
    Ok(match state.database()? {
        Some(url) => Database::connect(&url).await?,
        None => Database::open(&state.join(DATABASE)).await?,
    })
}

pub(super) async fn verifier(state: &Site, times: Times) -> Result<Verifier<Database>, CliError> {
    let identity = Identity::load(state)?;
    let authority = Authority::load(state, Arc::new(System))?.map(Arc::new);
    let intake = Intake::default();
    Ok(Verifier { store: open(state).await?, identity, authority, source: Arc::new(System), times, intake })
}

fn exit_code(verdict: &Verdict) -> ExitCode {
    ExitCode::from(match verdict.host.state {
        State::VerifierFault => 2,
        State::Unreachable => 3,
        _ if verdict.all_trusted() => 0,
        _ => 1,
    })
}

fn show(verdict: &Verdict, json: bool) -> Result<(), CliError> {
    if json {
        let text = serde_json::to_string_pretty(verdict).map_err(std::io::Error::other)?;
        return say(&format!("{text}\n"));
    }
    say(&table::verdict(verdict))
}

pub(super) fn say(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Whoever read has read enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

pub(super) fn read_evidence(path: &Path) -> Result<Vec<u8>, CliError> {
    let fail = |source| CliError::File { doing: "cannot read", path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(fail)?.len() > MAX_EVIDENCE {
        return Err(fail(std::io::Error::other(format!("larger than {MAX_EVIDENCE} bytes"))));
    }
    std::fs::read(path).map_err(fail)
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    std::fs::write(path, bytes).map_err(|source| CliError::File {
        doing: "cannot write",
        path: path.to_owned(),
        source,
    })
}
