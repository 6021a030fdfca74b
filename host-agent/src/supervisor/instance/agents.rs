//! What a guest says of its guest agent becomes status and events.

use super::super::event::EventKind;
use super::Instance;
use crate::channels::AgentEvent;

impl Instance {
    pub(super) fn agent(&mut self, event: AgentEvent) {
        match event {
            AgentEvent::Runs(running) => {
                self.status.send_if_modified(|status| {
                    let changed = status.agent.as_ref() != Some(&running);
                    status.agent = Some(running);
                    changed
                });
            }
            AgentEvent::Update(update) => {
                let kind = EventKind::AgentUpdate {
                    version: update.version,
                    package: update.sha256,
                    step: update.step,
                    detail: update.detail,
                };
                self.report_limited(kind);
            }
        }
    }
}
