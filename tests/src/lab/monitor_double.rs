//! Processes that answer at a monitor as a QEMU did: where a thousand VMs are wanted and there is memory for twenty.
//!
//! A real QEMU that waits under `-S` is met by a proxy once and writes down, by its own tracing, what it was asked and what it
//! answered ([`Recording`]). A double gives the same answers, byte for byte but for its own name and UUID, its run state and
//! the command's id. It is a process of its own with QEMU's arguments; what it was never asked while it was recorded is an error,
//! which its log names.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Names the recording in a double's environment.
const RECORDING: &str = "ONEQUOTE_MONITOR_RECORDING";

/// What QEMU writes down for [`Recording::read`]: these arguments, and the file behind them.
pub const TRACE: [&str; 7] =
    ["-msg", "timestamp=on", "-trace", "monitor_qmp_respond", "-trace", "handle_qmp_command", "-D"];

/// What a monitor was asked and answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recording {
    greeting: Value,
    /// By command and arguments, as JSON.
    answers: BTreeMap<String, Value>,
}

impl Recording {
    /// Reads what QEMU traced.
    ///
    /// # Errors
    /// It is no such trace, or has no whole exchange.
    pub fn read(trace: &str) -> Result<Self> {
        let mut greeting = None;
        let mut asked: BTreeMap<(String, String), String> = BTreeMap::new();
        let mut answers = BTreeMap::new();
        for line in trace.lines() {
            // `PID@SECONDS:NAME mon ADDRESS req: JSON`, and the same with `resp:`.
            let mut words = line.splitn(5, ' ');
            let (Some(name), Some("mon"), Some(monitor), Some(kind), Some(json)) =
                (words.next(), words.next(), words.next(), words.next(), words.next())
            else {
                continue;
            };
            let Ok(mut message) = serde_json::from_str::<Value>(json) else { continue };
            let id = (monitor.to_owned(), message["id"].to_string());
            match kind {
                "req:" if name.ends_with(":handle_qmp_command") => {
                    asked.insert(id, question(&message));
                }
                "resp:" if message.get("QMP").is_some() => greeting = Some(message),
                "resp:" => {
                    if let Some(question) = asked.remove(&id) {
                        message.as_object_mut().context("an answer is an object")?.remove("id");
                        answers.insert(question, message);
                    }
                }
                _ => {}
            }
        }
        let greeting = greeting.context("the trace has no greeting")?;
        ensure!(!answers.is_empty(), "the trace has no answer");
        Ok(Self { greeting, answers })
    }

    /// The command line of a double: the program that calls [`serve_if_double`] first, with QEMU's arguments.
    ///
    /// # Errors
    /// The recording cannot be written to `file`.
    pub fn save(&self, file: &Path) -> Result<(&'static str, PathBuf)> {
        std::fs::write(file, serde_json::to_vec(self)?)?;
        Ok((RECORDING, file.to_owned()))
    }
}

fn question(message: &Value) -> String {
    json!([message["execute"], message.get("arguments").unwrap_or(&json!({}))]).to_string()
}

/// Lives as a double, if this process was started as one. Says whether it did.
///
/// # Errors
/// It was not started with a recording and QEMU's arguments, or something was asked that was not recorded.
pub fn serve_if_double() -> Result<bool> {
    let Some(recording) = std::env::var_os(RECORDING) else { return Ok(false) };
    let recording: Recording = serde_json::from_slice(&std::fs::read(recording)?)?;
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let after = |option: &str| {
        let at = arguments.iter().position(|a| a == option).with_context(|| format!("a double without {option}"))?;
        arguments.get(at + 1).and_then(|a| a.to_str()).with_context(|| format!("{option} without a value"))
    };
    let (name, uuid, monitor) = (after("-name")?, after("-uuid")?, after("-qmp")?);
    let socket = monitor.strip_prefix("unix:").and_then(|m| m.split(',').next()).context("-qmp unix:PATH,…")?;
    let listener = UnixListener::bind(socket)?;
    let mut double = Double { recording, name: name.to_owned(), uuid: uuid.to_owned(), running: false };
    loop {
        let (client, _) = listener.accept()?;
        if !double.serve(client)? {
            return Ok(true);
        }
    }
}

struct Double {
    recording: Recording,
    name: String,
    uuid: String,
    running: bool,
}

impl Double {
    /// Serves a client to its end. Says whether to go on.
    fn serve(&mut self, mut client: UnixStream) -> Result<bool> {
        let mut lines = BufReader::new(client.try_clone()?);
        writeln!(client, "{}", self.recording.greeting)?;
        let mut line = String::new();
        while lines.read_line(&mut line)? > 0 {
            let request: Value = serde_json::from_str(&line)?;
            line.clear();
            let mut out = String::new();
            let mut answer = self.answer(&request, &mut out)?;
            answer["id"] = request["id"].clone();
            out += &format!("{answer}\r\n");
            client.write_all(out.as_bytes())?;
            if request["execute"] == "quit" {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn answer(&mut self, request: &Value, events: &mut String) -> Result<Value> {
        Ok(match request["execute"].as_str() {
            Some("cont") => {
                self.running = true;
                let time = json!({"seconds": 1, "microseconds": 0});
                *events += &format!("{}\r\n", json!({"timestamp": time, "event": "RESUME"}));
                json!({"return": {}})
            }
            Some("query-status") => {
                let status = if self.running { "running" } else { "prelaunch" };
                json!({"return": {"status": status, "singlestep": false, "running": self.running}})
            }
            Some("query-name") => json!({"return": {"name": self.name}}),
            Some("query-uuid") => json!({"return": {"UUID": self.uuid}}),
            Some("quit") => json!({"return": {}}),
            _ => match self.recording.answers.get(&question(request)) {
                Some(answer) => answer.clone(),
                None => bail!("never asked of the QEMU that was recorded: {request}"),
            },
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    const TRACE: &str = "\
1@2.3:monitor_qmp_respond mon 0xa resp: {\"QMP\": {\"version\": {}, \"capabilities\": []}}\n\
1@2.3:handle_qmp_command mon 0xa req: {\"execute\": \"query-block\", \"id\": 7}\n\
1@2.3:handle_qmp_command mon 0xb req: {\"execute\": \"query-kvm\", \"arguments\": {}, \"id\": 7}\n\
1@2.3:runstate_set current_run_state 6 (prelaunch) new_state 9 (running)\n\
1@2.3:monitor_qmp_respond mon 0xb resp: {\"return\": {\"enabled\": false}, \"id\": 7}\n\
1@2.3:monitor_qmp_respond mon 0xa resp: {\"error\": {\"class\": \"GenericError\"}, \"id\": 7}\n";

    #[test]
    fn answers_are_those_that_were_given_to_the_same_question() {
        let recording = Recording::read(TRACE).unwrap();
        let mut double = Double { recording, name: "n".into(), uuid: "u".into(), running: false };
        let mut answer = |command: &str| {
            let mut events = String::new();
            let request = json!({"execute": command, "arguments": {}, "id": 1});
            double.answer(&request, &mut events).map(|answer| (answer, events))
        };
        assert_eq!(answer("query-kvm").unwrap().0, json!({"return": {"enabled": false}}));
        assert_eq!(answer("query-block").unwrap().0, json!({"error": {"class": "GenericError"}}));
        assert_eq!(answer("query-name").unwrap().0, json!({"return": {"name": "n"}}));
        assert_eq!(answer("query-status").unwrap().0["return"]["status"], "prelaunch");
        assert!(answer("cont").unwrap().1.contains("RESUME"));
        assert_eq!(answer("query-status").unwrap().0["return"]["status"], "running");
        assert!(answer("query-cpus-fast").is_err());
        assert!(Recording::read("").is_err());
    }
}
