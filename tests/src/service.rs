//! Services with one worker role, written to a directory.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use nix::sys::socket::sockopt::ReuseAddr;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, setsockopt, socket,
};

/// An echo server for any image: Perl is essential in Debian.
pub const ECHO: &str = r#"#!/usr/bin/perl
use strict; use IO::Socket::INET; $SIG{CHLD} = 'IGNORE';
my $l = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => $ENV{ECHO_PORT},
    Listen => 1024, ReuseAddr => 1) or die "listen: $!";
print "echo listens on $ENV{ECHO_PORT}\n"; $| = 1;
while (my $c = $l->accept) {
    if (fork) { close $c; next }
    my $b; while (my $n = sysread $c, $b, 65536) {
        my $o = 0; while ($o < $n) { my $w = syswrite $c, $b, $n - $o, $o; exit unless $w; $o += $w }
    }
    exit;
}
"#;

/// A service with one worker role named `Role`.
#[derive(Debug, Clone)]
pub struct Service {
    /// Contents of `approot/entry`.
    pub entry: String,
    /// Guest image.
    pub image: String,
    /// VM size.
    pub size: String,
    /// Public port of endpoint `Echo`; without one the endpoint is not defined.
    pub port: Option<u16>,
}

impl Service {
    /// A role that starts and does nothing.
    pub fn idle() -> Self {
        Self::script("#!/bin/sh\nexec sleep 100000\n")
    }

    /// A role that runs this script.
    pub fn script(entry: &str) -> Self {
        Self {
            entry: entry.to_owned(),
            image: "minimal".into(),
            size: "ExtraSmall".into(),
            port: None,
        }
    }

    /// The echo server behind a free public port, and that port.
    pub fn echo() -> Result<(Self, u16)> {
        let port = free_port()?;
        let service = Self {
            port: Some(port),
            ..Self::script(ECHO)
        };
        Ok((service, port))
    }

    /// Writes the service to `dir` and returns `dir`.
    pub fn write(&self, dir: &Path) -> Result<PathBuf> {
        fs::create_dir_all(dir.join("Role"))?;
        let entry = dir.join("Role/entry");
        fs::write(&entry, &self.entry)?;
        fs::set_permissions(&entry, fs::Permissions::from_mode(0o755))?;
        let endpoint = self.port.map_or_else(String::new, |port| {
            format!(
                r#"<Endpoints><InputEndpoint name="Echo" protocol="tcp" port="{port}" localPort="7000" /></Endpoints>"#
            )
        });
        let variable = if self.port.is_some() {
            r#"<Variable name="ECHO_PORT"><RoleInstanceValue xpath="/RoleEnvironment/CurrentInstance/Endpoints/Endpoint[@name='Echo']/@port" /></Variable>"#
        } else {
            ""
        };
        let definition = format!(
            r#"<?xml version="1.0" encoding="utf-8"?>
<ServiceDefinition name="Test" xmlns="http://schemas.microsoft.com/ServiceHosting/2008/10/ServiceDefinition">
  <WorkerRole name="Role" vmsize="{}">
    <Runtime executionContext="limited">
      <Environment>
        <Variable name="DATA"><RoleInstanceValue xpath="/RoleEnvironment/CurrentInstance/LocalResources/LocalResource[@name='Data']/@path" /></Variable>
        {variable}
      </Environment>
      <EntryPoint><ProgramEntryPoint commandLine="entry" setReadyOnProcessStart="true" /></EntryPoint>
    </Runtime>
    <ConfigurationSettings><Setting name="Greeting" /></ConfigurationSettings>
    <LocalResources><LocalStorage name="Data" sizeInMB="64" cleanOnRoleRecycle="false" /></LocalResources>
    {endpoint}
  </WorkerRole>
</ServiceDefinition>
"#,
            self.size
        );
        fs::write(dir.join("ServiceDefinition.csdef"), definition)?;
        let configuration = format!(
            r#"<?xml version="1.0" encoding="utf-8"?>
<ServiceConfiguration serviceName="Test" osFamily="{}" osVersion="*" xmlns="http://schemas.microsoft.com/ServiceHosting/2008/10/ServiceConfiguration">
  <Role name="Role">
    <Instances count="1" />
    <ConfigurationSettings><Setting name="Greeting" value="hello" /></ConfigurationSettings>
  </Role>
</ServiceConfiguration>
"#,
            self.image
        );
        fs::write(dir.join("ServiceConfiguration.cscfg"), configuration)?;
        Ok(dir.to_owned())
    }
}

/// A port that was free a moment ago. The socket is bound but does not listen: a
/// process that another test forks meanwhile holds a copy of it until `execve`, and
/// with SO_REUSEADDR only a listening copy would block the port.
pub fn free_port() -> Result<u16> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    setsockopt(&socket, ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0))?;
    Ok(getsockname::<SockaddrIn>(socket.as_raw_fd())?.port())
}
