//! Deploys a service model: builds its content, plans its specs, and creates them on a host.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::host::{DeploymentHandle, Host, HostError, NewDeployment, Published};
use super::plan::{Placement, plan, public_endpoints};
use super::spec::GuestSize;
use crate::progress::Progress;
use crate::service::model::ServiceModel;
use crate::store::deployment::Retention;

/// How a service is deployed.
#[derive(Debug, Clone)]
pub struct DeployOptions {
    /// Id of the deployment: 32 hexadecimal digits.
    pub id: String,
    /// What happens to disks and logs at the end.
    pub retention: Retention,
    /// Number of the goal state, from 1.
    pub incarnation: u64,
    /// Address on which endpoints are published.
    pub address: IpAddr,
}

/// The size of each instance of `model`.
pub fn sizes(model: &ServiceModel) -> Vec<GuestSize> {
    let roles = model.roles.iter();
    let sizes = roles.flat_map(|role| (0..role.instances).map(|_| GuestSize::from(&role.size)));
    sizes.collect()
}

/// Deploys `model` on `host` and returns as soon as its instances are starting.
/// `progress` shows what takes long and can cancel it.
///
/// # Errors
/// The service could not be deployed. Nothing of it is left, also if the future is dropped.
pub async fn deploy(
    host: &Host,
    model: &ServiceModel,
    options: &DeployOptions,
    progress: &Progress,
) -> Result<DeploymentHandle, HostError> {
    // First, because these fail at once.
    let _claim = host.claim(&sizes(model))?;
    let endpoints: Vec<_> = model
        .roles
        .iter()
        .map(|role| {
            let endpoints = public_endpoints(model, role, options.address);
            (role.definition.name.as_str(), endpoints)
        })
        .collect();
    let endpoints = endpoints.iter().map(|(role, found)| (*role, &found[..]));
    let published = Published::listen(endpoints)?;
    let image = host.verify_image(&model.image, progress).await?;
    let hold = host.hold_content().await?;
    let mut applications = BTreeMap::new();
    for role in &model.roles {
        let digest = host.add_application(&hold, role, progress).await?;
        applications.insert(role.definition.name.clone(), digest);
    }
    let placement = Placement {
        deployment: &options.id,
        incarnation: options.incarnation,
        image: &image,
        applications: &applications,
        address: options.address,
        stop_timeout: host.options().role_stop(),
    };
    let specs = plan(model, &placement);
    let new = NewDeployment {
        id: options.id.clone(),
        service: model.name.clone(),
        retention: options.retention,
        specs,
    };
    host.create(new, published, &hold).await
}
