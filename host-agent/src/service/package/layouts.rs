//! Reads the files of each role from the manifest of a package.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use super::super::archive::Archive;
use super::super::error::ServiceError;
use super::super::payload::{MAX_DEPTH, RoleFile, Total, check_name, check_path, check_paths};
use super::super::xml::{Element, Schema};
use super::super::xml_chunks::LargeXml;
use super::{APPROOT, ByName, Content, EXECUTABLE_KEY, FILE_RECORDS, Layouts, ROLE_LAYOUT};

/// Starts of the names of contents that describe the package and are in no layout.
const RESERVED: [&str; 2] = ["ServiceDefinition/", "NamedStreams/"];

/// The files of a role, sorted by path, and the index of each one's content.
#[derive(Debug)]
pub(super) struct Layout {
    pub entries: Arc<[RoleFile]>,
    pub contents: Box<[u32]>,
}

const METADATA: Schema = Schema::of_children(&["KeyValuePair"]);
const KEY_VALUE: Schema = Schema::of_children(&["Key", "Value"]);
const LAYOUTS: Schema = Schema::of_children(&["LayoutDefinition"]);
const LAYOUT: Schema = Schema::of_children(&["Name", "LayoutDescription"]);
const LAYOUT_DESCRIPTION: Schema = Schema::of_children(&["FileDefinition"]);
const FILE: Schema = Schema::of_children(&["FilePath", "FileDescription"]);
const FILE_DESCRIPTION: Schema = Schema::of_children(&[
    "DataContentReference",
    "CreatedTimeUtc",
    "ModifiedTimeUtc",
    "ReadOnly",
]);

/// The files of each role.
pub(super) fn layouts<R: Read>(
    archive: &Archive,
    manifest: &LargeXml<'_, impl Fn() -> R>,
    root: Element<'_>,
    contents: &[Content],
    by_name: &ByName,
) -> Result<Layouts, ServiceError> {
    let mut executable = executables(root)?;
    let mut roles: Vec<LayoutBuilder<'_>> = Vec::new();
    if let Some(list) = root.child("PackageLayouts")? {
        list.check(&LAYOUTS)?;
        for layout in list.children("LayoutDefinition") {
            layout.check(&LAYOUT)?;
            let name = layout.leaf("Name")?;
            let Some(role) = name.strip_prefix(ROLE_LAYOUT) else {
                let what = format!("layout \"{name}\" is not supported yet");
                return Err(layout.refuse(what));
            };
            if roles.iter().any(|other| other.role == role) {
                return Err(layout.refuse(format!("duplicate layout \"{name}\"")));
            }
            // Exactly one per layout, so that file list N belongs to layout N.
            let description = layout.required_child("LayoutDescription")?;
            description.check(&LAYOUT_DESCRIPTION)?;
            roles.push(LayoutBuilder {
                role,
                description,
                executable: executable.remove(role).unwrap_or_default(),
                files: Vec::new(),
            });
        }
    }
    if let Some(role) = executable.keys().min() {
        let what = format!("\"{EXECUTABLE_KEY}{role}\" names a role without a layout");
        return Err(root.refuse(what));
    }
    let mut total = Total::default();
    manifest.read_records(FILE_RECORDS, |list, number| {
        list.check(&LAYOUT_DESCRIPTION)?;
        let Some(builder) = roles.get_mut(number) else {
            return Err(list.refuse("the manifest changed while it was read"));
        };
        for element in list.children("FileDefinition") {
            let size =
                |content: u32| archive.parts()[contents[content as usize].part as usize].size;
            let file = packed_file(element, by_name, &mut builder.executable, size)?;
            total.add(&file.0.path, file.0.size).map_err(|what| {
                element
                    .refuse(what)
                    .with_hint("remove files that the roles do not need, and pack again")
            })?;
            builder.files.push(file);
        }
        Ok(())
    })?;
    let layouts = roles.into_iter().map(|mut builder| {
        if let Some(path) = builder.executable.iter().min() {
            let role = builder.role;
            let what = format!("\"{EXECUTABLE_KEY}{role}\" names \"{path}\", which is not a file");
            return Err(builder.description.refuse(what));
        }
        builder.files.sort_by(|(a, _), (b, _)| a.path.cmp(&b.path));
        let contents = builder.files.iter().map(|(_, content)| *content).collect();
        let entries: Vec<RoleFile> = builder.files.into_iter().map(|(entry, _)| entry).collect();
        check_paths(&entries).map_err(|what| builder.description.refuse(what))?;
        let layout = Layout {
            entries: entries.into(),
            contents,
        };
        Ok((builder.role.to_owned(), layout))
    });
    layouts.collect()
}

/// A layout while the manifest is read.
struct LayoutBuilder<'a> {
    role: &'a str,
    description: Element<'a>,
    /// Executable files that were not found yet.
    executable: HashSet<&'a str>,
    files: Vec<(RoleFile, u32)>,
}

/// Executable files of each role: paths in its layout.
fn executables(root: Element<'_>) -> Result<HashMap<&str, HashSet<&str>>, ServiceError> {
    let mut executables = HashMap::new();
    let Some(list) = root.child("PackageMetaData")? else {
        return Ok(executables);
    };
    list.check(&METADATA)?;
    for pair in list.children("KeyValuePair") {
        pair.check(&KEY_VALUE)?;
        let (key, value) = (pair.leaf("Key")?, pair.leaf("Value")?);
        if let Some(role) = key.strip_prefix(EXECUTABLE_KEY)
            && executables.insert(role, value.lines().collect()).is_some()
        {
            return Err(pair.refuse(format!("duplicate key \"{key}\"")));
        }
    }
    Ok(executables)
}

/// A file and the index of its content, whose size `size` returns.
fn packed_file(
    element: Element<'_>,
    by_name: &ByName,
    executable: &mut HashSet<&str>,
    size: impl Fn(u32) -> u64,
) -> Result<(RoleFile, u32), ServiceError> {
    element.check(&FILE)?;
    let written = element.leaf("FilePath")?;
    let path = written.strip_prefix(APPROOT).ok_or_else(|| {
        element
            .refuse(format!("file \"{written}\" is not below {APPROOT}"))
            .with_hint("other files of a package are not supported yet")
    })?;
    let pieces: Vec<&str> = path.split('\\').collect();
    if pieces.len() > MAX_DEPTH + 1 {
        return Err(element.refuse(format!("directories nested deeper than {MAX_DEPTH}")));
    }
    for piece in &pieces {
        check_name(piece).map_err(|what| element.refuse(format!("file \"{written}\": {what}")))?;
    }
    let path = pieces.join("/");
    check_path(&path).map_err(|what| element.refuse(what))?;
    let description = element.required_child("FileDescription")?;
    description.check(&FILE_DESCRIPTION)?;
    let reference = description.leaf("DataContentReference")?;
    let content = *by_name
        .get(reference)
        .ok_or_else(|| description.refuse(format!("the package has no content \"{reference}\"")))?;
    let entry = RoleFile {
        path,
        size: size(content),
        executable: executable.remove(written),
    };
    Ok((entry, content))
}

/// Refuses contents that no layout uses.
pub(super) fn check_all_used(
    place: &Path,
    by_name: &ByName,
    layouts: &Layouts,
) -> Result<(), ServiceError> {
    let mut used = vec![false; by_name.len()];
    for layout in layouts.values() {
        for content in &layout.contents {
            used[*content as usize] = true;
        }
    }
    let unused = by_name.iter().filter(|(name, content)| {
        let reserved = RESERVED.iter().any(|start| name.starts_with(start));
        !reserved && !used[**content as usize]
    });
    match unused.map(|(name, _)| name).min() {
        None => Ok(()),
        Some(name) => {
            let what = format!("content \"{name}\" is in no layout");
            Err(ServiceError::new(place, what))
        }
    }
}
