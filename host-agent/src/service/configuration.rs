//! Reads a service configuration (`.cscfg`) and checks it against the
//! definition.

use std::collections::BTreeMap;
use std::path::Path;

use vmbus::role::RoleDefinition;

use super::definition::Definition;
use super::error::{ServiceError, SourceLocation, nearest};
use super::rules::{DEFAULT_IMAGE, is_image_name};
use super::xml::{self, EMPTY, Element, Names, Schema};

/// Namespace of configurations.
pub const NAMESPACE: &str =
    "http://schemas.microsoft.com/ServiceHosting/2008/10/ServiceConfiguration";

/// Most instances of a role: more than a host can run, and low enough that a
/// typing error is refused.
pub const MAX_INSTANCES: u32 = 1000;

/// A configuration that agrees with its definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// `osFamily`, which may be the name of an image.
    pub image: Option<String>,
    /// `osFamily`, or the root element if there is none.
    pub image_place: SourceLocation,
    /// One for each role of the definition, in the same order.
    pub roles: Vec<RoleConfiguration>,
}

/// The configuration of one role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoleConfiguration {
    /// Number of instances, at least 1.
    pub instances: u32,
    /// A value for each setting of the definition.
    pub settings: BTreeMap<String, String>,
}

const SERVICE: Schema = Schema {
    attributes: &["serviceName", "osFamily", "osVersion", "schemaVersion"],
    children: &["Role"],
    later_children: &["NetworkConfiguration"],
    ..EMPTY
};

const ROLE: Schema = Schema {
    attributes: &["name"],
    later_attributes: &["vmName"],
    children: &["Instances", "ConfigurationSettings"],
    later_children: &["Certificates", "OsImage"],
};

const INSTANCES: Schema = Schema::of_attributes(&["count"]);
const SETTINGS: Schema = Schema::of_children(&["Setting"]);
const SETTING: Schema = Schema::of_attributes(&["name", "value"]);

/// Reads the configuration of `definition` in `file`.
pub fn read(file: &Path, definition: &Definition) -> Result<Configuration, ServiceError> {
    xml::read_text(file)
        .and_then(|text| parse(file, &text, definition))
        .map_err(|error| error.or_hint("correct the configuration; host-agent validate checks it"))
}

/// Reads the configuration `text` of `definition`, naming it `file` in errors.
pub fn parse(
    file: &Path,
    text: &str,
    definition: &Definition,
) -> Result<Configuration, ServiceError> {
    let document = xml::parse_written(file, text)?;
    let root = xml::root(file, text, &document, "ServiceConfiguration", NAMESPACE)?;
    root.check(&SERVICE)?;
    let service = root.required("serviceName")?;
    if service.text != definition.name {
        return Err(service
            .refuse(format!(
                "{} is not the service \"{}\" of {}",
                service.quoted(),
                definition.name,
                definition.file().display()
            ))
            .with_hint(format!("write serviceName=\"{}\"", definition.name)));
    }
    if let Some(version) = root.attribute("osVersion")
        && version.text != "*"
    {
        return Err(version
            .refuse(format!("{} is not supported yet", version.quoted()))
            .with_hint("write osVersion=\"*\" or remove it"));
    }
    let (image, image_place) = image(root)?;

    let mut names = Names::of("role");
    let mut found: BTreeMap<&str, RoleConfiguration> = BTreeMap::new();
    for element in root.children("Role") {
        let name = element.required("name")?;
        names.take(name)?;
        let roles = definition.roles.iter().map(|role| &role.definition);
        let Some(role) = roles.clone().find(|role| role.name == name.text) else {
            let hint = match nearest(name.text, roles.map(|role| role.name.as_str())) {
                Some(near) => format!("did you mean \"{near}\"?"),
                None => "remove it, or define the role".into(),
            };
            let what = format!("role \"{}\" is not in the definition", name.text);
            return Err(name.refuse(what).with_hint(hint));
        };
        found.insert(&role.name, configured_role(element, role)?);
    }
    let roles = definition
        .roles
        .iter()
        .map(|role| {
            let name = role.definition.name.as_str();
            found.remove(name).ok_or_else(|| {
                root.refuse(format!("role \"{name}\" is not configured"))
                    .with_hint(format!(
                        "add <Role name=\"{name}\"><Instances count=\"1\"/></Role>"
                    ))
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(Configuration {
        image,
        image_place,
        roles,
    })
}

/// The `osFamily` of the configuration `text`, whose service was checked when it was accepted.
pub(super) fn os_family(text: &str) -> Result<Option<String>, ServiceError> {
    let file = Path::new("ServiceConfiguration.cscfg");
    let document = xml::parse_written(file, text)?;
    let root = xml::root(file, text, &document, "ServiceConfiguration", NAMESPACE)?;
    image(root).map(|(name, _)| name)
}

/// `osFamily`, which may be the name of an image, and its location.
fn image(root: Element<'_>) -> Result<(Option<String>, SourceLocation), ServiceError> {
    let Some(value) = root.attribute("osFamily") else {
        return Ok((None, root.location()));
    };
    let name = value.text;
    if is_image_name(name) {
        return Ok((Some(name.into()), value.location()));
    }
    Err(value
        .refuse(format!("{} is not the name of an image", value.quoted()))
        .with_hint(format!(
            "use 1 to 64 lower-case letters, digits, \"_\", \"-\" and \".\", for example \
             osFamily=\"{DEFAULT_IMAGE}\""
        )))
}

fn configured_role(
    element: Element<'_>,
    role: &RoleDefinition,
) -> Result<RoleConfiguration, ServiceError> {
    element.check(&ROLE)?;
    let instances = element.child("Instances")?.ok_or_else(|| {
        element
            .refuse(format!("role \"{}\" has no <Instances>", role.name))
            .with_hint("add <Instances count=\"1\"/>")
    })?;
    instances.check(&INSTANCES)?;
    let instances = instances
        .required("count")?
        .number(1..=u64::from(MAX_INSTANCES))? as u32;

    let mut names = Names::of("setting");
    let mut settings = BTreeMap::new();
    let list = element.child("ConfigurationSettings")?;
    if let Some(list) = list {
        list.check(&SETTINGS)?;
        for setting in list.children("Setting") {
            setting.check(&SETTING)?;
            let name = setting.required("name")?;
            names.take(name)?;
            if !role.settings.contains_key(name.text) {
                let hint = match nearest(name.text, role.settings.keys().map(String::as_str)) {
                    Some(near) => format!("did you mean \"{near}\"?"),
                    None => "remove it, or add it to the definition".into(),
                };
                return Err(name
                    .refuse(format!(
                        "setting \"{}\" is not defined for role \"{}\"",
                        name.text, role.name
                    ))
                    .with_hint(hint));
            }
            let value = setting.required("value")?;
            settings.insert(name.text.to_owned(), value.text.to_owned());
        }
    }
    if let Some(missing) = role
        .settings
        .keys()
        .find(|name| !settings.contains_key(*name))
    {
        return Err(list
            .unwrap_or(element)
            .refuse(format!(
                "setting \"{missing}\" of role \"{}\" has no value",
                role.name
            ))
            .with_hint(format!("add <Setting name=\"{missing}\" value=\"…\"/>")));
    }
    Ok(RoleConfiguration {
        instances,
        settings,
    })
}
