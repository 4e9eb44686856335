//! Sessions against hosts that are played, over a pipe: what a host may do, and what is refused.

mod door;

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use onequote_evidence::{
    id::{Blob, Nonce, Sha256},
    report::{Cause, EAGER, Frame as _, MAX_CHUNK, MAX_REPORT, ProxyFrame, VERSION, VerifierFrame, to_wire},
    stream::Known,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    task::JoinHandle,
};

use super::*;
use crate::{
    challenge::Challenge,
    finding::{Code, Finding},
    intake::Taken,
    result::Verdict,
    source::System,
    store::{StoreError, enrol::JoinRefusal, enrol::Standing},
};

const HOST: &str = "h1";

/// Who may report, and what becomes of reports.
/// Nonce, binding and evidence of a report that was taken.
type TakenReport = (Nonce, Vec<u8>, Vec<u8>);

#[derive(Default)]
struct Played {
    refuses: Mutex<Option<fn() -> Refusal>>,
    refused: Mutex<Vec<&'static str>>,
    nonces: AtomicUsize,
    have: Mutex<Have>,
    taken: Mutex<Vec<TakenReport>>,
    outcomes: Mutex<VecDeque<Result<bool, Fault>>>,
}

impl Members for Played {
    async fn member(&self, caller: &Caller) -> Result<IssuedCertificate, Refusal> {
        if let Some(refusal) = *self.refuses.lock().unwrap() {
            return Err(refusal());
        }
        let serial = caller.certificate.clone().ok_or(Refusal::Certificate("no certificate was shown"))?;
        let expires = TimeMs(System.now().0 + 3_600_000);
        Ok(IssuedCertificate { serial, host: HOST.parse().unwrap(), ak: vec![1], expires, revoked: false })
    }

    async fn refused(&self, _: &Caller, refusal: &Refusal) {
        self.refused.lock().unwrap().push(refusal.code());
    }
}

impl Played {
    fn next(&self) -> Expected {
        let number = (self.nonces.fetch_add(1, Ordering::Relaxed) as u8).wrapping_add(1);
        let nonce = Nonce::new(vec![number; 32]).unwrap();
        let challenge = Challenge { nonce, expires: TimeMs(System.now().0 + 60_000) };
        Expected { challenge, have: self.have.lock().unwrap().clone() }
    }
}

impl Appraiser for Played {
    async fn expect(&self, _: &HostId, _: bool, _: Duration) -> Result<Expected, Fault> {
        Ok(self.next())
    }

    async fn details(&self, _: &HostId) -> Result<Have, Fault> {
        let records = Some(Known { len: 7, digest: Sha256([7; 32]) });
        Ok(Have { records, ..Have::default() })
    }

    async fn take(&self, id: &HostId, answer: Answer<Cursor<Vec<u8>>>, _: Duration) -> Result<Outcome, Fault> {
        let Answer { challenge, binding, evidence, .. } = answer;
        self.taken.lock().unwrap().push((challenge.nonce, binding, evidence.into_inner()));
        let outcome = self.outcomes.lock().unwrap().pop_front();
        match outcome.unwrap_or(Ok(true))? {
            false => Ok(Outcome::Again(Box::new(self.next()))),
            true => {
                let finding = Finding::new(Code::HostWithoutPolicy, "policy");
                let verdict = Verdict::without_evidence(id.clone(), finding, None, TimeMs(1));
                let next = Some(self.next());
                Ok(Outcome::Taken(Box::new(Taken { verdict, accepted: true, next, facts: None, whole: None })))
            }
        }
    }
}

struct Desk {
    room: Arc<Room<Played, Played>>,
    played: Arc<Played>,
}

struct Line {
    stream: DuplexStream,
    served: JoinHandle<()>,
}

fn desk() -> Desk {
    let played = Arc::new(Played::default());
    let settings = Settings::new(Duration::from_secs(60));
    let members = Arc::clone(&played);
    let room = Room::new(members, Arc::clone(&played), Reporting::new(1), Arc::new(System), settings);
    Desk { room, played }
}

impl Desk {
    fn connect_with(&self, certificate: Option<Vec<u8>>) -> Line {
        let (ours, theirs) = duplex(1 << 20);
        let caller = Caller { address: "192.0.2.1:1".parse().unwrap(), binding: vec![5; 32], certificate };
        let room = Arc::clone(&self.room);
        let served = tokio::spawn(async move { session::serve(&room, theirs, caller, ()).await });
        Line { stream: ours, served }
    }

    /// A member's connection, up to the first question; gives its nonce.
    async fn connect(&self) -> (Line, u8) {
        let mut line = self.connect_with(Some(vec![1]));
        line.hello(HOST).await;
        let asked = line.asked().await;
        (line, asked)
    }
}

impl Line {
    async fn send(&mut self, frame: &ProxyFrame) {
        self.stream.write_all(&to_wire(frame)).await.unwrap();
    }

    async fn hello(&mut self, host: &str) {
        self.send(&ProxyFrame::Hello { version: VERSION, host: host.parse().unwrap() }).await;
    }

    async fn frame(&mut self) -> VerifierFrame {
        let mut prefix = [0; 4];
        self.stream.read_exact(&mut prefix).await.unwrap();
        let mut body = vec![0; VerifierFrame::body_len(prefix).unwrap()];
        self.stream.read_exact(&mut body).await.unwrap();
        VerifierFrame::parse(&body).unwrap()
    }

    async fn asked(&mut self) -> u8 {
        match self.frame().await {
            VerifierFrame::Ask(ask) => ask.nonce.0[0],
            other => panic!("{other:?}"),
        }
    }

    async fn begin(&mut self, nonce: u8, size: u64) {
        self.send(&ProxyFrame::Begin { nonce: Blob(vec![nonce; 32]), cause: Cause::Period, size }).await;
    }

    async fn chunk(&mut self, size: usize) {
        self.send(&ProxyFrame::Chunk { bytes: Blob(vec![9; size]) }).await;
    }

    /// A small report. Gives the next nonce.
    async fn report(&mut self, nonce: u8) -> u8 {
        self.begin(nonce, 10).await;
        self.chunk(10).await;
        match self.frame().await {
            VerifierFrame::Taken { next, .. } => next.nonce.0[0],
            other => panic!("{other:?}"),
        }
    }

    /// The connection is ended, with this code.
    async fn refused(mut self, code: &str) {
        loop {
            match self.frame().await {
                VerifierFrame::Refused { code: found, .. } => break assert_eq!(found, code),
                VerifierFrame::Later { .. } => {}
                other => panic!("{other:?} instead of {code}"),
            }
        }
        drop(self.stream);
        self.served.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_report_is_taken_and_the_answer_has_the_next_nonce() {
    let desk = desk();
    let (mut line, first) = desk.connect().await;
    let second = line.report(first).await;
    assert_ne!(first, second);
    line.report(second).await;
    let taken = desk.played.taken.lock().unwrap().clone();
    assert_eq!(taken.len(), 2);
    assert_eq!((&taken[0].1, taken[0].2.len()), (&vec![5; 32], 10), "bound to the connection, and whole");
    assert_eq!(desk.room.reporting.load.counts().taken, 2);
    line.send(&ProxyFrame::NeedHave).await;
    assert!(matches!(line.frame().await, VerifierFrame::Details(have) if have.records.unwrap().len == 7));
}

#[tokio::test(start_paused = true)]
async fn who_is_no_member_sends_nothing() {
    let desk = desk();
    desk.connect_with(None).refused("certificate-refused").await;
    let refusals: [(fn() -> Refusal, _); 2] = [
        (|| Refusal::Certificate("the certificate was taken back"), "certificate-refused"),
        (|| JoinRefusal::Withdrawn("h1".parse().unwrap(), Standing::Revoked).into(), "host-withdrawn"),
    ];
    for (refusal, code) in refusals {
        *desk.played.refuses.lock().unwrap() = Some(refusal);
        desk.connect_with(Some(vec![1])).refused(code).await;
    }
    let refused = desk.played.refused.lock().unwrap().clone();
    assert_eq!(refused, ["certificate-refused", "certificate-refused", "host-withdrawn"]);
    assert_eq!(desk.room.reporting.held.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_is_taken_back_ends_a_connection_at_its_next_report() {
    let desk = desk();
    let (mut line, nonce) = desk.connect().await;
    let next = line.report(nonce).await;
    *desk.played.refuses.lock().unwrap() = Some(|| Refusal::Certificate("the certificate was taken back"));
    line.begin(next, 10).await;
    line.refused("certificate-refused").await;
    assert_eq!(desk.played.taken.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn another_hosts_name_is_refused() {
    let desk = desk();
    let mut line = desk.connect_with(Some(vec![1]));
    line.hello("h2").await;
    line.refused("certificate-refused").await;
    assert_eq!(desk.played.refused.lock().unwrap().as_slice(), ["certificate-refused"]);
}

#[tokio::test(start_paused = true)]
async fn a_report_that_comes_twice_or_for_an_old_nonce_is_not_taken() {
    let desk = desk();
    let (mut line, first) = desk.connect().await;
    line.report(first).await;
    // The same once more.
    line.begin(first, 10).await;
    line.refused("protocol").await;
    // What was recorded on one connection, over another.
    let (mut line, _) = desk.connect().await;
    line.begin(first, 10).await;
    line.refused("protocol").await;
    assert_eq!(desk.played.taken.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn frames_out_of_order_end_the_connection() {
    let desk = desk();
    let mut line = desk.connect_with(Some(vec![1]));
    line.begin(1, 10).await;
    line.refused("protocol").await;
    let (mut line, _) = desk.connect().await;
    line.hello(HOST).await;
    line.refused("protocol").await;
    let (mut line, _) = desk.connect().await;
    line.chunk(1).await;
    line.refused("protocol").await;
    for size in [9, 11] {
        let (mut line, nonce) = desk.connect().await;
        line.begin(nonce, 10).await;
        line.chunk(size).await;
        if size < 10 {
            line.begin(nonce, 10).await;
        }
        line.refused("protocol").await;
    }
    // A gigabyte is refused before its first byte.
    let (mut line, nonce) = desk.connect().await;
    line.begin(nonce, 1 << 30).await;
    line.refused("protocol").await;
    let (mut line, _) = desk.connect().await;
    line.stream.write_all(&[0xff; 64]).await.unwrap();
    line.refused("protocol").await;
    assert!(desk.played.taken.lock().unwrap().is_empty());
    const { assert!(MAX_REPORT < 1 << 30) };
}

#[tokio::test(start_paused = true)]
async fn who_drips_is_let_go() {
    let desk = desk();
    let since = Instant::now();
    // No hello, a frame that does not end, a report that does not end.
    desk.connect_with(Some(vec![1])).refused("too-slow").await;
    let (mut line, _) = desk.connect().await;
    line.stream.write_all(&[1]).await.unwrap();
    line.refused("too-slow").await;
    let (mut line, nonce) = desk.connect().await;
    line.begin(nonce, 10).await;
    line.chunk(9).await;
    line.refused("too-slow").await;
    assert!(since.elapsed() < Duration::from_secs(70), "{:?}", since.elapsed());
    // A host that is connected and says nothing is let go when its reports are long overdue.
    let since = Instant::now();
    let (line, _) = desk.connect().await;
    line.refused("too-slow").await;
    assert!(since.elapsed() > Duration::from_secs(60) && since.elapsed() < Duration::from_secs(600));
    assert_eq!(desk.room.reporting.held.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_newer_connection_takes_the_place_of_the_one_before() {
    let desk = desk();
    let (old, _) = desk.connect().await;
    let (mut new, nonce) = desk.connect().await;
    old.refused("replaced").await;
    new.report(nonce).await;
    assert_eq!(desk.room.reporting.held.count(), 1);
}

#[tokio::test(start_paused = true)]
async fn who_asks_gets_the_verdict_of_a_report_made_for_it() {
    let desk = desk();
    let (mut line, first) = desk.connect().await;
    let held = Arc::clone(&desk.room.reporting.held);
    let asked = tokio::spawn(async move { held.ask(&HOST.parse().unwrap()).await });
    let VerifierFrame::Ask(ask) = line.frame().await else { panic!("no question") };
    assert!(ask.now && ask.nonce.0[0] != first);
    // A report that crossed the question answers nobody, and the one before is still remembered as what was asked.
    line.begin(first, 10).await;
    line.chunk(10).await;
    assert_eq!(line.frame().await, VerifierFrame::Later { after_ms: 0 });
    assert!(desk.played.taken.lock().unwrap().is_empty() && !asked.is_finished());
    line.report(ask.nonce.0[0]).await;
    assert_eq!(asked.await.unwrap().unwrap().host.id.as_str(), HOST);

    let held = Arc::clone(&desk.room.reporting.held);
    let asked = tokio::spawn(async move { held.ask(&HOST.parse().unwrap()).await });
    line.asked().await;
    line.send(&ProxyFrame::Unable { why: "the TPM is away".to_owned() }).await;
    assert_eq!(asked.await.unwrap(), Err(NotReported::Unable("the TPM is away".to_owned())));
}

#[tokio::test(start_paused = true)]
async fn under_load_reports_are_sent_away_unread() {
    let desk = desk();
    let (mut line, nonce) = desk.connect().await;
    let now = std::time::Instant::now();
    let load = &desk.room.reporting.load;
    let full: Vec<_> = std::iter::from_fn(|| load.admit(MAX_REPORT, now).ok()).collect();
    line.begin(nonce, EAGER + 1).await;
    assert!(matches!(line.frame().await, VerifierFrame::Later { after_ms } if after_ms > 0));
    let small: Vec<_> = std::iter::from_fn(|| load.admit(EAGER, now).ok()).collect();
    line.begin(nonce, 10).await;
    line.chunk(10).await;
    assert!(matches!(line.frame().await, VerifierFrame::Later { .. }));
    assert!(desk.played.taken.lock().unwrap().is_empty());
    // The nonce is as good as before.
    drop((full, small));
    line.begin(nonce, EAGER + 1).await;
    assert_eq!(line.frame().await, VerifierFrame::Go);
    line.chunk(MAX_CHUNK).await;
    line.chunk(1).await;
    assert!(matches!(line.frame().await, VerifierFrame::Taken { .. }));
}

#[tokio::test(start_paused = true)]
async fn a_fault_or_a_faster_round_is_no_end() {
    let desk = desk();
    let (mut line, nonce) = desk.connect().await;
    let fault = StoreError::Database { doing: "testing", source: "away".into() };
    desk.played.outcomes.lock().unwrap().extend([Err(fault.into()), Ok(false)]);
    line.begin(nonce, 10).await;
    line.chunk(10).await;
    assert!(matches!(line.frame().await, VerifierFrame::Later { after_ms } if after_ms > 0));
    let next = line.asked().await;
    line.begin(next, 10).await;
    line.chunk(10).await;
    let VerifierFrame::Ask(again) = line.frame().await else { panic!("no question") };
    assert!(again.now);
    assert_eq!(line.frame().await, VerifierFrame::Later { after_ms: 0 });
    line.report(again.nonce.0[0]).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_there_is_said_before_a_question_without_a_statement() {
    let desk = desk();
    let records = Some(Known { len: 1, digest: Sha256([1; 32]) });
    *desk.played.have.lock().unwrap() = Have { records, ..Have::default() };
    let mut line = desk.connect_with(Some(vec![1]));
    line.hello(HOST).await;
    assert!(matches!(line.frame().await, VerifierFrame::Details(have) if have.records == records));
    assert!(matches!(line.frame().await, VerifierFrame::Ask(ask) if ask.statement.is_none() && !ask.now));
    *desk.played.have.lock().unwrap() = Have { statement: Some(Sha256([2; 32])), ..Have::default() };
    let mut line = desk.connect_with(Some(vec![1]));
    line.hello(HOST).await;
    assert!(matches!(line.frame().await, VerifierFrame::Ask(ask) if ask.statement == Some(Sha256([2; 32]))));
}
