//! What fuzzing may reach of the reading of clients' commands, with what must hold.

use super::{
    Limits,
    frame::{Frame, Framer},
    request::{Request, returned},
};

/// Cuts what a client sent and reads the commands in it.
///
/// # Panics
/// When how the bytes arrive makes a difference, a frame is longer than its limit, or a command that was read and is
/// written as QEMU gets it reads otherwise.
pub fn commands(bytes: &[u8], pieces: usize, oob: bool) {
    let whole = frames(bytes, bytes.len());
    assert_eq!(frames(bytes, pieces), whole);
    for frame in whole {
        let Frame::Value(value) = frame else { continue };
        let Ok(request) = Request::parse(&value, oob) else { continue };
        let mut written = serde_json::Map::new();
        let key = if request.oob { "exec-oob" } else { "execute" };
        written.insert(key.to_owned(), request.command.clone().into());
        written.extend(request.arguments.clone().map(|map| ("arguments".to_owned(), map.into())));
        written.extend(request.id.clone().map(|id| ("id".to_owned(), id)));
        let line = serde_json::Value::from(written).to_string();
        let mut framer = framer();
        let Some(Frame::Value(again)) = framer.next(&mut line.as_bytes()) else { panic!("cut otherwise: {line}") };
        assert_eq!(Request::parse(&again, oob), Ok(request.clone()));
        let null = serde_json::value::RawValue::NULL;
        let answer: serde_json::Value = serde_json::from_slice(&returned(request.id.as_ref(), null)).expect("JSON");
        assert_eq!(answer.get("id"), request.id.as_ref());
    }
}

fn framer() -> Framer {
    let limits = Limits::default();
    Framer::new(limits.command, limits.nesting)
}

fn frames(bytes: &[u8], pieces: usize) -> Vec<Frame> {
    let mut framer = framer();
    let mut found = Vec::new();
    for mut piece in bytes.chunks(pieces.max(1)) {
        while let Some(frame) = framer.next(&mut piece) {
            if let Frame::Value(value) = &frame {
                assert!(value.len() <= Limits::default().command + 2);
            }
            found.push(frame);
        }
    }
    found
}
