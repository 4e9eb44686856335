//! A real folder, swtpm, and processes that are killed.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use onequote_evidence::pcr::Register;

use super::*;
use crate::{
    log::{FileStore, LogFolder, LogHandle, LogRead, Recorder},
    tpm::{EsapiTpm, Tpm, swtpm::Swtpm},
};

fn start(dir: &Path, tcti: &str) -> Result<(Recorder, LogHandle), RecorderError> {
    let tcti = tcti.to_owned();
    let open = Box::new(move || EsapiTpm::open(&tcti).map(|tpm| Box::new(tpm) as Box<dyn Tpm>));
    Recorder::start(config(), Box::new(FileStore::open(dir)?), open)
}

fn read(dir: &Path, epoch: u64) -> Vec<u8> {
    std::fs::read(LogFolder::new(dir).path(epoch, 0)).unwrap()
}

fn registers(tcti: &str) -> Registers {
    let mut tpm = EsapiTpm::open(tcti).unwrap();
    let ours: Vec<Register> =
        tpm.active_banks().unwrap().iter().flat_map(|&bank| [12, 13].map(|pcr| Register { bank, pcr })).collect();
    tpm.pcr_read(&ours).unwrap()
}

#[tokio::test]
async fn a_tpm_that_dies_and_returns() {
    let mut swtpm = Swtpm::start();
    let dir = tempfile::tempdir().unwrap();
    let (recorder, log) = start(dir.path(), &swtpm.tcti()).unwrap();
    log.append(PcrRole::Vm, vec![event("a")]).await.unwrap();
    let quoted = log.quote(|head| sha256(&[&head.log_len.to_be_bytes()])).await.unwrap();
    assert_eq!(quoted.head.log_len, 2);
    assert_eq!(quoted.pcr_values.len(), 4 * QUOTED_PCRS.len());
    swtpm.kill();
    let error = log.append(PcrRole::Vm, vec![event("b")]).await.unwrap_err();
    assert!(error.to_string().contains(&swtpm.tcti()), "{error}");
    assert!(log.quote(|_| sha256(&[])).await.is_err());
    swtpm.restart();
    let error = log.append(PcrRole::Guest, vec![event("c")]).await.unwrap_err();
    assert!(matches!(error, RecorderError::NewEpoch { asked: 1, now: 2 }), "{error}");
    let appended = log.append(PcrRole::Guest, vec![event("c")]).await.unwrap();
    assert_eq!((appended.epoch.number, appended.recnum), (2, 1), "swtpm came back reset");
    drop(log);
    recorder.join();
    assert_eq!(told(&read(dir.path(), 2)).registers, registers(&swtpm.tcti()));
    assert_eq!(told(&read(dir.path(), 1)).tags, ["a", "b"]);
}

#[tokio::test]
async fn a_tpm_that_forgets_our_key_is_opened_anew() {
    let swtpm = Swtpm::start();
    let dir = tempfile::tempdir().unwrap();
    let (_recorder, log) = start(dir.path(), &swtpm.tcti()).unwrap();
    for round in 0..3 {
        // Without a resource manager an opening takes away what others have in the TPM.
        drop(EsapiTpm::open(&swtpm.tcti()).unwrap());
        let appended = log.append(PcrRole::Vm, vec![event(&format!("{round}"))]).await.unwrap();
        assert_eq!((appended.epoch.number, appended.recnum), (1, round + 1));
        drop(EsapiTpm::open(&swtpm.tcti()).unwrap());
        log.quote(|_| sha256(&[])).await.unwrap();
    }
    assert_eq!(told(&read(dir.path(), 1)).tags, ["0", "1", "2"]);
}

/// Not a test by itself: what the killed processes do. Appends one event after the other and prints each that was
/// acknowledged.
#[test]
fn writer_process() {
    let Ok(world) = std::env::var("ONEQUOTE_TEST_WRITER") else { return };
    let (round, rest) = world.split_once(' ').unwrap();
    let (dir, tcti) = rest.split_once(' ').unwrap();
    let (_recorder, log) = start(Path::new(dir), tcti).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut out = std::io::stdout().lock();
    for n in 0.. {
        let tag = format!("{round}.{n}");
        let role = if n % 3 == 0 { PcrRole::Guest } else { PcrRole::Vm };
        runtime.block_on(log.append(role, vec![event(&tag)])).unwrap();
        writeln!(out, "acknowledged {tag}").unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn processes_killed_at_any_moment_lose_and_double_nothing() {
    const KILLS: u32 = 200;
    let swtpm = Swtpm::start();
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = Vec::new();
    let mut silent = 0;
    for round in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "log::tests::real::writer_process", "--nocapture", "--test-threads=1"])
            .env("ONEQUOTE_TEST_WRITER", format!("{round} {} {}", dir.path().display(), swtpm.tcti()))
            .env("TSS2_LOG", "all+none")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let (progress, seen) = mpsc::channel();
        let reader = thread::spawn(move || {
            let words = lines.lines().map_while(Result::ok);
            let tags = words.filter_map(|line| line.split_once("acknowledged ").map(|(_, tag)| tag.to_owned()));
            tags.inspect(|_| progress.send(()).unwrap_or_default()).collect::<Vec<_>>()
        });
        // Half of them somewhere in opening and recovery, half somewhere in writing, however slow the machine is now.
        if round % 2 == 0 {
            thread::sleep(Duration::from_millis(u64::from(round * 7919 % 97)));
        } else {
            (0..round % 7).for_each(|_| seen.recv_timeout(Duration::from_secs(60)).unwrap());
            thread::sleep(Duration::from_micros(u64::from(round * 7919 % 5000)));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let tags = reader.join().unwrap();
        silent += u32::from(tags.is_empty());
        acknowledged.extend(tags);
    }
    let (recorder, log) = start(dir.path(), &swtpm.tcti()).unwrap();
    drop(log);
    recorder.join();
    assert_eq!(LogFolder::new(dir.path()).epochs().unwrap(), [1], "one epoch, nothing set aside");
    let told = told(&read(dir.path(), 1));
    assert_eq!(told.registers, registers(&swtpm.tcti()));
    assert!(told.gaps.is_empty());
    assert_tells(&told, &acknowledged, &told.tags);
    println!(
        "{KILLS} kills, {silent} before the first append; {} events acknowledged, {} in the log, {} starts",
        acknowledged.len(),
        told.tags.len(),
        told.starts,
    );
    assert!(acknowledged.len() > 100, "{}", acknowledged.len());
}
