//! What an operator decides about the services of a host: sizes, images and ports in place of
//! those that a definition and a configuration name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::configuration;
use super::error::ServiceError;
use super::load;
use super::model::ServiceModel;
use super::pack::{self, Packed};
use super::publish::publish;
use super::size::Sizes;
use super::validate::{self, Validated};
use crate::progress::Progress;

/// Image of a configuration without `osFamily`, unless the operator names another.
pub const DEFAULT_IMAGE: &str = "minimal";

/// The rules of a host. Those of [`Default`] change nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRules {
    /// Virtual machine sizes.
    pub sizes: Sizes,
    /// Image of a configuration without `osFamily`.
    pub default_image: String,
    /// Image by `osFamily`; a family that is not here is the name of its image.
    pub images: BTreeMap<String, String>,
    /// Port on the host by public port of the definition.
    pub ports: BTreeMap<u16, u16>,
}

impl Default for ServiceRules {
    fn default() -> Self {
        Self {
            sizes: Sizes::default(),
            default_image: DEFAULT_IMAGE.to_owned(),
            images: BTreeMap::new(),
            ports: BTreeMap::new(),
        }
    }
}

impl ServiceRules {
    /// Loads the service in `service`, a directory or a `.cspkg`, with the configuration
    /// `config` or the one found beside the definition or package. Every content of a package
    /// is checked.
    ///
    /// # Errors
    /// The first error of the service.
    pub fn load(
        &self,
        service: &Path,
        config: Option<&Path>,
        progress: &Progress,
    ) -> Result<ServiceModel, ServiceError> {
        load::load_by(self, service, config, progress)
    }

    /// Loads the `.cspkg` in `package` with the text of a configuration. Every content is
    /// checked.
    ///
    /// # Errors
    /// The first error of the service.
    pub fn load_text(
        &self,
        package: &Path,
        configuration: &str,
        progress: &Progress,
    ) -> Result<ServiceModel, ServiceError> {
        load::load_text(self, package, configuration, progress)
    }

    /// Checks `path`: a service directory, `.csdef`, `.cscfg` or `.cspkg`, with the
    /// configuration `config` or the one beside it.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn validate(
        &self,
        path: &Path,
        config: Option<&Path>,
        progress: &Progress,
    ) -> Result<Validated, ServiceError> {
        validate::validate_by(self, path, config, progress)
    }

    /// Packs the service in `directory` into the file `out`, which appears only when it is
    /// complete. If `out` is a symbolic link, its target is replaced. Timestamps in the package
    /// are `$SOURCE_DATE_EPOCH`, else 1980-01-01.
    ///
    /// # Errors
    /// The service is refused, or `out` cannot be written.
    pub fn pack(
        &self,
        directory: &Path,
        out: &Path,
        progress: &Progress,
    ) -> Result<Packed, ServiceError> {
        pack::pack_by(&self.sizes, directory, out, progress)
    }

    /// The images that the configuration `text` names, by these rules or by none.
    ///
    /// # Errors
    /// The text is not a configuration.
    pub fn images_named(&self, text: &str) -> Result<BTreeSet<String>, ServiceError> {
        let family = configuration::os_family(text)?;
        let mut names = BTreeSet::from([self.image(family.as_deref())]);
        names.extend(family);
        Ok(names)
    }

    /// The image for `family`, the `osFamily` of a configuration.
    pub(super) fn image(&self, family: Option<&str>) -> String {
        let Some(family) = family else {
            return self.default_image.clone();
        };
        let image = self.images.get(family);
        image.map_or(family, String::as_str).to_owned()
    }

    /// Publishes the endpoints of `model` on the host's ports.
    pub(super) fn publish(&self, model: &mut ServiceModel) -> Result<(), ServiceError> {
        let mut place = None;
        for public in model
            .roles
            .iter_mut()
            .flat_map(|role| &mut role.public_ports)
        {
            if let Some(port) = self.ports.get(&public.port) {
                public.port = *port;
                place = Some(public.place.clone());
            }
        }
        let Some(place) = place else {
            return Ok(());
        };
        publish(model, &[]).map_err(|error| {
            ServiceError::at_position(&place.file, place.position, error.to_string())
                .with_hint("change [ports] of the configuration of this host")
        })
    }
}

/// Whether `name` can be that of an image: it is safe as the name of a directory.
pub fn is_image_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.bytes().all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-.".contains(&byte)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::SAMPLE;
    use crate::service::model::VmSize;

    fn load(rules: &ServiceRules) -> Result<ServiceModel, ServiceError> {
        rules.load(Path::new(SAMPLE), None, &Progress::default())
    }

    #[test]
    fn an_operator_replaces_size_image_and_port_of_a_service() {
        let plain = load(&ServiceRules::default()).unwrap();
        let mut rules = ServiceRules::default();
        rules.sizes.set(VmSize {
            name: plain.roles[0].size.name.clone(),
            vcpus: 3,
            memory_mib: 300,
            resource_mib: 9000,
        });
        rules.images.insert(plain.image.clone(), "other".into());
        rules.default_image = "other".into();
        rules.ports.insert(6379, 16379);
        let model = load(&rules).unwrap();
        assert_eq!(model.roles[0].size.vcpus, 3);
        assert_eq!(model.image, "other");
        assert_eq!(model.roles[0].public_ports[0].port, 16379);
    }

    #[test]
    fn two_endpoints_never_get_one_port() {
        let mut model = load(&ServiceRules::default()).unwrap();
        let mut other = model.roles[0].clone();
        other.definition.name = "Other".into();
        other.public_ports[0].port = 7000;
        model.roles.push(other);
        let mut rules = ServiceRules::default();
        rules.ports.insert(6379, 7000);
        let error = rules.publish(&mut model).unwrap_err();
        assert!(error.to_string().contains(".csdef:"), "{error}");
        assert!(
            error.what().contains("port 7000 would be that of"),
            "{error}"
        );
    }
}
