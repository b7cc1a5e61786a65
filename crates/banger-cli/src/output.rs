//! What goes to stdout: tables and lines for people, the API's own objects as JSON for scripts.

use crate::escape;
use crate::report::Failure;
use banger_api::error::ErrorCode;
use comfy_table::{Table, presets};
use serde::Serialize;
use std::io::Write as _;

/// How a command prints what it found.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub(crate) struct OutputArgs {
    /// Print the API's own objects as JSON; a list is an array
    #[arg(long)]
    pub(crate) json: bool,
}

/// Writes text to stdout, without colours where it is not a terminal. A reader that went away ends the program
/// quietly.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    raw_result(anstream::stdout().lock().write_all(text.as_bytes()))
}

/// Writes bytes to stdout as they are.
pub(crate) fn print_raw(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    raw_result(stdout.write_all(bytes).and_then(|()| stdout.flush()))
}

fn raw_result(result: std::io::Result<()>) -> Result<(), Failure> {
    match result {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(
            Failure::new(ErrorCode::Internal, "cannot write to standard output").caused_by(&error),
        ),
    }
}

/// Prints a value as JSON.
pub(crate) fn json<T: Serialize + ?Sized>(value: &T) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value).map_err(|error| {
        Failure::new(ErrorCode::Internal, "cannot write JSON").caused_by(&error)
    })?;
    text.push('\n');
    print(&text)
}

/// Rows below their header, columns two spaces apart. Every cell is escaped.
pub(crate) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row.iter().map(|cell| escape::line(cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text: String = table
        .lines()
        .map(|line| line.trim_end().to_owned() + "\n")
        .collect();
    if text.trim().is_empty() {
        text.clear();
    }
    text
}

/// `label  value` lines, the values below each other. Every value is escaped.
pub(crate) fn fields<'a>(fields: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let fields: Vec<_> = fields.into_iter().collect();
    let width = fields
        .iter()
        .map(|(label, _)| label.len())
        .max()
        .unwrap_or(0);
    fields
        .iter()
        .map(|(label, value)| format!("{label:width$}  {}\n", escape::line(value)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_no_borders_and_no_trailing_spaces() {
        let text = table(
            &["NAME", "PHASE"],
            [
                vec!["calm-otter".to_owned(), "running".to_owned()],
                vec!["fox".to_owned(), "stopped".to_owned()],
            ],
        );
        assert_eq!(
            text,
            "NAME        PHASE\ncalm-otter  running\nfox         stopped\n"
        );
    }

    #[test]
    fn a_cell_cannot_break_the_table_or_the_terminal() {
        let text = table(
            &["A", "B"],
            [vec!["x\ny\u{1b}[0m".to_owned(), "z".to_owned()]],
        );
        assert_eq!(text, "A            B\nx\\ny\\x1b[0m  z\n");
    }

    #[test]
    fn fields_are_aligned() {
        assert_eq!(
            fields([("id", "1".to_owned()), ("address", "172.16.0.2".to_owned())]),
            "id       1\naddress  172.16.0.2\n"
        );
    }
}
