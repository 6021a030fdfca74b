//! The program's entry point: a helper process, or the command line.

use std::process::ExitCode;

use host_agent::store::janitor;
use host_agent::vmm::sandbox::probe;
use host_agent::{child, dispositions};

fn main() -> ExitCode {
    host_agent::descriptors::raise_limit();
    let verb = std::env::args_os().nth(1).unwrap_or_default();
    // Helper processes need no argument parser and no asynchronous run-time.
    if verb == "vmm" {
        child::begin();
        return host_agent::vmm::process::main();
    }
    if verb == probe::VERB {
        child::begin();
        return probe::main();
    }
    if verb == janitor::VERB {
        child::begin();
        let arguments = std::env::args_os().skip(2).map(Into::into);
        return janitor::main(arguments).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    dispositions::begin_command();
    host_agent::cli::main()
}
