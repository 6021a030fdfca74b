//! Probes of published endpoints, over TCP or HTTP.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use vmbus::role::Endpoint;

use crate::service::model::{Role, ServiceModel, full_name};

/// A TCP connection that stays open and silent this long is a success: in many
/// protocols the client sends first. The host accepts before the guest does, so a
/// refusal by the guest closes the connection early, after one round trip. Times
/// the timeout scale, up to a limit.
const TCP_OPEN: Duration = Duration::from_millis(500);
/// The limit of [`TCP_OPEN`] times the timeout scale.
const TCP_OPEN_MOST: Duration = Duration::from_secs(2);
/// Limit of one HTTP attempt, times the timeout scale, and not more than the time
/// left.
const HTTP_LIMIT: Duration = Duration::from_secs(5);
/// Limit of an HTTP attempt when less time than this is left.
const HTTP_LEAST: Duration = Duration::from_secs(1);
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(200);
/// Longest status line read.
const MAX_STATUS_LINE: usize = 1024;

/// A probe of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointProbe {
    /// `ENDPOINT` or `ROLE.ENDPOINT`.
    pub endpoint: String,
    kind: ProbeKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum ProbeKind {
    Tcp,
    Http { path: String, code: u16 },
}

/// Why the name of a probe is not the name of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnresolvedEndpoint {
    /// No endpoint has that name; these exist.
    Unknown(Vec<String>),
    /// These endpoints have it.
    Ambiguous(Vec<String>),
}

/// The result of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeOutcome {
    /// What was observed, or why it failed.
    pub result: Result<String, String>,
    /// Attempts made.
    pub attempts: u32,
    /// From the first attempt to the result.
    pub took: Duration,
}

impl FromStr for EndpointProbe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "write tcp://ENDPOINT or http://ENDPOINT/PATH[=CODE]";
        let (scheme, rest) = text.split_once("://").ok_or(FORM)?;
        let (endpoint, path) = match rest.find('/') {
            Some(slash) => rest.split_at(slash),
            None => (rest, ""),
        };
        if endpoint.is_empty() {
            return Err(format!("the endpoint is missing: {FORM}"));
        }
        if endpoint.contains(':') {
            return Err("name the endpoint without a port: the definition has it".into());
        }
        if path.contains(|c: char| !c.is_ascii_graphic()) {
            return Err("the path has characters that must be percent-encoded".into());
        }
        let kind = match scheme {
            "tcp" if path.is_empty() => ProbeKind::Tcp,
            "tcp" => return Err("tcp:// takes no path".into()),
            "http" => {
                let (path, code) = path_and_code(path)?;
                ProbeKind::Http { path, code }
            }
            other => return Err(format!("{other}:// is not a probe: {FORM}")),
        };
        Ok(Self {
            endpoint: endpoint.to_owned(),
            kind,
        })
    }
}

/// Splits `/health=204`. After a query only three digits are a code.
fn path_and_code(text: &str) -> Result<(String, u16), String> {
    let text = if text.is_empty() { "/" } else { text };
    let split = text
        .rsplit_once('=')
        .filter(|(path, digits)| !digits.is_empty() && (!path.contains('?') || digits.len() == 3))
        .filter(|(_, digits)| digits.bytes().all(|b| b.is_ascii_digit()));
    let Some((path, digits)) = split else {
        return Ok((text.to_owned(), 200));
    };
    match digits.parse() {
        Ok(code @ 100..=599) => Ok((path.to_owned(), code)),
        _ => Err(format!("{digits} is not an HTTP status code")),
    }
}

impl fmt::Display for EndpointProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            ProbeKind::Tcp => write!(f, "tcp://{}", self.endpoint),
            ProbeKind::Http { path, code } => write!(f, "http://{}{path}={code}", self.endpoint),
        }
    }
}

impl EndpointProbe {
    /// The endpoint and its role, by `ENDPOINT` if only one role has it, or by
    /// `ROLE.ENDPOINT`.
    pub fn resolve<'a>(
        &self,
        model: &'a ServiceModel,
    ) -> Result<(&'a Role, &'a Endpoint), UnresolvedEndpoint> {
        // Both names may contain dots, so whole names are compared.
        let all = || {
            model
                .endpoints()
                .map(|(role, endpoint, _)| (role, endpoint))
        };
        let mut found: Vec<_> = all()
            .filter(|(role, endpoint)| {
                endpoint.name == self.endpoint
                    || full_name(&role.definition.name, &endpoint.name) == self.endpoint
            })
            .collect();
        match (found.pop(), found.is_empty()) {
            (Some(only), true) => Ok(only),
            (Some(last), false) => Err(UnresolvedEndpoint::Ambiguous(
                found
                    .into_iter()
                    .chain([last])
                    .map(|(role, endpoint)| full_name(&role.definition.name, &endpoint.name))
                    .collect(),
            )),
            (None, _) => Err(UnresolvedEndpoint::Unknown(
                all()
                    .map(|(role, endpoint)| model.endpoint_name(role, endpoint))
                    .collect(),
            )),
        }
    }

    /// Tries until it succeeds or `deadline` passes: a Ready role runs, but may not
    /// listen yet. Calls `failed` for each failure except the last.
    pub async fn run(
        &self,
        address: SocketAddr,
        deadline: Instant,
        scale: u32,
        mut failed: impl FnMut(&str),
    ) -> ProbeOutcome {
        let started = Instant::now();
        let mut attempts = 0;
        loop {
            attempts += 1;
            let left = deadline.saturating_duration_since(Instant::now());
            let result = self.attempt(address, left, scale).await;
            match &result {
                Err(why) if Instant::now() + PAUSE < deadline => failed(why),
                _ => {
                    return ProbeOutcome {
                        result,
                        attempts,
                        took: started.elapsed(),
                    };
                }
            }
            sleep(PAUSE).await;
        }
    }

    async fn attempt(
        &self,
        address: SocketAddr,
        left: Duration,
        scale: u32,
    ) -> Result<String, String> {
        match &self.kind {
            ProbeKind::Tcp => tcp(address, (TCP_OPEN * scale).min(TCP_OPEN_MOST)).await,
            ProbeKind::Http { path, code } => {
                let limit = (HTTP_LIMIT * scale).min(left.max(HTTP_LEAST));
                let status = timeout(limit, http(address, &self.endpoint, path))
                    .await
                    .map_err(|_| format!("no answer in {:.1} s", limit.as_secs_f64()))??;
                if status == *code {
                    Ok(format!("GET {path} {status}"))
                } else {
                    Err(format!("GET {path} returned {status}, not {code}"))
                }
            }
        }
    }
}

async fn tcp(address: SocketAddr, open: Duration) -> Result<String, String> {
    let mut stream = TcpStream::connect(address)
        .await
        .map_err(|error| format!("connect to {address}: {error}"))?;
    match timeout(open, stream.read(&mut [0; 1])).await {
        Err(_) => Ok("connected".into()),
        Ok(Ok(0)) => Err("the connection was closed at once".into()),
        Ok(Ok(_)) => Ok("connected, the server spoke".into()),
        Ok(Err(error)) => Err(format!("the connection ended at once: {error}")),
    }
}

/// The status code of a GET request.
async fn http(address: SocketAddr, host: &str, path: &str) -> Result<u16, String> {
    let failed = |error: std::io::Error| format!("http at {address}: {error}");
    let mut stream = TcpStream::connect(address).await.map_err(failed)?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: host-agent/{}\r\n\
         Accept: */*\r\nConnection: close\r\n\r\n",
        env!("CARGO_PKG_VERSION")
    );
    stream.write_all(request.as_bytes()).await.map_err(failed)?;
    let mut head = Vec::new();
    while head.len() < MAX_STATUS_LINE && !head.contains(&b'\n') {
        let mut piece = [0; 256];
        let count = stream.read(&mut piece).await.map_err(failed)?;
        if count == 0 {
            break;
        }
        head.extend_from_slice(&piece[..count]);
    }
    if head.is_empty() {
        return Err("the connection was closed without an answer".into());
    }
    status(&head).ok_or_else(|| "the answer is not HTTP".to_owned())
}

/// The code in a status line (RFC 9112, 4).
fn status(head: &[u8]) -> Option<u16> {
    let end = head.iter().position(|byte| *byte == b'\n')?;
    let line = std::str::from_utf8(&head[..end]).ok()?;
    let mut words = line.strip_prefix("HTTP/1.")?.split(' ');
    words.next()?;
    let code = words.next()?.trim_end();
    (code.len() == 3).then(|| code.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::model::Payload;
    use crate::service::size::Sizes;
    use crate::service::{Position, SourceLocation, definition};
    use std::path::Path;
    use tokio::net::TcpListener;

    #[test]
    fn probes_are_parsed_and_printed() {
        for (text, expected) in [
            ("tcp://redis", "tcp://redis"),
            ("http://www", "http://www/=200"),
            ("http://www/a/b", "http://www/a/b=200"),
            ("http://www/health=204", "http://www/health=204"),
            ("http://www/?a=b", "http://www/?a=b=200"),
            ("http://www/?a=12", "http://www/?a=12=200"),
            ("http://www/?a=12=404", "http://www/?a=12=404"),
        ] {
            assert_eq!(text.parse::<EndpointProbe>().unwrap().to_string(), expected);
        }
        for bad in [
            "redis",
            "tcp://",
            "tcp://redis/",
            "tcp://redis:6379",
            "http:///x",
            "http://www/=99",
            "http://www/=600",
            "http://www/a b",
            "http://www/a\r\nX: y",
            "https://www/",
        ] {
            assert!(bad.parse::<EndpointProbe>().is_err(), "{bad}");
        }
    }

    /// Each role with its endpoints; the ports, public and local, count up from 1.
    fn model(roles: &[(&str, &[&str])]) -> ServiceModel {
        let mut port = 0;
        let roles: String = roles
            .iter()
            .map(|(role, endpoints)| {
                let endpoints = endpoints.iter().map(|endpoint| {
                    port += 1;
                    format!("<InputEndpoint name='{endpoint}' protocol='tcp' port='{port}'/>")
                });
                let endpoints: String = endpoints.collect();
                format!(
                    "<WorkerRole name='{role}'><Endpoints>{endpoints}</Endpoints><Runtime><EntryPoint>\
                     <ProgramEntryPoint commandLine='run'/></EntryPoint></Runtime></WorkerRole>"
                )
            })
            .collect();
        let text = format!(
            "<ServiceDefinition name='S' xmlns='{}'>{roles}</ServiceDefinition>",
            definition::NAMESPACE
        );
        let definition = definition::parse(Path::new("S.csdef"), text, &Sizes::default()).unwrap();
        let payload = Payload::Directory("/".into());
        let roles = definition.roles.into_iter().map(|role| Role {
            definition: role.definition,
            instances: 1,
            size: role.size.clone(),
            public_ports: role.public_ports,
            payload: payload.clone(),
        });
        ServiceModel {
            name: "S".into(),
            image: "minimal".into(),
            image_place: SourceLocation {
                file: "S.cscfg".into(),
                position: Position { line: 1, column: 1 },
            },
            roles: roles.collect(),
        }
    }

    #[test]
    fn an_endpoint_is_found_by_its_name_or_role_and_name() {
        let model = model(&[
            ("Web", &["Endpoint1", "Admin"]),
            ("Web.Api", &["Endpoint1"]),
            ("Mail", &["Api.Endpoint1"]),
        ]);
        let port = |name: &str| {
            let probe: EndpointProbe = format!("tcp://{name}").parse().unwrap();
            let (_, endpoint) = probe.resolve(&model)?;
            Ok::<u16, UnresolvedEndpoint>(endpoint.local_port)
        };
        assert_eq!(port("Web.Endpoint1"), Ok(1));
        assert_eq!(port("Admin"), Ok(2));
        assert_eq!(port("Web.Admin"), Ok(2));
        assert_eq!(port("Web.Api.Endpoint1"), Ok(3));
        assert_eq!(port("Api.Endpoint1"), Ok(4));
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let both = names(&["Web.Endpoint1", "Web.Api.Endpoint1"]);
        assert_eq!(port("Endpoint1"), Err(UnresolvedEndpoint::Ambiguous(both)));
        let all = names(&[
            "Web.Endpoint1",
            "Admin",
            "Web.Api.Endpoint1",
            "Api.Endpoint1",
        ]);
        assert_eq!(port("Mail.Admin"), Err(UnresolvedEndpoint::Unknown(all)));
    }

    #[test]
    fn only_a_whole_status_line_has_a_code() {
        assert_eq!(status(b"HTTP/1.1 204 No Content\r\n"), Some(204));
        assert_eq!(status(b"HTTP/1.0 200\r\n"), Some(200));
        for bad in [
            &b"HTTP/1.1 200"[..],
            b"HTTP/2 200\r\n",
            b"-ERR unknown\r\n",
            b"HTTP/1.1 20\r\n",
            b"\xff\n",
        ] {
            assert_eq!(status(bad), None);
        }
    }

    #[tokio::test]
    async fn a_connection_closed_at_once_is_a_failure() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            for _ in 0..2 {
                drop(listener.accept().await.unwrap());
            }
            let (mut held, _) = listener.accept().await.unwrap();
            held.write_all(b"hello").await.unwrap();
            held
        });
        let probe: EndpointProbe = "tcp://x".parse().unwrap();
        let deadline = Instant::now() + Duration::from_mins(1);
        let mut failures = Vec::new();
        let outcome = probe
            .run(address, deadline, 1, |why| failures.push(why.to_owned()))
            .await;
        assert_eq!(outcome.result.as_deref(), Ok("connected, the server spoke"));
        assert_eq!((outcome.attempts, failures.len()), (3, 2));
        drop(server.await.unwrap());
    }

    #[tokio::test]
    async fn an_attempt_ends_with_the_time_left_and_reports_why() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let probe: EndpointProbe = "http://www/".parse().unwrap();
        // Nothing accepts: the connection stays open and silent.
        let left = Duration::from_millis(1200);
        let outcome = probe
            .run(address, Instant::now() + left, 1000, |_| {})
            .await;
        assert_eq!(outcome.result, Err("no answer in 1.2 s".to_owned()));
        assert_eq!(outcome.attempts, 1);
        tokio::spawn(async move {
            // The first connection is from the attempt above.
            for _ in 0..2 {
                let (mut client, _) = listener.accept().await.unwrap();
                assert_ne!(client.read(&mut [0; 512]).await.unwrap(), 0);
            }
        });
        let outcome = probe.run(address, Instant::now(), 1, |_| {}).await;
        let wanted = "the connection was closed without an answer";
        assert_eq!(outcome.result, Err(wanted.to_owned()));
    }

    #[tokio::test]
    async fn a_wrong_status_fails_and_names_both_codes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 512];
            let count = client.read(&mut request).await.unwrap();
            assert!(request[..count].starts_with(b"GET /h HTTP/1.1\r\nHost: www\r\n"));
            client
                .write_all(b"HTTP/1.1 503 Busy\r\n\r\n")
                .await
                .unwrap();
        });
        let probe: EndpointProbe = "http://www/h".parse().unwrap();
        let outcome = probe.run(address, Instant::now(), 1, |_| {}).await;
        assert_eq!(
            outcome.result,
            Err("GET /h returned 503, not 200".to_owned())
        );
    }
}
