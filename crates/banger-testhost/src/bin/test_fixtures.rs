//! `test-fixtures DATA_HOME BANGER_INIT`: makes the image and the kernel that guests in tests boot.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [data_home, init] = args.as_slice() else {
        eprintln!("usage: test-fixtures DATA_HOME BANGER_INIT");
        return ExitCode::from(2);
    };
    match banger_testhost::fixtures::ensure(Path::new(data_home), Path::new(init)) {
        Ok((image, kernel)) => {
            println!("{}\n{}", image.display(), kernel.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{}", error.report());
            ExitCode::FAILURE
        }
    }
}
