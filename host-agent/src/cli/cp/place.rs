//! A path on this machine, or in a guest.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On this machine.
    Here(PathBuf),
    /// In a guest.
    Guest {
        /// Instance, or DEPLOYMENT/INSTANCE.
        instance: String,
        /// Relative to `/`.
        path: String,
    },
}

impl FromStr for Place {
    type Err = Infallible;

    /// `INSTANCE:PATH` is in a guest; what begins with `/` or `.` is here.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.split_once(':') {
            Some((instance, path))
                if !instance.is_empty() && !path.is_empty() && !text.starts_with(['/', '.']) =>
            {
                Self::Guest {
                    instance: instance.to_owned(),
                    path: if path.starts_with('/') {
                        path.to_owned()
                    } else {
                        format!("/{path}")
                    },
                }
            }
            _ => Self::Here(text.into()),
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here(path) => write!(f, "{}", path.display()),
            Self::Guest { instance, path } => write!(f, "{instance}:{path}"),
        }
    }
}

/// A path of a guest as directory and last name, which is empty of `/`.
pub fn split(path: &str) -> (&str, &str) {
    let path = path.trim_end_matches('/');
    match path.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((parent, name)) => (parent, name),
        None => ("/", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_before_a_colon_is_an_instance_unless_it_is_a_path() {
        let parse = |text: &str| text.parse::<Place>().unwrap();
        for (text, shown) in [
            ("A_IN_0:/etc/x:y", "A_IN_0:/etc/x:y"),
            ("12ab/A_IN_0:etc", "12ab/A_IN_0:/etc"),
        ] {
            assert!(matches!(parse(text), Place::Guest { .. }), "{text}");
            assert_eq!(parse(text).to_string(), shown);
        }
        for here in ["a", "./a:b", "/a:b", "../a:b", ":b", "A_IN_0:", "."] {
            assert_eq!(parse(here), Place::Here(here.into()));
        }
    }

    #[test]
    fn a_path_is_split_before_its_last_name() {
        for (path, parts) in [
            ("/etc/hosts", ("/etc", "hosts")),
            ("/etc/", ("/", "etc")),
            ("/", ("/", "")),
            ("/a/b/.", ("/a/b", ".")),
        ] {
            assert_eq!(split(path), parts, "{path}");
        }
    }
}
