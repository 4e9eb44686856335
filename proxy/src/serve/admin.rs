//! The Unix socket for the proxy's own command line, and the client for it.

use std::{io, os::unix::fs::PermissionsExt as _, path::Path};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path as UrlPath, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use http_body_util::BodyExt as _;
use hyper::{Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::{UnixListener, UnixStream};

use super::Doors;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Boot {
    boot: Option<u32>,
}

/// Serves the command line until the process ends. Only the owner of the process can connect.
///
/// # Errors
/// When the socket cannot be made.
pub async fn serve_admin(path: &Path, doors: Doors) -> io::Result<()> {
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
        .with_state(doors);
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

/// Asks the running proxy.
///
/// # Errors
/// When no proxy answers at the socket, or it refuses.
pub async fn ask(socket: &Path, path: &str) -> io::Result<Vec<u8>> {
    let stream = UnixStream::connect(socket).await.map_err(|e| {
        io::Error::new(
            e.kind(),
            format!("no proxy answers at {}: {e}; is `onequote-proxy run` running?", socket.display()),
        )
    })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    let connection = tokio::spawn(connection);
    let request = Request::get(path).header("host", "proxy").body(String::new()).map_err(io::Error::other)?;
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(io::Error::other)?.to_bytes();
    drop(sender);
    connection.abort();
    if status.is_success() {
        return Ok(body.to_vec());
    }
    let text = serde_json::from_slice::<serde_json::Value>(&body)
        .ok()
        .and_then(|v| v["error"].as_str().map(str::to_owned))
        .unwrap_or_else(|| status.to_string());
    Err(io::Error::other(text))
}
