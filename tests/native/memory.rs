//! Peak memory of `pack` and `validate` on the largest package.

use std::fs;

use anyhow::{Result, ensure};
use e2e::service::Service;
use e2e::{Sandbox, peak};

/// The largest number of files in a package.
const FILES: usize = 50_000;
/// Limit of resident memory in KiB.
const MAX_KIB: i64 = 64 << 10;

#[test]
fn the_largest_package_is_made_and_checked_in_64_mib() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script("#!/bin/sh\n").write(&sandbox.file("service"))?;
    for number in 1..FILES {
        let directory = service.join(format!("Role/components/group-{:03}", number / 250));
        if number == 1 || number % 250 == 0 {
            fs::create_dir_all(&directory)?;
        }
        // No two files have the same contents.
        fs::write(
            directory.join(format!("part-{number:05}.txt")),
            number.to_string(),
        )?;
    }
    let package = sandbox.file("service.cspkg").display().to_string();
    let service = service.display().to_string();
    for arguments in [
        &["pack", &service, "-o", &package][..],
        &["validate", &package],
        &["validate", &service],
    ] {
        let used = peak::run(sandbox.command().args(arguments))?;
        ensure!(used.status.success(), "{arguments:?}: {}", used.status);
        ensure!(
            used.peak_kib <= MAX_KIB,
            "{arguments:?}: {} KiB",
            used.peak_kib
        );
    }
    Ok(())
}
