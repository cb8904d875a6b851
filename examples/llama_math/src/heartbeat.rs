//! Regular lines with the progress of a long piece of work.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Repeats its text until it is dropped.
pub(crate) struct Heartbeat {
    text: Arc<Mutex<String>>,
    /// The thread ends when this sender is dropped.
    _alive: Sender<()>,
}

impl Heartbeat {
    /// Calls `say` with the current text each time `interval` has passed.
    pub(crate) fn start(interval: Duration, say: impl Fn(&str) + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let (alive, ended) = mpsc::channel::<()>();
        let shown = text.clone();
        let beat = move || {
            while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                let text = shown.lock().map(|text| text.clone()).unwrap_or_default();
                say(&text);
            }
        };
        // Without the thread only the lines are missing.
        let _ = std::thread::Builder::new()
            .name("heartbeat".into())
            .spawn(beat);
        Self {
            text,
            _alive: alive,
        }
    }

    /// Sets the text from now on.
    pub(crate) fn set(&self, text: String) {
        if let Ok(mut shown) = self.text.lock() {
            *shown = text;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_text_is_said_until_the_end() {
        let (sender, said) = mpsc::channel();
        let send = move |text: &str| drop(sender.send(text.to_string()));
        let heartbeat = Heartbeat::start(Duration::from_millis(5), send);
        heartbeat.set("step 1 of 9".into());
        let limit = Duration::from_secs(20);
        while said.recv_timeout(limit).unwrap() != "step 1 of 9" {}
        heartbeat.set("step 2 of 9".into());
        while said.recv_timeout(limit).unwrap() != "step 2 of 9" {}
        drop(heartbeat);
        // The thread ends when its sender is dropped.
        while said.recv_timeout(limit).is_ok() {}
        assert_eq!(said.try_recv(), Err(mpsc::TryRecvError::Disconnected));
    }
}
