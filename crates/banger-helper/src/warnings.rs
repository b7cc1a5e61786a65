//! Warnings of what these programs are made of, as lines on their standard error.

use std::fmt::{Debug, Write as _};
use std::io::Write as _;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

/// From now on, what this process warns of is said on standard error, whoever reads it.
pub fn to_stderr() {
    // Only a second call could fail.
    let _ = tracing::subscriber::set_global_default(Lines(|line: &str| {
        // Nobody may be reading.
        let _ = writeln!(std::io::stderr(), "{line}");
    }));
}

/// Hands each warning on. It knows no spans: the whole of a logging library would be most of these programs.
struct Lines<F>(F);

impl<F: Fn(&str) + 'static> Subscriber for Lines<F> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let Line { message, fields } = line;
        (self.0)(&(message + &fields));
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // A string takes whatever it is given.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_its_message_and_its_fields() {
        let (sender, lines) = std::sync::mpsc::channel();
        let kept = Lines(move |line: &str| sender.send(line.to_owned()).unwrap());
        tracing::subscriber::with_default(kept, || {
            tracing::warn!(error = "no room", "connections are left");
            tracing::info!("nobody asked");
        });
        let lines: Vec<String> = lines.iter().collect();
        assert_eq!(lines, ["connections are left error=\"no room\""]);
    }
}
