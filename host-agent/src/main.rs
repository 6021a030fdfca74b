//! The one program: chooses the role of this process.
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("vmm") {
        return host_agent::vmm::process::main();
    }
    ExitCode::from(2)
}
