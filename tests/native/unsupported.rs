//! What is not supported yet is refused by name with file and line, never
//! ignored.

use std::fs;

use anyhow::{Result, ensure};
use e2e::service::Service;
use e2e::{Place, text};

const DEFINITION: &str = "ServiceDefinition.csdef";
const CONFIGURATION: &str = "ServiceConfiguration.cscfg";

/// File, text that is replaced, its replacement with a mark where the error
/// is, and how the error names it. `@` is the mark.
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
fn each_part_of_the_model_that_is_not_there_yet_is_refused_at_its_line() -> Result<()> {
    let place = Place::new()?;
    let service = Service::echo()?.write(&place.file("service"))?;
    for (file, from, to, name) in CASES {
        let path = service.join(file);
        let sound = fs::read_to_string(&path)?;
        let marked = sound.replacen(from, to, 1);
        ensure!(marked != sound, "{from} is not in {file}");
        let mark = marked.find('@').filter(|_| to.contains('@'));
        // The XPath of the service has the same character.
        let mark = mark
            .and_then(|_| marked.find(to))
            .map(|at| at + to.find('@').unwrap_or(0));
        let at = mark.ok_or_else(|| anyhow::anyhow!("no mark in {to}"))?;
        let line = marked[..at].matches('\n').count() + 1;
        let mut broken = marked;
        broken.remove(at);
        fs::write(&path, broken)?;
        for verb in ["validate", "test"] {
            let output = place.output(&[verb, &service.to_string_lossy()])?;
            let said = text(&output);
            ensure!(output.status.code() == Some(3), "{name}: {said}");
            let wanted = format!("{}:{line}:", path.display());
            ensure!(said.contains(&wanted), "`{wanted}` is not in: {said}");
            ensure!(said.contains("not supported yet"), "{name}: {said}");
            let error = said.lines().find(|line| line.starts_with("error[HA-0101]"));
            ensure!(
                error.is_some_and(|line| line.contains(name)),
                "{name}: {said}"
            );
            ensure!(said.contains("\n  hint "), "{name}: {said}");
        }
        fs::write(&path, sound)?;
    }
    let output = place.output(&["validate", &service.to_string_lossy()])?;
    ensure!(output.status.success(), "{}", text(&output));
    place.assert_nothing_left()
}
