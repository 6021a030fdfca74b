//! The files of the page: embedded, and served below a name with a digest of their content, so
//! that a browser may keep them for ever.

use std::sync::LazyLock;

use axum::extract::Path;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

use crate::digest::Digest;

/// Folder of the files in a path.
pub(super) const FOLDER: &str = "/page/";

/// Digits of the digest in a name.
const DIGITS: usize = 16;

/// A file of the page.
#[derive(Debug)]
struct Asset {
    name: String,
    media_type: &'static str,
    text: &'static str,
}

impl Asset {
    fn new(stem: &str, suffix: &str, media_type: &'static str, text: &'static str) -> Self {
        let (digest, _) = Digest::of(text.as_bytes()).expect("memory can be read");
        let digest = &digest.hex()[..DIGITS];
        let name = format!("{stem}-{digest}.{suffix}");
        Self {
            name,
            media_type,
            text,
        }
    }

    fn path(&self) -> String {
        format!("{FOLDER}{}", self.name)
    }
}

static STYLE: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("page", "css", "text/css", include_str!("assets/page.css")));
static SCRIPT: LazyLock<Asset> = LazyLock::new(|| {
    let text = include_str!("assets/page.js");
    Asset::new("page", "js", "text/javascript", text)
});
static ICON: LazyLock<Asset> = LazyLock::new(|| {
    let text = include_str!("assets/icon.svg");
    Asset::new("icon", "svg", "image/svg+xml", text)
});

/// Path of the style sheet.
pub(super) fn style() -> String {
    STYLE.path()
}

/// Path of the script.
pub(super) fn script() -> String {
    SCRIPT.path()
}

/// Path of the icon.
pub(super) fn icon() -> String {
    ICON.path()
}

/// Answers with a file.
pub(super) async fn asset(Path(name): Path<String>) -> Response {
    let all = [&STYLE, &SCRIPT, &ICON];
    let Some(found) = all.into_iter().find(|asset| asset.name == name) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let headers = [
        (CONTENT_TYPE, found.media_type),
        (CACHE_CONTROL, "public, max-age=31536000, immutable"),
    ];
    (headers, found.text).into_response()
}
