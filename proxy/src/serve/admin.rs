//! The Unix socket for the proxy's own command line.

use std::{io, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path as UrlPath, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Deserialize;
use tokio::net::UnixListener;

use super::{Deleting, Doors, release, vms};
use crate::{
    join::{JoinError, Members, Wish},
    vm::Registry,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Boot {
    boot: Option<u32>,
}

/// Serves the command line until the process ends. Only the owner of the process can connect.
///
/// # Errors
/// When the socket cannot be made.
pub async fn serve_admin(
    path: &Path,
    doors: Doors,
    registry: Registry,
    deleting: Deleting,
    members: Arc<Members>,
) -> io::Result<()> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(named(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(named)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(named)?;
    let releasing = release::router(doors.releasing.clone());
    let app = Router::new()
        .route("/v1/status", get(super::status))
        .route("/v1/guests/{vm}/ima", get(guest_ima))
        .with_state(doors)
        .merge(Router::new().route("/v1/join", post(join)).with_state(members))
        .merge(vms::router(registry, deleting))
        .merge(releasing);
    axum::serve(listener, app).await
}

async fn join(State(members): State<Arc<Members>>, Json(wish): Json<Wish>) -> Response {
    // It goes on when the command line goes away: what the verifier gave must not be lost.
    let joined = tokio::spawn(async move { members.join(wish).await }).await;
    match joined.unwrap_or_else(|e| Err(JoinError::File(io::Error::other(e)))) {
        Ok(done) => Json(done).into_response(),
        Err(e) => (StatusCode::BAD_GATEWAY, Json(serde_json::json!({"error": e.to_string()}))).into_response(),
    }
}

async fn guest_ima(State(doors): State<Doors>, UrlPath(vm): UrlPath<String>, Query(query): Query<Boot>) -> Response {
    match doors.attest.guest_list(&vm, query.boot).await {
        Some(list) => Body::from(list).into_response(),
        None => {
            let error = format!("no running VM {vm} with a list of that boot; `status` shows what there is");
            (StatusCode::NOT_FOUND, Json(serde_json::json!({"error": error}))).into_response()
        }
    }
}
