//! Makes text from guests harmless on a terminal: what is not plain text is shown, not sent.
//!
//! Every control character but newline and tab is escaped, C0, DEL and C1 alike, and so are bytes that are no UTF-8
//! and the characters that turn the direction of writing. A carriage return before a newline, which consoles send at
//! every line's end, is dropped.

/// Escapes a stream that comes in pieces; a character may be cut between two of them.
#[derive(Debug, Default)]
pub(crate) struct Escaper {
    /// The beginning of a character whose end has not come yet, or carriage returns that may precede a newline.
    pending: Vec<u8>,
}

impl Escaper {
    /// The harmless form of `bytes`, as far as they are complete.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let pending = std::mem::take(&mut self.pending);
        let mut out = String::with_capacity(pending.len());
        let mut rest = pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    self.push_valid(valid, &mut out);
                    return out;
                }
                Err(error) => {
                    let (valid, bad) = rest.split_at(error.valid_up_to());
                    // The split is where the decoder said.
                    let valid = std::str::from_utf8(valid).unwrap_or_default();
                    let Some(length) = error.error_len() else {
                        push_escaped(valid, &mut out);
                        self.pending = bad.to_vec();
                        return out;
                    };
                    push_escaped(valid, &mut out);
                    for byte in &bad[..length] {
                        out.push_str(&format!("\\x{byte:02x}"));
                    }
                    rest = &bad[length..];
                }
            }
        }
    }

    /// What was held back, at the stream's end.
    pub(crate) fn finish(&mut self) -> String {
        let mut out = String::new();
        for byte in self.pending.drain(..) {
            match byte {
                b'\r' => out.push_str("\\r"),
                byte => out.push_str(&format!("\\x{byte:02x}")),
            }
        }
        out
    }

    /// Escapes `valid`, holding back carriage returns at its end.
    fn push_valid(&mut self, valid: &str, out: &mut String) {
        let body = valid.trim_end_matches('\r');
        push_escaped(body, out);
        self.pending = valid.as_bytes()[body.len()..].to_vec();
    }
}

fn push_escaped(text: &str, out: &mut String) {
    let mut returns = 0;
    for character in text.chars() {
        match character {
            '\r' => {
                returns += 1;
                continue;
            }
            '\n' => returns = 0,
            _ => {}
        }
        for _ in 0..std::mem::take(&mut returns) {
            out.push_str("\\r");
        }
        match character {
            '\n' | '\t' => out.push(character),
            '\0'..='\x1f' | '\x7f' => out.push_str(&format!("\\x{:02x}", u32::from(character))),
            '\u{80}'..='\u{9f}'
            | '\u{200e}'
            | '\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}' => {
                out.push_str(&format!("\\u{{{:x}}}", u32::from(character)));
            }
            _ => out.push(character),
        }
    }
    for _ in 0..returns {
        out.push_str("\\r");
    }
}

/// The harmless form of a whole text.
pub(crate) fn text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    push_escaped(text, &mut out);
    out
}

/// The harmless form of a text that must stay on its line.
pub(crate) fn line(value: &str) -> String {
    text(value).replace('\n', "\\n").replace('\t', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(bytes: &[u8]) -> String {
        let mut escaper = Escaper::default();
        let mut out = escaper.feed(bytes);
        out.push_str(&escaper.finish());
        out
    }

    #[test]
    fn plain_text_stays_as_it_is() {
        assert_eq!(
            whole("Debian GNU/Linux\tößé 日本\n".as_bytes()),
            "Debian GNU/Linux\tößé 日本\n"
        );
    }

    #[test]
    fn control_characters_are_shown_and_not_sent() {
        assert_eq!(whole(b"\x1b[2J\x07\x00\x7f"), "\\x1b[2J\\x07\\x00\\x7f");
        assert_eq!(whole("\u{9b}31m".as_bytes()), "\\u{9b}31m");
        assert_eq!(whole(b"\x9b31m\xff"), "\\x9b31m\\xff");
        assert_eq!(whole("a\u{202e}b".as_bytes()), "a\\u{202e}b");
    }

    #[test]
    fn line_ends_of_a_console_become_newlines_and_a_lone_return_is_shown() {
        assert_eq!(whole(b"a\r\nb\r\r\nc\rd\r"), "a\nb\nc\\rd\\r");
    }

    #[test]
    fn any_cut_of_a_stream_gives_the_same_text() {
        let bytes = b"ok \xc3\xb6\xe6\x97\xa5\r\n\x1b[0m\xc3\r\r\n\xf0\x9f\x90\xa6 \xe6\x97";
        let expected = whole(bytes);
        for cut in 0..=bytes.len() {
            for second in cut..=bytes.len() {
                let mut escaper = Escaper::default();
                let mut out = escaper.feed(&bytes[..cut]);
                out.push_str(&escaper.feed(&bytes[cut..second]));
                out.push_str(&escaper.feed(&bytes[second..]));
                out.push_str(&escaper.finish());
                assert_eq!(out, expected, "cut at {cut} and {second}");
            }
        }
        assert!(!expected.chars().any(|c| c.is_control() && c != '\n'));
    }

    #[test]
    fn a_line_stays_on_its_line() {
        assert_eq!(line("a\nb\tc"), "a\\nb c");
    }
}
