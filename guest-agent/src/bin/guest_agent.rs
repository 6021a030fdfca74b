//! The guest agent, and as `guest-agent bootstrapper` the process that runs
//! the role.

use std::process::ExitCode;

use guest_agent::agent;
use guest_agent::bootstrapper::role;
use guest_agent::os::limits;
use vmbus::text::chain;

const NAME: &str = "guest-agent";

fn main() -> ExitCode {
    if let Err(error) = limits::raise() {
        eprintln!("{NAME}: limits: {error}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{NAME}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = if std::env::args().nth(1).as_deref() == Some("bootstrapper") {
        runtime.block_on(role::main())
    } else {
        runtime.block_on(agent::run())
    };
    // Does not wait for a blocking step, such as a set-up that waits for a disk.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{NAME}: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}
