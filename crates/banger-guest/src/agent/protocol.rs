//! Lines in and out, bounded both ways.

use banger_guest::agent_protocol::{FromGuest, MAX_LINE_BYTES, ToGuest};

/// Splits a byte stream into lines; a line that is too long is dropped whole.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    partial: Vec<u8>,
    too_long: bool,
}

impl Lines {
    /// Takes more bytes and gives the lines that are whole now, without their ends.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            if self.partial.len() + text.len() >= MAX_LINE_BYTES {
                self.too_long = true;
                self.partial.clear();
            }
            if !self.too_long {
                self.partial.extend_from_slice(text);
            }
            if ends {
                let line = std::mem::take(&mut self.partial);
                if !std::mem::take(&mut self.too_long) && !line.is_empty() {
                    lines.push(line);
                }
            }
        }
        lines
    }

    /// Forgets an unfinished line: its sender is gone.
    pub(crate) fn clear(&mut self) {
        self.partial.clear();
        self.too_long = false;
    }
}

/// Reads one line of the host's.
pub(crate) fn decode(line: &[u8]) -> Result<ToGuest, String> {
    serde_json::from_slice(line)
        .map_err(|error| format!("the host's message cannot be read: {error}"))
}

/// One line for the host. A warning's text is cut to fit.
pub(crate) fn encode(message: &FromGuest) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).expect("these messages hold only texts and numbers");
    if line.len() >= MAX_LINE_BYTES {
        let text = "a warning was too long to be told".to_owned();
        line = serde_json::to_vec(&FromGuest::Warning { text })
            .expect("these messages hold only texts and numbers");
    }
    line.push(b'\n');
    line
}

/// A text of at most `limit` bytes.
pub(crate) fn cut(text: &str, limit: usize) -> String {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_across_pieces() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"one\ntw"), vec![b"one".to_vec()]);
        assert_eq!(
            lines.push(b"o\n\nthree\n"),
            vec![b"two".to_vec(), b"three".to_vec()]
        );
    }

    #[test]
    fn a_line_that_is_too_long_is_dropped_and_the_next_one_heard() {
        let mut lines = Lines::default();
        for _ in 0..10 {
            assert!(lines.push(&[b'x'; 1000]).is_empty());
        }
        assert!(lines.push(b"tail\n").is_empty());
        assert_eq!(lines.push(b"next\n"), vec![b"next".to_vec()]);
        let longest = vec![b'x'; MAX_LINE_BYTES - 1];
        assert_eq!(lines.push(&[&longest[..], b"\n"].concat()), vec![longest]);
    }

    #[test]
    fn an_unfinished_line_of_a_host_that_went_is_forgotten() {
        let mut lines = Lines::default();
        lines.push(b"half");
        lines.clear();
        assert_eq!(lines.push(b"whole\n"), vec![b"whole".to_vec()]);
    }

    #[test]
    fn a_message_that_cannot_be_read_is_an_error_and_no_panic() {
        assert_eq!(decode(br#"{"type":"ping"}"#), Ok(ToGuest::Ping));
        for bad in [&b"{"[..], b"null", br#"{"type":"dance"}"#, b"\xff\xfe"] {
            decode(bad).unwrap_err();
        }
    }

    #[test]
    fn no_line_is_longer_than_the_limit() {
        let text = "\u{1}".repeat(2000);
        let line = encode(&FromGuest::Warning { text });
        assert!(line.len() <= MAX_LINE_BYTES);
        assert_eq!(line.last(), Some(&b'\n'));
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(cut("häh", 2), "h");
        assert_eq!(cut("hä", 9), "hä");
    }
}
