//! Messages of D-Bus, as many of its types as a call to systemd takes. All is little-endian.

/// A method call.
pub(super) const CALL: u8 = 1;
/// Its answer.
pub(super) const RETURN: u8 = 2;
/// Its refusal.
pub(super) const ERROR: u8 = 3;
/// What nobody asked for.
pub(super) const SIGNAL: u8 = 4;
/// What comes before the header's fields.
pub(super) const HEAD: usize = 16;
/// The longest message that is taken. systemd's signals about one unit have a few thousand bytes.
const MAX_BYTES: usize = 1 << 20;

/// Writes values one after the other, each where its type has to begin. It begins itself where a body may.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

/// A value whose type goes with it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
    Text(&'a str),
    Texts(&'a [&'a str]),
    Number(u64),
    Processes(&'a [u32]),
}

impl Writer {
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.align(4);
        self.0.extend(value.to_le_bytes());
    }

    /// Also the path of an object.
    pub(super) fn text(&mut self, text: &str) {
        self.u32(length(text.len()));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    pub(super) fn boolean(&mut self, value: bool) {
        self.u32(u32::from(value));
    }

    fn signature(&mut self, signature: &str) {
        self.0
            .push(u8::try_from(signature.len()).unwrap_or(u8::MAX));
        self.0.extend(signature.as_bytes());
        self.0.push(0);
    }

    /// An array of what begins at multiples of `to`.
    fn array(&mut self, to: usize, elements: impl FnOnce(&mut Self)) {
        self.u32(0);
        let place = self.0.len() - 4;
        self.align(to);
        let begin = self.0.len();
        elements(self);
        let bytes = length(self.0.len() - begin).to_le_bytes();
        self.0[place..place + 4].copy_from_slice(&bytes);
    }

    fn variant(&mut self, value: Value<'_>) {
        match value {
            Value::Text(text) => {
                self.signature("s");
                self.text(text);
            }
            Value::Texts(texts) => {
                self.signature("as");
                self.array(4, |array| texts.iter().for_each(|text| array.text(text)));
            }
            Value::Number(number) => {
                self.signature("t");
                self.align(8);
                self.0.extend(number.to_le_bytes());
            }
            Value::Processes(processes) => {
                self.signature("au");
                self.array(4, |array| processes.iter().for_each(|pid| array.u32(*pid)));
            }
        }
    }

    /// `a(sv)`.
    pub(super) fn properties(&mut self, properties: &[(&str, Value<'_>)]) {
        self.array(8, |array| {
            for (name, value) in properties {
                array.align(8);
                array.text(name);
                array.variant(*value);
            }
        });
    }

    /// An empty array of structs.
    pub(super) fn nothing(&mut self) {
        self.array(8, |_| {});
    }
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// A call of systemd's manager; `body` has the types of `signature`.
pub(super) fn call(serial: u32, member: &str, signature: &str, body: Vec<u8>) -> Vec<u8> {
    let mut message = Writer::default();
    message.0.extend([b'l', CALL, 0, 1]);
    message.u32(length(body.len()));
    message.u32(serial);
    message.array(8, |fields| {
        for (code, kind, text) in [
            (1, "o", "/org/freedesktop/systemd1"),
            (2, "s", "org.freedesktop.systemd1.Manager"),
            (3, "s", member),
            (6, "s", "org.freedesktop.systemd1"),
        ] {
            fields.align(8);
            fields.0.push(code);
            fields.signature(kind);
            fields.text(text);
        }
        fields.align(8);
        fields.0.push(8);
        fields.signature("g");
        fields.signature(signature);
    });
    message.align(8);
    message.0.extend(body);
    message.into_bytes()
}

/// What came.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) kind: u8,
    /// Which call it answers.
    pub(super) answers: Option<u32>,
    /// The name of an error.
    pub(super) error: Option<String>,
    /// The name of a signal.
    pub(super) member: Option<String>,
    pub(super) body: Vec<u8>,
}

/// How many bytes follow on `head`; `None` if that is the head of no message that can be read.
pub(super) fn rest(head: &[u8; HEAD]) -> Option<usize> {
    let at = |place: usize| {
        let bytes = head.get(place..place + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let (body, fields) = (at(4)?, at(12)?);
    let is_ours = head[0] == b'l' && head[3] == 1 && body <= MAX_BYTES && fields <= MAX_BYTES;
    is_ours.then(|| fields.next_multiple_of(8) + body)
}

/// Reads the message of which `rest` comes after `head`.
pub(super) fn read(head: &[u8; HEAD], rest: &[u8]) -> Option<Message> {
    let mut head_reader = Reader::new(head);
    head_reader.skip(12)?;
    let fields_length = usize::try_from(head_reader.u32()?).ok()?;
    let mut message = Message {
        kind: head[1],
        body: rest.get(fields_length.next_multiple_of(8)..)?.to_vec(),
        ..Message::default()
    };
    let mut fields = Reader::new(rest.get(..fields_length)?);
    while !fields.is_at_end() {
        fields.align(8)?;
        let code = fields.byte()?;
        match fields.signature()? {
            "s" | "o" => {
                let text = fields.text()?;
                match code {
                    3 => message.member = Some(text.to_owned()),
                    4 => message.error = Some(text.to_owned()),
                    _ => {}
                }
            }
            "g" => {
                fields.signature()?;
            }
            "u" => {
                let number = fields.u32()?;
                if code == 5 {
                    message.answers = Some(number);
                }
            }
            _ => return None,
        }
    }
    Some(message)
}

/// Reads values one after the other.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn is_at_end(&self) -> bool {
        self.at >= self.bytes.len()
    }

    fn skip(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let skipped = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(skipped)
    }

    fn align(&mut self, to: usize) -> Option<()> {
        self.skip(self.at.next_multiple_of(to) - self.at)
            .map(|_| ())
    }

    fn byte(&mut self) -> Option<u8> {
        self.skip(1).map(|bytes| bytes[0])
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.align(4)?;
        Some(u32::from_le_bytes(self.skip(4)?.try_into().ok()?))
    }

    pub(super) fn text(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        let text = std::str::from_utf8(self.skip(length)?).ok()?;
        self.skip(1)?;
        Some(text)
    }

    fn signature(&mut self) -> Option<&'a str> {
        let length = self.byte()?.into();
        let text = std::str::from_utf8(self.skip(length)?).ok()?;
        self.skip(1)?;
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `GetUnit("a.scope")`, as `busctl --user --json=off capture` shows it, less the fields that a bus adds.
    #[test]
    fn a_call_is_what_the_specification_says() {
        let mut body = Writer::default();
        body.text("a.scope");
        let bytes = call(7, "GetUnit", "s", body.into_bytes());
        let mut expected = b"l\x01\0\x01\x0c\0\0\0\x07\0\0\0".to_vec();
        expected.extend(b"\x9f\0\0\0");
        expected.extend(b"\x01\x01o\0\x19\0\0\0/org/freedesktop/systemd1\0");
        expected.resize(expected.len().next_multiple_of(8), 0);
        expected.extend(b"\x02\x01s\0\x20\0\0\0org.freedesktop.systemd1.Manager\0");
        expected.resize(expected.len().next_multiple_of(8), 0);
        expected.extend(b"\x03\x01s\0\x07\0\0\0GetUnit\0");
        expected.resize(expected.len().next_multiple_of(8), 0);
        expected.extend(b"\x06\x01s\0\x18\0\0\0org.freedesktop.systemd1\0");
        expected.resize(expected.len().next_multiple_of(8), 0);
        expected.extend(b"\x08\x01g\0\x01s\0");
        let fields = u32::try_from(expected.len() - HEAD).unwrap();
        expected[12..16].copy_from_slice(&fields.to_le_bytes());
        expected.resize(expected.len().next_multiple_of(8), 0);
        expected.extend(b"\x07\0\0\0a.scope\0");
        assert_eq!(bytes, expected);
    }

    #[test]
    fn properties_begin_where_their_types_have_to() {
        let mut body = Writer::default();
        body.properties(&[
            ("Ab", Value::Number(5)),
            ("P", Value::Processes(&[1, 2])),
            ("T", Value::Texts(&["x"])),
            ("S", Value::Text("y")),
        ]);
        body.nothing();
        let mut expected = b"\x5e\0\0\0\0\0\0\0".to_vec();
        expected.extend(b"\x02\0\0\0Ab\0\x01t\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0");
        assert_eq!(expected.len(), 32);
        expected.extend(b"\x01\0\0\0P\0\x02au\0\0\0\x08\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0");
        expected.resize(expected.len().next_multiple_of(8), 0);
        expected.truncate(32 + 24);
        expected.extend(b"\x01\0\0\0T\0\x02as\0\0\0\x06\0\0\0\x01\0\0\0x\0\0\0");
        expected.extend(b"\x01\0\0\0S\0\x01s\0\0\0\0\x01\0\0\0y\0");
        let elements = u32::try_from(expected.len() - 8).unwrap();
        expected[..4].copy_from_slice(&elements.to_le_bytes());
        expected.resize(expected.len().next_multiple_of(4), 0);
        expected.extend([0; 4]);
        expected.resize(expected.len().next_multiple_of(8), 0);
        assert_eq!(body.into_bytes(), expected);
    }

    fn split(bytes: &[u8]) -> ([u8; HEAD], &[u8]) {
        (bytes[..HEAD].try_into().unwrap(), &bytes[HEAD..])
    }

    #[test]
    fn what_is_written_is_read_again_and_what_is_cut_off_is_not() {
        let mut body = Writer::default();
        body.u32(9);
        body.text("unit");
        let bytes = call(1, "JobRemoved", "us", body.into_bytes());
        let (head, tail) = split(&bytes);
        assert_eq!(rest(&head), Some(tail.len()));
        let message = read(&head, tail).unwrap();
        assert_eq!(message.member.as_deref(), Some("JobRemoved"));
        let mut body = Reader::new(&message.body);
        assert_eq!((body.u32(), body.text()), (Some(9), Some("unit")));
        assert_eq!(body.u32(), None);
        for length in 0..tail.len() {
            let cut = read(&head, &tail[..length]);
            assert_ne!(cut.as_ref(), Some(&message), "{length}");
        }
    }

    #[test]
    fn noise_is_no_message() {
        let bytes = call(1, "X", "", Vec::new());
        let (head, tail) = split(&bytes);
        for (place, value) in [(0, b'B'), (3, 2), (7, 0xff), (15, 0xff)] {
            let mut other = head;
            other[place] = value;
            assert_eq!(rest(&other), None, "{place}");
        }
        for place in 0..tail.len() {
            for value in [0, 0xff] {
                let mut other = tail.to_vec();
                other[place] = value;
                // It may still be one; it must not do harm.
                let _ = read(&head, &other);
            }
        }
    }
}
