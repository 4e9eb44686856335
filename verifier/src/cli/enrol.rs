//! Commands about enrolment: tokens, withdrawing hosts, the audit log, and the door at which hosts join.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use clap::{Args, Subcommand};
use onequote_evidence::{
    id::{HostId, TimeMs},
    join::{JoinToken, SECRET_SIZE, VERIFIER_NAME},
};

use super::{
    CliError,
    commands::{Site, open, say, write},
    table,
};
use crate::{
    enrol::{
        api,
        authority::Authority,
        door::{Door, Reports},
        ek::Roots,
        registrar::{Registrar, Settings},
    },
    report::{self, Reporting},
    round::Verifier,
    source::{Source, System},
    store::{
        Database, Store as _,
        enrol::{AuditEntry, EnrolStore as _, Standing, Token},
    },
};

/// The file with the address at which hosts join.
const ADDRESS_FILE: &str = "enrol.addr";

/// What to do with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token with which a host can join; it is shown this once
    Create(CreateToken),
}

/// Arguments of `token create`.
#[derive(Debug, Args)]
pub struct CreateToken {
    /// Only this host may use it
    #[arg(long)]
    pub host: Option<HostId>,
    /// How long it can be used: 30m, 2h, 1d
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
    /// How many hosts can use it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub uses: u32,
    /// The TPM may be software: no root of trust, and every verdict will say so
    #[arg(long)]
    pub software_tpm: bool,
    /// Where the host's proxy is, whatever it says itself: https://ADDRESS:PORT
    #[arg(long, requires = "host")]
    pub url: Option<String>,
    /// The host may come with another TPM or attestation key, or come back after it was revoked or retired
    #[arg(long, value_name = "HOST", conflicts_with = "host")]
    pub replace: Option<HostId>,
}

/// Arguments of `serve` about hosts that join.
#[derive(Debug, Args)]
pub struct DoorArgs {
    /// Where hosts join (TLS); port 0 takes a free one. The address is written to STATE/enrol.addr
    #[arg(long, value_name = "ADDRESS")]
    pub enrol_listen: Option<SocketAddr>,
    /// Roots of makers of TPMs: a PEM or DER file, or a folder of such
    #[arg(long, value_name = "PATH", requires = "enrol_listen")]
    pub ek_roots: Vec<PathBuf>,
    /// Roots of software TPMs; such hosts also need a token made with --software-tpm
    #[arg(long, value_name = "PATH", requires = "enrol_listen")]
    pub software_ek_roots: Vec<PathBuf>,
    /// Intermediates for certificates of TPMs that come without
    #[arg(long, value_name = "PATH", requires = "enrol_listen")]
    pub ek_intermediates: Vec<PathBuf>,
    /// Not built: intermediates are never fetched from the network. Refused, so that nobody relies on it
    #[arg(long)]
    pub fetch_intermediates: bool,
    /// Take no reports: hosts that joined are asked like all others
    #[arg(long)]
    pub no_reports: bool,
    /// Least time between two reports of a host because something changed there; 0s: it reports by the period only
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = humantime::parse_duration)]
    pub report_gap: Duration,
    /// How long a host's certificate holds; it is renewed at two thirds of it
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = humantime::parse_duration)]
    pub certificate_lifetime: Duration,
}

/// Who gives a command.
fn operator() -> String {
    format!("operator {}", rustix::process::getuid().as_raw())
}

/// Writes a command of the operator into the audit log.
pub(super) async fn audit(store: &Database, what: &str, host: Option<&HostId>, detail: &str) -> Result<(), CliError> {
    let (what, result, detail) = (what.to_owned(), "ok".to_owned(), detail.to_owned());
    let entry = AuditEntry { time: System.now(), who: operator(), what, host: host.cloned(), result, detail };
    Ok(store.audit(&entry).await?)
}

/// `token …`.
pub(super) async fn token(state: &Site, command: TokenCommand) -> Result<(), CliError> {
    let TokenCommand::Create(CreateToken { host, ttl, uses, software_tpm, url, replace }) = command;
    let store = open(state).await?;
    if let Some(url) = url.as_ref().filter(|url| crate::client::address(url).is_none()) {
        return Err(CliError::Usage(format!("{url:?} is not a URL of the form https://ADDRESS:PORT")));
    }
    let replaces = replace.is_some();
    let host = host.or(replace);
    if let Some(id) = host.as_ref().filter(|id| replaces || id.as_str() == VERIFIER_NAME) {
        if id.as_str() == VERIFIER_NAME {
            return Err(CliError::Usage(format!("{VERIFIER_NAME} is the verifier's own name; no host can have it")));
        }
        store.host(id).await?;
    }
    let authority = Authority::open(state, Arc::new(System))?;
    let mut token = JoinToken { id: [0; 8], secret: [0; SECRET_SIZE], pin: authority.pin() };
    System.fill(&mut token.id);
    System.fill(&mut token.secret);
    let now = System.now();
    let ttl = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
    let kept = Token {
        id: hex::encode(token.id),
        secret: token.hashed(),
        host: host.clone(),
        replace: replaces,
        software_tpm,
        url,
        expires: TimeMs(now.0.saturating_add(ttl)),
        uses,
    };
    store.create_token(&kept, now).await?;
    let words = |yes: bool, word: &'static str| if yes { word } else { "" };
    let (replace, software) = (words(replaces, ", may replace"), words(software_tpm, ", software TPM allowed"));
    let detail = format!("{}: {uses} uses{replace}{software}", kept.id);
    audit(&store, "token-create", host.as_ref(), &detail).await?;
    say(&format!("{token}\n"))
}

/// `revoke` and `retire`.
pub(super) async fn withdraw(state: &Site, host: &HostId, standing: Standing) -> Result<(), CliError> {
    let store = open(state).await?;
    store.set_standing(host, standing).await?;
    let what = if standing == Standing::Retired { "retire" } else { "revoke" };
    audit(&store, what, Some(host), "").await
}

/// `audit`.
pub(super) async fn show_audit(state: &Site, most: u32, json: bool) -> Result<(), CliError> {
    let entries = open(state).await?.audit_log(most).await?;
    if json {
        let text = serde_json::to_string_pretty(&entries).map_err(std::io::Error::other)?;
        return say(&format!("{text}\n"));
    }
    say(&table::audit(&entries))
}

/// Opens the door at which hosts join, if it is wanted, and serves there until `stop` is done.
pub(super) async fn serve_hosts(
    state: &Site,
    args: DoorArgs,
    authority: Option<Arc<Authority>>,
    (verifier, reporting, period): (Arc<Verifier<Database>>, Reporting, Duration),
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), CliError> {
    if args.fetch_intermediates {
        let why = "fetching intermediates is not built: give them by --ek-intermediates";
        return Err(CliError::Usage(why.to_owned()));
    }
    let Some(listen) = args.enrol_listen else {
        stop.await;
        return Ok(());
    };
    let roots = Roots::load(&args.ek_roots, &args.software_ek_roots, &args.ek_intermediates);
    let roots = roots.map_err(|e| CliError::Usage(e.to_string()))?;
    if roots.is_empty() {
        tracing::warn!("no --ek-roots: only software TPMs without a certificate can join, with a token for such");
    }
    if args.certificate_lifetime < Duration::from_secs(1) {
        return Err(CliError::Usage("a certificate's lifetime is a second at least".to_owned()));
    }
    let authority = match authority {
        Some(authority) => authority,
        None => Arc::new(Authority::open(state, Arc::new(System))?),
    };
    let fail = |source| CliError::Listen { address: listen.to_string(), source };
    let (known, source) = (roots.len(), Arc::new(System));
    let settings = Settings { roots, certificate: args.certificate_lifetime };
    let registrar = Registrar::new(open(state).await?, Arc::clone(&source) as _, Arc::clone(&authority), settings);
    let registrar = Arc::new(registrar);
    let reports: Option<Arc<dyn Reports>> = match args.no_reports {
        true => None,
        false => {
            let settings = report::Settings { gap: args.report_gap, ..report::Settings::new(period) };
            Some(report::Room::new(Arc::clone(&registrar), verifier, reporting, source, settings))
        }
    };
    let door = Door::bind(listen, authority, reports).await.map_err(fail)?;
    let address = door.address();
    write(&state.join(ADDRESS_FILE), address.to_string().as_bytes())?;
    tracing::info!(%address, roots = known, reports = !args.no_reports, "hosts can join");
    Ok(api::serve(door, registrar, stop).await?)
}
