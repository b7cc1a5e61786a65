//! `banger kernel`.

mod delete;
mod import;
mod list;

use crate::report::Outcome;

/// Import, list and delete kernels
#[derive(Debug, clap::Subcommand)]
pub(crate) enum KernelCommand {
    List(list::ListArgs),
    Import(import::ImportArgs),
    Delete(delete::DeleteArgs),
}

pub(crate) fn run(command: KernelCommand) -> Outcome {
    match command {
        KernelCommand::List(args) => list::run(args),
        KernelCommand::Import(args) => import::run(args),
        KernelCommand::Delete(args) => delete::run(args),
    }
}
