//! The program; everything is in the library.
#![allow(clippy::print_stdout, reason = "a command's answer goes to standard output")]

use std::{ffi::OsString, io, path::Path, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::Parser as _;
use onequote_evidence::join::JoinToken;
use onequote_proxy::{
    app,
    cli::{
        Cli, Command, End, VmCommandError, delete_vm, end_vm, export_ima, ignore_closed_pipe, list_vms, print_log,
        print_status, release, retry_vm,
    },
    config::Config,
    join::Wish,
    launch::{Description, HostVsock, Launch, VsockWish, host_has_vsock, taken_cids},
    measure,
    tpm::silence_tss_log,
};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    // While there is only this thread.
    silence_tss_log();
    let filter = EnvFilter::try_from_env("ONEQUOTE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("onequote-proxy: {e:#}");
            let code = e.downcast_ref::<VmCommandError>().map(VmCommandError::exit_code);
            code.map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if let Command::Measure { algorithm, json, files } = &cli.command {
        return Ok(measure::measure_files(files, *algorithm, *json, &mut io::stdout().lock())?);
    }
    let config = Config::read(&cli.config)?;
    match cli.command {
        Command::Init => {
            let [certificate, ak] = app::init(&config)?;
            println!("certificate     {}\nattestation key {}", certificate.display(), ak.display());
            Ok(())
        }
        Command::Join { url, token_file, token, name, own_url } => {
            let token = read_token(token_file.as_deref(), token)?;
            let done = runtime()?.block_on(app::join(&config, Wish { url, token, name, own_url }))?;
            let software = if done.certified.software_tpm { "; its TPM is SOFTWARE: no root of trust" } else { "" };
            println!("joined {} as {}{software}", done.name, done.certified.host);
            Ok(())
        }
        Command::Run => Ok(runtime()?.block_on(app::run(config))?),
        Command::Launch { name, dry_run, file, qemu } => start_vm(&config, name, dry_run, file.as_deref(), qemu),
        Command::Measure { .. } => Ok(()),
        Command::List { json } => {
            match runtime()?.block_on(list_vms(&config.admin_socket(), json, &mut io::stdout().lock())) {
                Err(VmCommandError::Io(e)) => Ok(ignore_closed_pipe(Err(e))?),
                other => Ok(other?),
            }
        }
        Command::Stop { vm, timeout } => end(&config, &vm, End::PowerDown, timeout),
        Command::Kill { vm, timeout } => end(&config, &vm, End::Quit, timeout),
        Command::Retry { vm } => {
            Ok(runtime()?.block_on(retry_vm(&config.admin_socket(), &vm, &mut io::stderr().lock()))?)
        }
        Command::Delete { vm } => {
            Ok(runtime()?.block_on(delete_vm(&config.admin_socket(), &vm, &mut io::stderr().lock()))?)
        }
        Command::Status { json } => {
            let printed = runtime()?.block_on(print_status(&config.admin_socket(), json, &mut io::stdout().lock()));
            Ok(ignore_closed_pipe(printed)?)
        }
        Command::Release { verifier } => {
            Ok(runtime()?.block_on(release(&config.admin_socket(), &verifier, &mut io::stderr().lock()))?)
        }
        Command::Log { json, epoch } => {
            Ok(print_log(&config.log_dir(), epoch, json, &mut io::BufWriter::new(io::stdout().lock()))?)
        }
        Command::ExportIma { vm, boot } => {
            let socket = config.admin_socket();
            let exported = runtime()?.block_on(export_ima(&socket, &vm, boot, &mut io::stdout().lock()));
            Ok(ignore_closed_pipe(exported)?)
        }
    }
}

/// The token, from a file, from standard input, or as it is.
fn read_token(file: Option<&Path>, token: Option<String>) -> anyhow::Result<JoinToken> {
    let stdin = file.is_some_and(|file| file == Path::new("-")) || token.as_deref() == Some("-");
    let text = match (file, token) {
        _ if stdin => io::read_to_string(io::stdin().lock()).context("standard input")?,
        (Some(file), _) => std::fs::read_to_string(file).with_context(|| file.display().to_string())?,
        (None, token) => token.unwrap_or_default(),
    };
    Ok(text.trim().parse()?)
}

fn start_vm(
    config: &Config,
    name: Option<String>,
    dry_run: bool,
    file: Option<&Path>,
    command: Vec<OsString>,
) -> anyhow::Result<()> {
    // What is wrong with it is said before anybody is asked.
    let description = file.map(Description::read).transpose()?;
    let taken = runtime()?.block_on(taken_cids(&config.admin_socket())).map_err(|e| e.to_string());
    let host = HostVsock { device: host_has_vsock(), taken };
    let dir = config.vms_dir();
    let launch = match description {
        Some(description) => Launch::described(&description, name, dir, host)?,
        None => Launch { name, dir, command, vsock: VsockWish::default(), host, folder: None, notes: Vec::new() },
    };
    let planned = match file {
        Some(file) => launch.plan().with_context(|| file.display().to_string())?,
        None => launch.plan()?,
    };
    for note in &planned.notes {
        eprintln!("onequote-proxy: {note}");
    }
    if dry_run {
        println!("{}", planned.command_line());
        return Ok(());
    }
    Err(planned.exec().into())
}

fn end(config: &Config, vm: &str, end: End, seconds: u64) -> anyhow::Result<()> {
    let limit = Duration::from_secs(seconds);
    Ok(runtime()?.block_on(end_vm(&config.admin_socket(), vm, end, limit, &mut io::stderr().lock()))?)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")
}
