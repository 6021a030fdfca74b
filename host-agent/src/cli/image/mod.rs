//! `host-agent image`: the guest images of the data directory.

mod archive;
mod builder;
mod layers;

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::{Value, json};

use self::archive::Archive;
use super::deploy;
use super::error::{CliError, Code};
use super::exit::Exit;
use super::gc;
use super::instances::columns;
use super::meter::Meter;
use super::output::Output;
use super::package::interruptible;
use super::runtime;
use crate::doctor::iec;
use crate::printable::printable;
use crate::store::garbage::{GarbageKind, allocated};
use crate::store::{deployment, image, paths};

/// `image`.
#[derive(Debug, Clone, Args)]
#[command(disable_help_subcommand = true)]
pub struct ImageCommand {
    /// What to do.
    #[command(subcommand)]
    pub verb: ImageVerb,
}

/// What to do with images.
#[derive(Debug, Clone, Subcommand)]
pub enum ImageVerb {
    /// List the images
    #[command(after_help = "\
Examples:
  host-agent image list
  host-agent image list --json | jq -r '.images[].name'")]
    List,
    /// Show the files and packages of an image
    #[command(after_help = "\
Examples:
  host-agent image show minimal
  host-agent image show minimal --json | jq .manifest.packages")]
    Show(ImageName),
    /// Compare every file of an image with the SHA-256 of its manifest
    #[command(after_help = "\
Examples:
  host-agent image verify minimal
  host-agent image verify minimal --json | jq .digest")]
    Verify(ImageName),
    /// Remove an image that no instance and no service uses
    #[command(after_help = "\
Examples:
  host-agent image remove python
  host-agent gc --images")]
    Remove(ImageName),
    /// Make an image of a root file system: a tar as of docker export, or an OCI archive
    #[command(after_help = "\
The file system is Linux for x86-64; its kernel is not used. A tar may be compressed by gzip.

Examples:
  docker export $(docker create redis) >redis.tar && host-agent image import redis redis.tar
  skopeo copy docker://redis oci-archive:redis.tar && host-agent image import redis redis.tar")]
    Import(ImportArgs),
    /// Build an image from Debian packages
    #[command(after_help = "\
Examples:
  host-agent image build minimal
  host-agent image build python --include python3")]
    Build(BuildArgs),
}

/// An image.
#[derive(Debug, Clone, Args)]
pub struct ImageName {
    /// Name of the image: osFamily of a configuration
    #[arg(id = "image", value_name = "NAME", value_parser = name)]
    pub name: String,
}

/// `image import`.
#[derive(Debug, Clone, Args)]
pub struct ImportArgs {
    /// Name of the image: osFamily of a configuration
    #[arg(value_parser = name)]
    pub name: String,
    /// The root file system
    pub file: PathBuf,
    /// Debian suite of the kernel [default: the newest that is known]
    #[arg(long)]
    pub suite: Option<String>,
}

/// `image build`.
#[derive(Debug, Clone, Args)]
pub struct BuildArgs {
    /// Name of the image: osFamily of a configuration
    #[arg(value_parser = name)]
    pub name: String,
    /// Debian suite of kernel and root file system [default: the newest that is known]
    #[arg(long)]
    pub suite: Option<String>,
    /// Add a Debian package; may be repeated
    #[arg(long, value_name = "PACKAGE")]
    pub include: Vec<String>,
}

/// The part of a manifest that is shown.
#[derive(Debug, Deserialize)]
struct Shown {
    #[serde(default)]
    created: String,
    #[serde(default)]
    suite: String,
    #[serde(default)]
    kernel_version: String,
}

fn name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
    let first = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    if first && text.len() <= 64 && text.chars().all(plain) {
        return Ok(text.to_owned());
    }
    Err("write 1 to 64 lower-case letters, digits, '_', '-' and '.'".into())
}

/// Runs the verb.
pub fn run(verb: &ImageVerb, output: &Output) -> Result<Exit, CliError> {
    let data_dir = paths::data_dir();
    match verb {
        ImageVerb::List => list(&data_dir, output),
        ImageVerb::Show(args) => show(&data_dir, &args.name, output),
        ImageVerb::Verify(args) => verify(&data_dir, &args.name, output),
        ImageVerb::Remove(args) => remove(&data_dir, &args.name, output),
        ImageVerb::Import(args) => import(&data_dir, args, output),
        ImageVerb::Build(args) => {
            let mut options = suite(args.suite.as_ref());
            for package in &args.include {
                options.extend(["--include".to_owned(), package.clone()]);
            }
            builder::run(&data_dir, &args.name, &options)?;
            built(&data_dir, &args.name, "host-agent.image-build/1", output)
        }
    }
}

fn suite(suite: Option<&String>) -> Vec<String> {
    let suite = suite.map(|suite| ["--suite".to_owned(), suite.clone()]);
    suite.into_iter().flatten().collect()
}

fn list(data_dir: &Path, output: &Output) -> Result<Exit, CliError> {
    let failed = |error: &dyn std::error::Error| CliError::chain(Code::Unclassified, error);
    let names = image::names(data_dir).map_err(|error| failed(&error))?;
    let used = deployment::images(data_dir).map_err(|error| failed(&error))?;
    let mut rows = vec![["IMAGE", "SUITE", "KERNEL", "CREATED", "SIZE", "USED"].map(str::to_owned)];
    let mut images = Vec::new();
    for name in names {
        let manifest = manifest(data_dir, &name)?;
        let Shown {
            created,
            suite,
            kernel_version,
        } = shown(&manifest);
        let bytes = allocated(&image::directory(data_dir, &name));
        let in_use = used.contains(&name);
        images.push(json!({
            "name": name,
            "suite": suite,
            "kernel_version": kernel_version,
            "created": created,
            "bytes": bytes,
            "used": in_use,
        }));
        let word = if in_use { "yes" } else { "no" };
        let row = [
            name,
            suite,
            kernel_version,
            created,
            iec(bytes),
            word.into(),
        ];
        rows.push(row.map(|cell| printable(&cell)));
    }
    let text = match rows.len() {
        1 => "no images".to_owned(),
        _ => columns(&rows),
    };
    output.answer(
        &text,
        || json!({"schema": "host-agent.images/1", "images": images}),
    )?;
    Ok(Exit::Success)
}

fn show(data_dir: &Path, name: &str, output: &Output) -> Result<Exit, CliError> {
    let manifest = manifest(data_dir, name)?;
    let Shown {
        created,
        suite,
        kernel_version,
    } = shown(&manifest);
    let mut text = format!(
        "{name}: built {created}, suite {suite}, kernel {kernel_version}\n{}",
        image::directory(data_dir, name).display()
    );
    let mut rows = Vec::new();
    for (file, entry) in manifest["files"].as_object().into_iter().flatten() {
        let digest = entry["sha256"].as_str().unwrap_or_default();
        let size = entry["size"].as_u64().unwrap_or_default();
        rows.push([
            printable(file),
            iec(size),
            format!("sha256:{}", printable(digest)),
        ]);
    }
    text.push_str(&format!("\n{}", columns(&rows)));
    let packages = manifest["packages"].as_array().map_or(0, Vec::len);
    text.push_str(&format!("\n{packages} Debian packages"));
    output.answer(
        &text,
        || json!({"schema": "host-agent.image/1", "name": name, "manifest": manifest}),
    )?;
    Ok(Exit::Success)
}

fn verify(data_dir: &Path, name: &str, output: &Output) -> Result<Exit, CliError> {
    let meter = Meter::start(output);
    let (of_work, image_name) = (data_dir.to_owned(), name.to_owned());
    let image = interruptible(meter.progress(), move |progress| {
        image::verify(&of_work, &image_name, progress).map_err(|error| deploy::image(&error))
    })?;
    drop(meter);
    let digest = image.digest.hex();
    output.answer(
        &format!("{name}: every file is that of its manifest, sha256:{digest}"),
        || json!({"schema": "host-agent.image-verify/1", "name": name, "digest": format!("sha256:{digest}")}),
    )?;
    Ok(Exit::Success)
}

fn remove(data_dir: &Path, name: &str, output: &Output) -> Result<Exit, CliError> {
    manifest(data_dir, name)?;
    // Who keeps services knows what their revisions name.
    let unused = runtime()?.block_on(gc::ask(true, true))?;
    let is_unused =
        |it: &crate::store::garbage::Garbage| it.kind == GarbageKind::Image && it.name == name;
    let bytes = allocated(&image::directory(data_dir, name));
    let removed = unused.iter().any(is_unused)
        && image::remove(data_dir, name, || {
            Ok(deployment::images(data_dir)?.contains(name))
        })
        .map_err(|error| CliError::chain(Code::Unclassified, &error))?;
    if !removed {
        return Err(
            CliError::new(Code::Conflict, format!("image {name} is in use"))
                .cause("an instance or a revision of a service names it")
                .hint("host-agent ps; host-agent service list"),
        );
    }
    output.answer(
        &format!("{name}: removed, {}", iec(bytes)),
        || json!({"schema": "host-agent.image-remove/1", "name": name, "bytes": bytes}),
    )?;
    Ok(Exit::Success)
}

fn import(data_dir: &Path, args: &ImportArgs, output: &Output) -> Result<Exit, CliError> {
    let meter = Meter::start(output);
    let file = args.file.clone();
    let place = data_dir.join("images");
    // A whole file system: beside the images, where there is room for it.
    let flat = interruptible(meter.progress(), move |progress| {
        Archive::open(&file)
            .and_then(|archive| archive.root_file_system(&place, progress))
            .map_err(|error| archive::refused(&file, &error))
    })?;
    drop(meter);
    let file = fs::canonicalize(&args.file);
    let file = file.map_err(|error| archive::refused(&args.file, &error))?;
    let tar = flat.as_ref().map_or(&*file, |flat| flat.as_ref());
    let mut options = suite(args.suite.as_ref());
    for (option, value) in [("--rootfs-tar", tar), ("--imported", &*file)] {
        options.extend([option.to_owned(), value.to_string_lossy().into_owned()]);
    }
    builder::run(data_dir, &args.name, &options)?;
    built(data_dir, &args.name, "host-agent.image-import/1", output)
}

/// The result of a build.
fn built(data_dir: &Path, name: &str, schema: &str, output: &Output) -> Result<Exit, CliError> {
    let manifest = manifest(data_dir, name)?;
    let directory = image::directory(data_dir, name);
    output.answer(
        &format!("{name}: ready, osFamily=\"{name}\""),
        || json!({"schema": schema, "name": name, "directory": directory.display().to_string(), "manifest": manifest}),
    )?;
    Ok(Exit::Success)
}

fn shown(manifest: &Value) -> Shown {
    serde_json::from_value(manifest.clone()).unwrap_or(Shown {
        created: String::new(),
        suite: String::new(),
        kernel_version: String::new(),
    })
}

/// The manifest of an image.
fn manifest(data_dir: &Path, name: &str) -> Result<Value, CliError> {
    let text = image::manifest(data_dir, name).map_err(|error| deploy::image(&error))?;
    let path = image::directory(data_dir, name).join("manifest.json");
    serde_json::from_slice(&text)
        .map_err(|source| deploy::image(&image::ImageError::Manifest { path, source }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_that_of_a_directory() {
        for good in ["minimal", "python3.12", "9_a-b"] {
            assert_eq!(name(good).as_deref(), Ok(good));
        }
        for bad in ["", ".x", "..", "a/b", "A", "-a", "a b"] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }
}
