//! What the proxy's own command line may do to VMs.

use std::time::Duration;

use axum::{
    Json, Router,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use onequote_evidence::id::SessionId;
use serde::Deserialize;

use crate::vm::{ControlError, LiveVm, Registry};

/// The longest that one question waits for the end of a VM. Who wants to wait longer asks again.
const MAX_WAIT: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wait {
    #[serde(default)]
    wait_ms: u64,
}

pub(super) fn router(registry: Registry) -> Router {
    Router::new()
        .route("/v1/vms/{vm}/power-down", post(power_down))
        .route("/v1/vms/{vm}/quit", post(quit))
        .route("/v1/vms/{vm}/retry", post(retry))
        .route("/v1/sessions/{session}", get(session))
        .with_state(registry)
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

async fn session(State(registry): State<Registry>, Path(session): Path<String>, Query(wait): Query<Wait>) -> Response {
    let Ok(session) = session.parse::<SessionId>() else {
        let error = format!("{session:?} is no session's id");
        return (StatusCode::BAD_REQUEST, Json(serde_json::json!({ "error": error }))).into_response();
    };
    let wait = Duration::from_millis(wait.wait_ms).min(MAX_WAIT);
    Json(registry.ended_within(session, wait).await).into_response()
}

fn answer(outcome: Result<LiveVm, ControlError>) -> Response {
    let error = match outcome {
        Ok(vm) => return Json(vm).into_response(),
        Err(error) => error,
    };
    let status = match &error {
        ControlError::NoVm { .. } => StatusCode::NOT_FOUND,
        ControlError::Several(..)
        | ControlError::NotRunning(..)
        | ControlError::NotRefused(..)
        | ControlError::RefusedAgain(_) => StatusCode::CONFLICT,
        ControlError::Monitor { .. } => StatusCode::BAD_GATEWAY,
    };
    (status, Json(serde_json::json!({"error": error.to_string()}))).into_response()
}
