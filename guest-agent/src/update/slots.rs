//! What is installed, and the decision what runs. Pure; kept as JSON.

use serde::{Deserialize, Serialize};
use vmbus::agent_package::Version;
use vmbus::message::{AgentOffer, BadAgent, MAX_BAD};

/// Starts of a version that is not confirmed, over boots. After them it is bad.
pub const MAX_STARTS: u32 = 3;

/// What is installed on this guest's OS disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    /// What runs; the guest agent of the image if absent.
    pub current: Option<Installed>,
    /// A confirmed version to go back to; that of the image if absent.
    pub previous: Option<Installed>,
    /// What failed, the newest last.
    #[serde(default)]
    pub bad: Vec<BadAgent>,
}

/// An installed package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installed {
    /// Its version.
    pub version: Version,
    /// Its SHA-256, which names its directory.
    pub sha256: String,
    /// SHA-256 of its program.
    pub program: String,
    /// It has run well for long enough.
    pub confirmed: bool,
    /// How often it was started before that.
    pub starts: u32,
}

impl Slots {
    /// Whether `offer` is to be taken in a guest whose image has version `image`.
    pub fn wants(&self, offer: &AgentOffer, version: Version, image: Version) -> bool {
        let runs = self.current.as_ref();
        let is_current = runs.is_some_and(|it| it.sha256 == offer.sha256);
        let is_bad = self.bad.iter().any(|it| it.sha256 == offer.sha256);
        let is_newer = version > runs.map_or(image, |it| it.version);
        !is_current && !is_bad && (is_newer || offer.allow_downgrade)
    }

    /// `new` is what runs from now on.
    pub fn install(&mut self, new: Installed) {
        let before = self.current.replace(new);
        // One that did not prove itself is nothing to go back to.
        if let Some(before) = before.filter(|it| it.confirmed) {
            self.previous = Some(before);
        }
        if self.previous.as_ref().map(|it| &it.sha256) == self.current.as_ref().map(|it| &it.sha256)
        {
            self.previous = None;
        }
    }

    /// What runs is started.
    ///
    /// # Errors
    /// It was started too often.
    pub fn starting(&mut self) -> Result<(), String> {
        let Some(current) = self.current.as_mut().filter(|it| !it.confirmed) else {
            return Ok(());
        };
        if current.starts >= MAX_STARTS {
            return Err(format!(
                "did not work for five minutes in {MAX_STARTS} starts"
            ));
        }
        current.starts += 1;
        Ok(())
    }

    /// What runs has run well for long enough.
    pub fn confirm(&mut self) {
        if let Some(current) = &mut self.current {
            current.confirmed = true;
        }
    }

    /// The starts of what runs are no failures.
    pub fn forget_starts(&mut self) {
        if let Some(current) = &mut self.current {
            current.starts = 0;
        }
    }

    /// What runs has failed: it never runs again, and the one before does.
    pub fn fail(&mut self, reason: &str) {
        let Some(failed) = self.current.take() else {
            return;
        };
        self.current = self.previous.take();
        self.bad.push(BadAgent {
            version: failed.version.to_string(),
            sha256: failed.sha256,
            reason: reason.to_owned(),
        });
        let over = self.bad.len().saturating_sub(MAX_BAD);
        self.bad.drain(..over);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        text.parse().unwrap()
    }

    fn installed(text: &str) -> Installed {
        Installed {
            version: version(text),
            sha256: format!("package of {text}"),
            program: format!("program of {text}"),
            confirmed: false,
            starts: 0,
        }
    }

    fn wants(slots: &Slots, text: &str, allow_downgrade: bool) -> bool {
        let offer = AgentOffer {
            version: text.into(),
            sha256: format!("package of {text}"),
            signature: String::new(),
            keys: Vec::new(),
            allow_downgrade,
        };
        slots.wants(&offer, version(text), version("1.0.0"))
    }

    #[test]
    fn only_newer_versions_are_taken_unless_a_downgrade_is_named() {
        let mut slots = Slots::default();
        assert!(!wants(&slots, "1.0.0", false) && !wants(&slots, "0.9.0", false));
        assert!(wants(&slots, "1.0.1", false) && wants(&slots, "0.9.0", true));
        slots.install(installed("2.0.0"));
        assert!(!wants(&slots, "1.9.0", false) && !wants(&slots, "2.0.0", true));
        assert!(wants(&slots, "1.9.0", true) && wants(&slots, "2.0.1", false));
    }

    #[test]
    fn a_version_that_failed_is_never_taken_again() {
        let mut slots = Slots::default();
        slots.install(installed("2.0.0"));
        slots.fail("x");
        assert_eq!(slots.current, None);
        assert!(!wants(&slots, "2.0.0", false) && !wants(&slots, "2.0.0", true));
        assert!(wants(&slots, "2.0.1", false));
    }

    #[test]
    fn the_way_back_leads_to_the_last_confirmed_version() {
        let mut slots = Slots::default();
        let mut good = installed("2.0.0");
        slots.install(good.clone());
        slots.confirm();
        good.confirmed = true;
        slots.install(installed("3.0.0"));
        slots.install(installed("4.0.0"));
        slots.fail("x");
        assert_eq!(slots.current, Some(good));
        slots.fail("y");
        assert_eq!((&slots.current, &slots.previous), (&None, &None));
        let bad: Vec<_> = slots.bad.iter().map(|it| it.version.as_str()).collect();
        assert_eq!(bad, ["4.0.0", "2.0.0"]);
    }

    #[test]
    fn a_version_has_three_starts_to_prove_itself() {
        let mut slots = Slots::default();
        slots.install(installed("2.0.0"));
        for _ in 0..MAX_STARTS {
            slots.starting().unwrap();
        }
        assert!(slots.clone().starting().is_err());
        slots.forget_starts();
        slots.starting().unwrap();
        slots.confirm();
        for _ in 0..10 {
            slots.starting().unwrap();
        }
    }

    #[test]
    fn the_list_of_bad_versions_is_bounded() {
        let mut slots = Slots::default();
        for patch in 0..MAX_BAD + 5 {
            slots.install(installed(&format!("2.0.{patch}")));
            slots.fail("x");
        }
        assert_eq!(slots.bad.len(), MAX_BAD);
        assert_eq!(slots.bad.last().unwrap().version, "2.0.68");
    }
}
