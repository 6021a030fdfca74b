//! A form that acts: only the page itself may have sent it.

use axum::Form;
use axum::extract::rejection::FormRejection;
use axum::extract::{FromRequest, Request};
use axum::http::header::{HOST, ORIGIN};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;

use super::gate::is_loopback;
use super::routes::message;
use super::sessions::Session;
use crate::api::listener::Client;

/// A form that was sent by the page, and who sent it.
#[derive(Debug)]
pub(super) struct Action {
    /// Id of the user.
    pub(super) user: u32,
}

#[derive(Debug, Deserialize)]
struct Fields {
    #[serde(default)]
    csrf: String,
}

impl<S: Send + Sync> FromRequest<S> for Action {
    type Rejection = Response;

    async fn from_request(request: Request, _: &S) -> Result<Self, Response> {
        let session = request.extensions().get::<Session>().cloned();
        let client = request.extensions().get::<Client>();
        let user = client.map(|client| client.user);
        if !is_own(request.headers()) {
            return Err(refused("another site has sent this form"));
        }
        let form: Result<Form<Fields>, FormRejection> = Form::from_request(request, &()).await;
        let Form(fields) = form.map_err(|error| error.into_response())?;
        let user = match (session, user) {
            (Some(session), _) if session.csrf != fields.csrf => {
                return Err(refused(
                    "the session of this form is over: open the page again",
                ));
            }
            // Who has the token has it from the user of this process.
            (Some(_), _) => nix::unistd::geteuid().as_raw(),
            (None, Some(user)) => user,
            (None, None) => return Err(refused("nobody has sent this form")),
        };
        Ok(Self { user })
    }
}

/// Whether the page may have sent this. Browsers name the origin of each form; a tunnel to the
/// Unix socket makes it reachable for every site that they show.
fn is_own(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(ORIGIN) else {
        // Not a browser.
        return !headers.contains_key("sec-fetch-site");
    };
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let origin = origin
        .to_str()
        .ok()
        .and_then(|it| it.strip_prefix("http://"));
    host.is_some_and(|host| Some(host) == origin && is_loopback(host))
}

fn refused(why: &str) -> Response {
    message(StatusCode::FORBIDDEN, "Refused", why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_page_itself_and_programs_may_send_a_form() {
        let own = |fields: &[(&'static str, &'static str)]| {
            let pairs = fields.iter().map(|(name, value)| {
                let name = axum::http::HeaderName::from_static(name);
                (name, axum::http::HeaderValue::from_static(value))
            });
            is_own(&pairs.collect())
        };
        assert!(own(&[("host", "x")]));
        assert!(own(&[
            ("host", "localhost:8"),
            ("origin", "http://localhost:8")
        ]));
        for origin in [
            "http://evil.example",
            "http://localhost:9",
            "null",
            "https://localhost:8",
        ] {
            assert!(
                !own(&[("host", "localhost:8"), ("origin", origin)]),
                "{origin}"
            );
        }
        // A name of another that leads here.
        assert!(!own(&[
            ("host", "evil.example"),
            ("origin", "http://evil.example")
        ]));
        assert!(!own(&[
            ("host", "localhost:8"),
            ("sec-fetch-site", "cross-site")
        ]));
    }
}
