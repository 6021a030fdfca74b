//! The one program: chooses the role of this process.
use std::process::ExitCode;

fn main() -> ExitCode {
    // A VMM process has no argument parser and no asynchronous run-time.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "vmm") {
        return host_agent::vmm::process::main();
    }
    host_agent::cli::main()
}
