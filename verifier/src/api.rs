//! `serve`: asks every enrolled host again and again, keeps the last verdicts, and shows them as JSON.
//!
//! Hosts that report are not asked, as long as they do ([`crate::report`]). Of the others, one task a host. Its rounds begin a random part of the period after the start, so that hosts are not asked all at
//! once, and follow each other by the period with a tenth of jitter; a host that gives no evidence is asked again
//! after a growing part of the period. Hosts that are enrolled or removed meanwhile are noticed. Only one round of a
//! host runs at a time.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/hosts` | array of `{id, state, time, expires, contact, way, connected, vms}`: when and in which way the host was heard last, whether it holds a connection here; `vms` counts states |
//! | `GET /v1/hosts/{id}` | the verdict, as it holds now |
//! | `POST /v1/hosts/{id}/attest` | a new verdict |
//! | `GET /v1/hosts/{id}/expectations` | the host's part of the expectation tree |
//! | `GET /v1/expectations` | `{digest, hosts}`: the root's digest, and `{id, digest}` of each host |
//! | `GET /v1/reports` | `{connected, taken, later, waiting}`: hosts that hold a connection, reports since the start that were taken and sent away, and that wait now |
//! | `GET /healthz` | 200 while the store answers |
//!
//! There is no authentication here yet: it listens on loopback unless told otherwise.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Serialize;
use serde_json::json;
use tokio::{net::TcpListener, sync::Mutex, task::JoinHandle, time::MissedTickBehavior};

use onequote_evidence::id::{HostId, TimeMs};

use crate::{
    cli::database::limits,
    expectation::{self, HostTree},
    policy::Policy,
    replicas::Replica,
    report::{Counts, NotReported, Reporting},
    result::{self, Way},
    round::{Fault, Verifier, faulty},
    store::{
        Store, StoreError,
        enrol::{EnrolStore, Standing},
    },
};

/// How often the list of enrolled hosts is read again.
const REREAD: Duration = Duration::from_secs(2);

/// How often what is old is forgotten.
const FORGET: Duration = Duration::from_secs(3600);
/// How long a host that has just joined may take to its first report before it is asked.
const FIRST_REPORT: Duration = Duration::from_secs(10);

/// How long an answer over a held connection may take before the proxy is asked by another one.
const HELD_ANSWER: Duration = Duration::from_secs(30);

/// A verifier that serves.
pub struct Server<S> {
    verifier: Arc<Verifier<S>>,
    period: Duration,
    keep_audit: Option<Duration>,
    reporting: Reporting,
    /// One round at a time for each host.
    turns: Mutex<BTreeMap<HostId, Arc<Mutex<()>>>>,
}

/// A line of the list of hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The host.
    pub id: HostId,
    /// Its state; none when it was never asked.
    pub state: Option<result::State>,
    /// When the verdict was made.
    pub time: Option<TimeMs>,
    /// When it stops to hold.
    pub expires: Option<TimeMs>,
    /// When evidence came from it last, or a word over the connection that it holds.
    pub contact: Option<TimeMs>,
    /// How its last evidence came.
    pub way: Option<Way>,
    /// Whether it holds a connection to this verifier.
    pub connected: bool,
    /// Number of VMs by state.
    pub vms: BTreeMap<result::State, u64>,
}

impl<S: EnrolStore> Server<S> {
    /// Asks each host every `period`, and forgets lines of the audit log after `keep_audit`.
    #[must_use]
    pub fn new(
        verifier: Arc<Verifier<S>>,
        period: Duration,
        keep_audit: Option<Duration>,
        reporting: Reporting,
    ) -> Arc<Self> {
        Arc::new(Self { verifier, period, keep_audit, reporting, turns: Mutex::default() })
    }

    /// Serves until `stop` is done.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn run(
        self: Arc<Self>,
        listener: TcpListener,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> std::io::Result<()> {
        let rounds = AbortOnDrop(tokio::spawn(Arc::clone(&self).watch_hosts()));
        let care = AbortOnDrop(tokio::spawn(Arc::clone(&self).forget()));
        let served = axum::serve(listener, router(self)).with_graceful_shutdown(stop).await;
        drop((rounds, care));
        served
    }

    /// Forgets what is old, again and again.
    async fn forget(self: Arc<Self>) {
        let mut tick = tokio::time::interval(FORGET);
        loop {
            tick.tick().await;
            let limits = limits(self.verifier.source.now(), self.keep_audit);
            if let Err(e) = self.verifier.store.forget(&limits).await {
                tracing::error!(error = &e as &dyn std::error::Error, "cannot forget what is old");
            }
        }
    }

    /// Keeps one task for each enrolled host that is ours to ask.
    async fn watch_hosts(self: Arc<Self>) {
        let mut tasks: BTreeMap<HostId, AbortOnDrop> = BTreeMap::new();
        let mut replica = Replica::new(&*self.verifier.source);
        let mut tick = tokio::time::interval(REREAD);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if let Err(e) = replica.beat(&self.verifier.store).await {
                tracing::error!(error = &e as &dyn std::error::Error, "cannot say that this verifier is there");
                continue;
            }
            match self.verifier.store.hosts().await {
                Ok(mut hosts) => {
                    hosts.retain(|host| replica.asks(host));
                    let ours: BTreeSet<&HostId> = hosts.iter().collect();
                    tasks.retain(|id, _| ours.contains(id));
                    for id in hosts {
                        tasks
                            .entry(id.clone())
                            .or_insert_with(|| AbortOnDrop(tokio::spawn(Arc::clone(&self).keep_asking(id))));
                    }
                }
                Err(e) => tracing::error!(error = &e as &dyn std::error::Error, "cannot list the hosts"),
            }
        }
    }

    async fn keep_asking(self: Arc<Self>, id: HostId) {
        let mut failures = 0;
        // Hosts with a verdict wait, and those that may report before they are asked; another one is asked at once.
        match self.verifier.store.host(&id).await {
            Ok(host) if host.verdict.is_some() => tokio::time::sleep(self.period.mul_f64(self.random())).await,
            Ok(host) if host.joined.issued => tokio::time::sleep(self.period.min(FIRST_REPORT)).await,
            _ => {}
        }
        loop {
            match self.reports(&id).await {
                Ok(true) => {
                    tokio::time::sleep(pause(self.period, 0, self.random())).await;
                    continue;
                }
                Ok(false) => {}
                Err(StoreError::NoHost(_)) => return,
                // Asking says the same.
                Err(_) => {}
            }
            let answered = match self.attest(&id).await {
                Ok(verdict) => {
                    tracing::info!(host = %id, state = %verdict.host.state, vms = verdict.vms.len(), "attested");
                    verdict.quote.is_some()
                }
                Err(Fault::Store(StoreError::NoHost(_))) => return,
                Err(e) => {
                    tracing::error!(host = %id, error = &e as &dyn std::error::Error, "cannot attest");
                    false
                }
            };
            failures = if answered { 0 } else { failures + 1 };
            tokio::time::sleep(pause(self.period, failures, self.random())).await;
        }
    }

    /// Whether a host reports by itself, so that it need not be asked: it holds a connection here, or its last verdict came
    /// from a report, maybe to another verifier on the same database, and is not so old that it counts as unreachable.
    async fn reports(&self, id: &HostId) -> Result<bool, StoreError> {
        let host = self.verifier.store.host(id).await?;
        if host.standing != Standing::Enrolled {
            return Ok(false);
        }
        let now = self.verifier.source.now();
        let lives = |v: result::Verdict| v.way == Way::Reported && v.at(now).host.state != result::State::Unreachable;
        Ok(self.reporting.held.contact(id).is_some() || host.verdict.is_some_and(lives))
    }

    /// Asks a host over the connection that it holds, or else by one to its proxy.
    async fn attest_now(&self, id: &HostId) -> Result<result::Verdict, Fault> {
        match tokio::time::timeout(HELD_ANSWER, self.reporting.held.ask(id)).await {
            Ok(Ok(verdict)) => return Ok(verdict),
            Ok(Err(NotReported::NoConnection)) => {}
            Ok(Err(e)) => tracing::info!(host = %id, "no report although the host is connected: {e}"),
            Err(_) => tracing::info!(host = %id, "no report in time although the host is connected"),
        }
        self.attest(id).await
    }

    async fn attest(&self, id: &HostId) -> Result<result::Verdict, Fault> {
        // Who names hosts that are not enrolled must not make us remember them.
        if let Err(e) = self.verifier.store.host(id).await {
            self.turns.lock().await.remove(id);
            return Err(e.into());
        }
        let turn = Arc::clone(self.turns.lock().await.entry(id.clone()).or_default());
        let _turn = turn.lock().await;
        let round = self.verifier.attest(id).await?;
        tracing::info!(bytes = round.received, host = %id, "evidence received");
        Ok(round.verdict)
    }

    /// From 0 to 1.
    fn random(&self) -> f64 {
        let mut bytes = [0; 4];
        self.verifier.source.fill(&mut bytes);
        f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
    }
}

/// How long to wait before the next round: the period and a tenth of jitter, or less after a failure.
fn pause(period: Duration, failures: u32, random: f64) -> Duration {
    let share = match failures {
        0 => 1.0,
        // 1/8, 1/4, 1/2, then the whole.
        n => (2_f64.powi(i32::try_from(n.min(4)).unwrap_or(4)) / 16.0).min(1.0),
    };
    period.mul_f64(share * (0.95 + random / 10.0))
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

type Shared<S> = State<Arc<Server<S>>>;

fn router<S: EnrolStore>(server: Arc<Server<S>>) -> Router {
    Router::new()
        .route("/v1/hosts", get(list::<S>))
        .route("/v1/hosts/{id}", get(show::<S>))
        .route("/v1/hosts/{id}/attest", post(attest::<S>))
        .route("/v1/hosts/{id}/expectations", get(expectations::<S>))
        .route("/v1/expectations", get(root::<S>))
        .route("/v1/reports", get(reports::<S>))
        .route("/healthz", get(health::<S>))
        .with_state(server)
}

async fn list<S: EnrolStore>(State(server): Shared<S>) -> Result<Json<Vec<Line>>, ApiError> {
    let mut lines = Vec::new();
    for id in server.verifier.store.hosts().await? {
        let host = server.verifier.store.host(&id).await?;
        let verdict = host.verdict.map(|verdict| verdict.at(server.verifier.source.now()));
        let mut vms = BTreeMap::new();
        for vm in verdict.iter().flat_map(|verdict| &verdict.vms) {
            *vms.entry(vm.state).or_default() += 1;
        }
        let evidence = verdict.as_ref().filter(|v| v.quote.is_some());
        let (told, heard) = (evidence.map(|v| v.time), server.reporting.held.contact(&id));
        lines.push(Line {
            id,
            contact: told.max(heard),
            way: evidence.map(|v| v.way),
            connected: heard.is_some(),
            state: verdict.as_ref().map(|v| v.host.state),
            time: verdict.as_ref().map(|v| v.time),
            expires: verdict.as_ref().map(|v| v.expires),
            vms,
        });
    }
    Ok(Json(lines))
}

async fn show<S: EnrolStore>(
    State(server): Shared<S>,
    Path(id): Path<String>,
) -> Result<Json<result::Verdict>, ApiError> {
    let host = server.verifier.store.host(&host_id(&id)?).await?;
    let verdict = host.verdict.ok_or(ApiError(StatusCode::NOT_FOUND, "the host was not asked yet".into()))?;
    Ok(Json(verdict.at(server.verifier.source.now())))
}

async fn attest<S: EnrolStore>(
    State(server): Shared<S>,
    Path(id): Path<String>,
) -> Result<Json<result::Verdict>, ApiError> {
    let id = host_id(&id)?;
    match server.attest_now(&id).await {
        Ok(verdict) => Ok(Json(verdict)),
        Err(Fault::Store(e @ StoreError::NoHost(_))) => Err(e.into()),
        Err(fault) => Ok(Json(faulty(&id, &fault, None, &*server.verifier.source))),
    }
}

async fn expectations<S: EnrolStore>(
    State(server): Shared<S>,
    Path(id): Path<String>,
) -> Result<Json<HostTree>, ApiError> {
    Ok(Json(tree(&server.verifier.store, &host_id(&id)?).await?))
}

async fn root<S: EnrolStore>(State(server): Shared<S>) -> Result<Json<serde_json::Value>, ApiError> {
    let mut hosts = Vec::new();
    for id in server.verifier.store.hosts().await? {
        hosts.push(tree(&server.verifier.store, &id).await?);
    }
    let digest = expectation::root(&hosts);
    let hosts: Vec<_> = hosts.into_iter().map(|host| json!({ "id": host.id, "digest": host.digest })).collect();
    Ok(Json(json!({ "digest": digest, "hosts": hosts })))
}

/// A host's part of the expectation tree by the policy in force.
async fn tree<S: Store>(store: &S, id: &HostId) -> Result<HostTree, ApiError> {
    let host = store.host(id).await?;
    let policy = store.policy(&host).await?;
    let policy = policy.map(|(_, text)| Policy::parse(&text, "the policy in force")).transpose();
    let policy = policy.map_err(|e| ApiError(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))?;
    Ok(HostTree::new(id, &host.state, policy.as_ref()))
}

async fn reports<S: EnrolStore>(State(server): Shared<S>) -> Json<serde_json::Value> {
    let Counts { taken, later, waiting } = server.reporting.load.counts();
    let connected = server.reporting.held.count();
    Json(json!({ "connected": connected, "taken": taken, "later": later, "waiting": waiting }))
}

async fn health<S: EnrolStore>(State(server): Shared<S>) -> Result<&'static str, ApiError> {
    server.verifier.store.hosts().await?;
    Ok("ok\n")
}

struct ApiError(StatusCode, String);

impl From<StoreError> for ApiError {
    fn from(e: StoreError) -> Self {
        let status = match e {
            StoreError::NoHost(_) => StatusCode::NOT_FOUND,
            StoreError::Database { .. } => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        tracing::debug!(error = &e as &dyn std::error::Error, "request failed");
        Self(status, e.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

fn host_id(text: &str) -> Result<HostId, ApiError> {
    text.parse().map_err(|e: &str| ApiError(StatusCode::BAD_REQUEST, e.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::intake::Intake;
    use crate::{
        enrol::Identity,
        round::Times,
        source::System,
        store::{Database, Enrolment},
    };

    async fn request(address: std::net::SocketAddr, line: &str) -> (u16, String) {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let text = format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    #[tokio::test]
    async fn what_is_served() {
        let dir = tempfile::tempdir().unwrap();
        Identity::create(dir.path()).unwrap();
        let identity = Identity::load(dir.path()).unwrap();
        let store = Database::open(&dir.path().join("v.sqlite")).await.unwrap();
        let host = Enrolment {
            id: "h1".parse().unwrap(),
            url: "https://127.0.0.1:1".into(),
            ak: crate::appraise::testing::Ak::generate().unwrap().public(),
            certificate: identity.certificate.to_vec(),
            software_tpm: true,
        };
        store.enrol(&host, false).await.unwrap();
        let verifier = Verifier {
            store,
            identity,
            authority: None,
            source: Arc::new(System),
            times: Times::default(),
            intake: Intake::default(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = Server::new(Arc::new(verifier), Duration::from_secs(60), None, Reporting::new(1));
        let served = tokio::spawn(server.run(listener, async { stopped.await.unwrap_or_default() }));

        assert_eq!(request(address, "GET /healthz").await, (200, "ok\n".into()));
        let (status, body) = request(address, "POST /v1/hosts/h1/attest").await;
        let verdict: result::Verdict = serde_json::from_str(&body).unwrap();
        assert_eq!((status, verdict.host.state), (200, result::State::Unreachable));
        let (status, body) = request(address, "GET /v1/hosts/h1").await;
        let verdict: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(status, 200);
        assert_eq!(verdict["host"]["findings"][0]["code"], "unreachable");
        let (status, body) = request(address, "GET /v1/hosts/h1/expectations").await;
        let tree: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &tree["id"], &tree["vms"]), (200, &"h1".into(), &json!([])));
        let (_, body) = request(address, "GET /v1/expectations").await;
        let root: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(root["hosts"], json!([{ "id": "h1", "digest": tree["digest"] }]));

        let (_, body) = request(address, "GET /v1/hosts").await;
        let list: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((&list[0]["id"], &list[0]["state"]), (&"h1".into(), &"unreachable".into()));
        assert_eq!(request(address, "GET /v1/hosts/h2").await.0, 404);
        assert_eq!(request(address, "GET /v1/hosts/No_Host").await.0, 400);
        stop.send(()).unwrap();
        served.await.unwrap().unwrap();
    }

    #[test]
    fn failures_are_asked_sooner_but_less_and_less() {
        let period = Duration::from_secs(60);
        let times: Vec<u64> = (0..6).map(|n| pause(period, n, 0.5).as_secs()).collect();
        assert_eq!(times, [60, 7, 15, 30, 60, 60]);
        assert!(pause(period, 0, 1.0) <= Duration::from_secs(63));
    }
}
