//! Makes a package (`.cspkg`) of the open format from a service directory.
//! The same files give the same bytes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::iter::once;
use std::path::{Path, PathBuf};

use super::archive_writer::ArchiveWriter;
use super::definition::{self, Definition};
use super::draft::Draft;
use super::error::{Blame, ServiceError};
use super::load::{check_directory, directory_of, find_definition};
use super::package::{
    APPROOT, CONTENT_TYPES, CONTENT_TYPES_NAMESPACE, DEFINITION, EXECUTABLE_KEY,
    MANIFEST_NAMESPACE, MANIFEST_TYPE, MAX_MANIFEST, RELATIONSHIPS, RELATIONSHIPS_NAMESPACE,
    ROLE_LAYOUT,
};
use super::payload::{Entry, Files, MAX_FILES};
use super::xml::escape;
use crate::digest::{Digest, Verified};
use crate::progress::Progress;

/// Largest sum of metadata that every handler of packages must take (manifest
/// format, `PackageMetaData`).
const MAX_METADATA: usize = 1_000_000;

/// What was packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// Service name.
    pub service: String,
    /// Number of roles.
    pub roles: usize,
    /// Number of files, over all roles.
    pub files: usize,
    /// Length of the package in bytes.
    pub bytes: u64,
}

/// Packs the service in `directory` into the file `out`, which appears only
/// when it is complete. A link is followed. Times in it are `$SOURCE_DATE_EPOCH`, else 1980-01-01.
///
/// # Errors
/// What is wrong with the service, or with writing `out`.
pub fn pack(directory: &Path, out: &Path, progress: &Progress) -> Result<Packed, ServiceError> {
    let stamp = Stamp::from_environment()?;
    pack_at(directory, &destination(out)?, stamp, progress)
}

/// The file that a package named `out` becomes. Only a regular file is
/// replaced: `-o /dev/null` by root must not put a file in place of the device.
fn destination(out: &Path) -> Result<PathBuf, ServiceError> {
    const HINT: &str = "name a file: host-agent pack DIR -o FILE.cspkg";
    let cannot = |source| ServiceError::output(out, "cannot write the package", source);
    match fs::metadata(out) {
        Ok(found) if found.is_file() => fs::canonicalize(out).map_err(cannot),
        Ok(found) => {
            let what = if found.is_dir() {
                "the package would replace a directory"
            } else {
                "the package would replace what is not a regular file"
            };
            Err(ServiceError::new(out, what)
                .blaming(Blame::Output)
                .with_hint(HINT))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read_link(out) {
            Ok(target) => {
                let what = format!("is a link to {}, which is not there", target.display());
                Err(ServiceError::new(out, what)
                    .blaming(Blame::Output)
                    .with_hint("remove the link, or name its target"))
            }
            Err(_) => Ok(out.to_owned()),
        },
        Err(error) => Err(cannot(error)),
    }
}

fn pack_at(
    directory: &Path,
    out: &Path,
    stamp: Stamp,
    progress: &Progress,
) -> Result<Packed, ServiceError> {
    let what = format!("listing {}", directory.display());
    let step = progress.step(what, None);
    let definition = definition::read(&find_definition(directory)?)?;
    let mut roles = Vec::new();
    for role in &definition.roles {
        let files = check_directory(&definition, role, &directory.join(&role.definition.name))?;
        roles.push((role.definition.name.as_str(), files));
    }
    let files = roles.iter().map(|(_, files)| files.entries().len()).sum();
    if files > MAX_FILES {
        let what = format!("the roles hold more than {MAX_FILES} files together");
        return Err(
            ServiceError::new(directory, what).with_hint("take out what the roles do not need")
        );
    }
    drop(step);
    let plan = Plan::of(&definition, &roles, progress)?;
    let manifest: u64 = plan.manifest(stamp).map(|piece| piece.len() as u64).sum();
    if manifest > MAX_MANIFEST {
        return Err(
            ServiceError::new(directory, "the file names are too long for a package")
                .with_hint("take out what the roles do not need, or give shorter names"),
        );
    }

    let cannot = |source| ServiceError::output(out, "cannot write the package", source);
    let draft = Draft::in_directory(directory_of(out)).map_err(cannot)?;
    let file = draft.file().try_clone().map_err(cannot)?;
    let (date, time) = stamp.ms_dos();
    let mut archive = ArchiveWriter::new(file, date, time);
    archive
        .add(CONTENT_TYPES, || Ok(Pieces::of(plan.content_types())))
        .and_then(|()| archive.add(RELATIONSHIPS, || Ok(Pieces::of(once(relationships())))))
        .and_then(|()| archive.add("package.xml", || Ok(Pieces::of(plan.manifest(stamp)))))
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
            ServiceError::output(out, format!("cannot pack {}", place.display()), source)
                .or_hint("pack again, and leave the files alone meanwhile")
        })?;
    }
    let file = archive.finish().map_err(cannot)?;
    file.sync_all().map_err(cannot)?;
    let bytes = file.metadata().map_err(cannot)?.len();
    progress.check().map_err(cannot)?;
    draft.publish(out).map_err(cannot)?;
    Ok(Packed {
        service: definition.name.clone(),
        roles: roles.len(),
        files,
        bytes,
    })
}

/// What goes into the package.
struct Plan<'a> {
    /// Each content once.
    contents: BTreeMap<Digest, Content<'a>>,
    /// The files of each role with their contents.
    layouts: Vec<(&'a str, Vec<(&'a Entry, Digest)>)>,
    definition: (Digest, u64),
}

/// One of the files that have a content.
struct Content<'a> {
    files: &'a Files,
    entry: &'a Entry,
}

impl<'a> Plan<'a> {
    /// Reads every file once, to know it by its digest.
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
            let what = "too many executable files for a package";
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

    fn manifest(&self, stamp: Stamp) -> impl Iterator<Item = String> {
        let definition = content_record(DEFINITION, &self.definition.0, self.definition.1);
        let contents = self
            .contents
            .iter()
            .map(|(digest, first)| content_record(&content_name(digest), digest, first.entry.size));
        let layouts = self.layouts.iter().flat_map(move |(role, layout)| {
            let files = layout
                .iter()
                .map(move |(entry, digest)| file_record(entry, digest, stamp));
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

    /// The manifest up to its contents.
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

fn file_record(entry: &Entry, digest: &Digest, stamp: Stamp) -> String {
    let time = stamp.rfc3339();
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

/// A text that is made piece by piece as it is read: that of 50,000 files
/// would need 35 MB.
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
    /// Fills the buffer, so that how a text is cut does not show in the package.
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

fn file_path(entry: &Entry) -> String {
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

/// The one time in a package.
#[derive(Debug, Clone, Copy)]
struct Stamp {
    year: u16,
    month: u16,
    day: u16,
    second_of_day: u32,
}

impl Stamp {
    /// 1980-01-01 and 2107-12-31, between which MS-DOS can tell the time.
    const RANGE: std::ops::RangeInclusive<u64> = 315_532_800..=4_354_819_199;

    fn from_environment() -> Result<Self, ServiceError> {
        Self::of_variable(std::env::var_os("SOURCE_DATE_EPOCH").as_deref())
    }

    /// The time that the variable says; an empty one is as good as none.
    fn of_variable(value: Option<&OsStr>) -> Result<Self, ServiceError> {
        let Some(text) = value.filter(|text| !text.is_empty()) else {
            return Ok(Self::at(*Self::RANGE.start()));
        };
        let seconds = text.to_str().and_then(|text| text.parse::<u64>().ok());
        seconds.map(Self::at).ok_or_else(|| {
            ServiceError::new(Path::new("SOURCE_DATE_EPOCH"), "is not a number of seconds")
                .blaming(Blame::Usage)
                .with_hint("set it to seconds since 1970, or unset it")
        })
    }

    /// `seconds` since 1970, brought into range.
    fn at(seconds: u64) -> Self {
        let seconds = seconds.clamp(*Self::RANGE.start(), *Self::RANGE.end());
        let mut days = (seconds / 86_400) as u32;
        let leap = |year: u16| {
            year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
        };
        let mut year = 1970;
        loop {
            let length = if leap(year) { 366 } else { 365 };
            if days < length {
                break;
            }
            days -= length;
            year += 1;
        }
        let february = if leap(year) { 29 } else { 28 };
        let mut month = 1;
        for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
            if days < length {
                break;
            }
            days -= length;
            month += 1;
        }
        Self {
            year,
            month,
            day: days as u16 + 1,
            second_of_day: (seconds % 86_400) as u32,
        }
    }

    /// Date and time in the form of ZIP.
    fn ms_dos(self) -> (u16, u16) {
        let (hour, minute, second) = self.clock();
        let date = (self.year - 1980) << 9 | self.month << 5 | self.day;
        let time = hour << 11 | minute << 5 | (second / 2);
        (date, time as u16)
    }

    fn rfc3339(self) -> String {
        let (hour, minute, second) = self.clock();
        format!(
            "{:04}-{:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z",
            self.year, self.month, self.day
        )
    }

    fn clock(self) -> (u32, u32, u32) {
        let seconds = self.second_of_day;
        (seconds / 3600, seconds / 60 % 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_as_the_calendar_has_it() {
        let written = |seconds| (Stamp::at(seconds).rfc3339(), Stamp::at(seconds).ms_dos());
        assert_eq!(written(0).0, "1980-01-01T00:00:00Z");
        assert_eq!(written(1_709_210_096).0, "2024-02-29T12:34:56Z");
        assert_eq!(
            written(1_709_210_096).1,
            ((44 << 9) + (2 << 5) + 29, (12 << 11) + (34 << 5) + 28)
        );
        assert_eq!(written(951_782_400).0, "2000-02-29T00:00:00Z");
        assert_eq!(written(u64::MAX).0, "2107-12-31T23:59:59Z");
    }

    #[test]
    fn an_empty_variable_is_none_and_one_without_a_number_is_bad_usage() {
        let stamp = |text: &str| Stamp::of_variable(Some(text.as_ref()));
        assert_eq!(stamp("").unwrap().rfc3339(), "1980-01-01T00:00:00Z");
        assert_eq!(
            stamp("951782400").unwrap().rfc3339(),
            "2000-02-29T00:00:00Z"
        );
        assert_eq!(stamp("now").unwrap_err().blame(), Blame::Usage);
    }
}
