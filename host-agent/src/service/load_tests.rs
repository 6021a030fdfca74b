//! Every way in which a service directory can be wrong, and the one error.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use proptest::prelude::*;
use vmbus::role::{Endpoint, EntryPoint, InstanceValue, LocalStorage, VariableValue};

use super::error::{Position, ServiceError, SourceLocation};
use super::model::{Payload, PublicPort};
use super::size::Sizes;
use super::{configuration, definition, load};
use crate::progress::Progress;

/// A definition in which every supported thing occurs, one a line.
const CSDEF: &str = r#"<?xml version="1.0" encoding="utf-8"?>
<ServiceDefinition name="Shop" schemaVersion="2015-04.2.6" xmlns="http://schemas.microsoft.com/ServiceHosting/2008/10/ServiceDefinition">
  <WorkerRole name="Cart" vmsize="A0">
    <ConfigurationSettings>
      <Setting name="Greeting" />
    </ConfigurationSettings>
    <LocalStorage name="Scratch" sizeInMB="10" />
    <LocalResources>
      <LocalStorage name="Data" sizeInMB="256" cleanOnRoleRecycle="false" />
    </LocalResources>
    <Endpoints>
      <InputEndpoint name="Api" protocol="tcp" port="8080" localPort="80" />
      <InputEndpoint name="Any" protocol="tcp" port="9000" localPort="*" />
    </Endpoints>
    <Runtime executionContext="elevated">
      <Environment>
        <Variable name="MODE" value="a &amp; b" />
        <Variable name="PORT"><RoleInstanceValue xpath="/RoleEnvironment/CurrentInstance/Endpoints/Endpoint[@name='Api']/@port" /></Variable>
      </Environment>
      <EntryPoint>
        <ProgramEntryPoint commandLine="bin\serve --flag &quot;two words&quot;" setReadyOnProcessStart="false" />
      </EntryPoint>
    </Runtime>
  </WorkerRole>
  <WorkerRole name="Mail">
    <Runtime><EntryPoint><ProgramEntryPoint commandLine="run" /></EntryPoint></Runtime>
  </WorkerRole>
</ServiceDefinition>
"#;

const CSCFG: &str = r#"<?xml version="1.0" encoding="utf-8"?>
<ServiceConfiguration serviceName="Shop" osFamily="web" osVersion="*" xmlns="http://schemas.microsoft.com/ServiceHosting/2008/10/ServiceConfiguration">
  <Role name="Cart">
    <Instances count="3" />
    <ConfigurationSettings>
      <Setting name="Greeting" value="hello" />
    </ConfigurationSettings>
  </Role>
  <Role name="Mail">
    <Instances count="1" />
  </Role>
</ServiceConfiguration>
"#;

/// The first line that holds `needle`, from 1.
fn line_of(text: &str, needle: &str) -> usize {
    let found = text.lines().position(|line| line.contains(needle));
    found.unwrap_or_else(|| panic!("{needle} is not in the text")) + 1
}

fn refused(text: &str) -> ServiceError {
    let file = Path::new("S.csdef");
    match definition::parse(file, text.to_owned(), &Sizes::default()) {
        Ok(_) => panic!("accepted:\n{text}"),
        Err(error) => error,
    }
}

#[test]
fn a_definition_with_everything_supported_is_read_as_written() {
    let directory = service_directory();
    let model = load(directory.path(), None, &Progress::default()).unwrap();
    assert_eq!((model.name.as_str(), model.image.as_str()), ("Shop", "web"));
    let [cart, mail] = model.roles.as_slice() else {
        panic!("two roles");
    };
    let role = &cart.definition;
    assert_eq!(role.name, "Cart");
    assert_eq!(cart.instances, 3);
    assert_eq!(
        (&*cart.size.name, cart.size.memory_mib),
        ("ExtraSmall", 768)
    );
    let command = ["bin/serve", "--flag", "two words"].map(str::to_owned);
    assert_eq!(
        role.entry_point,
        EntryPoint::Program {
            command: command.into(),
            ready_on_start: false
        }
    );
    assert!(role.elevated);
    let place = |file: &str, line, column| SourceLocation {
        file: directory.path().join(file),
        position: Position { line, column },
    };
    assert_eq!(
        model.image_place,
        place("ServiceConfiguration.cscfg", 2, 52)
    );
    let endpoint = |name: &str, local_port| Endpoint {
        name: name.into(),
        protocol: "tcp".into(),
        local_port,
    };
    assert_eq!(role.endpoints, [endpoint("Api", 80), endpoint("Any", 9000)]);
    let public = |port, line| PublicPort {
        port,
        place: place("ServiceDefinition.csdef", line, 54),
    };
    assert_eq!(cart.public_ports, [public(8080, 12), public(9000, 13)]);
    let storage = |name: &str, size_mib, clean_on_role_recycle| LocalStorage {
        name: name.into(),
        size_mib,
        clean_on_role_recycle,
    };
    assert_eq!(
        role.local_storage,
        [storage("Scratch", 10, true), storage("Data", 256, false)]
    );
    assert_eq!(
        role.settings,
        [("Greeting".to_owned(), "hello".to_owned())].into()
    );
    assert_eq!(
        role.environment,
        [
            ("MODE".to_owned(), VariableValue::Literal("a & b".into())),
            (
                "PORT".to_owned(),
                VariableValue::Instance(InstanceValue::EndpointPort("Api".into()))
            ),
        ]
    );
    assert_eq!(
        cart.payload,
        Payload::Directory(directory.path().join("Cart"))
    );
    assert_eq!((&*mail.size.name, mail.size.memory_mib), ("Small", 1792));
    let EntryPoint::Program { ready_on_start, .. } = &mail.definition.entry_point;
    assert!(*ready_on_start && !mail.definition.elevated);
}

#[test]
fn a_role_too_long_for_a_goal_is_refused_at_its_element() {
    let directory = service_directory();
    let file = directory.path().join("ServiceConfiguration.cscfg");
    let load = || load(directory.path(), None, &Progress::default());
    // A double quote takes two bytes of JSON and one of this attribute.
    let write = |quotes| fs::write(&file, CSCFG.replace("\"hello\"", &format!("'{quotes}'")));
    write("\"".repeat(400_000)).unwrap();
    load().unwrap();
    write("\"".repeat(500_000)).unwrap();
    let error = load().unwrap_err();
    assert_eq!(error.position().unwrap().line, line_of(CSDEF, "Cart"));
    assert!(error.what().contains("too long for a goal"), "{error}");
    assert!(error.hint().is_some());
}

/// Replace the first by the second: the error stands on the line that holds the
/// third and contains the fourth; its hint contains the fifth.
#[rustfmt::skip]
const BAD_DEFINITIONS: &[(&str, &str, &str, &str, &str)] = &[
    ("</Endpoints>", "</Endpoint>", "</Endpoint>", "not well-formed", ""),
    ("<?xml version=\"1.0\" encoding=\"utf-8\"?>", "<!DOCTYPE x>", "<!DOCTYPE", "DTD", "remove"),
    ("<?xml version=\"1.0\" encoding=\"utf-8\"?>", "<!-- <!DOCTYPE --><!DOCTYPE x [<!ENTITY a \"b\">]>", "<!DOCTYPE x", "DTD", ""),
    ("<ServiceDefinition ", "<ServiceDefinitions ", "<ServiceDefinitions", "not well-formed", ""),
    ("2008/10/ServiceDefinition\"", "2009/10/X\"", "<ServiceDefinition", "wrong namespace", "xmlns=\"http"),
    (" xmlns=\"http://schemas.microsoft.com/ServiceHosting/2008/10/ServiceDefinition\"", "", "<ServiceDefinition", "no namespace", "xmlns"),
    ("name=\"Shop\" ", "", "<ServiceDefinition", "no attribute \"name\"", "add name="),
    ("name=\"Shop\"", "name=\"../Shop\"", "../Shop", "not a usable name", "letters"),
    ("schemaVersion", "upgradeDomainCount", "upgradeDomainCount", "\"upgradeDomainCount\" of <ServiceDefinition> is not supported yet", "remove"),
    ("schemaVersion", "schemaVersoin", "schemaVersoin", "unknown attribute", "did you mean \"schemaVersion\"?"),
    ("<LocalResources>", "<LocalResource/><LocalResources>", "<LocalResource/>", "unknown element <LocalResource> in <WorkerRole>", "did you mean \"LocalResources\"?"),
    ("<LocalResources>", "<Startup/><LocalResources>", "<Startup/>", "<Startup> is not supported yet", "remove"),
    ("<LocalResources>", "<Certificates/><LocalResources>", "<Certificates/>", "<Certificates> is not supported yet", "remove"),
    ("<LocalResources>", "<Imports/><LocalResources>", "<Imports/>", "<Imports> is not supported yet", "remove"),
    ("<LocalResources>", "<x:y xmlns:x=\"urn:z\"/><LocalResources>", "<x:y", "another namespace", "remove"),
    ("<LocalResources>", "words<LocalResources>", "words", "unexpected text in <WorkerRole>", "attributes"),
    ("<WorkerRole name=\"Mail\"", "<WebRole name=\"W\"/><WorkerRole name=\"Mail\"", "<WebRole", "<WebRole> is not supported yet", "remove"),
    ("name=\"Mail\"", "name=\"cart\"", "\"cart\"", "duplicate role \"cart\"", "rename"),
    ("vmsize=\"A0\"", "vmsize=\"Smal\"", "Smal\"", "unknown size", "did you mean \"Small\"?"),
    ("vmsize=\"A0\"", "vmsize=\"Standard_D1\"", "Standard_D1", "not supported yet", "ExtraSmall"),
    ("vmsize=\"A0\"", "vmsize=\"A7\"", "\"A7\"", "not supported yet", "ExtraSmall"),
    ("vmsize=\"A0\"", "enableNativeCodeExecution=\"false\"", "enableNative", "partial trust", "remove"),
    ("<Setting name=\"Greeting\" />", "<Setting name=\"a\"/>\n<Setting name=\"A\"/>", "name=\"A\"", "duplicate setting", "rename"),
    ("<Setting name=\"Greeting\" />", "<Setting name=\"a b\"/>", "a b", "not a usable name", ""),
    ("<Setting name=\"Greeting\" />", "<Setting name=\"a\" value=\"1\"/>", "value=\"1\"", "unknown attribute \"value\"", "name"),
    ("name=\"Data\"", "name=\"Scratch\"", "sizeInMB=\"256\"", "duplicate local storage", "rename"),
    ("name=\"Data\"", "name=\"a/b\"", "a/b", "not a usable name", ""),
    ("name=\"Data\"", "name=\"PATH\"", "name=\"PATH\"", "a variable that the platform sets", "another name"),
    ("sizeInMB=\"256\"", "sizeInMB=\"0\"", "sizeInMB=\"0\"", "not a number from 1", ""),
    ("sizeInMB=\"256\"", "sizeInMB=\"-5\"", "-5", "not a number", ""),
    ("sizeInMB=\"256\"", "sizeInMB=\"13327\"", "13327", "adds up to 13337 MB, size ExtraSmall has 13336 MB", "vmsize larger"),
    ("cleanOnRoleRecycle=\"false\"", "cleanOnRoleRecycle=\"no\"", "\"no\"", "neither true nor false", ""),
    ("port=\"9000\"", "port=\"8080\"", "\"Any\"", "port 8080 is already taken by endpoint \"Api\"", "unique"),
    ("port=\"9000\" localPort=\"*\"", "port=\"80\"", "\"Any\"", "local port 80 is already taken", "not supported yet"),
    ("port=\"9000\"", "port=\"65536\"", "65536", "not a number from 1 to 65535", ""),
    ("port=\"9000\"", "port=\"+1\"", "+1", "not a number", ""),
    ("localPort=\"*\"", "localPort=\"x\"", "localPort=\"x\"", "not a number", "let the platform choose"),
    ("\"Any\" protocol=\"tcp\"", "\"Any\" protocol=\"http\"", "http\" port", "protocol=\"http\" is not supported yet", "tcp"),
    ("\"Any\" protocol=\"tcp\"", "\"Any\" protocol=\"sctp\"", "sctp", "unknown protocol", "tcp"),
    ("name=\"Any\"", "name=\"api\"", "\"api\"", "duplicate endpoint", ""),
    ("localPort=\"*\"", "loadBalancerProbe=\"p\"", "loadBalancerProbe", "not supported yet", "remove"),
    ("</Endpoints>", "<InternalEndpoint name=\"i\"/></Endpoints>", "<InternalEndpoint", "<InternalEndpoint> is not supported yet", ""),
    ("</Endpoints>", "</Endpoints><Endpoints/>", "<Endpoints/>", "second <Endpoints>", "merge"),
    ("\"elevated\"", "\"root\"", "\"root\"", "unknown executionContext", "limited"),
    ("name=\"MODE\"", "name=\"A=B\"", "A=B", "not a usable variable name", ""),
    ("name=\"MODE\"", "name=\"RoleRoot\"", "name=\"RoleRoot\"", "a variable that the platform sets", "script"),
    ("name=\"MODE\"", "name=\"PORT\"", "RoleInstanceValue", "duplicate variable", ""),
    ("value=\"a &amp; b\"", "value=\"a &bad; b\"", "&bad;", "not well-formed", ""),
    ("value=\"a &amp; b\"", "", "name=\"MODE\"", "variable \"MODE\" has no value", "RoleInstanceValue"),
    ("name=\"PORT\"", "name=\"PORT\" value=\"1\"", "<RoleInstanceValue", "both", "keep one"),
    ("'Api']/@port", "'Apy']/@port", "'Apy'", "role \"Cart\" has no endpoint \"Apy\"", "did you mean \"Api\"?"),
    ("'Api']/@port", "'Api']/@prot", "@prot", "unknown xpath", "CurrentInstance"),
    ("<ProgramEntryPoint commandLine=\"run\" />", "<NetFxEntryPoint/>", "<NetFxEntryPoint", "not supported yet", ""),
    ("<ProgramEntryPoint commandLine=\"run\" />", "", "\"Mail\"", "role \"Mail\" has no entry point", "ProgramEntryPoint"),
    ("commandLine=\"run\"", "commandLine=\" \"", "commandLine=\" \"", "empty", ""),
    ("commandLine=\"run\"", "commandLine=\"/bin/sh -c x\"", "/bin/sh", "absolute path", "script"),
    ("commandLine=\"run\"", "commandLine=\"..\\..\\sh\"", "sh\"", "leaves approot", "script"),
    ("commandLine=\"run\"", "commandLine=\"run &#10; x\"", "&#10;", "line break", ""),
    ("commandLine=\"run\"", "commandLine='run \"x'", "'run", "unclosed", ""),
];

#[test]
fn each_malformed_definition_gives_one_error_at_its_line() {
    definition::parse(Path::new("S.csdef"), CSDEF.into(), &Sizes::default()).unwrap();
    for (old, new, line, what, hint) in BAD_DEFINITIONS {
        assert!(CSDEF.contains(old), "{old}");
        let text = CSDEF.replacen(old, new, 1);
        let error = refused(&text);
        let expected = match *what {
            // The end tag is where the parser sees that the names differ.
            "not well-formed" if line.starts_with("<ServiceDefinitions") => text.lines().count(),
            _ => line_of(&text, line),
        };
        assert_eq!(
            error.position().map(|p| p.line),
            Some(expected),
            "{old} -> {new}: {error}"
        );
        assert!(error.what().contains(what), "{old} -> {new}: {error}");
        assert!(
            error.hint().is_some_and(|found| found.contains(hint)),
            "{error}: {:?}",
            error.hint()
        );
        assert_eq!(error.snippet(), text.lines().nth(expected - 1), "{error}");
        assert!(
            error
                .to_string()
                .starts_with(&format!("S.csdef:{expected}:")),
            "{error}"
        );
    }
}

#[test]
fn limits_of_the_definition_are_refused_at_the_first_excess() {
    let deep = format!("{}{}", "<a>".repeat(33), "</a>".repeat(33));
    assert!(refused(&deep).what().contains("deeper than 32"));
    // A million levels must not cost a stack.
    assert!(refused(&"<a>".repeat(1_000_000)).what().contains("deeper"));

    let role = |name: &str, inside: &str| {
        format!(
            "<WorkerRole name=\"{name}\">{inside}<Runtime><EntryPoint>\
             <ProgramEntryPoint commandLine=\"r\"/></EntryPoint></Runtime></WorkerRole>\n"
        )
    };
    let service = |roles: String| {
        format!(
            "<ServiceDefinition name=\"S\" xmlns=\"{}\">\n{roles}</ServiceDefinition>",
            definition::NAMESPACE
        )
    };
    let error = refused(&service(
        (0..26).map(|i| role(&format!("R{i}"), "")).collect(),
    ));
    assert_eq!(error.to_string(), "S.csdef:27:1: more than 25 roles");
    let endpoints: Vec<String> = (1..=26)
        .map(|i| format!("\n<InputEndpoint name=\"e{i}\" protocol=\"tcp\" port=\"{i}\"/>"))
        .collect();
    let endpoints = endpoints.concat();
    let error = refused(&service(role(
        "R",
        &format!("<Endpoints>{endpoints}</Endpoints>"),
    )));
    assert_eq!(
        error.to_string(),
        "S.csdef:28:1: more than 25 endpoints in the service"
    );
    assert!(refused(&service(String::new())).what().contains("no role"));
}

#[rustfmt::skip]
const BAD_CONFIGURATIONS: &[(&str, &str, &str, &str, &str)] = &[
    ("serviceName=\"Shop\"", "serviceName=\"Shed\"", "Shed", "is not the service \"Shop\"", "serviceName=\"Shop\""),
    ("serviceName=\"Shop\" ", "", "<ServiceConfiguration", "no attribute \"serviceName\"", ""),
    ("2008/10/ServiceConfiguration", "2008/10/ServiceDefinition", "<ServiceConfiguration", "wrong namespace", "xmlns"),
    ("osFamily=\"web\"", "osFamily=\"../web\"", "../web", "not the name of an image", "minimal"),
    ("osFamily=\"web\"", "osFamily=\"\"", "osFamily", "not the name of an image", "minimal"),
    ("osVersion=\"*\"", "osVersion=\"WA-GUEST-OS-2.1\"", "WA-GUEST", "not supported yet", "*"),
    ("name=\"Mail\"", "name=\"Mial\"", "Mial", "role \"Mial\" is not in the definition", ""),
    ("name=\"Mail\"", "name=\"Cart\"", "<Instances count=\"1\"", "duplicate role", ""),
    ("name=\"Mail\"", "name=\"Mail\" vmName=\"m\"", "vmName", "not supported yet", "remove"),
    ("count=\"3\"", "count=\"0\"", "count=\"0\"", "not a number from 1 to 1000", ""),
    ("count=\"3\"", "count=\"4294967297\"", "4294967297", "not a number", ""),
    ("<Instances count=\"3\" />", "", "\"Cart\"", "no <Instances>", "count=\"1\""),
    (" value=\"hello\"", "", "\"Greeting\"", "no attribute \"value\"", "add value"),
    ("<Setting name=\"Greeting\" value=\"hello\" />", "", "<ConfigurationSettings>", "setting \"Greeting\" of role \"Cart\" has no value", "<Setting"),
    ("name=\"Greeting\"", "name=\"greetng\"", "greetng", "not defined for role \"Cart\"", "did you mean \"Greeting\"?"),
    ("</Role>", "<Certificates/></Role>", "<Certificates/>", "not supported yet", "remove"),
    ("<Role name=\"Cart\">", "<NetworkConfiguration/><Role name=\"Cart\">", "<NetworkConf", "not supported yet", "remove"),
    ("<Role name=\"Cart\">", "<Rôle/><Role name=\"Cart\">", "<Rôle/>", "unknown element <Rôle>", "did you mean \"Role\"?"),
];

#[test]
fn each_malformed_configuration_gives_one_error_at_its_line() {
    let file = Path::new("S.cscfg");
    let definition =
        definition::parse(Path::new("S.csdef"), CSDEF.into(), &Sizes::default()).unwrap();
    for (old, new, line, what, hint) in BAD_CONFIGURATIONS {
        assert!(CSCFG.contains(old), "{old}");
        let text = CSCFG.replacen(old, new, 1);
        let Err(error) = configuration::parse(file, &text, &definition) else {
            panic!("accepted: {new}");
        };
        let mut expected = line_of(&text, line);
        if *what == "duplicate role" {
            expected -= 1;
        }
        assert_eq!(
            error.position().map(|p| p.line),
            Some(expected),
            "{old} -> {new}: {error}"
        );
        assert!(error.what().contains(what), "{old} -> {new}: {error}");
        assert!(
            error.hint().is_some_and(|found| found.contains(hint)),
            "{error}: {:?}",
            error.hint()
        );
    }
    let start = CSCFG.find("  <Role name=\"Mail\"").unwrap();
    let text = format!("{}</ServiceConfiguration>", &CSCFG[..start]);
    let error = configuration::parse(file, &text, &definition).unwrap_err();
    assert!(
        error.what().contains("role \"Mail\" is not configured"),
        "{error}"
    );
    let plain = CSCFG.replace("osFamily=\"web\" osVersion=\"*\" ", "");
    let read = configuration::parse(file, &plain, &definition).unwrap();
    assert_eq!(read.image, None);
}

/// A directory with the service of [`CSDEF`], complete.
pub(super) fn service_directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    fs::write(root.join("ServiceDefinition.csdef"), CSDEF).unwrap();
    fs::write(root.join("ServiceConfiguration.cscfg"), CSCFG).unwrap();
    fs::create_dir_all(root.join("Cart/bin/empty/empty")).unwrap();
    fs::create_dir_all(root.join("Mail/päth with space")).unwrap();
    fs::write(root.join("Cart/data"), "same").unwrap();
    fs::write(root.join("Mail/päth with space/data"), "same").unwrap();
    fs::write(root.join("Mail/none"), "").unwrap();
    fs::write(root.join("Mail/zeroes"), vec![0; 3 << 20]).unwrap();
    for program in ["Cart/bin/serve", "Mail/run"] {
        let path = root.join(program);
        fs::write(&path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    }
    directory
}

#[test]
fn each_fault_of_a_directory_is_an_error_that_names_the_path() {
    type Fault = fn(&Path);
    let faults: &[(Fault, &str, &str, &str)] = &[
        (
            |d| fs::remove_dir_all(d).unwrap(),
            "",
            "cannot open the service",
            "",
        ),
        (
            |d| fs::remove_file(d.join("ServiceDefinition.csdef")).unwrap(),
            "",
            "no service definition",
            "ServiceDefinition.csdef",
        ),
        (
            |d| fs::write(d.join("Other.csdef"), "").unwrap(),
            "",
            "Other.csdef and ServiceDefinition.csdef",
            "one .csdef",
        ),
        (
            |d| fs::remove_file(d.join("ServiceConfiguration.cscfg")).unwrap(),
            "",
            "no service configuration",
            "--config",
        ),
        (
            |d| {
                fs::rename(d.join("ServiceConfiguration.cscfg"), d.join("a.cscfg")).unwrap();
                fs::write(d.join("b.cscfg"), "").unwrap();
            },
            "",
            "a.cscfg and b.cscfg",
            "--config",
        ),
        (
            |d| fs::write(d.join("ServiceDefinition.csdef"), b"<a>\xFF").unwrap(),
            "ServiceDefinition.csdef:1:4",
            "not UTF-8",
            "UTF-8",
        ),
        (
            |d| fs::write(d.join("ServiceDefinition.csdef"), b"\xFF\xFE<\0").unwrap(),
            "ServiceDefinition.csdef",
            "UTF-16",
            "iconv",
        ),
        (
            |d| fs::write(d.join("ServiceDefinition.csdef"), vec![b' '; 1 << 21]).unwrap(),
            "ServiceDefinition.csdef",
            "larger than 1048576 bytes",
            "",
        ),
        (
            |d| fs::remove_dir_all(d.join("Mail")).unwrap(),
            "ServiceDefinition.csdef:25:3",
            "role \"Mail\" has no directory",
            "make it",
        ),
        (
            |d| fs::remove_file(d.join("Mail/run")).unwrap(),
            "ServiceDefinition.csdef:26:",
            "/Mail/run",
            "add the file",
        ),
        (
            |d| fs::rename(d.join("Mail/run"), d.join("Mail/Run")).unwrap(),
            "ServiceDefinition.csdef:26:",
            "does not exist",
            "did you mean \"Run\"?",
        ),
        (
            |d| {
                fs::remove_file(d.join("Mail/run")).unwrap();
                fs::create_dir(d.join("Mail/run")).unwrap();
                fs::write(d.join("Mail/run/x"), "").unwrap();
            },
            "ServiceDefinition.csdef:26:",
            "is a directory",
            "",
        ),
        (
            |d| fs::set_permissions(d.join("Mail/run"), fs::Permissions::from_mode(0o644)).unwrap(),
            "ServiceDefinition.csdef:26:",
            "is not executable",
            "chmod +x",
        ),
        (
            |d| std::os::unix::fs::symlink("run", d.join("Mail/link")).unwrap(),
            "Mail/link",
            "symbolic links",
            "replace",
        ),
        (
            |d| {
                nix::unistd::mkfifo(&d.join("Mail/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
            },
            "Mail/fifo",
            "neither a regular file",
            "remove",
        ),
        (
            |d| fs::write(d.join("Mail/a\\b"), "").unwrap(),
            "Mail/a\\b",
            "holds '\\\\'",
            "rename",
        ),
        (
            |d| fs::create_dir_all(d.join("Mail").join("d/".repeat(33))).unwrap(),
            "",
            "deeper than 32",
            "",
        ),
        (
            |d| {
                let big = fs::File::create(d.join("Mail/big")).unwrap();
                big.set_len(3 << 30).unwrap();
            },
            "Mail:",
            "larger than 2147483648 bytes",
            "",
        ),
    ];
    for (fault, place, what, hint) in faults {
        let directory = service_directory();
        fault(directory.path());
        let error = load(directory.path(), None, &Progress::default()).unwrap_err();
        let text = error.to_string();
        let expected = directory.path().join(place).display().to_string();
        let expected = expected.trim_end_matches('/');
        assert!(
            text.starts_with(expected),
            "{text} should start with {expected}"
        );
        assert!(text.contains(what), "{text} should contain {what}");
        assert!(
            error.hint().is_some_and(|found| found.contains(hint)),
            "{text}: {:?}",
            error.hint()
        );
    }
}

#[test]
fn hints_about_a_directory_with_a_blank_are_commands() {
    let root = service_directory();
    let directory = root.path().join("my service");
    fs::create_dir(&directory).unwrap();
    for entry in fs::read_dir(root.path()).unwrap().flatten() {
        if entry.path() != directory {
            fs::rename(entry.path(), directory.join(entry.file_name())).unwrap();
        }
    }
    let program = directory.join("Mail/run");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o644)).unwrap();
    let hint = |service: &Path| {
        let error = load(service, None, &Progress::default()).unwrap_err();
        error.hint().unwrap_or_default().to_owned()
    };
    assert_eq!(
        hint(&directory),
        format!("chmod +x '{}'", program.display())
    );
    let wanted = format!("name its directory: '{}'", directory.display());
    assert_eq!(hint(&directory.join("ServiceDefinition.csdef")), wanted);
}

proptest! {
    #![proptest_config(crate::property::cases(2000))]

    /// Neither any text nor any damage to a real definition makes the reader panic.
    #[test]
    fn no_text_makes_the_readers_panic(
        noise in ".{0,200}",
        cut in any::<prop::sample::Index>(),
        length in 0..40_usize,
    ) {
        let definition = definition::parse(Path::new("d"), CSDEF.into(), &Sizes::default()).unwrap();
        let _ = definition::parse(Path::new("d"), noise.clone(), &Sizes::default());
        for original in [CSDEF, CSCFG] {
            let mut start = cut.index(original.len());
            while !original.is_char_boundary(start) { start -= 1; }
            let mut end = (start + length).min(original.len());
            while !original.is_char_boundary(end) { end += 1; }
            let text = format!("{}{noise}{}", &original[..start], &original[end..]);
            for error in [
                definition::parse(Path::new("d"), text.clone(), &Sizes::default()).err(),
                configuration::parse(Path::new("c"), &text, &definition).err(),
            ].into_iter().flatten() {
                let position = error.position().unwrap();
                prop_assert!(position.line <= text.matches('\n').count() + 1);
            }
        }
    }
}
