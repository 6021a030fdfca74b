//! Packs a service directory into a package (`.cspkg`) of the open format. The
//! same files always give the same bytes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::iter::once;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use jiff::{Timestamp, tz::Offset};

use super::archive_writer::{ArchiveWriter, is_limit};
use super::definition::{self, Definition};
use super::error::{Blame, ServiceError};
use super::load::{check_directory, directory_of, find_definition};
use super::package::{
    APPROOT, CONTENT_TYPES, CONTENT_TYPES_NAMESPACE, DEFINITION, EXECUTABLE_KEY,
    MANIFEST_NAMESPACE, MANIFEST_TYPE, MAX_MANIFEST, RELATIONSHIPS, RELATIONSHIPS_NAMESPACE,
    ROLE_LAYOUT,
};
use super::payload::{Files, RoleFile, Total};
use super::size::Sizes;
use super::xml::escape;
use crate::digest::{Digest, Verified};
use crate::progress::Progress;

/// Most bytes of metadata that every reader of packages must accept (manifest
/// format, `PackageMetaData`).
const MAX_METADATA: usize = 1_000_000;

const FEWER_FILES: &str = "remove files that the roles do not need";

/// Summary of a package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// Service name.
    pub service: String,
    /// Number of roles.
    pub roles: usize,
    /// Number of files of all roles.
    pub files: usize,
    /// Size of the package in bytes.
    pub bytes: u64,
}

/// [`ServiceRules::pack`] by the rules of no operator.
///
/// # Errors
/// The service is refused, or `out` cannot be written.
pub fn pack(directory: &Path, out: &Path, progress: &Progress) -> Result<Packed, ServiceError> {
    pack_by(&Sizes::default(), directory, out, progress)
}

pub(super) fn pack_by(
    sizes: &Sizes,
    directory: &Path,
    out: &Path,
    progress: &Progress,
) -> Result<Packed, ServiceError> {
    let time = source_date(std::env::var_os("SOURCE_DATE_EPOCH").as_deref())?;
    pack_at(sizes, directory, &destination(out)?, time, progress)
}

/// The path at which the package for `out` appears. Only a regular file is
/// replaced: with `-o /dev/null`, root must not lose the device.
fn destination(out: &Path) -> Result<PathBuf, ServiceError> {
    const HINT: &str = "name a file: host-agent pack DIR -o FILE.cspkg";
    let cannot = |source| ServiceError::output(out, "cannot write the package", source);
    match fs::metadata(out) {
        Ok(found) if found.is_file() => fs::canonicalize(out).map_err(cannot),
        Ok(found) => {
            let what = if found.is_dir() {
                "the output is a directory"
            } else {
                "the output is not a regular file"
            };
            Err(ServiceError::new(out, what)
                .blaming(Blame::Output)
                .with_hint(HINT))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read_link(out) {
            Ok(target) => {
                let what = format!("is a link to {}, which does not exist", target.display());
                Err(ServiceError::new(out, what)
                    .blaming(Blame::Output)
                    .with_hint("remove the link, or create its target"))
            }
            Err(_) => Ok(out.to_owned()),
        },
        Err(error) => Err(cannot(error)),
    }
}

fn pack_at(
    sizes: &Sizes,
    directory: &Path,
    out: &Path,
    time: Timestamp,
    progress: &Progress,
) -> Result<Packed, ServiceError> {
    let what = format!("listing {}", directory.display());
    let step = progress.step(what, None);
    let definition = definition::read(&find_definition(directory)?, sizes)?;
    let mut roles = Vec::new();
    let mut total = Total::default();
    for role in &definition.roles {
        let files = directory.join(&role.definition.name);
        let files = check_directory(&definition, role, &files, &mut total)?;
        roles.push((role.definition.name.as_str(), files));
    }
    let files = roles.iter().map(|(_, files)| files.entries().len()).sum();
    drop(step);
    let plan = Plan::of(&definition, &roles, progress)?;
    let manifest: u64 = plan.manifest(time).map(|piece| piece.len() as u64).sum();
    if manifest > MAX_MANIFEST {
        let what = format!(
            "the manifest would have {manifest} bytes, the limit of a package is {MAX_MANIFEST}"
        );
        return Err(ServiceError::new(directory, what)
            .with_hint("remove files that the roles do not need, or shorten their names"));
    }

    let cannot = |source| cannot_write(directory, out, "cannot write the package", source);
    // 0o666 and the umask: readable as any new file, not only by its owner.
    let unfinished = tempfile::Builder::new()
        .prefix(".pack-")
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(directory_of(out))
        .map_err(cannot)?;
    let file = unfinished.as_file().try_clone().map_err(cannot)?;
    let mut archive = ArchiveWriter::new(file, ms_dos(time));
    archive
        .add(CONTENT_TYPES, || Ok(Pieces::of(plan.content_types())))
        .and_then(|()| archive.add(RELATIONSHIPS, || Ok(Pieces::of(once(relationships())))))
        .and_then(|()| archive.add("package.xml", || Ok(Pieces::of(plan.manifest(time)))))
        .and_then(|()| archive.add(DEFINITION, || Ok(definition.text().as_bytes())))
        .map_err(cannot)?;
    let total = plan.contents.values().map(|content| content.entry.size);
    let what = format!("packing {}", out.display());
    let _step = progress.step(what, Some(total.sum()));
    for (digest, content) in &plan.contents {
        let open = || {
            let content = progress.watch(content.files.read(content.entry)?);
            Ok(Verified::new(content, *digest))
        };
        archive.add(&content_name(digest), open).map_err(|source| {
            let place = content.files.locate(&content.entry.path);
            let what = format!("cannot pack {}", place.display());
            cannot_write(directory, out, &what, source)
                .or_hint("pack again, and do not change the files meanwhile")
        })?;
    }
    let file = archive.finish().map_err(cannot)?;
    file.sync_all().map_err(cannot)?;
    let bytes = file.metadata().map_err(cannot)?.len();
    progress.check().map_err(cannot)?;
    unfinished
        .persist(out)
        .map_err(|error| cannot(error.error))?;
    Ok(Packed {
        service: definition.name.clone(),
        roles: roles.len(),
        files,
        bytes,
    })
}

/// Why `out`, the package of `directory`, cannot be written: `what`, or a limit of packages.
fn cannot_write(directory: &Path, out: &Path, what: &str, source: io::Error) -> ServiceError {
    if is_limit(&source) {
        return ServiceError::new(directory, source.to_string()).with_hint(FEWER_FILES);
    }
    ServiceError::output(out, what, source)
}

/// Everything that goes into the package.
struct Plan<'a> {
    /// Each distinct content once.
    contents: BTreeMap<Digest, Content<'a>>,
    /// The files of each role with the digests of their contents.
    layouts: Vec<(&'a str, Vec<(&'a RoleFile, Digest)>)>,
    /// Digest and size of the definition.
    definition: (Digest, u64),
}

/// The first file with a content.
struct Content<'a> {
    files: &'a Files,
    entry: &'a RoleFile,
}

impl<'a> Plan<'a> {
    /// Reads every file once to compute its digest.
    fn of(
        definition: &'a Definition,
        roles: &'a [(&'a str, Files)],
        progress: &Progress,
    ) -> Result<Self, ServiceError> {
        let entries = roles.iter().flat_map(|(_, files)| files.entries());
        let total = entries.map(|entry| entry.size).sum();
        let _step = progress.step("reading the files to pack", Some(total));
        let mut contents = BTreeMap::new();
        let mut layouts = Vec::new();
        let mut metadata = 0;
        for (role, files) in roles {
            let mut layout = Vec::new();
            for entry in files.entries() {
                let place = files.locate(&entry.path);
                let (digest, _) = files
                    .read(entry)
                    .and_then(|content| Digest::of(progress.watch(content)))
                    .map_err(|source| ServiceError::io(&place, "cannot read the file", source))?;
                contents.entry(digest).or_insert(Content { files, entry });
                layout.push((entry, digest));
                if entry.executable {
                    metadata += entry.path.len() + APPROOT.len() + 1;
                }
            }
            layouts.push((*role, layout));
        }
        if metadata > MAX_METADATA {
            let what = format!(
                "the paths of executable files have {metadata} bytes, the limit of a package is \
                 {MAX_METADATA}"
            );
            return Err(ServiceError::new(definition.file(), what)
                .with_hint("chmod -x files that are not programs"));
        }
        let text = definition.text().as_bytes();
        let definition_digest = Digest::of(text)
            .map_err(|source| ServiceError::io(definition.file(), "cannot hash", source))?;
        Ok(Self {
            contents,
            layouts,
            definition: definition_digest,
        })
    }

    fn content_types(&self) -> impl Iterator<Item = String> {
        let head = format!(
            "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n<Types xmlns=\"{CONTENT_TYPES_NAMESPACE}\">\n\
             <Default Extension=\"rels\" ContentType=\"application/vnd.openxmlformats-package.relationships+xml\"/>\n\
             <Default Extension=\"xml\" ContentType=\"text/xml\"/>\n\
             <Default Extension=\"csdef\" ContentType=\"text/xml\"/>\n"
        );
        let parts = self.contents.keys().map(|digest| {
            format!(
                "<Override PartName=\"/{}\" ContentType=\"application/octet-stream\"/>\n",
                content_name(digest)
            )
        });
        once(head).chain(parts).chain(once("</Types>\n".into()))
    }

    fn manifest(&self, time: Timestamp) -> impl Iterator<Item = String> {
        let definition = content_record(DEFINITION, &self.definition.0, self.definition.1);
        let contents = self
            .contents
            .iter()
            .map(|(digest, first)| content_record(&content_name(digest), digest, first.entry.size));
        let layouts = self.layouts.iter().flat_map(move |(role, layout)| {
            let files = layout
                .iter()
                .map(move |(entry, digest)| file_record(entry, digest, time));
            once(format!(
                "<LayoutDefinition><Name>{ROLE_LAYOUT}{role}</Name><LayoutDescription>\n"
            ))
            .chain(files)
            .chain(once("</LayoutDescription></LayoutDefinition>\n".into()))
        });
        let end = "</PackageLayouts>\n</PackageDefinition>\n";
        once(self.metadata())
            .chain(once(definition))
            .chain(contents)
            .chain(once("</PackageContents>\n<PackageLayouts>\n".into()))
            .chain(layouts)
            .chain(once(end.into()))
    }

    /// The manifest up to its list of contents.
    fn metadata(&self) -> String {
        let pair = |key: &str, value: &str| {
            let (key, value) = (escape(key), escape(value));
            format!("<KeyValuePair><Key>{key}</Key><Value>{value}</Value></KeyValuePair>\n")
        };
        let mut xml = format!(
            "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n\
             <PackageDefinition xmlns=\"{MANIFEST_NAMESPACE}\">\n<PackageMetaData>\n"
        );
        xml += &pair(
            "http://schemas.microsoft.com/windowsazure/ProductVersion/",
            concat!("host-agent ", env!("CARGO_PKG_VERSION")),
        );
        for (role, layout) in &self.layouts {
            let executable: Vec<String> = layout
                .iter()
                .filter(|(entry, _)| entry.executable)
                .map(|(entry, _)| file_path(entry))
                .collect();
            xml += &pair(&format!("{EXECUTABLE_KEY}{role}"), &executable.join("\n"));
        }
        xml + "</PackageMetaData>\n<PackageContents>\n"
    }
}

fn content_record(name: &str, digest: &Digest, size: u64) -> String {
    let digest = digest.to_base64();
    format!(
        "<ContentDefinition><Name>{name}</Name><ContentDescription>\
         <LengthInBytes>{size}</LengthInBytes>\
         <IntegrityCheckHashAlgortihm>Sha256</IntegrityCheckHashAlgortihm>\
         <IntegrityCheckHash>{digest}</IntegrityCheckHash>\
         <DataStorePath>{name}</DataStorePath>\
         </ContentDescription></ContentDefinition>\n"
    )
}

fn file_record(entry: &RoleFile, digest: &Digest, time: Timestamp) -> String {
    format!(
        "<FileDefinition><FilePath>{}</FilePath><FileDescription>\
         <DataContentReference>{}</DataContentReference>\
         <CreatedTimeUtc>{time}</CreatedTimeUtc>\
         <ModifiedTimeUtc>{time}</ModifiedTimeUtc>\
         <ReadOnly>false</ReadOnly></FileDescription></FileDefinition>\n",
        escape(&file_path(entry)),
        content_name(digest),
    )
}

/// A text that is generated piece by piece while it is read: the manifest of
/// 50,000 files has 35 MB.
struct Pieces<I> {
    rest: I,
    piece: io::Cursor<String>,
}

impl<I: Iterator<Item = String>> Pieces<I> {
    fn of(rest: I) -> Self {
        Self {
            rest,
            piece: io::Cursor::default(),
        }
    }
}

impl<I: Iterator<Item = String>> Read for Pieces<I> {
    /// Fills the buffer, so that the package does not depend on the pieces.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            let read = self.piece.read(&mut buffer[filled..])?;
            filled += read;
            if read == 0 {
                match self.rest.next() {
                    Some(piece) => self.piece = io::Cursor::new(piece),
                    None => break,
                }
            }
        }
        Ok(filled)
    }
}

fn content_name(digest: &Digest) -> String {
    format!("LocalContent/{}", digest.guid())
}

fn file_path(entry: &RoleFile) -> String {
    format!("{APPROOT}{}", entry.path.replace('/', "\\"))
}

fn relationships() -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n\
         <Relationships xmlns=\"{RELATIONSHIPS_NAMESPACE}\">\n\
         <Relationship Type=\"{MANIFEST_TYPE}\" Target=\"/package.xml\" Id=\"Rmanifest\"/>\n\
         </Relationships>\n"
    )
}

/// `$SOURCE_DATE_EPOCH`, or the earliest timestamp if it is unset or empty.
fn source_date(variable: Option<&OsStr>) -> Result<Timestamp, ServiceError> {
    let Some(text) = variable.filter(|text| !text.is_empty()) else {
        return Ok(timestamp(0));
    };
    let seconds = text.to_str().and_then(|text| text.parse().ok());
    seconds.map(timestamp).ok_or_else(|| {
        ServiceError::new(Path::new("SOURCE_DATE_EPOCH"), "is not a number of seconds")
            .blaming(Blame::Usage)
            .with_hint("set it to seconds since 1970, or unset it")
    })
}

/// `seconds` since 1970, clamped to the range of MS-DOS timestamps.
fn timestamp(seconds: u64) -> Timestamp {
    // 1980-01-01T00:00:00Z to 2107-12-31T23:59:59Z.
    let seconds = seconds.clamp(315_532_800, 4_354_819_199) as i64;
    Timestamp::from_second(seconds).expect("years from 1980 to 2107 are in range")
}

/// Date and time as ZIP stores them.
fn ms_dos(timestamp: Timestamp) -> (u16, u16) {
    let time = Offset::UTC.to_datetime(timestamp);
    let date = (time.year() as u16 - 1980) << 9 | (time.month() as u16) << 5 | time.day() as u16;
    let seconds = time.second() as u16;
    let clock = (time.hour() as u16) << 11 | (time.minute() as u16) << 5 | (seconds / 2);
    (date, clock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_clamped_to_those_of_ms_dos() {
        let written = |seconds| timestamp(seconds).to_string();
        assert_eq!(written(0), "1980-01-01T00:00:00Z");
        assert_eq!(written(1_709_210_096), "2024-02-29T12:34:56Z");
        assert_eq!(written(u64::MAX), "2107-12-31T23:59:59Z");
        assert_eq!(
            ms_dos(timestamp(1_709_210_096)),
            ((44 << 9) + (2 << 5) + 29, (12 << 11) + (34 << 5) + 28)
        );
        assert_eq!(
            ms_dos(timestamp(u64::MAX)),
            ((127 << 9) + (12 << 5) + 31, (23 << 11) + (59 << 5) + 29)
        );
    }

    #[test]
    fn an_empty_source_date_is_unset_and_a_bad_one_is_refused() {
        let date = |text: &str| source_date(Some(text.as_ref()));
        assert_eq!(date("").unwrap().to_string(), "1980-01-01T00:00:00Z");
        let leap_day = date("951782400").unwrap();
        assert_eq!(leap_day.to_string(), "2000-02-29T00:00:00Z");
        assert_eq!(date("now").unwrap_err().blame(), Blame::Usage);
    }
}
