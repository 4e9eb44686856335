//! What the proxy's own command line may do to VMs.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use onequote_evidence::id::SessionId;
use serde::{Deserialize, Serialize};

use crate::{
    log::RecorderError,
    vm::{ControlError, Deleter, PastVms, Registry},
};

/// The longest that one question waits for the end of a VM. Who wants to wait longer asks again.
const MAX_WAIT: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wait {
    #[serde(default)]
    wait_ms: u64,
}

/// Reads what the logs say of VMs that have ended. It may take its time.
pub type ReadPast = Arc<dyn Fn() -> Result<PastVms, RecorderError> + Send + Sync>;

/// What deleting needs.
#[derive(Clone)]
pub struct Deleting {
    /// Who does it.
    pub deleter: Deleter,
    /// Where it is looked up.
    pub past: ReadPast,
}

pub(super) fn router(registry: Registry, deleting: Deleting) -> Router {
    let deletion = Router::new().route("/v1/vms/{vm}/delete", post(delete)).with_state(deleting);
    Router::new()
        .route("/v1/vms/{vm}/power-down", post(power_down))
        .route("/v1/vms/{vm}/quit", post(quit))
        .route("/v1/vms/{vm}/retry", post(retry))
        .route("/v1/sessions/{session}", get(session))
        .with_state(registry)
        .merge(deletion)
}

async fn power_down(State(registry): State<Registry>, Path(vm): Path<String>) -> Response {
    answer(registry.power_down(&vm).await)
}

async fn quit(State(registry): State<Registry>, Path(vm): Path<String>) -> Response {
    answer(registry.quit(&vm).await)
}

async fn retry(State(registry): State<Registry>, Path(vm): Path<String>) -> Response {
    answer(registry.retry(&vm).await)
}

async fn delete(State(Deleting { deleter, past }): State<Deleting>, Path(vm): Path<String>) -> Response {
    if let Ok(there) = deleter.registry.find(&vm) {
        let alive = ControlError::Alive(there.name, there.stage.to_string());
        return answer(Err::<(), _>(alive));
    }
    let read = tokio::task::spawn_blocking(move || past()).await;
    let outcome = match read.map_err(|e| e.to_string()).and_then(|past| past.map_err(|e| e.to_string())) {
        Ok(past) => match past.find(&vm) {
            Some(past) => deleter.delete(past).await,
            None => Err(ControlError::NoVm { name: vm, hint: ", nor was one, as far as the logs go back".to_owned() }),
        },
        Err(why) => Err(ControlError::Log(why)),
    };
    answer(outcome)
}

async fn session(State(registry): State<Registry>, Path(session): Path<String>, Query(wait): Query<Wait>) -> Response {
    let Ok(session) = session.parse::<SessionId>() else {
        let error = format!("{session:?} is no session's id");
        return (StatusCode::BAD_REQUEST, Json(serde_json::json!({ "error": error }))).into_response();
    };
    let wait = Duration::from_millis(wait.wait_ms).min(MAX_WAIT);
    Json(registry.ended_within(session, wait).await).into_response()
}

fn answer(outcome: Result<impl Serialize, ControlError>) -> Response {
    let error = match outcome {
        Ok(done) => return Json(done).into_response(),
        Err(error) => error,
    };
    let status = match &error {
        ControlError::NoVm { .. } => StatusCode::NOT_FOUND,
        ControlError::Several(..)
        | ControlError::NotRunning(..)
        | ControlError::NotRefused(..)
        | ControlError::Alive(..)
        | ControlError::Deleted(_)
        | ControlError::RefusedAgain(_) => StatusCode::CONFLICT,
        ControlError::Monitor { .. } | ControlError::Log(_) => StatusCode::BAD_GATEWAY,
    };
    (status, Json(serde_json::json!({"error": error.to_string()}))).into_response()
}
