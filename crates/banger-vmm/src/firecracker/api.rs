//! Firecracker's API, the part of it that a shim speaks: small HTTP requests, one connection each.

use serde_json::{Value, json};

/// The longest response that is read.
pub const MAX_RESPONSE_BYTES: usize = 64 * 1024;

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Request {
    /// The instance's state.
    Describe,
    /// Pause the vCPUs.
    Pause,
    /// Let them run on.
    Resume,
    /// Press Ctrl-Alt-Del.
    CtrlAltDel,
    /// Write the metrics now; otherwise they come once a minute.
    FlushMetrics,
}

impl Request {
    /// The method, the path and the body.
    fn parts(self) -> (&'static str, &'static str, Option<Value>) {
        match self {
            Self::Describe => ("GET", "/", None),
            Self::Pause => ("PATCH", "/vm", Some(json!({ "state": "Paused" }))),
            Self::Resume => ("PATCH", "/vm", Some(json!({ "state": "Resumed" }))),
            Self::CtrlAltDel => (
                "PUT",
                "/actions",
                Some(json!({ "action_type": "SendCtrlAltDel" })),
            ),
            Self::FlushMetrics => (
                "PUT",
                "/actions",
                Some(json!({ "action_type": "FlushMetrics" })),
            ),
        }
    }

    /// The request's bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        let (method, path, body) = self.parts();
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
        if !body.is_empty() {
            request.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                body.len()
            ));
        }
        request.push_str("\r\n");
        request.push_str(&body);
        request.into_bytes()
    }
}

/// A whole response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The body, usually JSON or nothing.
    pub body: Vec<u8>,
}

/// The bytes are no HTTP response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("firecracker's answer is not HTTP")]
pub struct NotHttp;

impl Response {
    /// Reads a response; `None` while it is not complete.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, NotHttp> {
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
            return if bytes.len() > MAX_RESPONSE_BYTES {
                Err(NotHttp)
            } else {
                Ok(None)
            };
        };
        let head = std::str::from_utf8(&bytes[..end]).map_err(|_| NotHttp)?;
        let mut lines = head.split("\r\n");
        let status = lines
            .next()
            .and_then(|line| line.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok())
            .ok_or(NotHttp)?;
        let length = lines
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .map_or(Ok(0), |(_, value)| value.trim().parse::<usize>())
            .map_err(|_| NotHttp)?;
        if length > MAX_RESPONSE_BYTES {
            return Err(NotHttp);
        }
        Ok(bytes[end + 4..].get(..length).map(|body| Self {
            status,
            body: body.to_vec(),
        }))
    }

    /// `Ok` for a success, else Firecracker's own message.
    pub fn outcome(&self) -> Result<(), String> {
        if (200..300).contains(&self.status) {
            return Ok(());
        }
        let message = serde_json::from_slice::<Value>(&self.body)
            .ok()
            .and_then(|body| Some(body.get("fault_message")?.as_str()?.to_owned()));
        Err(message.unwrap_or_else(|| format!("HTTP status {}", self.status)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_whole_http_with_the_length_of_their_body() {
        assert_eq!(
            Request::Pause.to_bytes(),
            b"PATCH /vm HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
              Content-Type: application/json\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}"
        );
        assert!(Request::Describe.to_bytes().ends_with(b"\r\n\r\n"));
    }

    #[test]
    fn a_response_is_complete_only_with_its_whole_body() {
        let whole = b"HTTP/1.1 200 \r\nServer: Firecracker API\r\nContent-length: 2\r\n\r\n{}";
        for cut in 0..whole.len() {
            assert_eq!(Response::parse(&whole[..cut]), Ok(None), "{cut}");
        }
        let response = Response::parse(whole).unwrap().unwrap();
        assert_eq!(
            (response.status, response.body.as_slice()),
            (200, &b"{}"[..])
        );
        let none = Response::parse(b"HTTP/1.1 204 \r\n\r\n").unwrap().unwrap();
        assert_eq!(none.outcome(), Ok(()));
        assert_eq!(Response::parse(b"QMP\r\n\r\n"), Err(NotHttp));
    }

    #[test]
    fn a_refusal_speaks_in_firecrackers_words() {
        let response = Response {
            status: 400,
            body: br#"{"fault_message":"not yet"}"#.to_vec(),
        };
        assert_eq!(response.outcome(), Err("not yet".to_owned()));
    }
}
