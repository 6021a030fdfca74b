//! Makes the specs of a service's instances from its model. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use vmbus::message::{ExpectedState, Goal};

use super::spec::{ImageRef, InstanceSpec, PublicEndpoint};
use crate::digest::Digest;
use crate::service::model::{Role, ServiceModel};

/// Serial number of the OS disk.
pub const OS_DISK: &str = "os";
/// Serial number of the resource disk.
pub const RESOURCE_DISK: &str = "resource";
/// Serial number of the application disk.
pub const APPLICATION_DISK: &str = "app-e";

/// Update and fault domains over which instances are spread (role model, section 4.5).
const UPDATE_DOMAINS: u32 = 5;
const FAULT_DOMAINS: u32 = 2;

/// What a plan needs besides the model.
#[derive(Debug, Clone)]
pub struct Placement<'a> {
    /// Id of the deployment: 32 hexadecimal digits.
    pub deployment: &'a str,
    /// Number of the goal state.
    pub incarnation: u64,
    /// The verified image that the model names.
    pub image: &'a ImageRef,
    /// Application disk of each role, by role name.
    pub applications: &'a BTreeMap<String, Digest>,
    /// Address on which endpoints are published.
    pub address: IpAddr,
    /// Time that a role may take to stop.
    pub stop_timeout: Duration,
}

/// The specs of every instance of `model`, in the order of the definition. A role
/// without an application disk in `placement` has no instances.
pub fn plan(model: &ServiceModel, placement: &Placement<'_>) -> Vec<InstanceSpec> {
    let mut specs = Vec::new();
    for role in &model.roles {
        let Some(application) = placement.applications.get(&role.definition.name) else {
            continue;
        };
        let endpoints = public_endpoints(model, role, placement.address);
        for number in 0..role.instances {
            specs.push(InstanceSpec {
                service: model.name.clone(),
                image: placement.image.clone(),
                application: *application,
                size: (&role.size).into(),
                endpoints: endpoints.clone(),
                goal: goal(role, number, placement),
            });
        }
    }
    specs
}

fn goal(role: &Role, number: u32, placement: &Placement<'_>) -> Goal {
    Goal {
        incarnation: placement.incarnation,
        expected: ExpectedState::Started,
        deployment_id: placement.deployment.to_owned(),
        instance: instance_name(role, number),
        update_domain: number % UPDATE_DOMAINS,
        fault_domain: number % FAULT_DOMAINS,
        role: role.definition.clone(),
        application_disk: APPLICATION_DISK.into(),
        resource_disk: RESOURCE_DISK.into(),
        stop_timeout_ms: u64::try_from(placement.stop_timeout.as_millis()).unwrap_or(u64::MAX),
    }
}

/// `<Role>_IN_<n>`.
fn instance_name(role: &Role, number: u32) -> String {
    format!("{}_IN_{number}", role.definition.name)
}

/// The public endpoints of `role`, on `address`.
pub fn public_endpoints(model: &ServiceModel, role: &Role, address: IpAddr) -> Vec<PublicEndpoint> {
    let endpoints = role.endpoints().map(|(endpoint, public)| PublicEndpoint {
        name: endpoint.name.clone(),
        label: model.endpoint_name(role, endpoint),
        address: SocketAddr::new(address, public.port),
        local_port: endpoint.local_port,
    });
    endpoints.collect()
}

/// Names of every instance of `model`, in the order of [`plan`].
pub fn instance_names(model: &ServiceModel) -> Vec<String> {
    let roles = model.roles.iter();
    let names = roles.flat_map(|role| (0..role.instances).map(|n| instance_name(role, n)));
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;
    use crate::service;
    use std::collections::BTreeSet;
    use std::net::Ipv4Addr;
    use std::path::Path;

    #[test]
    fn every_instance_gets_a_spec_that_can_be_stored() {
        let mut model =
            service::load(Path::new(service::SAMPLE), None, &Progress::default()).unwrap();
        model.roles[0].instances = 6;
        let digest = Digest::of(&b"application"[..]).unwrap().0;
        let placement = Placement {
            deployment: "0123456789abcdef0123456789abcdef",
            incarnation: 1,
            image: &ImageRef {
                name: "redis".into(),
                manifest: digest,
            },
            applications: &BTreeMap::from([(model.roles[0].definition.name.clone(), digest)]),
            address: Ipv4Addr::LOCALHOST.into(),
            stop_timeout: Duration::from_secs(30),
        };
        let specs = plan(&model, &placement);
        let names: BTreeSet<&str> = specs.iter().map(InstanceSpec::name).collect();
        assert_eq!(names.len(), 6);
        let goals = specs.iter().map(|spec| &spec.goal);
        let domains: Vec<_> = goals
            .map(|it| (it.update_domain, it.fault_domain))
            .collect();
        let spread = [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0), (0, 1)];
        assert_eq!(domains, spread);
        assert!(names.iter().copied().eq(instance_names(&model)));
        for spec in &specs {
            assert_eq!(spec.deployment(), placement.deployment);
            assert_eq!(spec.endpoints[0].address, ([127, 0, 0, 1], 6379).into());
            let json = serde_json::to_string(spec).unwrap();
            assert_eq!(&serde_json::from_str::<InstanceSpec>(&json).unwrap(), spec);
        }
    }
}
