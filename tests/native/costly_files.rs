//! Service files that cost the most to check: each is refused or accepted within 5 s of
//! processor time and 64 MiB.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::iter;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Sandbox, peak};
use host_agent::digest::Digest;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

const MAX_CPU: Duration = Duration::from_secs(5);
const MAX_KIB: i64 = 64 << 10;

const DEFINITION_NAMESPACE: &str =
    "http://schemas.microsoft.com/ServiceHosting/2008/10/ServiceDefinition";
const PROGRAM: &str = "#!/bin/sh\n";

/// A definition with the role `Role`, whose elements before `Runtime` are `inside`, and
/// whose variables are `variables`.
fn definition(inside: &str, variables: &str) -> String {
    format!(
        "<ServiceDefinition name=\"S\" xmlns=\"{DEFINITION_NAMESPACE}\"><WorkerRole \
         name=\"Role\">{inside}<Runtime><Environment>{variables}</Environment><EntryPoint>\
         <ProgramEntryPoint commandLine=\"run\"/></EntryPoint></Runtime></WorkerRole>\
         </ServiceDefinition>"
    )
}

/// A content of the manifest: `bytes` as the part `part`.
fn content(name: &str, digest: &str, bytes: usize, part: &str) -> String {
    format!(
        "<ContentDefinition><Name>{name}</Name><ContentDescription>\
         <LengthInBytes>{bytes}</LengthInBytes>\
         <IntegrityCheckHashAlgortihm>Sha256</IntegrityCheckHashAlgortihm>\
         <IntegrityCheckHash>{digest}</IntegrityCheckHash>\
         <DataStorePath>{part}</DataStorePath></ContentDescription></ContentDefinition>\n"
    )
}

fn file(path: &str) -> String {
    format!(
        "<FileDefinition><FilePath>\\approot\\{path}</FilePath><FileDescription>\
         <DataContentReference>run</DataContentReference></FileDescription></FileDefinition>\n"
    )
}

fn digest(bytes: &[u8]) -> Result<String> {
    Ok(Digest::of(bytes)?.0.to_base64())
}

/// A package with one role and more. It is written piece by piece: what this process has
/// in memory when it starts a command counts for that command (`ru_maxrss`).
struct Package<'a> {
    /// Attributes of the manifest's root.
    root: String,
    /// More contents.
    contents: &'a mut dyn Iterator<Item = String>,
    /// More files of the role.
    files: &'a mut dyn Iterator<Item = String>,
    /// Whether it has the part `big`.
    big: bool,
}

impl Package<'_> {
    fn write(self, path: &Path) -> Result<()> {
        const DEFINITION: &str = "ServiceDefinition/ServiceDefinition.csdef";
        let definition = definition("", "");
        let mut writer = ZipWriter::new(BufWriter::new(File::create(path)?));
        for (name, text) in [
            (
                "[Content_Types].xml",
                "<Types xmlns=\"http://schemas.openxmlformats.org/package/2006/content-types\"/>",
            ),
            (
                "_rels/.rels",
                "<Relationships \
                 xmlns=\"http://schemas.openxmlformats.org/package/2006/relationships\">\
                 <Relationship Target=\"/package.xml\" Id=\"R1\" Type=\"http://schemas.microsoft\
                 .com/windowsazure/PackageDefinition/Version/2012/03/15\"/></Relationships>",
            ),
            (DEFINITION, &definition),
            ("run", PROGRAM),
        ] {
            writer.start_file(name, SimpleFileOptions::default())?;
            writer.write_all(text.as_bytes())?;
        }
        if self.big {
            writer.start_file("big", SimpleFileOptions::default())?;
            io::copy(&mut big(), &mut writer)?;
        }
        writer.start_file("package.xml", SimpleFileOptions::default())?;
        let head = [
            "<PackageDefinition xmlns=\"http://schemas.microsoft.com/windowsazure\"",
            &self.root,
            "><PackageMetaData><KeyValuePair><Key>urn:host-agent:executable:Role</Key>\
             <Value>\\approot\\run</Value></KeyValuePair></PackageMetaData><PackageContents>",
            &content(
                DEFINITION,
                &digest(definition.as_bytes())?,
                definition.len(),
                DEFINITION,
            ),
            &content("run", &digest(PROGRAM.as_bytes())?, PROGRAM.len(), "run"),
        ]
        .concat();
        let middle = "</PackageContents><PackageLayouts><LayoutDefinition><Name>Roles/Role</Name>\
                      <LayoutDescription>"
            .to_owned();
        let end = "</LayoutDescription></LayoutDefinition></PackageLayouts></PackageDefinition>";
        let pieces = iter::once(head)
            .chain(self.contents)
            .chain([middle, file("run")])
            .chain(self.files)
            .chain([end.to_owned()]);
        for piece in pieces {
            writer.write_all(piece.as_bytes())?;
        }
        writer.finish()?.flush()?;
        Ok(())
    }
}

/// Bytes of [`big`].
const BIG: usize = 256 << 20;

/// What compresses to about a hundredth of its size: much more is refused. The number of
/// bytes that were read.
struct Compressible(u64);

impl Read for Compressible {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        for byte in &mut *buffer {
            let noise = self.0.wrapping_mul(6_364_136_223_846_793_005) >> 56;
            *byte = if self.0 % 8192 < 80 { noise as u8 } else { 0 };
            self.0 += 1;
        }
        Ok(buffer.len())
    }
}

fn big() -> impl Read {
    Compressible(0).take(BIG as u64)
}

/// Runs `validate` on `path`: it must say `expected` within the limits.
fn check(sandbox: &Sandbox, path: &Path, expected: &str) -> Result<()> {
    let log = sandbox.file("validate.log");
    let mut command: Command = sandbox.command();
    let output = File::create(&log)?;
    command.arg("validate").arg(path);
    command.stdout(output.try_clone()?).stderr(output);
    let used = peak::run(&mut command)?;
    let printed = fs::read_to_string(&log)?;
    let shown = printed.get(..1000).unwrap_or(&printed);
    let name = path.display();
    ensure!(
        printed.contains(expected),
        "{name}: no `{expected}` in {shown}"
    );
    ensure!(used.cpu <= MAX_CPU, "{name} took {:?}", used.cpu);
    ensure!(
        used.peak_kib <= MAX_KIB,
        "{name} took {} KiB",
        used.peak_kib
    );
    Ok(())
}

#[test]
fn many_contents_of_one_part_are_checked_once() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let hash = Digest::of(big())?.0.to_base64();
    let content = |n| content(&format!("NamedStreams/{n}"), &hash, BIG, "big");
    let package = Package {
        contents: &mut (0..100).map(content),
        root: String::new(),
        files: &mut iter::empty(),
        big: true,
    };
    let path = sandbox.file("contents.cspkg");
    package.write(&path)?;
    check(&sandbox, &path, "ok    ")?;

    let hash = digest(PROGRAM.as_bytes())?;
    let content = |n| self::content(&format!("NamedStreams/{n}"), &hash, PROGRAM.len(), "run");
    let package = Package {
        contents: &mut (0..51_000).map(content),
        root: String::new(),
        files: &mut iter::empty(),
        big: false,
    };
    package.write(&path)?;
    check(&sandbox, &path, "more than 51000 contents")
}

#[test]
fn namespaces_around_a_list_cost_little() -> Result<()> {
    let sandbox = Sandbox::new()?;
    for (name, root, expected) in [
        (
            "many",
            (0..4200).map(|n| format!(" xmlns:a{n}=\"b{n}\"")).collect(),
            "around a list are longer than 2048 bytes",
        ),
        // Few, but all in each part of the list that is parsed.
        (
            "long",
            format!(" xmlns:a=\"{}\"", "b".repeat(60_000)),
            "around a list are longer than 2048 bytes",
        ),
        (
            "accepted",
            (0..60)
                .map(|n| format!(" xmlns:a{n}=\"b{n}\""))
                .collect::<String>(),
            "ok    ",
        ),
    ] {
        let package = Package {
            root,
            files: &mut (0..49_000).map(|n| file(&format!("f{n}"))),
            contents: &mut iter::empty(),
            big: false,
        };
        let path = sandbox.file(&format!("{name}.cspkg"));
        package.write(&path)?;
        check(&sandbox, &path, expected)?;
    }
    Ok(())
}

#[test]
fn long_paths_of_files_cost_little() -> Result<()> {
    let sandbox = Sandbox::new()?;
    // Nested as deep as is accepted, as long as the manifest may be, in capitals.
    let directory = "DIRECTORY\\".repeat(30);
    let path = |n| file(&format!("{directory}{n:05}"));
    for (count, expected) in [(49_999, "ok    "), (50_000, "more than 50000 files")] {
        let package = Package {
            root: String::new(),
            files: &mut (0..count).map(path),
            contents: &mut iter::empty(),
            big: false,
        };
        let path = sandbox.file(&format!("{count}.cspkg"));
        package.write(&path)?;
        check(&sandbox, &path, expected)?;
    }
    let directory = format!("{}\\", "D".repeat(255)).repeat(15);
    let package = Package {
        root: String::new(),
        files: &mut (0..5000).map(|n| file(&format!("{directory}{n:05}"))),
        contents: &mut iter::empty(),
        big: false,
    };
    let path = sandbox.file("paths.cspkg");
    package.write(&path)?;
    check(&sandbox, &path, "more than 16777216 bytes")
}

#[test]
fn definitions_that_cost_the_parser_most_cost_little() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let write = |name: &str, text: String| -> Result<PathBuf> {
        let path = sandbox.file(name);
        ensure!(text.len() <= 1 << 20, "{name} has {} bytes", text.len());
        fs::write(&path, text)?;
        Ok(path)
    };
    let attributes: String = (0..100_000).map(|n| format!(" a{n:x}=\"\"")).collect();
    let attributes = format!("<ServiceDefinition{attributes}/>");
    let path = write("attributes.csdef", attributes)?;
    check(&sandbox, &path, "more than 64 attributes")?;

    let path = write(
        "elements.csdef",
        format!("<a>{}</a>", "<b/>".repeat(250_000)),
    )?;
    check(&sandbox, &path, "more than 120000 elements")?;

    let pieces = "x<![CDATA[y]]>".repeat(70_000);
    let path = write("pieces.csdef", definition(&pieces, ""))?;
    check(&sandbox, &path, "unexpected text")?;

    let uris: String = (0..40_000).map(|n| format!("<b xmlns=\"{n}\"/>")).collect();
    let path = write("uris.csdef", definition(&uris, ""))?;
    check(&sandbox, &path, "another namespace")?;

    // Every variable is looked up among all settings.
    let settings: String = (0..16_000)
        .map(|n| format!("<Setting name=\"s{n}\"/>"))
        .collect();
    let variable = |n| {
        format!(
            "<Variable name=\"v{n}\"><RoleInstanceValue xpath=\"/RoleEnvironment/CurrentInstance\
             /ConfigurationSettings/ConfigurationSetting[@name='s15999']/@value\"/></Variable>"
        )
    };
    let variables: String = (0..3_500).map(variable).collect();
    let settings = format!("<ConfigurationSettings>{settings}</ConfigurationSettings>");
    let path = write("names.csdef", definition(&settings, &variables))?;
    check(&sandbox, &path, "ok    ")?;

    // A long name is compared with all settings to suggest one.
    let config = sandbox.file("S.cscfg");
    fs::write(
        &config,
        format!(
            "<ServiceConfiguration serviceName=\"S\" xmlns=\"{}\"><Role name=\"Role\">\
             <Instances count=\"1\"/><ConfigurationSettings><Setting name=\"{}\" value=\"\"/>\
             </ConfigurationSettings></Role></ServiceConfiguration>",
            DEFINITION_NAMESPACE.replace("ServiceDefinition", "ServiceConfiguration"),
            "n".repeat(1_000_000)
        ),
    )?;
    for other in ["attributes", "elements", "pieces", "uris"] {
        fs::remove_file(sandbox.file(&format!("{other}.csdef")))?;
    }
    check(&sandbox, &config, "is not defined for role")
}
