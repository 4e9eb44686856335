//! Where hosts join: bounded JSON behind the [`super::door`], a limit on requests.
//!
//! `POST /v1/join`, `/v1/join/prove`, `/v1/renew`, `/v1/renew/prove`, `/v1/here`: see docs/formats.md. Whoever connects
//! may show a certificate, which must then be one of the authority's; joining needs none.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{ConnectInfo, DefaultBodyLimit, Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::post,
};
use onequote_evidence::join::{MAX_MESSAGE, Refused};
use serde::Serialize;
use tokio::time::timeout;

use super::{
    door::Door,
    registrar::{Caller, Refusal, Registrar},
};
use crate::store::enrol::EnrolStore;

/// Time for one request.
const REQUEST: Duration = Duration::from_secs(60);

/// Requests that are taken at once, and how many a second after that. A renewal has three, a join two.
const BURST: f64 = 200.0;
const PER_SECOND: f64 = 50.0;

/// A bucket of requests.
#[derive(Debug)]
struct Bucket(Mutex<(f64, Instant)>);

impl Bucket {
    fn full(now: Instant) -> Self {
        Self(Mutex::new((BURST, now)))
    }

    fn take(&self, now: Instant) -> bool {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(bucket.1).as_secs_f64();
        let left = (bucket.0 + passed * PER_SECOND).min(BURST);
        *bucket = if left >= 1.0 { (left - 1.0, now) } else { (left, now) };
        left >= 1.0
    }
}

type Shared<S> = State<Arc<Registrar<S>>>;
type Of = ConnectInfo<Caller>;

/// Serves hosts until `stop` is done.
///
/// # Errors
/// When the listener fails.
pub async fn serve<S: EnrolStore>(
    door: Door,
    registrar: Arc<Registrar<S>>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let bucket = Arc::new(Bucket::full(Instant::now()));
    let limit = move |request: Request, next: Next| {
        let allowed = bucket.take(Instant::now());
        async move {
            match allowed {
                // Nothing takes longer: a client that sends its request drop by drop is let go.
                true => timeout(REQUEST, next.run(request)).await.unwrap_or_else(|_| refused(&Refusal::Busy)),
                false => refused(&Refusal::Busy),
            }
        }
    };
    let app = Router::new()
        .route("/v1/join", post(join::<S>))
        .route("/v1/join/prove", post(prove::<S>))
        .route("/v1/renew", post(renew::<S>))
        .route("/v1/renew/prove", post(prove_renewal::<S>))
        .route("/v1/here", post(here::<S>))
        .layer(DefaultBodyLimit::max(MAX_MESSAGE))
        .layer(middleware::from_fn(limit))
        .with_state(registrar);
    axum::serve(door, app.into_make_service_with_connect_info::<Caller>()).with_graceful_shutdown(stop).await
}

async fn join<S: EnrolStore>(State(r): Shared<S>, ConnectInfo(caller): Of, body: Bytes) -> Response {
    answer(r.join(&caller, &body).await)
}

async fn prove<S: EnrolStore>(State(r): Shared<S>, ConnectInfo(caller): Of, body: Bytes) -> Response {
    answer(r.prove(&caller, &body).await)
}

async fn renew<S: EnrolStore>(State(r): Shared<S>, ConnectInfo(caller): Of, body: Bytes) -> Response {
    answer(r.renew(&caller, &body).await)
}

async fn prove_renewal<S: EnrolStore>(State(r): Shared<S>, ConnectInfo(caller): Of, body: Bytes) -> Response {
    answer(r.prove_renewal(&caller, &body).await)
}

async fn here<S: EnrolStore>(State(r): Shared<S>, ConnectInfo(caller): Of, body: Bytes) -> Response {
    answer(r.here(&caller, &body).await)
}

fn answer<T: Serialize>(outcome: Result<T, Refusal>) -> Response {
    match outcome {
        Ok(message) => Json(message).into_response(),
        Err(refusal) => refused(&refusal),
    }
}

fn refused(refusal: &Refusal) -> Response {
    let status = match refusal {
        Refusal::Malformed(_) => StatusCode::BAD_REQUEST,
        Refusal::Busy => StatusCode::TOO_MANY_REQUESTS,
        Refusal::Store(_) | Refusal::Certify(_) => {
            tracing::error!(error = refusal as &dyn std::error::Error, "cannot serve a host");
            StatusCode::INTERNAL_SERVER_ERROR
        }
        _ => StatusCode::FORBIDDEN,
    };
    let body = Json(Refused { code: refusal.code().to_owned(), error: refusal.to_string() });
    (status, [(header::RETRY_AFTER, "5")], body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_come_in_bursts_and_then_at_a_rate() {
        let start = Instant::now();
        let bucket = Bucket::full(start);
        let taken = (0..1000).filter(|_| bucket.take(start)).count();
        assert_eq!(taken, 200);
        let taken = (0..1000).filter(|_| bucket.take(start + Duration::from_secs(1))).count();
        assert_eq!(taken, 50);
    }
}
