//! What a role without privileges is denied in its guest, and that agents and operators go on
//! beside a role that takes all it can get.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::Sandbox;
use e2e::run::{INSTANCE, Run, eventually};
use e2e::service::Service;

/// Prints the error number of each thing that is denied, then waits for a file and takes
/// memory and processes without end.
const GREEDY: &str = r#"#!/usr/bin/perl
$| = 1;
sub report { print "$_[0]: ", $_[1] ? 'done' : $! + 0, "\n" }
report('vsock', socket(my $s, 40, 1, 0));
sysopen(my $d, $ENV{DATA}, 0) or die "$!";
my $zeros = "\0" x 28;
report('project', ioctl($d, 0x401c5820, $zeros));
report('flags', ioctl($d, 0x40086602, $zeros));
report('namespace', syscall(272, 0x10000000) == 0);
report('ring', syscall(425, 1, 0) >= 0);
report('init', -d '/proc/1');
report('self', -d '/proc/self' && -r '/proc/meminfo');
my $n = 0;
while ($n < 9000) { open(my $f, '>', "$ENV{TEMP}/$n") or last; $n++ }
report('inodes', $n == 9000);
chomp(my $name = `cat /proc/sys/kernel/hostname`);
report('name', gethostbyname($name));
print "checked\n";
sleep 1 until -e "$ENV{DATA}/go";
if (!fork) { my @all; push @all, 'x' x (1 << 20) while 1 }
while (1) { fork }
"#;

/// Longer than the heartbeat limit.
const GREED: Duration = Duration::from_secs(35);

#[test]
fn agents_and_operators_go_on_beside_a_greedy_role() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script(GREEDY).write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &["--heartbeat-limit", "30"])?;
    run.ready()?;
    let log = || -> Result<String> {
        let logs = sandbox.output(&["logs", INSTANCE, "--source", "role"])?;
        Ok(String::from_utf8_lossy(&logs.stdout).into_owned())
    };
    eventually("the role has tried everything", || {
        Ok(log()?.contains("checked"))
    })?;
    let seen = log()?;
    for wanted in [
        "vsock: 97\n",
        "project: 1\n",
        "flags: 1\n",
        "namespace: 1\n",
        "ring: 1\n",
        "init: 2\n",
        "self: done\n",
        "inodes: 122\n",
        "name: done\n",
    ] {
        ensure!(seen.contains(wanted), "`{wanted}` is not in: {seen}");
    }
    let limits = run.shell(
        "cd /sys/fs/cgroup; cat stack/role/memory.max stack/role/pids.max stack/memory.max \
         exec/memory.max exec/pids.max; awk '/^MemTotal/ { print $2 * 1024 }' /proc/meminfo",
    )?;
    let limits: Vec<u64> = limits.lines().filter_map(|it| it.parse().ok()).collect();
    let [role, _, stack, _, _, all] = limits[..] else {
        anyhow::bail!("a group has no limit: {limits:?}");
    };
    ensure!(role < stack && stack + (64 << 20) <= all, "{limits:?}");
    // Operators do not wait for the role.
    let weights = run.shell("cd /sys/fs/cgroup; cat exec/cpu.weight stack/cpu.weight")?;
    ensure!(weights == "200\n100\n", "{weights}");

    run.shell("cd /mnt/resource/Resources/directory/*.Data; touch go")?;
    let began = Instant::now();
    while began.elapsed() < GREED {
        run.shell("true")?;
    }
    let seen = run.stop()?;
    ensure!(!seen.contains("\"verdict\""), "{seen}");
    sandbox.assert_nothing_left()
}
