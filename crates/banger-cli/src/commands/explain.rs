//! `banger explain`.

use super::codes_table;
use crate::output::{OutputArgs, json, print};
use crate::report::Outcome;
use banger_api::error::ErrorCode;

/// Tell what an error code means and what helps
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  banger explain               List all codes with their exit codes\n  banger explain wrong-phase   Tell about one"
)]
pub(crate) struct ExplainArgs {
    /// The code, such as `no-space`; without it all are listed
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(ErrorCode::ALL.iter().map(|code| code.name())), hide_possible_values = true)]
    code: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: ExplainArgs) -> Outcome {
    let code = args
        .code
        .as_deref()
        .and_then(|code| code.parse::<ErrorCode>().ok());
    let object = |code: ErrorCode| serde_json::json!({"code": code, "exit_code": code.exit_code(), "explanation": code.explanation()});
    match (code, args.output.json) {
        (Some(code), true) => json(&object(code))?,
        (Some(code), false) => print(&format!(
            "{} (exit code {})\n\n{}\n",
            code.name(),
            code.exit_code(),
            code.explanation()
        ))?,
        (None, true) => json(
            &ErrorCode::ALL
                .iter()
                .copied()
                .map(object)
                .collect::<Vec<_>>(),
        )?,
        (None, false) => print(&codes_table())?,
    }
    Ok(0)
}
