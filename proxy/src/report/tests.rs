//! A reporter against a verifier that is played, over a pipe.

use std::sync::Mutex;

use onequote_evidence::{
    id::Blob,
    report::{Ask, Cause, EAGER, Frame as _, MAX_CHUNK, ProxyFrame, VERSION, VerifierFrame, to_wire},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    sync::{mpsc, watch},
};

use super::*;

/// Evidence is the nonce and the binding, and zeros up to `size`.
struct Played {
    position: watch::Sender<u64>,
    size: Mutex<usize>,
    fails: Mutex<Option<String>>,
    known: Option<Sha256>,
}

impl Attest for Played {
    fn knows(&self, statement: &Sha256) -> bool {
        self.known.as_ref() == Some(statement)
    }

    async fn evidence(&self, nonce: Nonce, binding: Vec<u8>, have: Have) -> Result<Evidence, String> {
        if let Some(why) = self.fails.lock().unwrap().take() {
            return Err(why);
        }
        let mut stream = [nonce.as_bytes(), &binding, &[u8::from(have.records.is_some())]].concat();
        stream.resize(stream.len().max(*self.size.lock().unwrap()), 0);
        Ok(Evidence { stream: stream.into(), position: *self.position.borrow() })
    }

    async fn changed(&self, position: u64) {
        self.position.subscribe().wait_for(|now| *now > position).await.unwrap();
    }
}

/// Connections of which the other ends go to the test.
struct Pipes(mpsc::UnboundedSender<DuplexStream>);

impl Connect for Pipes {
    type Stream = DuplexStream;

    async fn connect(&self) -> Result<Connected<DuplexStream>, ReportError> {
        let (ours, theirs) = duplex(1 << 20);
        self.0.send(theirs).map_err(|_| ReportError::Connect("the test is over".to_owned()))?;
        Ok(Connected { stream: ours, binding: vec![5; 32] })
    }

    fn certificate(&self) -> u64 {
        1
    }
}

/// The verifier.
struct Verifier {
    connections: mpsc::UnboundedReceiver<DuplexStream>,
    attest: Arc<Played>,
    status: Arc<Status>,
}

struct Line(DuplexStream);

fn start(known: Option<Sha256>) -> Verifier {
    let (pipes, connections) = mpsc::unbounded_channel();
    let (position, size, fails) = (watch::channel(1).0, Mutex::new(0), Mutex::default());
    let attest = Arc::new(Played { position, size, fails, known });
    let status = Arc::new(Status::new("v"));
    let reporter = Reporter {
        verifier: "v".to_owned(),
        host: "h1".parse().unwrap(),
        attest: Arc::clone(&attest),
        connect: Pipes(pipes),
        changes: true,
        status: Arc::clone(&status),
        now: || TimeMs(7),
    };
    tokio::spawn(reporter.run());
    Verifier { connections, attest, status }
}

fn ask(nonce: u8, now: bool) -> Ask {
    let (period_ms, gap_ms) = (3_600_000, 10);
    Ask { nonce: Blob(vec![nonce; 32]), statement: None, expires_ms: 7_200_000, period_ms, gap_ms, now }
}

fn taken(nonce: u8) -> VerifierFrame {
    VerifierFrame::Taken { accepted: true, state: "trusted".to_owned(), next: ask(nonce, false) }
}

impl Verifier {
    /// The next connection, up to the question with this nonce.
    async fn connected(&mut self, nonce: u8) -> Line {
        let mut line = Line(self.connections.recv().await.unwrap());
        let hello = line.frame().await;
        assert_eq!(hello, ProxyFrame::Hello { version: VERSION, host: "h1".parse().unwrap() });
        line.send(&VerifierFrame::Ask(ask(nonce, false))).await;
        line
    }
}

impl Line {
    async fn send(&mut self, frame: &VerifierFrame) {
        self.0.write_all(&to_wire(frame)).await.unwrap();
    }

    async fn frame(&mut self) -> ProxyFrame {
        let mut prefix = [0; 4];
        self.0.read_exact(&mut prefix).await.unwrap();
        let mut body = vec![0; ProxyFrame::body_len(prefix).unwrap()];
        self.0.read_exact(&mut body).await.unwrap();
        ProxyFrame::parse(&body).unwrap()
    }

    /// A small report: what it answers, its cause and its bytes.
    async fn report(&mut self) -> (u8, Cause, Vec<u8>) {
        let ProxyFrame::Begin { nonce, cause, size } = self.frame().await else { panic!("no report") };
        let ProxyFrame::Chunk { bytes } = self.frame().await else { panic!("no chunk") };
        assert_eq!(bytes.0.len() as u64, size);
        assert_eq!(&bytes.0[..32], &nonce.0, "evidence for another nonce");
        (nonce.0[0], cause, bytes.0)
    }
}

#[tokio::test(start_paused = true)]
async fn first_by_the_period_after_changes_and_when_asked() {
    let mut verifier = start(None);
    let mut line = verifier.connected(1).await;
    let (nonce, cause, evidence) = line.report().await;
    assert_eq!((nonce, cause, &evidence[32..64]), (1, Cause::First, &[5; 32][..]), "not bound to the connection");
    line.send(&taken(2)).await;
    let since = Instant::now();
    assert_eq!(line.report().await.1, Cause::Period);
    assert!((3400..3800).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
    line.send(&taken(3)).await;
    let since = Instant::now();
    verifier.attest.position.send_replace(2);
    assert_eq!(line.report().await.1, Cause::Change);
    assert!(since.elapsed() < Duration::from_secs(1));
    // Changes during a report are in it, or are the next one's.
    verifier.attest.position.send_replace(3);
    line.send(&taken(4)).await;
    assert_eq!(line.report().await.1, Cause::Change);
    line.send(&taken(5)).await;
    let since = Instant::now();
    line.send(&VerifierFrame::Ask(ask(6, true))).await;
    let (nonce, cause, _) = line.report().await;
    assert_eq!((nonce, cause), (6, Cause::Asked));
    assert!(since.elapsed() < Duration::from_secs(1));
    line.send(&taken(7)).await;
    // Nothing is owed now.
    assert_eq!(line.report().await.1, Cause::Period);
    let shown = verifier.status.shown();
    assert_eq!((shown.reports, shown.connected, shown.last.unwrap().cause), (5, Some(TimeMs(7)), "asked"));
}

#[tokio::test(start_paused = true)]
async fn who_is_sent_away_comes_later_with_the_same_nonce() {
    let mut verifier = start(None);
    let mut line = verifier.connected(1).await;
    line.report().await;
    line.send(&VerifierFrame::Later { after_ms: 8_000 }).await;
    // Nothing hurries it, not even a question.
    verifier.attest.position.send_replace(2);
    let since = Instant::now();
    assert_eq!(line.report().await.0, 1);
    assert!((8..=10).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
    // A question that the report crossed.
    line.send(&VerifierFrame::Ask(ask(2, true))).await;
    line.send(&VerifierFrame::Later { after_ms: 0 }).await;
    assert_eq!(line.report().await.0, 2);
    line.send(&taken(3)).await;
    assert_eq!(verifier.status.shown().later, 2);
}

#[tokio::test(start_paused = true)]
async fn a_large_report_waits_until_it_is_wanted() {
    let mut verifier = start(None);
    let size = EAGER as usize + MAX_CHUNK;
    *verifier.attest.size.lock().unwrap() = size;
    let mut line = verifier.connected(1).await;
    for wanted in [false, true] {
        assert!(matches!(line.frame().await, ProxyFrame::Begin { size: announced, .. } if announced == size as u64));
        let more = tokio::time::timeout(Duration::from_secs(1), line.frame()).await;
        assert!(more.is_err(), "{more:?} came unasked");
        line.send(&if wanted { VerifierFrame::Go } else { VerifierFrame::Later { after_ms: 1000 } }).await;
    }
    for _ in 0..2 {
        assert!(matches!(line.frame().await, ProxyFrame::Chunk { bytes } if bytes.0.len() == MAX_CHUNK));
    }
    line.send(&taken(2)).await;
}

#[tokio::test(start_paused = true)]
async fn details_are_asked_for_only_if_the_statement_is_not_known() {
    let statement = Sha256([9; 32]);
    for known in [None, Some(statement)] {
        let mut verifier = start(known);
        let mut line = verifier.connected(1).await;
        line.report().await;
        let next = Ask { statement: Some(statement), ..ask(2, true) };
        line.send(&VerifierFrame::Taken { accepted: true, state: String::new(), next }).await;
        if known.is_none() {
            assert_eq!(line.frame().await, ProxyFrame::NeedHave);
            let records = Some(onequote_evidence::stream::Known { len: 1, digest: statement });
            line.send(&VerifierFrame::Details(Have { records, ..Have::default() })).await;
        }
        let (_, _, evidence) = line.report().await;
        assert_eq!(evidence[64], u8::from(known.is_none()));
    }
}

#[tokio::test(start_paused = true)]
async fn evidence_that_cannot_be_made_is_said_to_who_waits_and_tried_again() {
    let mut verifier = start(None);
    let mut line = verifier.connected(1).await;
    line.report().await;
    line.send(&taken(2)).await;
    *verifier.attest.fails.lock().unwrap() = Some("the TPM is away".to_owned());
    line.send(&VerifierFrame::Ask(ask(3, true))).await;
    assert_eq!(line.frame().await, ProxyFrame::Unable { why: "the TPM is away".to_owned() });
    assert_eq!(verifier.status.shown().failure.as_deref(), Some("the TPM is away"));
    verifier.attest.position.send_replace(2);
    assert_eq!(line.report().await.1, Cause::Change);
    line.send(&taken(4)).await;
    assert_eq!(line.report().await.0, 4);
    assert_eq!(verifier.status.shown().failure, None);
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_is_made_again_and_the_schedule_goes_on() {
    let mut verifier = start(None);
    let mut line = verifier.connected(1).await;
    line.report().await;
    line.send(&taken(2)).await;
    let since = Instant::now();
    drop(line);
    let mut line = verifier.connected(3).await;
    assert!(since.elapsed() < Duration::from_secs(11), "{:?}", since.elapsed());
    // Not at once: it is not this verifier's first.
    let (nonce, cause, _) = line.report().await;
    assert_eq!((nonce, cause), (3, Cause::Period));
    assert!(since.elapsed() > Duration::from_secs(3400));
    line.send(&VerifierFrame::Refused { code: "host-withdrawn".to_owned(), error: "it was".to_owned() }).await;
    drop(line);
    verifier.connections.recv().await.unwrap();
    assert!(verifier.status.shown().failure.unwrap().contains("host-withdrawn"));
}

#[tokio::test(start_paused = true)]
async fn who_breaks_the_protocol_or_is_silent_is_left() {
    let mut verifier = start(None);
    let frames =
        [VerifierFrame::Go, VerifierFrame::Details(Have::default()), VerifierFrame::Later { after_ms: 1 }, taken(2)];
    for frame in frames {
        let mut line = Line(verifier.connections.recv().await.unwrap());
        line.frame().await;
        line.send(&frame).await;
        let mut rest = Vec::new();
        line.0.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty(), "{frame:?}");
    }
    let mut line = verifier.connected(1).await;
    line.report().await;
    // No answer comes: within bounded time the proxy looks for another connection.
    let since = Instant::now();
    let _next = verifier.connected(2).await;
    assert!(since.elapsed() < Duration::from_secs(200), "{:?}", since.elapsed());
}

#[test]
fn pauses_grow_and_end() {
    let lost = ReportError::Closed;
    let spread = Duration::from_secs(5);
    let pauses: Vec<_> = (0..6).map(|n| lost.pause(n, spread).as_secs()).collect();
    assert_eq!(pauses, [5, 10, 20, 40, 60, 60]);
    assert_eq!(lost.pause(u32::MAX, spread), LONGEST_PAUSE);
    let refused = ReportError::Refused { code: "host-withdrawn".to_owned(), error: String::new() };
    assert_eq!(refused.pause(0, spread), UNWANTED_PAUSE);
}
