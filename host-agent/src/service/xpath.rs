//! The paths that `RoleInstanceValue@xpath` may name: a closed set, not XPath.

use vmbus::role::InstanceValue;

/// Reads one path of the set.
pub(super) fn parse(path: &str) -> Option<InstanceValue> {
    let path = path.trim();
    let rest = path.strip_prefix("/RoleEnvironment/")?;
    match rest {
        "Deployment/@id" => return Some(InstanceValue::DeploymentId),
        "Deployment/@emulated" => return Some(InstanceValue::Emulated),
        "CurrentInstance/@id" => return Some(InstanceValue::InstanceId),
        "CurrentInstance/@roleName" => return Some(InstanceValue::RoleName),
        "CurrentInstance/@updateDomain" => return Some(InstanceValue::UpdateDomain),
        "CurrentInstance/@faultDomain" => return Some(InstanceValue::FaultDomain),
        _ => {}
    }
    let rest = rest.strip_prefix("CurrentInstance/")?;
    let (element, rest) = rest.split_once("[@name=")?;
    let quote = rest.chars().next().filter(|c| *c == '\'' || *c == '"')?;
    let (name, attribute) = rest[1..].split_once(quote)?;
    let attribute = attribute.strip_prefix("]/@")?;
    let name = name.to_owned();
    Some(match (element, attribute) {
        ("ConfigurationSettings/ConfigurationSetting", "value") => InstanceValue::Setting(name),
        ("LocalResources/LocalResource", "path") => InstanceValue::LocalStoragePath(name),
        ("LocalResources/LocalResource", "sizeInMB") => InstanceValue::LocalStorageSize(name),
        ("Endpoints/Endpoint", "protocol") => InstanceValue::EndpointProtocol(name),
        ("Endpoints/Endpoint", "address") => InstanceValue::EndpointAddress(name),
        ("Endpoints/Endpoint", "port") => InstanceValue::EndpointPort(name),
        _ => return None,
    })
}

/// The set, for messages.
pub(super) const ALLOWED: &str = "below /RoleEnvironment: Deployment/@id | @emulated; \
CurrentInstance/@id | @roleName | @updateDomain | @faultDomain; \
CurrentInstance/ConfigurationSettings/ConfigurationSetting[@name='X']/@value; \
CurrentInstance/LocalResources/LocalResource[@name='X']/@path | @sizeInMB; \
CurrentInstance/Endpoints/Endpoint[@name='X']/@protocol | @address | @port";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_of_the_set_is_read_and_no_other() {
        let x = || "X.y".to_owned();
        #[rustfmt::skip]
        let set = [
            ("Deployment/@id", InstanceValue::DeploymentId),
            ("Deployment/@emulated", InstanceValue::Emulated),
            ("CurrentInstance/@id", InstanceValue::InstanceId),
            ("CurrentInstance/@roleName", InstanceValue::RoleName),
            ("CurrentInstance/@updateDomain", InstanceValue::UpdateDomain),
            ("CurrentInstance/@faultDomain", InstanceValue::FaultDomain),
            ("CurrentInstance/ConfigurationSettings/ConfigurationSetting[@name='X.y']/@value", InstanceValue::Setting(x())),
            ("CurrentInstance/LocalResources/LocalResource[@name=\"X.y\"]/@path", InstanceValue::LocalStoragePath(x())),
            ("CurrentInstance/LocalResources/LocalResource[@name='X.y']/@sizeInMB", InstanceValue::LocalStorageSize(x())),
            ("CurrentInstance/Endpoints/Endpoint[@name='X.y']/@protocol", InstanceValue::EndpointProtocol(x())),
            ("CurrentInstance/Endpoints/Endpoint[@name='X.y']/@address", InstanceValue::EndpointAddress(x())),
            ("CurrentInstance/Endpoints/Endpoint[@name='X.y']/@port", InstanceValue::EndpointPort(x())),
        ];
        for (path, value) in set {
            let path = format!("/RoleEnvironment/{path}");
            assert_eq!(parse(&path), Some(value), "{path}");
            assert_eq!(parse(&format!("{path}x")), None);
            assert_eq!(parse(&path[1..]), None);
        }
        for name in ["ä'", "'a", "'a\""] {
            let path =
                format!("/RoleEnvironment/CurrentInstance/Endpoints/Endpoint[@name={name}]/@port");
            assert_eq!(parse(&path), None);
        }
    }
}
