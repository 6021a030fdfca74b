//! Public ports in place of those of the definition, as an operator gives them. Pure.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::model::{ServiceModel, full_name};

/// A public port of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishedPort {
    /// Port on the host, from 1.
    #[schema(minimum = 1, maximum = 65535)]
    pub port: u16,
    /// `ENDPOINT`, or `ROLE.ENDPOINT` where several roles have one of that name.
    pub endpoint: String,
}

/// Why ports cannot be published as given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The service has no such endpoint.
    #[error("the service has no endpoint {name}; it has: {known}")]
    NoEndpoint {
        /// The given name.
        name: String,
        /// Names of its endpoints.
        known: String,
    },
    /// Several roles have the endpoint.
    #[error("several roles have an endpoint {name}: name one of {matches}")]
    Ambiguous {
        /// The given name.
        name: String,
        /// `ROLE.ENDPOINT` of each.
        matches: String,
    },
    /// An endpoint is given twice.
    #[error("endpoint {0} is given two ports")]
    Twice(String),
    /// Two endpoints would have the same port.
    #[error("port {port} would be that of {first} and of {second}")]
    SamePort {
        /// The port.
        port: u16,
        /// One endpoint.
        first: String,
        /// The other.
        second: String,
    },
    /// No port of a host.
    #[error("port 0 of endpoint {0} is no port")]
    Zero(String),
}

impl FromStr for PublishedPort {
    type Err = String;

    /// `PORT:ENDPOINT`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || "write PORT:ENDPOINT, such as 8080:http".to_owned();
        let (port, endpoint) = text.split_once(':').ok_or_else(wanted)?;
        match port.parse() {
            Ok(port) if port > 0 && !endpoint.is_empty() => Ok(Self {
                port,
                endpoint: endpoint.to_owned(),
            }),
            _ => Err(wanted()),
        }
    }
}

/// Publishes endpoints of `model` on the ports of `wanted`.
///
/// # Errors
/// A name means no endpoint or several, or two endpoints would have one port. `model` may be
/// changed in part.
pub fn publish(model: &mut ServiceModel, wanted: &[PublishedPort]) -> Result<(), PublishError> {
    let mut changed = Vec::new();
    for PublishedPort { port, endpoint } in wanted {
        if *port == 0 {
            return Err(PublishError::Zero(endpoint.clone()));
        }
        let place = find(model, endpoint)?;
        if changed.contains(&place) {
            return Err(PublishError::Twice(endpoint.clone()));
        }
        changed.push(place);
        model.roles[place.0].public_ports[place.1].port = *port;
    }
    let mut names = model
        .endpoints()
        .map(|(role, endpoint, public)| (public.port, model.endpoint_name(role, endpoint)))
        .collect::<Vec<_>>();
    names.sort();
    for pair in names.windows(2) {
        if let [(port, first), (other, second)] = pair
            && port == other
        {
            return Err(PublishError::SamePort {
                port: *port,
                first: first.clone(),
                second: second.clone(),
            });
        }
    }
    Ok(())
}

/// Numbers of the role and of its endpoint that `name` means.
fn find(model: &ServiceModel, name: &str) -> Result<(usize, usize), PublishError> {
    let all = || {
        model.roles.iter().enumerate().flat_map(|(number, role)| {
            let endpoints = role.definition.endpoints.iter().enumerate();
            endpoints.map(move |(place, endpoint)| {
                let full = full_name(&role.definition.name, &endpoint.name);
                ((number, place), endpoint.name.as_str(), full)
            })
        })
    };
    let matches: Vec<_> = all()
        .filter(|(_, short, full)| *short == name || full == name)
        .collect();
    match &matches[..] {
        [(place, ..)] => Ok(*place),
        [] => {
            let known = model.endpoints();
            let known: Vec<_> = known
                .map(|(role, endpoint, _)| model.endpoint_name(role, endpoint))
                .collect();
            Err(PublishError::NoEndpoint {
                name: name.to_owned(),
                known: if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                },
            })
        }
        several => {
            let names: Vec<_> = several.iter().map(|(.., full)| full.as_str()).collect();
            Err(PublishError::Ambiguous {
                name: name.to_owned(),
                matches: names.join(", "),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;
    use crate::service;
    use std::path::Path;

    /// Roles `Cache` and `Other`, each with an endpoint `Redis`.
    fn model() -> ServiceModel {
        let sample = Path::new(service::SAMPLE);
        let mut model = service::load(sample, None, &Progress::default()).unwrap();
        let mut other = model.roles[0].clone();
        other.definition.name = "Other".into();
        other.public_ports[0].port = 7000;
        model.roles.push(other);
        model
    }

    fn published(wanted: &[&str]) -> Result<Vec<u16>, PublishError> {
        let mut model = model();
        let wanted: Vec<PublishedPort> = wanted.iter().map(|it| it.parse().unwrap()).collect();
        publish(&mut model, &wanted)?;
        Ok(model
            .endpoints()
            .map(|(_, _, public)| public.port)
            .collect())
    }

    #[test]
    fn endpoints_get_the_ports_that_are_given() {
        assert_eq!(published(&[]).unwrap(), [6379, 7000]);
        assert_eq!(published(&["8080:Other.Redis"]).unwrap(), [6379, 8080]);
        let swapped = published(&["7000:Cache.Redis", "6379:Other.Redis"]);
        assert_eq!(swapped.unwrap(), [7000, 6379]);
    }

    #[test]
    fn what_cannot_be_published_is_refused_with_the_names() {
        for (wanted, text) in [
            (
                &["1:Web"][..],
                "no endpoint Web; it has: Cache.Redis, Other.Redis",
            ),
            (&["1:Redis"], "name one of Cache.Redis, Other.Redis"),
            (&["1:Other.Redis", "2:Other.Redis"], "is given two ports"),
            (
                &["6379:Other.Redis"],
                "6379 would be that of Cache.Redis and of Other.Redis",
            ),
        ] {
            let error = published(wanted).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        for bad in ["8080", "0:http", "65536:http", ":http", "80:", "http:80"] {
            assert!(bad.parse::<PublishedPort>().is_err(), "{bad}");
        }
        let zero = PublishedPort {
            port: 0,
            endpoint: "Other.Redis".into(),
        };
        assert!(publish(&mut model(), &[zero]).is_err());
    }
}
