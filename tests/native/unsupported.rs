//! Elements and attributes that are not supported yet are refused with file and line,
//! never ignored.

use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::service::Service;
use e2e::{Sandbox, text};

const DEFINITION: &str = "ServiceDefinition.csdef";
const CONFIGURATION: &str = "ServiceConfiguration.cscfg";

/// File, text to replace, replacement with `@` where the error is, and the name in the
/// error.
const CASES: &[(&str, &str, &str, &str)] = &[
    (
        DEFINITION,
        "</ServiceDefinition>",
        "@<WebRole name=\"W\" />\n</ServiceDefinition>",
        "<WebRole>",
    ),
    (
        DEFINITION,
        "</ServiceDefinition>",
        "@<VirtualMachineRole name=\"V\" />\n</ServiceDefinition>",
        "<VirtualMachineRole>",
    ),
    (
        DEFINITION,
        "</ServiceDefinition>",
        "@<LoadBalancerProbes />\n</ServiceDefinition>",
        "<LoadBalancerProbes>",
    ),
    (
        DEFINITION,
        "</ServiceDefinition>",
        "@<NetworkTrafficRules />\n</ServiceDefinition>",
        "<NetworkTrafficRules>",
    ),
    (
        DEFINITION,
        "<ServiceDefinition name",
        "<ServiceDefinition @upgradeDomainCount=\"2\" name",
        "upgradeDomainCount",
    ),
    (
        DEFINITION,
        "</WorkerRole>",
        "@<Startup />\n</WorkerRole>",
        "<Startup>",
    ),
    (
        DEFINITION,
        "</WorkerRole>",
        "@<Certificates />\n</WorkerRole>",
        "<Certificates>",
    ),
    (
        DEFINITION,
        "</WorkerRole>",
        "@<Imports />\n</WorkerRole>",
        "<Imports>",
    ),
    (
        DEFINITION,
        "</WorkerRole>",
        "@<Contents />\n</WorkerRole>",
        "<Contents>",
    ),
    (
        DEFINITION,
        "</WorkerRole>",
        "@<Sites />\n</WorkerRole>",
        "<Sites>",
    ),
    (
        DEFINITION,
        "vmsize=\"ExtraSmall\"",
        "vmsize=@\"Standard_D1_v2\"",
        "Standard_D1_v2",
    ),
    (
        DEFINITION,
        "<ProgramEntryPoint commandLine=\"entry\" setReadyOnProcessStart=\"true\" />",
        "@<NetFxEntryPoint assemblyName=\"a.dll\" />",
        "<NetFxEntryPoint>",
    ),
    (
        DEFINITION,
        "<Endpoints>",
        "<Endpoints>\n@<InternalEndpoint name=\"I\" protocol=\"tcp\" />",
        "<InternalEndpoint>",
    ),
    (
        DEFINITION,
        "<Endpoints>",
        "<Endpoints>\n@<InstanceInputEndpoint name=\"I\" />",
        "<InstanceInputEndpoint>",
    ),
    (
        DEFINITION,
        "protocol=\"tcp\"",
        "protocol=@\"udp\"",
        "\"udp\"",
    ),
    (
        DEFINITION,
        "protocol=\"tcp\"",
        "protocol=\"tcp\" @certificate=\"c\"",
        "certificate",
    ),
    (
        DEFINITION,
        "protocol=\"tcp\"",
        "protocol=\"tcp\" @loadBalancerProbe=\"p\"",
        "loadBalancerProbe",
    ),
    (
        CONFIGURATION,
        "osVersion=\"*\"",
        "osVersion=@\"WA-GUEST-OS-1.0\"",
        "WA-GUEST-OS-1.0",
    ),
    (
        CONFIGURATION,
        "</ServiceConfiguration>",
        "@<NetworkConfiguration />\n</ServiceConfiguration>",
        "<NetworkConfiguration>",
    ),
    (
        CONFIGURATION,
        "</Role>",
        "@<Certificates />\n</Role>",
        "<Certificates>",
    ),
    (
        CONFIGURATION,
        "</Role>",
        "@<OsImage href=\"i.vhd\" />\n</Role>",
        "<OsImage>",
    ),
    (
        CONFIGURATION,
        "<Role name",
        "<Role @vmName=\"v\" name",
        "vmName",
    ),
];

#[test]
fn unsupported_elements_are_refused_at_their_line() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (service, _) = Service::echo()?;
    let service = service.write(&sandbox.file("service"))?;
    for (file, from, to, name) in CASES {
        let path = service.join(file);
        let sound = fs::read_to_string(&path)?;
        let marked = sound.replacen(from, to, 1);
        ensure!(marked != sound, "{from} is not in {file}");
        // Not the first `@` of the file: the XPaths of the service contain it too.
        let mark = to.find('@').context("no mark")?;
        let at = mark + marked.find(to).context("the replacement is there")?;
        let line = marked[..at].matches('\n').count() + 1;
        let mut broken = marked;
        broken.remove(at);
        fs::write(&path, broken)?;
        for verb in ["validate", "test"] {
            let output = sandbox.output(&[verb, &service.to_string_lossy()])?;
            let printed = text(&output);
            ensure!(output.status.code() == Some(3), "{name}: {printed}");
            let wanted = format!("{}:{line}:", path.display());
            ensure!(printed.contains(&wanted), "`{wanted}` is not in: {printed}");
            ensure!(printed.contains("not supported yet"), "{name}: {printed}");
            let error = printed
                .lines()
                .find(|line| line.starts_with("error[HA-0101]"));
            ensure!(
                error.is_some_and(|line| line.contains(name)),
                "{name}: {printed}"
            );
            ensure!(printed.contains("\n  hint "), "{name}: {printed}");
        }
        fs::write(&path, sound)?;
    }
    let output = sandbox.output(&["validate", &service.to_string_lossy()])?;
    ensure!(output.status.success(), "{}", text(&output));
    sandbox.assert_nothing_left()
}
