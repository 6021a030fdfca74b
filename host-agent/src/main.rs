//! The one program: chooses the role of this process.
use std::process::ExitCode;

use host_agent::child;
use host_agent::store::janitor;

fn main() -> ExitCode {
    host_agent::descriptors::raise_limit();
    // A VMM process has no argument parser and no asynchronous run-time.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "vmm") {
        child::begin();
        return host_agent::vmm::process::main();
    }
    if std::env::args_os()
        .nth(1)
        .is_some_and(|verb| verb == janitor::VERB)
    {
        child::begin();
        let arguments = std::env::args_os().skip(2).map(Into::into);
        return janitor::main(arguments).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    host_agent::cli::main()
}
