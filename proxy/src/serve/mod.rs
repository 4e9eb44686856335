//! The doors of the proxy: mTLS for verifiers, a Unix socket for its own command line.
//!
//! Verifiers (TLS 1.3, pinned certificates on both sides):
//! - `POST /v1/evidence`, JSON `{"nonce": hex, "have": …}` → an evidence stream, without the beginnings of logs that the verifier
//!   has. The challenge's channel binding is the TLS
//!   exporter of this very connection (RFC 9266), so that evidence relayed over another connection does not answer it.
//! - `GET /v1/status` → JSON.
//!
//! The Unix socket, for its owner only:
//! - `GET /v1/status` and `GET /v1/guests/{VM}/ima?boot=N`.
//! - `POST /v1/join`, JSON of a [`crate::join::Wish`] → JSON of what the verifier gave; 502 when nothing came of it.
//! - `POST /v1/vms/{VM}/power-down`, `…/quit`, `…/retry` → JSON of the VM as it was when it was asked, and
//!   `…/delete` → JSON of what was logged; 404 when there is
//!   no such VM, 409 when it cannot do that now, 502 when its monitor fails.
//! - `POST /v1/verifiers/{NAME}/release` → JSON of what each verifier has accepted; 404 when it is not enrolled.
//! - `GET /v1/sessions/{SESSION}?wait_ms=N` → JSON of the VM as soon as it is gone (`null`), at the latest after the wait.

mod admin;
mod client;
mod patience;
mod release;
mod tls;
mod vms;

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Json, Router,
    body::Body,
    extract::{ConnectInfo, DefaultBodyLimit, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use onequote_evidence::{
    id::Nonce,
    stream::{Have, MAX_KNOWN_GUESTS, MEDIA_TYPE},
};
use serde::Deserialize;

pub use admin::serve_admin;
pub use client::{AskError, ask, ask_json, tell, tell_json};
pub use release::Releasing;
pub use tls::{Peer, TlsListener};
pub use vms::{Deleting, ReadPast};

use crate::{
    attest::AttestHandle,
    rate::{Kind, limited},
    status::StatusSource,
};

/// What the handlers need.
#[derive(Clone)]
pub struct Doors {
    /// Where challenges go.
    pub attest: AttestHandle,
    /// What status says.
    pub status: Arc<dyn StatusSource>,
    /// For whom the log is kept.
    pub releasing: Releasing,
}

/// A challenge. Unknown fields are refused, so that a verifier never believes an option was honoured.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EvidenceRequest {
    nonce: Nonce,
    #[serde(default)]
    have: Have,
}

/// The most bytes of a request: what a verifier has of [`MAX_KNOWN_GUESTS`] guests, each in less than 256 bytes, and of the
/// rest.
const MAX_REQUEST: usize = 4096 + MAX_KNOWN_GUESTS * 256;

/// Serves verifiers until the process ends.
///
/// # Errors
/// When the listener fails for good.
pub async fn serve_verifiers(listener: TlsListener, doors: Doors) -> std::io::Result<()> {
    let app = Router::new()
        .route("/v1/evidence", post(evidence))
        .route("/v1/status", get(status))
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .with_state(doors);
    axum::serve(listener, app.into_make_service_with_connect_info::<Peer>()).await
}

async fn evidence(
    State(doors): State<Doors>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Json(request): Json<EvidenceRequest>,
) -> Response {
    doors.releasing.asked(&peer.verifier, &request.have).await;
    match doors.attest.challenge(request.nonce, peer.binding.clone(), request.have).await {
        Ok(stream) => {
            limited!(Kind::Answered, info, verifier = %peer.verifier, bytes = stream.left(), "answered a challenge");
            ([(header::CONTENT_TYPE, MEDIA_TYPE)], Body::new(stream)).into_response()
        }
        Err(e) => {
            limited!(Kind::Unanswered, warn, verifier = %peer.verifier, "cannot answer a challenge: {e}");
            (StatusCode::SERVICE_UNAVAILABLE, Json(serde_json::json!({"error": e.to_string()}))).into_response()
        }
    }
}

async fn status(State(doors): State<Doors>) -> Response {
    Json(doors.status.status()).into_response()
}

/// Writes the address that the listener got where the operator's scripts find it.
///
/// # Errors
/// Of the file system.
pub fn publish_address(path: &std::path::Path, address: SocketAddr) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, format!("{address}\n"))?;
    std::fs::rename(temporary, path)
}
