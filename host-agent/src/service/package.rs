//! Reads a package (`.cspkg`) of the open format: its parts, its manifest and
//! the files of each role. Every content must have its declared size and SHA-256.

mod layouts;

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::archive::{Archive, MAX_PARTS, Part, PartReader};
use super::definition::{self, Definition};
use super::error::ServiceError;
use super::payload::RoleFile;
use super::size::Sizes;
use super::xml::{self, Element, Schema};
use super::xml_chunks::LargeXml;
use crate::digest::{Digest, Verified};
use crate::progress::Progress;
use layouts::{Layout, check_all_used, layouts};

/// Part with the media types of all other parts.
pub(super) const CONTENT_TYPES: &str = "[Content_Types].xml";
/// Namespace of [`CONTENT_TYPES`].
pub(super) const CONTENT_TYPES_NAMESPACE: &str =
    "http://schemas.openxmlformats.org/package/2006/content-types";
/// Part that names the manifest.
pub(super) const RELATIONSHIPS: &str = "_rels/.rels";
/// Namespace of [`RELATIONSHIPS`].
pub(super) const RELATIONSHIPS_NAMESPACE: &str =
    "http://schemas.openxmlformats.org/package/2006/relationships";
/// Type of the relationship to the manifest.
pub(super) const MANIFEST_TYPE: &str =
    "http://schemas.microsoft.com/windowsazure/PackageDefinition/Version/2012/03/15";
/// Namespace of the manifest.
pub(super) const MANIFEST_NAMESPACE: &str = "http://schemas.microsoft.com/windowsazure";
/// Content with the definition.
pub(super) const DEFINITION: &str = "ServiceDefinition/ServiceDefinition.csdef";
/// Start of the name of a role's layout; the role's name follows.
pub(super) const ROLE_LAYOUT: &str = "Roles/";
/// Directory of a role's files in its layout.
pub(super) const APPROOT: &str = "\\approot\\";
/// Start of a metadata key; a role's name follows. The value lists the paths of
/// the role's executable files, one per line. The format comes from Windows and
/// has no executable bit; other readers ignore unknown keys.
pub(super) const EXECUTABLE_KEY: &str = "urn:host-agent:executable:";

/// Largest manifest: 50,000 files of some 800 bytes each.
pub(super) const MAX_MANIFEST: u64 = 40 << 20;

/// The long lists of [`CONTENT_TYPES`].
const OVERRIDES: &[&[&str]] = &[&["Types", "Override"]];

/// The long lists of a manifest.
const LISTS: &[&[&str]] = &[
    &["PackageDefinition", "PackageContents", "ContentDefinition"],
    &[
        "PackageDefinition",
        "PackageLayouts",
        "LayoutDefinition",
        "LayoutDescription",
        "FileDefinition",
    ],
];
/// Index of the contents in [`LISTS`].
const CONTENT_RECORDS: usize = 0;
/// Index of the files in [`LISTS`].
const FILE_RECORDS: usize = 1;

/// A package with a valid structure. Contents are checked as they are read.
#[derive(Debug)]
pub(super) struct Package {
    archive: Archive,
    definition: Definition,
    contents: Vec<Content>,
    layouts: Layouts,
}

#[derive(Debug)]
struct Content {
    /// Index of its part.
    part: u32,
    digest: Digest,
}

/// The files of each role.
type Layouts = HashMap<String, Layout>;

/// Indices of contents by name.
type ByName = HashMap<Box<str>, u32>;

const TYPES: Schema = Schema::of_children(&["Default", "Override"]);
const MANIFEST: Schema =
    Schema::of_children(&["PackageMetaData", "PackageContents", "PackageLayouts"]);
const CONTENTS: Schema = Schema::of_children(&["ContentDefinition"]);
const CONTENT: Schema = Schema::of_children(&["Name", "ContentDescription"]);
const CONTENT_DESCRIPTION: Schema = Schema::of_children(&[
    "LengthInBytes",
    // Misspelt in the format.
    "IntegrityCheckHashAlgortihm",
    "IntegrityCheckHash",
    "DataStorePath",
]);
const RELATIONSHIP_LIST: Schema = Schema::of_children(&["Relationship"]);
const RELATIONSHIP: Schema = Schema::of_attributes(&["Type", "Target", "TargetMode", "Id"]);

impl Package {
    /// Opens the package `file` and checks everything but the contents.
    pub fn open(file: &Path, sizes: &Sizes) -> Result<Self, ServiceError> {
        let hint = "make the package with: host-agent pack DIR -o FILE.cspkg";
        Self::read_structure(file, sizes).map_err(|error| error.or_hint(hint))
    }

    fn read_structure(file: &Path, sizes: &Sizes) -> Result<Self, ServiceError> {
        let archive = Archive::open(file)?;
        check_content_types(&archive)?;
        let manifest_name = manifest_name(&archive)?;
        let place = file.join(&manifest_name);
        let part = archive.find(&manifest_name).ok_or_else(|| {
            ServiceError::new(file, format!("the package has no part \"{manifest_name}\""))
        })?;
        let (definition, contents, layouts) = read_manifest(&archive, part, &place, sizes)?;
        for role in &definition.roles {
            if !layouts.contains_key(&role.definition.name) {
                let what = format!(
                    "the package has no files for role \"{}\"",
                    role.definition.name
                );
                return Err(ServiceError::new(&place, what));
            }
        }
        let defined = |name: &str| {
            definition
                .roles
                .iter()
                .any(|role| role.definition.name == name)
        };
        if let Some(name) = layouts.keys().filter(|name| !defined(name)).min() {
            let what =
                format!("layout \"{ROLE_LAYOUT}{name}\" belongs to no role of the definition");
            return Err(ServiceError::new(&place, what));
        }
        Ok(Self {
            archive,
            definition,
            contents,
            layouts,
        })
    }

    /// Unpacks every content and checks its size, checksum and digest.
    pub fn verify(&self, progress: &Progress) -> Result<(), ServiceError> {
        // Several contents may have one part, which then has one digest.
        let mut parts: Vec<&Content> = self.contents.iter().collect();
        parts.sort_unstable_by_key(|content| content.part);
        parts.dedup_by_key(|content| content.part);
        let total = parts.iter().map(|content| self.part(content).size).sum();
        let what = format!("checking {}", self.path().display());
        let _step = progress.step(what, Some(total));
        for content in parts {
            let mut read = progress.watch(self.read(content));
            std::io::copy(&mut read, &mut std::io::sink()).map_err(|source| {
                let place = self.archive.path().join(&*self.part(content).name);
                ServiceError::io(&place, "the content is damaged", source)
                    .with_hint("get the package again, or pack it again")
            })?;
        }
        Ok(())
    }

    /// The definition in the package.
    pub fn definition(&self) -> &Definition {
        &self.definition
    }

    /// The package's file.
    pub fn path(&self) -> &Path {
        self.archive.path()
    }

    /// The files of `role`, sorted by path.
    pub fn entries(&self, role: &str) -> Option<Arc<[RoleFile]>> {
        Some(Arc::clone(&self.layouts.get(role)?.entries))
    }

    /// The content of the file at `path` of `role`; reading ends in an error
    /// if it is damaged.
    pub fn open_file(&self, role: &str, path: &str) -> Option<impl Read + '_> {
        let Layout { entries, contents } = self.layouts.get(role)?;
        let found = entries.binary_search_by(|entry| entry.path.as_str().cmp(path));
        Some(self.read(&self.contents[contents[found.ok()?] as usize]))
    }

    /// `path` of `role` for messages.
    pub fn locate(&self, role: &str, path: &str) -> PathBuf {
        self.path()
            .join(ROLE_LAYOUT)
            .join(role)
            .join("approot")
            .join(path)
    }

    fn read(&self, content: &Content) -> Verified<impl Read + '_> {
        Verified::new(self.archive.read(self.part(content)), content.digest)
    }

    fn part(&self, content: &Content) -> &Part {
        &self.archive.parts()[content.part as usize]
    }
}

/// Definition, contents and layouts from the manifest `part`.
fn read_manifest(
    archive: &Archive,
    part: &Part,
    place: &Path,
    sizes: &Sizes,
) -> Result<(Definition, Vec<Content>, Layouts), ServiceError> {
    let root = ("PackageDefinition", MANIFEST_NAMESPACE);
    let manifest = large(archive, part, place, root, LISTS)?;
    manifest.read_rest(&manifest.rest()?, |root| {
        root.check(&MANIFEST)?;
        let (contents, by_name) = contents(archive, &manifest, root)?;
        check_all_named(archive, &part.name, &contents)?;
        let layouts = layouts(archive, &manifest, root, &contents, &by_name)?;
        check_all_used(place, &by_name, &layouts)?;
        let definition = read_definition(archive, &contents, &by_name, sizes)?;
        Ok((definition, contents, layouts))
    })
}

/// The large XML file `part`, named `place` in errors.
fn large<'a>(
    archive: &'a Archive,
    part: &'a Part,
    place: &'a Path,
    root: (&'static str, &'static str),
    records: &'static [&'static [&'static str]],
) -> Result<LargeXml<'a, impl Fn() -> PartReader<'a>>, ServiceError> {
    if part.size > MAX_MANIFEST {
        let what = format!("is larger than {MAX_MANIFEST} bytes");
        return Err(ServiceError::new(place, what));
    }
    Ok(LargeXml {
        file: place,
        open: || archive.read(part),
        root,
        records,
    })
}

fn required_part<'a>(archive: &'a Archive, name: &str) -> Result<&'a Part, ServiceError> {
    archive.find(name).ok_or_else(|| {
        let what = format!("is not a package: no part \"{name}\"");
        ServiceError::new(archive.path(), what)
    })
}

fn check_content_types(archive: &Archive) -> Result<(), ServiceError> {
    let part = required_part(archive, CONTENT_TYPES)?;
    let place = archive.path().join(CONTENT_TYPES);
    let root = ("Types", CONTENT_TYPES_NAMESPACE);
    let types = large(archive, part, &place, root, OVERRIDES)?;
    types.read_rest(&types.rest()?, |root| root.check(&TYPES))
}

/// Name of the manifest, from the only relationship of the package.
fn manifest_name(archive: &Archive) -> Result<String, ServiceError> {
    let part = required_part(archive, RELATIONSHIPS)?;
    let (place, text) = read_text(archive, part)?;
    let document = xml::parse(&place, &text, xml::MAX_NODES)?;
    let root = xml::root(
        &place,
        &text,
        &document,
        "Relationships",
        RELATIONSHIPS_NAMESPACE,
    )?;
    root.check(&RELATIONSHIP_LIST)?;
    let mut found = None;
    for relationship in root.children("Relationship") {
        relationship.check(&RELATIONSHIP)?;
        let target = relationship.required("Target")?;
        // Real packages write External, though the manifest is a part of the package.
        if let Some(mode) = relationship.attribute("TargetMode")
            && !matches!(mode.text, "Internal" | "External")
        {
            return Err(mode.refuse(format!("unknown {}", mode.quoted())));
        }
        if relationship.required("Type")?.text != MANIFEST_TYPE {
            return Err(relationship.refuse("unknown relationship").with_hint(
                "packages of the old format cannot be read; pack with /useCtpPackageFormat",
            ));
        }
        if found.replace(target.text).is_some() {
            return Err(relationship.refuse("second manifest"));
        }
    }
    let name = found.ok_or_else(|| root.refuse("no relationship names the manifest"))?;
    Ok(name.strip_prefix('/').unwrap_or(name).to_owned())
}

/// All contents, and their indices by name.
fn contents<R: Read>(
    archive: &Archive,
    manifest: &LargeXml<'_, impl Fn() -> R>,
    root: Element<'_>,
) -> Result<(Vec<Content>, ByName), ServiceError> {
    let mut contents: Vec<Content> = Vec::new();
    let mut by_name = ByName::new();
    let mut names = HashSet::new();
    // The first content of each part.
    let mut first: Vec<Option<u32>> = vec![None; archive.parts().len()];
    if let Some(list) = root.child("PackageContents")? {
        list.check(&CONTENTS)?;
    }
    manifest.read_records(CONTENT_RECORDS, |list, _| {
        list.check(&CONTENTS)?;
        for element in list.children("ContentDefinition") {
            element.check(&CONTENT)?;
            let name = element.leaf("Name")?;
            if contents.len() == MAX_PARTS {
                return Err(element.refuse(format!("more than {MAX_PARTS} contents")));
            }
            let index = contents.len() as u32;
            if by_name.insert(name.into(), index).is_some() {
                return Err(element.refuse(format!("duplicate content \"{name}\"")));
            }
            if !names.insert(name.to_lowercase()) {
                let what = format!("content \"{name}\" differs from another only in case");
                return Err(element.refuse(what));
            }
            let content = content(archive, element, name)?;
            let first = *first[content.part as usize].get_or_insert(index);
            let same = contents.get(first as usize);
            if same.is_some_and(|same| same.digest != content.digest) {
                let what = format!("content \"{name}\" gives its part a second hash");
                return Err(element.refuse(what));
            }
            contents.push(content);
        }
        Ok(())
    })?;
    Ok((contents, by_name))
}

fn content(archive: &Archive, element: Element<'_>, name: &str) -> Result<Content, ServiceError> {
    let description = element.required_child("ContentDescription")?;
    description.check(&CONTENT_DESCRIPTION)?;
    let path = description.leaf("DataStorePath")?;
    let part = archive
        .index_of(path.strip_prefix('/').unwrap_or(path))
        .ok_or_else(|| description.refuse(format!("the package has no part \"{path}\"")))?;
    let size = archive.parts()[part].size;
    if description.leaf("LengthInBytes")?.trim().parse() != Ok(size) {
        let what = format!("LengthInBytes is not the size of the part, {size}");
        return Err(description.refuse(what));
    }
    if description.leaf("IntegrityCheckHashAlgortihm")? != "Sha256" {
        return Err(description
            .refuse(format!("content \"{name}\" has no SHA-256"))
            .with_hint("contents without a hash are not supported; pack again"));
    }
    let digest = Digest::from_base64(description.leaf("IntegrityCheckHash")?.trim())
        .ok_or_else(|| description.refuse("IntegrityCheckHash is not a SHA-256 in base64"))?;
    Ok(Content {
        part: part as u32,
        digest,
    })
}

/// Refuses parts that the manifest does not name.
fn check_all_named(
    archive: &Archive,
    manifest: &str,
    contents: &[Content],
) -> Result<(), ServiceError> {
    let mut named = vec![false; archive.parts().len()];
    for content in contents {
        named[content.part as usize] = true;
    }
    let unnamed = std::iter::zip(archive.parts(), named).find(|(part, named)| {
        !named && ![CONTENT_TYPES, RELATIONSHIPS, manifest].contains(&&*part.name)
    });
    match unnamed {
        None => Ok(()),
        Some((part, _)) => Err(ServiceError::new(
            archive.path(),
            format!("part \"{}\" is not in the manifest", part.name),
        )
        .with_hint("pack again instead of adding to a package")),
    }
}

fn read_definition(
    archive: &Archive,
    contents: &[Content],
    by_name: &ByName,
    sizes: &Sizes,
) -> Result<Definition, ServiceError> {
    let index = by_name.get(DEFINITION).ok_or_else(|| {
        let what = format!("the package has no content \"{DEFINITION}\"");
        ServiceError::new(archive.path(), what)
    })?;
    let part = &archive.parts()[contents[*index as usize].part as usize];
    let (place, text) = read_text(archive, part)?;
    definition::parse(&place, text, sizes)
}

/// Name for messages and text of `part`.
fn read_text(archive: &Archive, part: &Part) -> Result<(PathBuf, String), ServiceError> {
    let place = archive.path().join(&*part.name);
    let bytes = archive.read_all(part, xml::MAX_BYTES)?;
    let text = xml::text_of(&place, bytes, xml::MAX_BYTES)?;
    Ok((place, text))
}
