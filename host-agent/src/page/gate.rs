//! Who passes to the page on TCP, which every user of the machine and every site in a browser
//! can reach: a browser with a session, under a name of this machine, to look and to send the
//! forms of the page.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use axum::extract::{Query, Request, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, COOKIE, HOST, LOCATION, REFERRER_POLICY, SET_COOKIE,
    UPGRADE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use tokio::time::Instant;

use super::assets::FOLDER;
use super::routes::message;
use super::sessions::{LASTS, Sessions};

/// Where a browser shows the token.
pub(super) const LOGIN: &str = "/login";

/// What a browser may do with any page: nothing but the page's own files and paths.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
                      connect-src 'self'; form-action 'self'; base-uri 'none'; \
                      frame-ancestors 'none'";

/// A listener's gate.
#[derive(Debug, Clone)]
pub(super) struct Gate {
    pub(super) sessions: Arc<Sessions>,
    /// Browsers send cookies to every port of a host: each listener has its own name.
    pub(super) port: u16,
}

#[derive(Debug, Deserialize)]
struct Login {
    token: String,
}

impl Gate {
    fn cookie(&self) -> String {
        format!("host-agent-{}", self.port)
    }

    fn log_in(&self, request: &Request) -> Response {
        let query = Query::<Login>::try_from_uri(request.uri());
        let token = query.map(|Query(login)| login.token).unwrap_or_default();
        match self.sessions.open(&token, Instant::now()) {
            Ok(Some(id)) => {
                let cookie = format!(
                    "{}={id}; Path=/; HttpOnly; SameSite=Strict; Max-Age={}",
                    self.cookie(),
                    LASTS.as_secs()
                );
                let headers = [(SET_COOKIE, cookie), (LOCATION, "/".to_owned())];
                (StatusCode::SEE_OTHER, headers).into_response()
            }
            Ok(None) => signed_out(),
            Err(error) => {
                let status = StatusCode::INTERNAL_SERVER_ERROR;
                message(status, "No session", &error.to_string())
            }
        }
    }
}

/// Passes a request to the page and the API, or refuses it.
pub(super) async fn pass(State(gate): State<Gate>, mut request: Request, next: Next) -> Response {
    let headers = request.headers();
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    if !host.is_some_and(is_loopback) {
        let text = "this page answers only under a name of this machine, such as 127.0.0.1";
        return message(StatusCode::MISDIRECTED_REQUEST, "Refused", text);
    }
    let path = request.uri().path();
    if request.method() == Method::GET {
        if path == LOGIN {
            return gate.log_in(&request);
        }
        // They have no secret, and the page below needs them.
        if path.starts_with(FOLDER) {
            return next.run(request).await;
        }
    }
    let session = cookie(headers, &gate.cookie());
    let session = session.and_then(|id| gate.sessions.find(id, Instant::now()));
    let Some(session) = session else {
        return signed_out();
    };
    if !is_of_page(&request) {
        let text = "only the socket of this host agent takes this request";
        return message(StatusCode::FORBIDDEN, "Refused", text);
    }
    request.extensions_mut().insert(session);
    next.run(request).await
}

/// Whether a browser may send this with its session: it looks, or sends a form of the page.
fn is_of_page(request: &Request) -> bool {
    let method = request.method();
    let looks = method == Method::GET && !request.headers().contains_key(UPGRADE);
    looks || (method == Method::POST && request.uri().path().starts_with("/services/"))
}

fn signed_out() -> Response {
    let text = "Open the address that host-agent serve printed when it started.";
    message(StatusCode::UNAUTHORIZED, "Signed out", text)
}

fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let values = headers.get_all(COOKIE).iter();
    let pairs = values.filter_map(|it| it.to_str().ok());
    let pairs = pairs.flat_map(|it| it.split(';'));
    let mut found = pairs.filter_map(|pair| pair.trim().split_once('='));
    found.find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// Whether `host`, with or without a port, can only lead to this machine. Any other name could
/// be that of a site which lets its name lead here.
pub(super) fn is_loopback(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        let address = rest.split_once(']').map(|(address, _)| address.parse());
        return matches!(address, Some(Ok(Ipv6Addr::LOCALHOST)));
    }
    let name = host.split_once(':').map_or(host, |(name, _)| name);
    let address = name.parse::<Ipv4Addr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|it| it.is_loopback())
}

/// Tells a browser what an answer may do. Nothing is kept that a session has seen.
pub(super) async fn protect(mut response: Response) -> Response {
    let headers = response.headers_mut();
    let mut set = |name: HeaderName, value| {
        let kept = headers.entry(name);
        kept.or_insert(HeaderValue::from_static(value));
    };
    set(CONTENT_SECURITY_POLICY, POLICY);
    set(X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(X_FRAME_OPTIONS, "DENY");
    // With "no-referrer" the origin of a form would be "null".
    set(REFERRER_POLICY, "same-origin");
    set(CACHE_CONTROL, "no-store");
    let isolated = "same-origin";
    set(
        HeaderName::from_static("cross-origin-opener-policy"),
        isolated,
    );
    set(
        HeaderName::from_static("cross-origin-resource-policy"),
        isolated,
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_loopback() {
        for host in [
            "localhost",
            "LOCALHOST:1",
            "127.0.0.1:80",
            "127.8.9.1",
            "[::1]:80",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "",
            "10.0.0.1",
            "evil.example:80",
            "localhost.evil",
            "[::2]",
            "[::1",
            "127.1",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn the_cookie_of_another_port_is_not_ours() {
        let headers = [(
            COOKIE,
            HeaderValue::from_static("a=1; host-agent-8=x;host-agent-9=y"),
        )];
        let headers = headers.into_iter().collect();
        assert_eq!(cookie(&headers, "host-agent-9"), Some("y"));
        assert_eq!(cookie(&headers, "host-agent-7"), None);
    }
}
