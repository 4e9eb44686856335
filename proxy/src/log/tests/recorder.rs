//! The thread and its queue.

use std::{sync::mpsc, time::Duration};

use super::*;
use crate::log::{Recorder, RecorderConfig};

fn start(chip: &FakeChip, disk: &MemoryDisk) -> (Recorder, crate::log::LogHandle) {
    let chip = chip.clone();
    Recorder::start(RecorderConfig { ..config() }, disk.store(), Box::new(move || chip.connect())).unwrap()
}

/// A chip whose extends wait until they are let through.
fn gated(chip: &FakeChip) -> (mpsc::Sender<()>, mpsc::Receiver<()>) {
    let (let_through, gate) = mpsc::channel();
    let (arrived, arrivals) = mpsc::channel();
    let gate = Mutex::new(gate);
    chip.set_fault(move |name| {
        if name == "extend" {
            arrived.send(()).unwrap();
            let _ = gate.lock().unwrap().recv();
        }
        Fault::None
    });
    (let_through, arrivals)
}

async fn wait(arrivals: mpsc::Receiver<()>) -> mpsc::Receiver<()> {
    tokio::task::spawn_blocking(move || {
        arrivals.recv_timeout(Duration::from_secs(20)).unwrap();
        arrivals
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn events_that_wait_for_the_tpm_share_one_extend() {
    let (chip, disk) = (FakeChip::new(&BANKS), MemoryDisk::default());
    let (recorder, log) = start(&chip, &disk);
    let before = chip.counts();
    let (let_through, arrivals) = gated(&chip);
    let first = tokio::spawn({
        let log = log.clone();
        async move { log.append(PcrRole::Vm, vec![event("first")]).await.unwrap() }
    });
    let arrivals = wait(arrivals).await;
    // The TPM is busy with the first. These queue, in this order, because each is polled once before the next (more
    // than these would use up what tokio lets one task poll at a time).
    let mut waiting = Vec::new();
    for n in 0..50 {
        let role = if n % 2 == 0 { PcrRole::Vm } else { PcrRole::Guest };
        let mut append = Box::pin({
            let log = log.clone();
            async move { log.append(role, vec![event(&format!("{n}"))]).await }
        });
        assert!(poll_once(append.as_mut()).is_none());
        waiting.push(append);
    }
    let mut quote = Box::pin(log.quote(|head| sha256(&[&head.log_len.to_be_bytes()])));
    assert!(poll_once(quote.as_mut()).is_none());
    let mut late = Box::pin(log.append(PcrRole::Vm, vec![event("late")]));
    assert!(poll_once(late.as_mut()).is_none());
    drop(let_through);
    assert_eq!(first.await.unwrap().recnum, 1);
    for (n, append) in waiting.into_iter().enumerate() {
        let appended = append.await.unwrap();
        assert_eq!(appended.recnum, if n % 2 == 0 { 2 } else { 3 }, "event {n}");
    }
    let quoted = quote.await.unwrap();
    assert_eq!(quoted.head.log_len, 4, "all that came before the quote, nothing that came later");
    assert_eq!(late.await.unwrap().recnum, 4);
    let after = chip.counts();
    assert_eq!((after.0 - before.0, after.1 - before.1), (4, 1));
    drop((log, arrivals));
    recorder.join();
    let told = told(&disk.logs()[&1]);
    assert_eq!(told.tags.len(), 52);
    assert_eq!(told.registers, chip.registers(&[12, 13]));
}

/// Polls once without a waker.
fn poll_once<F: Future>(future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    match future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(output) => Some(output),
        std::task::Poll::Pending => None,
    }
}

#[tokio::test]
async fn what_does_not_fit_is_refused_and_what_fits_waits_for_room() {
    let (chip, disk) = (FakeChip::new(&BANKS), MemoryDisk::default());
    let (recorder, log) = start(&chip, &disk);
    assert!(matches!(log.append(PcrRole::Vm, vec![]).await, Err(RecorderError::Empty)));
    let large = |size: usize| vec![event(&"x".repeat(size))];
    let error = log.append(PcrRole::Vm, large(1024 * 1024)).await.unwrap_err();
    assert!(matches!(error, RecorderError::TooLarge { events: 1, .. }), "{error}");
    let many = vec![event("x"); 16 * 1024 + 1];
    assert!(matches!(log.append(PcrRole::Vm, many).await, Err(RecorderError::TooLarge { .. })));

    // 40 of about 1 MB: the queue has room for 16 MiB. All get through.
    let appends: Vec<_> = (0..40)
        .map(|_| {
            let log = log.clone();
            let events = large(1024 * 1024 - 100);
            tokio::spawn(async move { log.append(PcrRole::Guest, events).await.unwrap().recnum })
        })
        .collect();
    let mut records = Vec::new();
    for append in appends {
        records.push(append.await.unwrap());
    }
    records.sort_unstable();
    assert_eq!(records, (1..=40).collect::<Vec<_>>(), "one record each");
    drop(log);
    recorder.join();
}

#[tokio::test]
async fn records_are_read_in_pieces() {
    let (chip, disk) = (FakeChip::new(&BANKS), MemoryDisk::default());
    let (recorder, log) = start(&chip, &disk);
    for n in 0..200 {
        log.append(PcrRole::Vm, vec![event(&format!("event {n}"))]).await.unwrap();
    }
    let whole = disk.logs()[&1].clone();
    for max in [1, 1000, 10_000, usize::MAX] {
        for from in [0, 1, 63, 64, 65, 130, 200, 201] {
            let mut bytes = Vec::new();
            let mut next = from;
            while next < 201 {
                let chunk = log.records(1, next, 201, max).await.unwrap();
                assert_eq!(chunk.first, next);
                assert!(chunk.bytes.len() <= max.max(2000));
                next = chunk.next;
                bytes.extend(chunk.bytes);
            }
            assert!(whole.ends_with(&bytes));
            assert_eq!(LogReader::new(&bytes, from).map(Result::unwrap).count() as u64, 201 - from);
        }
    }
    let middle = log.records(1, 70, 75, usize::MAX).await.unwrap();
    assert_eq!(LogReader::new(&middle.bytes, 70).map(Result::unwrap).count(), 5);
    assert!(matches!(log.records(2, 0, 1, 1).await, Err(RecorderError::OtherEpoch { asked: 2, current: 1 })));
    assert!(matches!(log.records(1, 0, 202, 1).await, Err(RecorderError::NoSuchRecords { len: 201, .. })));
    assert!(matches!(log.records(1, 2, 1, 1).await, Err(RecorderError::NoSuchRecords { .. })));
    drop(recorder);
}

#[tokio::test]
async fn a_failure_is_told_to_everybody_who_waits_and_to_onlookers() {
    let (chip, disk) = (FakeChip::new(&BANKS), MemoryDisk::default());
    let (_recorder, log) = start(&chip, &disk);
    let mut onlooker = log.clone();
    let head = log.head().unwrap();
    chip.set_fault(|_| Fault::Before);
    let (a, b, quote) = tokio::join!(
        log.append(PcrRole::Vm, vec![event("a")]),
        log.append(PcrRole::Guest, vec![event("b")]),
        log.quote(|_| sha256(&[])),
    );
    assert!(matches!(a, Err(RecorderError::Tpm(_))));
    assert!(matches!(b, Err(RecorderError::Tpm(_))));
    assert!(matches!(quote, Err(RecorderError::Tpm(_))));
    assert!(log.failure().is_some());
    assert_eq!(onlooker.changed().await.unwrap(), head);
    chip.clear_fault();
    log.quote(|_| sha256(&[])).await.unwrap();
    assert!(log.failure().is_none());
    assert_eq!(log.head().unwrap().log_len, head.log_len + 1, "a was on disk and was made up for");
    assert_eq!(log.tpm().unwrap().model.as_ref(), "fake");
}
