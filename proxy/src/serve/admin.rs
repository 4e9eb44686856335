//! The Unix socket for the proxy's own command line.

use std::{io, os::unix::fs::PermissionsExt as _, path::Path};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path as UrlPath, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Deserialize;
use tokio::net::UnixListener;

use super::{Deleting, Doors, vms};
use crate::vm::Registry;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Boot {
    boot: Option<u32>,
}

/// Serves the command line until the process ends. Only the owner of the process can connect.
///
/// # Errors
/// When the socket cannot be made.
pub async fn serve_admin(path: &Path, doors: Doors, registry: Registry, deleting: Deleting) -> io::Result<()> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(named(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(named)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(named)?;
    let app = Router::new()
        .route("/v1/status", get(super::status))
        .route("/v1/guests/{vm}/ima", get(guest_ima))
        .with_state(doors)
        .merge(vms::router(registry, deleting));
    axum::serve(listener, app).await
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
