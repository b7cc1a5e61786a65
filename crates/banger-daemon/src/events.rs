//! The event hub: every change gets a sequence number; the latest are kept for clients that come back.

use banger_api::event::{Cursor, Event, EventKind};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::broadcast;

/// How many events are kept, and how far a reader may lag.
const KEPT: usize = 1024;

/// Numbers events and hands them out.
#[derive(Debug)]
pub(crate) struct Hub {
    epoch: u64,
    state: Mutex<State>,
    /// The very events that are kept: one names a whole VM, and all readers share it.
    sender: broadcast::Sender<Arc<Event>>,
}

#[derive(Debug, Default)]
struct State {
    sequence: u64,
    kept: VecDeque<Arc<Event>>,
}

impl Hub {
    /// A hub whose epoch is `epoch`: another one at each start of the daemon.
    pub(crate) fn new(epoch: u64) -> Self {
        Self {
            epoch,
            state: Mutex::default(),
            sender: broadcast::Sender::new(KEPT),
        }
    }

    /// Publishes `kind`.
    pub(crate) fn publish(&self, kind: EventKind) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.sequence += 1;
        let event = Arc::new(Event {
            cursor: Cursor {
                epoch: self.epoch,
                sequence: state.sequence,
            },
            kind,
        });
        if state.kept.len() == KEPT {
            state.kept.pop_front();
        }
        state.kept.push_back(Arc::clone(&event));
        // Nobody may be listening.
        let _ = self.sender.send(event);
    }

    /// Events after `after`: first a hello, then those kept, then the receiver of what comes.
    pub(crate) fn follow(
        &self,
        after: Option<&Cursor>,
    ) -> (Vec<Arc<Event>>, broadcast::Receiver<Arc<Event>>) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let receiver = self.sender.subscribe();
        let oldest = state
            .kept
            .front()
            .map_or(state.sequence + 1, |event| event.cursor.sequence);
        let from = match after {
            Some(cursor) if cursor.epoch == self.epoch && cursor.sequence + 1 >= oldest => {
                Some(cursor.sequence)
            }
            Some(_) => None,
            None => Some(state.sequence),
        };
        let at = from.unwrap_or(state.sequence);
        let hello = Arc::new(Event {
            cursor: Cursor {
                epoch: self.epoch,
                sequence: at,
            },
            kind: EventKind::Hello {
                missed: from.is_none(),
            },
        });
        let kept = state
            .kept
            .iter()
            .filter(|event| event.cursor.sequence > at)
            .cloned();
        (std::iter::once(hello).chain(kept).collect(), receiver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences(events: &[Arc<Event>]) -> Vec<u64> {
        events.iter().map(|event| event.cursor.sequence).collect()
    }

    #[test]
    fn a_client_resumes_where_it_left_off() {
        let hub = Hub::new(7);
        for _ in 0..5 {
            hub.publish(EventKind::ImagesChanged);
        }
        let (events, _) = hub.follow(Some(&Cursor {
            epoch: 7,
            sequence: 3,
        }));
        assert_eq!(sequences(&events), [3, 4, 5]);
        assert_eq!(events[0].kind, EventKind::Hello { missed: false });
    }

    #[test]
    fn a_client_of_another_epoch_or_from_too_long_ago_is_told_to_list_again() {
        let hub = Hub::new(7);
        for _ in 0..KEPT + 10 {
            hub.publish(EventKind::ImagesChanged);
        }
        for cursor in [
            Cursor {
                epoch: 6,
                sequence: 3,
            },
            Cursor {
                epoch: 7,
                sequence: 3,
            },
        ] {
            let (events, _) = hub.follow(Some(&cursor));
            assert_eq!(
                events[0].kind,
                EventKind::Hello { missed: true },
                "{cursor}"
            );
            assert_eq!(events.len(), 1);
        }
    }

    #[test]
    fn a_new_client_sees_only_what_comes() {
        let hub = Hub::new(7);
        hub.publish(EventKind::ImagesChanged);
        let (events, mut receiver) = hub.follow(None);
        assert_eq!(sequences(&events), [1]);
        hub.publish(EventKind::ImagesChanged);
        assert_eq!(receiver.try_recv().unwrap().cursor.sequence, 2);
    }
}
