//! An instance that is made before its request comes: making one is half of what a quick module's request costs.
//!
//! Whoever has cleared away the instance before makes the next, when the response is on its way. There is one for each
//! replica at most, and only of modules that are quick ([`pace`](super::pace)); it serves one request, like any other
//! instance. What cannot be made in one turn is not made, and what goes wrong is told to nobody: the next request makes
//! its own, and has the error.

use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use wasmtime::Store;
use wasmtime_wasi_http::p2::bindings::Proxy;

use super::guest::{Deadline, Guest};
use super::replica::{Replica, Turn, take_turn};

/// A replica's place for one.
#[derive(Default)]
pub(super) struct Spare(Mutex<Option<Ready>>);

pub(super) struct Ready {
    pub(super) store: Store<Guest>,
    pub(super) instance: Proxy,
    pub(super) deadline: Deadline,
    /// One of those there may be on this node.
    _place: OwnedSemaphorePermit,
}

impl Spare {
    /// What is there, for a request that may take so long from now.
    pub(super) fn take(&self, timeout: Duration) -> Option<Ready> {
        let mut ready = self.0.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        ready.deadline.begin(timeout);
        Guest::begin(&mut ready.store);
        Some(ready)
    }

    pub(super) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    pub(super) fn is_there(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

impl Replica {
    pub(super) fn make_spare(&self) {
        if !self.pace.is_quick() || self.is_stopping() || self.spare.is_there() {
            return;
        }
        let (Some(handler), Some(place)) = (self.component.handler(), self.engine.place_for_spare()) else { return };
        // While it counts as running, the ticker ends a turn that is too long.
        let _running = self.engine.running();
        let deadline = Deadline::after(self.limits.timeout);
        let mut store = self.store(deadline.clone());
        let made = take_turn(pin!(handler.instantiate_async(&mut store)), self.engine.runtime());
        match made {
            Turn::Last(Ok(instance)) => {
                let ready = Ready { store, instance, deadline, _place: place };
                *self.spare.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(ready);
            }
            Turn::Last(Err(_)) | Turn::Unfinished | Turn::Panicked => {}
        }
    }
}
