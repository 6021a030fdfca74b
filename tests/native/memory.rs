//! The memory of a command does not grow with what it is given.

use std::fs;

use anyhow::{Result, ensure};
use e2e::service::Service;
use e2e::{Place, peak};

/// Files of a package, at most.
const FILES: usize = 50_000;
/// Most resident memory, in KiB as the kernel counts it.
const MOST: i64 = 64 << 10;

#[test]
fn a_package_of_as_many_files_as_there_may_be_is_made_and_checked_in_64_mib() -> Result<()> {
    let place = Place::new()?;
    let service = Service::script("#!/bin/sh\n").write(&place.file("service"))?;
    for number in 1..FILES {
        let directory = service.join(format!("Role/components/group-{:03}", number / 250));
        if number == 1 || number % 250 == 0 {
            fs::create_dir_all(&directory)?;
        }
        // Each a content of its own.
        fs::write(
            directory.join(format!("part-{number:05}.txt")),
            number.to_string(),
        )?;
    }
    let package = place.file("service.cspkg").display().to_string();
    let service = service.display().to_string();
    for arguments in [
        &["pack", &service, "-o", &package][..],
        &["validate", &package],
        &["validate", &service],
    ] {
        let (status, most) = peak::run(place.command().args(arguments))?;
        ensure!(status.success(), "{arguments:?}: {status}");
        ensure!(most <= MOST, "{arguments:?}: {most} KiB");
    }
    Ok(())
}
