//! The command line's way to the running proxy.

use std::{
    io,
    path::{Path, PathBuf},
};

use http_body_util::BodyExt as _;
use hyper::{Method, Request, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

/// The longest answer that is taken: a guest's whole list.
const MAX_ANSWER: usize = 1 << 30;

/// Why the running proxy gives no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens, or not to this user.
    #[error("no proxy answers at {socket}: {error}; is `onequote-proxy run` running, and are you its user?")]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It went away, or is no proxy.
    #[error("the proxy ended while it was asked: {0}")]
    Broken(String),
    /// It says no.
    #[error("{text}")]
    Refused {
        /// Its answer's status.
        status: StatusCode,
        /// Why.
        text: String,
    },
}

impl From<AskError> for io::Error {
    fn from(e: AskError) -> Self {
        match &e {
            AskError::Unreachable { error, .. } => Self::new(error.kind(), e),
            _ => Self::other(e),
        }
    }
}

/// Asks the running proxy for bytes.
///
/// # Errors
/// When no proxy answers at the socket, or it refuses.
pub async fn ask(socket: &Path, path: &str) -> io::Result<Vec<u8>> {
    Ok(request(socket, Method::GET, path, String::new()).await?)
}

/// Asks the running proxy for something in JSON.
///
/// # Errors
/// [`AskError`].
pub async fn ask_json<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, AskError> {
    read(&request(socket, Method::GET, path, String::new()).await?)
}

/// Tells the running proxy to do something.
///
/// # Errors
/// [`AskError`].
pub async fn tell<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, AskError> {
    read(&request(socket, Method::POST, path, String::new()).await?)
}

/// Tells the running proxy to do something that takes more than a path to say.
///
/// # Errors
/// [`AskError`].
pub async fn tell_json<T: DeserializeOwned>(socket: &Path, path: &str, what: &impl Serialize) -> Result<T, AskError> {
    let body = serde_json::to_string(what).map_err(|e| AskError::Broken(e.to_string()))?;
    read(&request(socket, Method::POST, path, body).await?)
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, AskError> {
    serde_json::from_slice(body).map_err(|e| AskError::Broken(e.to_string()))
}

async fn request(socket: &Path, method: Method, path: &str, body: String) -> Result<Vec<u8>, AskError> {
    let unreachable = |error| AskError::Unreachable { socket: socket.to_owned(), error };
    let stream = UnixStream::connect(socket).await.map_err(unreachable)?;
    let broken = |e: hyper::Error| AskError::Broken(e.to_string());
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let connection = tokio::spawn(connection);
    let request = Request::builder().method(method).uri(path).header("host", "proxy");
    let request = request.header("content-type", "application/json").body(body);
    let request = request.map_err(|e| AskError::Broken(e.to_string()))?;
    let response = sender.send_request(request).await.map_err(broken)?;
    let status = response.status();
    let body = http_body_util::Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    let body = body.map_err(|e| AskError::Broken(e.to_string()))?.to_bytes();
    drop(sender);
    connection.abort();
    if status.is_success() {
        return Ok(body.to_vec());
    }
    let text = serde_json::from_slice::<serde_json::Value>(&body)
        .ok()
        .and_then(|v| v["error"].as_str().map(str::to_owned))
        .unwrap_or_else(|| status.to_string());
    Err(AskError::Refused { status, text })
}
