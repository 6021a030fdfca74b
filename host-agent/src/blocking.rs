//! File I/O away from the runtime's threads.

use std::ops::Deref;

use tokio::runtime::Handle;
use tokio::task::JoinError;

/// Runs `work` on a blocking thread: a file system that is slow or hangs delays no task.
///
/// # Errors
/// `work` panicked, or the runtime ends.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    tokio::task::spawn_blocking(work).await
}

/// A value whose Drop does file I/O: it is dropped on a blocking thread, even if the
/// future that owns it is cancelled.
#[derive(Debug)]
pub struct DropBlocking<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> DropBlocking<T> {
    /// Holds `value`.
    pub const fn new(value: T) -> Self {
        Self(Some(value))
    }

    /// The value, whose owner now decides where it is dropped.
    pub fn into_inner(mut self) -> T {
        self.0.take().expect("only Drop takes the value")
    }
}

impl<T: Send + 'static> Deref for DropBlocking<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("only Drop takes the value")
    }
}

impl<T: Send + 'static> Drop for DropBlocking<T> {
    fn drop(&mut self) {
        let value = self.0.take();
        // Without a runtime the value is dropped here, where no task can be delayed.
        if let (Some(value), Ok(runtime)) = (value, Handle::try_current()) {
            runtime.spawn_blocking(move || drop(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::thread::{self, ThreadId};

    use super::*;

    /// Sends the thread on which it is dropped.
    struct Dropped(Sender<ThreadId>);

    impl Drop for Dropped {
        fn drop(&mut self) {
            let _ = self.0.send(thread::current().id());
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn work_and_drops_are_on_other_threads() {
        let own = thread::current().id();
        let worked = blocking(|| thread::current().id()).await.unwrap();
        assert_ne!(worked, own);
        let (sender, dropped) = channel();
        drop(DropBlocking::new(Dropped(sender)));
        assert_ne!(dropped.recv().unwrap(), own);
        let (sender, dropped) = channel();
        drop(DropBlocking::new(Dropped(sender)).into_inner());
        assert_eq!(dropped.recv().unwrap(), own);
    }
}
