//! What the templates show. askama escapes every text.

use askama::Template;

use super::plot::Plot;

/// Around every page.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) title: String,
    pub(super) style: String,
    pub(super) script: String,
    pub(super) icon: String,
    /// Path of the events that change the page; empty if none does.
    pub(super) stream: String,
    /// Secret that a form sends back; empty without a session.
    pub(super) csrf: String,
    pub(super) version: &'static str,
}

/// How a state is to be seen. It is never shown by colour alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mood {
    Good,
    Busy,
    Bad,
    Off,
}

impl Mood {
    /// Its class in the style sheet.
    pub(super) const fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Busy => "busy",
            Self::Bad => "bad",
            Self::Off => "off",
        }
    }

    /// A sign beside the colour.
    pub(super) const fn sign(self) -> &'static str {
        match self {
            Self::Good => "●",
            Self::Busy => "◐",
            Self::Bad => "▲",
            Self::Off => "○",
        }
    }
}

#[derive(Debug)]
pub(super) struct EndpointRow {
    pub(super) name: String,
    pub(super) address: String,
    pub(super) local_port: u16,
}

#[derive(Debug)]
pub(super) struct InstanceRow {
    pub(super) service: String,
    pub(super) name: String,
    pub(super) state: &'static str,
    pub(super) mood: Mood,
    pub(super) paused: bool,
    pub(super) no_space: Option<String>,
    pub(super) generation: u64,
    pub(super) recycles: u32,
    /// Age of the last heartbeat.
    pub(super) heartbeat: String,
    pub(super) exits: Vec<(String, u64)>,
    pub(super) endpoints: Vec<EndpointRow>,
}

#[derive(Debug)]
pub(super) struct OperationRow {
    pub(super) kind: String,
    pub(super) state: String,
    pub(super) mood: Mood,
    pub(super) generation: u64,
    pub(super) started: String,
    pub(super) took: String,
    pub(super) user: u32,
    pub(super) error: String,
}

#[derive(Debug)]
pub(super) struct ServiceRow {
    pub(super) name: String,
    /// What is wanted.
    pub(super) wanted: String,
    /// What is there.
    pub(super) summary: String,
    pub(super) mood: Mood,
    pub(super) generation: u64,
    pub(super) deployment: Option<String>,
    pub(super) operation: Option<OperationRow>,
}

#[derive(Debug)]
pub(super) struct RevisionRow {
    pub(super) generation: u64,
    pub(super) package: String,
    pub(super) at: String,
    pub(super) user: u32,
}

#[derive(Debug)]
pub(super) struct EventRow {
    pub(super) at: String,
    /// Service and instance.
    pub(super) about: String,
    pub(super) text: String,
}

/// An action that a dialog confirms.
#[derive(Debug)]
pub(super) struct ActionRow {
    pub(super) id: &'static str,
    pub(super) label: &'static str,
    pub(super) question: String,
    pub(super) path: String,
}

/// States over time.
#[derive(Debug)]
pub(super) struct Strip {
    pub(super) width: u32,
    pub(super) label: String,
    pub(super) since: String,
    pub(super) parts: Vec<StripPart>,
}

#[derive(Debug)]
pub(super) struct StripPart {
    pub(super) mood: Mood,
    pub(super) x: String,
    pub(super) width: String,
    pub(super) title: String,
}

/// The link to a log.
#[derive(Debug)]
pub(super) struct LogTab {
    pub(super) name: &'static str,
    pub(super) chosen: bool,
}

#[derive(Debug, Template)]
#[template(path = "overview.html")]
pub(super) struct Overview {
    pub(super) frame: Frame,
    pub(super) services: Vec<ServiceRow>,
    pub(super) instances: Vec<InstanceRow>,
    /// Of this process.
    pub(super) plots: Vec<Plot>,
    pub(super) events: Vec<EventRow>,
}

#[derive(Debug, Template)]
#[template(path = "service.html")]
pub(super) struct ServicePage {
    pub(super) frame: Frame,
    pub(super) service: ServiceRow,
    pub(super) actions: Vec<ActionRow>,
    pub(super) instances: Vec<InstanceRow>,
    pub(super) operations: Vec<OperationRow>,
    pub(super) revisions: Vec<RevisionRow>,
    pub(super) events: Vec<EventRow>,
}

#[derive(Debug, Template)]
#[template(path = "instance.html")]
pub(super) struct InstancePage {
    pub(super) frame: Frame,
    pub(super) instance: InstanceRow,
    pub(super) strip: Strip,
    pub(super) actions: Vec<ActionRow>,
    pub(super) plots: Vec<Plot>,
    pub(super) logs: Vec<LogTab>,
    pub(super) log_path: String,
    pub(super) events: Vec<EventRow>,
}

#[derive(Debug, Template)]
#[template(path = "events.html")]
pub(super) struct EventsPage {
    pub(super) frame: Frame,
    pub(super) events: Vec<EventRow>,
}

/// A page that says one thing.
#[derive(Debug, Template)]
#[template(path = "message.html")]
pub(super) struct Message {
    pub(super) frame: Frame,
    pub(super) text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_guests_and_packages_are_never_markup() {
        let evil = "</pre><script>alert(1)</script><a href=\"x\" onclick='y'>&";
        let text = || evil.to_owned();
        let page = InstancePage {
            frame: Frame {
                title: text(),
                style: text(),
                script: text(),
                icon: text(),
                stream: text(),
                csrf: text(),
                version: "1",
            },
            instance: InstanceRow {
                service: text(),
                name: text(),
                state: "Ready",
                mood: Mood::Good,
                paused: true,
                no_space: Some(text()),
                generation: 1,
                recycles: 2,
                heartbeat: text(),
                exits: vec![(text(), 1)],
                endpoints: vec![EndpointRow {
                    name: text(),
                    address: text(),
                    local_port: 1,
                }],
            },
            strip: Strip {
                width: 1,
                label: text(),
                since: text(),
                parts: vec![StripPart {
                    mood: Mood::Bad,
                    x: text(),
                    width: text(),
                    title: text(),
                }],
            },
            actions: vec![ActionRow {
                id: "a",
                label: "b",
                question: text(),
                path: text(),
            }],
            plots: Vec::new(),
            logs: Vec::new(),
            log_path: text(),
            events: vec![EventRow {
                at: text(),
                about: text(),
                text: text(),
            }],
        };
        let html = page.render().unwrap();
        for markup in ["<script>", "</pre><", "<a href=\"x\"", "onclick='"] {
            assert!(!html.contains(markup), "{markup} in {html}");
        }
        // Nothing but the page's own files, and nothing inline.
        assert_eq!(html.matches("<script").count(), 1);
        assert!(!html.contains("style=") && !html.contains("javascript:"));
    }
}
