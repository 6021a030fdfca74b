//! A service of two roles, one of which serves HTTP with Debian's busybox httpd.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::limit;
use crate::service::free_port;

/// Prints its variables and files, serves `www`, and prints a line on SIGTERM.
const SERVE: &str = r#"#!/bin/sh
trap 'echo asked to stop; kill $server; exit 0' TERM
env | LC_ALL=C sort
echo "files: $(find . -type f -exec sha256sum {} + | LC_ALL=C sort | sha256sum)"
echo "modes: $(find . -printf '%p %m %U %G\n' | LC_ALL=C sort | sha256sum)"
./busybox httpd -f -p "$WWW_ADDRESS:$WWW_PORT" -h www &
server=$!
wait
"#;

/// A CGI program that prints the name of its instance.
const WHO: &str = r#"#!/bin/sh
printf 'Content-Type: text/plain\r\n\r\n%s\n' "$RoleInstanceID"
"#;

const WORK: &str = r"#!/bin/sh
trap 'echo asked to stop; exit 0' TERM
env | LC_ALL=C sort
while :; do sleep 1 & wait; done
";

/// Role `Web`, the web server behind endpoint `Www`, and role `Worker`.
#[derive(Debug)]
pub struct WebService {
    /// Public port of `Www`.
    pub port: u16,
    /// Number of instances of `Web`.
    pub instances: u32,
    /// Number of instances of `Worker`; with 0 the role is not defined.
    pub workers: u32,
}

impl WebService {
    /// A service on a free port.
    pub fn new(instances: u32, workers: u32) -> Result<Self> {
        Ok(Self {
            port: free_port()?,
            instances,
            workers,
        })
    }

    /// Writes the service to `dir` and returns `dir`.
    pub fn write(&self, dir: &Path) -> Result<PathBuf> {
        let web = dir.join("Web");
        fs::create_dir_all(web.join("www/cgi-bin"))?;
        write_program(&web.join("serve"), SERVE)?;
        write_program(&web.join("www/cgi-bin/who"), WHO)?;
        fs::write(web.join("www/index.html"), "hello\n")?;
        let busybox = std::env::var_os("HOST_AGENT_TEST_BUSYBOX")
            .context("HOST_AGENT_TEST_BUSYBOX is not set: run scripts/test")?;
        fs::copy(busybox, web.join("busybox"))?;
        let port = self.port;
        let mut definition = format!(
            r#"<?xml version="1.0" encoding="utf-8"?>
<ServiceDefinition name="Shop" xmlns="http://schemas.microsoft.com/ServiceHosting/2008/10/ServiceDefinition">
  <WorkerRole name="Web" vmsize="ExtraSmall">
    <Runtime executionContext="limited">
      <Environment>
        <Variable name="LITERAL" value="a &lt; b &amp; &quot;c&quot;" />
        <Variable name="SETTING"><RoleInstanceValue xpath="{instance}/ConfigurationSettings/ConfigurationSetting[@name='Motto']/@value" /></Variable>
        <Variable name="WWW_ADDRESS"><RoleInstanceValue xpath="{instance}/Endpoints/Endpoint[@name='Www']/@address" /></Variable>
        <Variable name="WWW_PORT"><RoleInstanceValue xpath="{instance}/Endpoints/Endpoint[@name='Www']/@port" /></Variable>
        <Variable name="WWW_PROTOCOL"><RoleInstanceValue xpath="{instance}/Endpoints/Endpoint[@name='Www']/@protocol" /></Variable>
        <Variable name="CACHE"><RoleInstanceValue xpath="{instance}/LocalResources/LocalResource[@name='Cache']/@path" /></Variable>
        <Variable name="CACHE_SIZE"><RoleInstanceValue xpath="{instance}/LocalResources/LocalResource[@name='Cache']/@sizeInMB" /></Variable>
        <Variable name="ID"><RoleInstanceValue xpath="{instance}/@id" /></Variable>
        <Variable name="ROLE"><RoleInstanceValue xpath="{instance}/@roleName" /></Variable>
        <Variable name="UPDATE_DOMAIN"><RoleInstanceValue xpath="{instance}/@updateDomain" /></Variable>
        <Variable name="FAULT_DOMAIN"><RoleInstanceValue xpath="{instance}/@faultDomain" /></Variable>
        <Variable name="DEPLOYMENT"><RoleInstanceValue xpath="/RoleEnvironment/Deployment/@id" /></Variable>
        <Variable name="EMULATED"><RoleInstanceValue xpath="/RoleEnvironment/Deployment/@emulated" /></Variable>
      </Environment>
      <EntryPoint><ProgramEntryPoint commandLine="serve" /></EntryPoint>
    </Runtime>
    <ConfigurationSettings><Setting name="Motto" /></ConfigurationSettings>
    <LocalResources><LocalStorage name="Cache" sizeInMB="8" /></LocalResources>
    <Endpoints><InputEndpoint name="Www" protocol="tcp" port="{port}" localPort="8080" /></Endpoints>
  </WorkerRole>
"#,
            instance = "/RoleEnvironment/CurrentInstance"
        );
        let mut roles = format!(
            r#"  <Role name="Web"><Instances count="{}" /><ConfigurationSettings><Setting name="Motto" value="übermäßig &amp; günstig" /></ConfigurationSettings></Role>
"#,
            self.instances
        );
        if self.workers > 0 {
            fs::create_dir_all(dir.join("Worker/bin"))?;
            write_program(&dir.join("Worker/bin/work"), WORK)?;
            definition.push_str(
                r#"  <WorkerRole name="Worker" vmsize="ExtraSmall">
    <Runtime executionContext="elevated">
      <EntryPoint><ProgramEntryPoint commandLine="bin\work" setReadyOnProcessStart="true" /></EntryPoint>
    </Runtime>
    <ConfigurationSettings><Setting name="Queue" /></ConfigurationSettings>
  </WorkerRole>
"#,
            );
            let workers = self.workers;
            roles.push_str(&format!(
                r#"  <Role name="Worker"><Instances count="{workers}" /><ConfigurationSettings><Setting name="Queue" value="q" /></ConfigurationSettings></Role>
"#
            ));
        }
        definition.push_str("</ServiceDefinition>\n");
        let configuration = format!(
            r#"<?xml version="1.0" encoding="utf-8"?>
<ServiceConfiguration serviceName="Shop" osFamily="minimal" osVersion="*" xmlns="http://schemas.microsoft.com/ServiceHosting/2008/10/ServiceConfiguration">
{roles}</ServiceConfiguration>
"#
        );
        fs::write(dir.join("ServiceDefinition.csdef"), definition)?;
        fs::write(dir.join("ServiceConfiguration.cscfg"), configuration)?;
        Ok(dir.to_owned())
    }

    /// Name of the instance that answers a request.
    pub fn answering_instance(&self) -> Result<String> {
        let answer = get(self.port, "/cgi-bin/who")?;
        let body = answer.rsplit("\r\n\r\n").next().unwrap_or_default();
        Ok(body.trim().to_owned())
    }
}

fn write_program(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o755),
    )?)
}

/// The whole response to a GET request.
fn get(port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(limit(10)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: test\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
