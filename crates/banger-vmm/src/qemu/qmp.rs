//! QMP, the part of it that a shim speaks: one JSON object a line, events between replies.

use serde::Deserialize;
use serde_json::{Value, json};

/// The longest line that is read; QEMU's own are far shorter.
pub const MAX_LINE_BYTES: usize = 64 * 1024;

/// A line from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The first line.
    Greeting,
    /// A command's answer: `Ok` with its value, or QEMU's description of the error.
    Answer {
        /// The id that was sent with the command.
        id: Option<u64>,
        /// The outcome.
        result: Result<Value, String>,
    },
    /// Something happened.
    Event(Event),
}

/// The events that matter; all others are [`Event::Other`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The machine ends, for a reason such as `guest-shutdown`, `guest-reset` or `host-qmp-quit`.
    Shutdown {
        /// QEMU's word for it.
        reason: String,
    },
    /// The vCPUs were stopped.
    Stop,
    /// They run on.
    Resume,
    /// A drive could not be written.
    BlockError {
        /// QEMU stopped the vCPUs because of it.
        stopped: bool,
        /// The host has no space left.
        no_space: bool,
    },
    /// A panic device told of the guest's panic.
    Panicked,
    /// The guest opened or closed its end of the agent's port.
    AgentPort {
        /// Opened.
        open: bool,
    },
    /// Anything else.
    Other,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    id: Option<u64>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<RawError>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Deserialize)]
struct RawError {
    desc: String,
}

/// Reads one line; `None` is a line that is no QMP.
pub fn parse(line: &[u8]) -> Option<Message> {
    let raw: Raw = serde_json::from_slice(line).ok()?;
    if let Some(name) = raw.event {
        return Some(Message::Event(event(&name, &raw.data)));
    }
    if let Some(error) = raw.error {
        return Some(Message::Answer {
            id: raw.id,
            result: Err(error.desc),
        });
    }
    if let Some(value) = raw.value {
        return Some(Message::Answer {
            id: raw.id,
            result: Ok(value),
        });
    }
    raw.greeting.map(|_| Message::Greeting)
}

fn event(name: &str, data: &Value) -> Event {
    let flag = |key: &str| data.get(key).and_then(Value::as_bool).unwrap_or(false);
    let text = |key: &str| data.get(key).and_then(Value::as_str).unwrap_or_default();
    match name {
        "SHUTDOWN" => Event::Shutdown {
            reason: text("reason").to_owned(),
        },
        "STOP" => Event::Stop,
        "RESUME" => Event::Resume,
        "BLOCK_IO_ERROR" => Event::BlockError {
            stopped: text("action") == "stop",
            no_space: flag("nospace"),
        },
        "GUEST_PANICKED" => Event::Panicked,
        "VSERPORT_CHANGE" if text("id") == "agent" => Event::AgentPort { open: flag("open") },
        _ => Event::Other,
    }
}

/// The line that executes `command`.
pub fn command(command: &str, id: u64) -> Vec<u8> {
    let mut line = json!({ "execute": command, "id": id })
        .to_string()
        .into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_answers_and_events_are_told_apart() {
        assert_eq!(
            parse(br#"{"QMP": {"version": {"qemu": {"major": 10}}, "capabilities": ["oob"]}}"#),
            Some(Message::Greeting)
        );
        assert_eq!(
            parse(br#"{"return": {}, "id": 7}"#),
            Some(Message::Answer {
                id: Some(7),
                result: Ok(json!({}))
            })
        );
        assert_eq!(
            parse(br#"{"id": 8, "error": {"class": "GenericError", "desc": "no"}}"#),
            Some(Message::Answer {
                id: Some(8),
                result: Err("no".to_owned())
            })
        );
        assert_eq!(parse(b"HTTP/1.1 200 OK"), None);
        assert_eq!(parse(b"{}"), None);
    }

    #[test]
    fn events_that_matter_are_read_and_others_are_passed_over() {
        let read = |line: &str| match parse(line.as_bytes()) {
            Some(Message::Event(event)) => event,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            read(
                r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#
            ),
            Event::Shutdown {
                reason: "guest-reset".to_owned()
            }
        );
        assert_eq!(
            read(
                r#"{"event": "BLOCK_IO_ERROR", "data": {"device": "drive3", "nospace": true, "action": "stop"}}"#
            ),
            Event::BlockError {
                stopped: true,
                no_space: true
            }
        );
        assert_eq!(
            read(r#"{"event": "VSERPORT_CHANGE", "data": {"id": "agent", "open": true}}"#),
            Event::AgentPort { open: true }
        );
        assert_eq!(
            read(r#"{"event": "VSERPORT_CHANGE", "data": {"id": "other", "open": true}}"#),
            Event::Other
        );
        assert_eq!(read(r#"{"event": "STOP"}"#), Event::Stop);
        assert_eq!(read(r#"{"event": "RTC_CHANGE"}"#), Event::Other);
    }

    #[test]
    fn a_command_is_one_line() {
        assert_eq!(
            command("query-status", 3),
            b"{\"execute\":\"query-status\",\"id\":3}\n"
        );
    }
}
