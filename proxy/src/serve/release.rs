//! For whom the log is kept: verifiers acknowledge what they have, and the operator releases one that does not come.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};

use onequote_evidence::stream::Have;

use crate::{
    log::{Acknowledged, LogHandle},
    rate::{Kind, limited},
};

/// What verifiers have accepted, and the log of which that may go.
#[derive(Clone)]
pub struct Releasing {
    /// What verifiers have accepted.
    pub acknowledged: Arc<Acknowledged>,
    /// The log.
    pub log: LogHandle,
}

impl Releasing {
    /// A verifier asks, and says what it has.
    pub async fn asked(&self, verifier: &str, have: &Have) {
        self.acknowledged.seen(verifier);
        let place = have.statement.and_then(|statement| self.acknowledged.accepted(verifier, &statement));
        if let Some(place) = place
            && let Err(error) = self.log.drop_before(place).await
        {
            limited!(Kind::Unanswered, warn, verifier, "the oldest part of the log cannot be dropped: {error}");
        }
    }
}

pub(super) fn router(releasing: Releasing) -> Router {
    Router::new().route("/v1/verifiers/{name}/release", post(release)).with_state(releasing)
}

async fn release(State(Releasing { acknowledged, log }): State<Releasing>, Path(name): Path<String>) -> Response {
    let failed =
        |error: String| (StatusCode::INTERNAL_SERVER_ERROR, Json(serde_json::json!({"error": error}))).into_response();
    match acknowledged.release(&name) {
        Ok(true) => {}
        Ok(false) => {
            let error = format!("no verifier {name} is enrolled here; `status` names them");
            return (StatusCode::NOT_FOUND, Json(serde_json::json!({"error": error}))).into_response();
        }
        Err(error) => return failed(format!("it cannot be written down: {error}")),
    }
    if let Some(place) = acknowledged.droppable()
        && let Err(error) = log.drop_before(place).await
    {
        return failed(error.to_string());
    }
    Json(acknowledged.all()).into_response()
}
