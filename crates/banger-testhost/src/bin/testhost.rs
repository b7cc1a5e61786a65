//! `testhost --cache DIR [OPTION...] -- COMMAND...`: runs COMMAND in the test host and ends with its exit code.
//! `cargo xtask testhost` gives the options.

use banger_testhost::drive::Contents;
use banger_testhost::init::Init;
use banger_testhost::machine::Options;
use banger_testhost::{Result, base, drive, machine};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "usage: testhost --cache DIR [--programs DIR] [--fixtures DIR] [--suite FILE] \
                     [--add PATH BELOW_MNT]... [--systemd] [--console] -- COMMAND...";
/// Neither a success nor what the command in the test host would likely end with.
const COULD_NOT_RUN: u8 = 125;

fn main() -> ExitCode {
    let Some(request) = Request::read(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(&request) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{}", error.report());
            ExitCode::from(COULD_NOT_RUN)
        }
    }
}

struct Request {
    cache: PathBuf,
    contents: Contents,
    options: Options,
}

impl Request {
    fn read(mut args: impl Iterator<Item = String>) -> Option<Self> {
        let mut cache = None;
        let mut contents = Contents::default();
        let mut options = Options::default();
        loop {
            match args.next()?.as_str() {
                "--cache" => cache = Some(PathBuf::from(args.next()?)),
                "--programs" => contents.programs = Some(PathBuf::from(args.next()?)),
                "--fixtures" => contents.fixtures = Some(PathBuf::from(args.next()?)),
                "--suite" => contents.suite = Some(PathBuf::from(args.next()?)),
                "--add" => contents
                    .more
                    .push((args.next()?.into(), args.next()?.into())),
                "--systemd" => {
                    contents.init = Init::Systemd;
                    options.init = Init::Systemd;
                }
                "--console" => options.show_console = true,
                "--" => break,
                _ => return None,
            }
        }
        contents.command = args.collect();
        contents.firecracker = find_firecracker();
        (!contents.command.is_empty()).then_some(Self {
            cache: cache?,
            contents,
            options,
        })
    }
}

fn run(request: &Request) -> Result<u8> {
    let base = base::ensure(&request.cache)?;
    let drive = drive::make(&request.contents, &request.cache)?;
    machine::run(&base, &drive, request.options)
}

/// The Firecracker on PATH, if there is one.
fn find_firecracker() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join("firecracker"))
        .find(|candidate| Path::new(candidate).is_file())
}
