//! The modules that run on this node, as the proxy finds them.

use std::collections::HashMap;
use std::fmt;
use std::sync::{PoisonError, RwLock};

use http::Request;
use orca_cluster::id::ReplicaId;
use orca_dataplane::{Body, ModuleError, Modules, Offered, WhenBusy};

use super::Module;

/// The modules that run on this node, for the proxy.
#[derive(Default)]
pub struct Replicas(RwLock<HashMap<ReplicaId, Module>>);

impl Replicas {
    pub fn insert(&self, module: Module) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(module.replica(), module);
    }

    pub fn remove(&self, replica: ReplicaId) -> Option<Module> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&replica)
    }

    pub fn get(&self, replica: ReplicaId) -> Option<Module> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&replica).cloned()
    }
}

impl Modules for Replicas {
    fn call(&self, replica: ReplicaId, request: Request<Body>, when_busy: WhenBusy) -> Offered {
        let Some(module) = self.get(replica) else { return Err(Box::new(request)) };
        let place = module.place();
        if place.is_none() && when_busy == WhenBusy::GiveBack {
            return Err(Box::new(request));
        }
        Ok(Box::pin(async move { module.call(request, place).await.map_err(|error| ModuleError::from(&error)) }))
    }
}

impl fmt::Debug for Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.read().unwrap_or_else(PoisonError::into_inner).keys()).finish()
    }
}
