//! Where a replica goes: filter by what it must have, choose by spread and room, explain every refusal.
//! Resources are set aside, not hoped for: what a service names as its limit is taken off the node's total.

use std::collections::BTreeMap;

use crate::id::{NodeId, ServiceName};
use crate::replica::Engine;
use crate::resource::{Cpu, Memory};
use crate::spec::Service;
use crate::state::Placement;
use crate::view::View;
use crate::waiting::NoRoom;

/// What every node still has to give, kept while one plan places several replicas.
#[derive(Debug, Clone)]
pub struct Room<'a> {
    view: View<'a>,
    nodes: BTreeMap<NodeId, Used>,
}

#[derive(Debug, Clone, Default)]
struct Used {
    memory: u64,
    cpu: u64,
    replicas: BTreeMap<ServiceName, u32>,
}

impl<'a> Room<'a> {
    pub fn new(view: View<'a>) -> Room<'a> {
        let mut nodes: BTreeMap<NodeId, Used> = view.state.nodes.keys().map(|node| (*node, Used::default())).collect();
        for placement in view.state.placements.values() {
            if let (Some(used), Some(spec)) = (nodes.get_mut(&placement.node), spec_of(view, placement)) {
                used.take(&placement.service, spec);
            }
        }
        Room { view, nodes }
    }

    /// As if this replica were gone.
    pub fn give_back(&mut self, placement: &Placement) {
        if let (Some(used), Some(spec)) = (self.nodes.get_mut(&placement.node), spec_of(self.view, placement)) {
            used.give_back(&placement.service, spec);
        }
    }

    /// A node for one more replica of this service, and what it needs is set aside there.
    pub fn place(&mut self, name: &ServiceName, spec: &Service) -> Result<NodeId, BTreeMap<NodeId, NoRoom>> {
        let mut refused = BTreeMap::new();
        let mut best: Option<(NodeId, (bool, u32, u64))> = None;
        for (node, used) in &self.nodes {
            if let Some(reason) = self.refusal(*node, used, name, spec) {
                refused.insert(*node, reason);
                continue;
            }
            let lacks_engine = !spec.is_module()
                && !self
                    .view
                    .inventory
                    .observed(*node)
                    .is_some_and(|seen| matches!(seen.facts.containers, Engine::Ready { .. }));
            let rank = (lacks_engine, used.replicas.get(name).copied().unwrap_or(0), used.memory);
            if best.as_ref().is_none_or(|(_, least)| rank < *least) {
                best = Some((*node, rank));
            }
        }
        let Some((node, _)) = best else {
            return Err(refused);
        };
        if let Some(used) = self.nodes.get_mut(&node) {
            used.take(name, spec);
        }
        Ok(node)
    }

    fn refusal(&self, id: NodeId, used: &Used, name: &ServiceName, spec: &Service) -> Option<NoRoom> {
        let node = self.view.state.nodes.get(&id)?;
        if node.dead || self.view.inventory.is_suspect(id, self.view.now) {
            return Some(NoRoom::NotHeard);
        }
        let Some(seen) = self.view.inventory.observed(id) else {
            return Some(NoRoom::NotHeard);
        };
        if let Some(pin) = &spec.placement.node
            && *pin != node.name
        {
            return Some(NoRoom::Pinned { to: pin.clone() });
        }
        // What is in its volumes is on one node and nowhere else.
        let home = self.view.state.services.get(name).and_then(|deployed| deployed.home);
        if let Some(home) = home.filter(|home| spec.keeps_data() && *home != id) {
            return Some(NoRoom::VolumeElsewhere { on: self.view.state.node_name(home) });
        }
        for (key, wanted) in &spec.placement.labels {
            let has = seen.facts.labels.get(key);
            if has != Some(wanted) {
                return Some(NoRoom::Label { key: key.clone(), wanted: wanted.clone(), has: has.cloned() });
            }
        }
        if let Some(wanted) = spec.resources.memory {
            let (free, total) = (Memory(seen.facts.memory.0.saturating_sub(used.memory)), seen.facts.memory);
            if wanted > free {
                return Some(NoRoom::Memory { wanted, free, total });
            }
        }
        if let Some(wanted) = spec.resources.cpu {
            let total = seen.facts.cpu;
            let free = Cpu(u32::try_from(u64::from(total.0).saturating_sub(used.cpu)).unwrap_or(0));
            if wanted > free {
                return Some(NoRoom::Cpu { wanted, free, total });
            }
        }
        None
    }
}

impl Used {
    fn take(&mut self, name: &ServiceName, spec: &Service) {
        self.memory += spec.resources.memory.map_or(0, |memory| memory.0);
        self.cpu += spec.resources.cpu.map_or(0, |cpu| u64::from(cpu.0));
        *self.replicas.entry(name.clone()).or_default() += 1;
    }

    fn give_back(&mut self, name: &ServiceName, spec: &Service) {
        self.memory -= spec.resources.memory.map_or(0, |memory| memory.0);
        self.cpu -= spec.resources.cpu.map_or(0, |cpu| u64::from(cpu.0));
        if let Some(count) = self.replicas.get_mut(name) {
            *count -= 1;
        }
    }
}

fn spec_of<'a>(view: View<'a>, placement: &Placement) -> Option<&'a Service> {
    let deployed = view.state.services.get(&placement.service)?;
    deployed.revisions.get(&placement.revision).map(|record| &record.spec)
}
