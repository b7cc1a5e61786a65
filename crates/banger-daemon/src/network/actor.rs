//! The actor: brings the namespace and the host to what the plans of all live VMs say. What a single guest has of them
//! is in `guests`.

use super::namespace::{self, Namespace};
use super::plan::{self, Part, Plans, PortPlan};
use super::repair::{Measured, Mend, Repaired};
use super::{Ask, NetworkError, NetworkSetup, Now, PortProblem, host_watch, way_out};
use banger_api::daemon::Mode;
use banger_api::network::WayOut;
use banger_core::publish::Protocol;
use banger_host::error_chain;
use banger_host::host_side::Keeping;
use banger_host::net::addresses;
use banger_host::net::keeper::{Keeper, KeeperError};
use banger_host::op::{
    HostAnswer, HostOp, NamespaceAnswer, NamespaceOp, OwnedKind, OwnedObject, ResolvedReport,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc;

/// What is said where the host's own programs find the names.
pub(crate) const ROUTED: &str = "systemd-resolved asks the instance's server";

pub(super) struct Actor {
    setup: NetworkSetup,
    /// Its own inbox, for threads that hear of changes on the host.
    inbox: mpsc::WeakSender<Ask>,
    /// Those threads run.
    watching: bool,
    /// One of them lives as long as this.
    keeping: Option<Keeping>,
    host_addresses: BTreeSet<Ipv4Addr>,
    namespace: Option<Namespace>,
    plans: Plans,
    /// The plans are those of all VMs that live: none is still to be found.
    settled: bool,
    way_out: WayOut,
    /// The namespace has another keeper than before: everything is to be measured anew.
    rejoined: bool,
    /// The name server has its sockets in the namespace.
    named: bool,
    /// The host's resolver is to be told of the name server.
    tell_resolver: bool,
    /// What it said.
    host_names: Option<String>,
    /// Ports that could not be opened.
    problems: BTreeMap<(Protocol, SocketAddr), PortProblem>,
}

impl Actor {
    pub(super) fn new(setup: NetworkSetup, inbox: mpsc::WeakSender<Ask>) -> Self {
        Self {
            setup,
            inbox,
            watching: false,
            keeping: None,
            host_addresses: BTreeSet::new(),
            namespace: None,
            plans: Plans::new(),
            settled: false,
            way_out: WayOut::Closed,
            rejoined: false,
            named: false,
            tell_resolver: false,
            host_names: None,
            problems: BTreeMap::new(),
        }
    }

    pub(super) fn handle(&mut self, ask: Ask) {
        // A caller that went away no longer wants the answer.
        match ask {
            Ask::Lease(plan, reply) => drop(reply.send(self.lease(plan))),
            Ask::Apply(plan, named, reply) => drop(reply.send(self.apply(plan, Some(&named)))),
            Ask::TakeOver(plan, shim, reply) => drop(reply.send(self.take_over(plan, shim))),
            Ask::Release(tap, reply) => drop(reply.send(self.release(&tap))),
            Ask::Now(reply) => drop(reply.send(self.now())),
            Ask::Settle(reply) => drop(reply.send(self.settle())),
            Ask::Repair(reply) => drop(reply.send(self.repair())),
            Ask::Sweep(reply) => drop(reply.send(self.sweep())),
            Ask::Keeper(reply) => {
                let keeper = self.ensure().map(|namespace| Arc::clone(&namespace.keeper));
                drop(reply.send(keeper));
            }
            Ask::KeeperEnded => self.keeper_ended(),
            Ask::HostAddresses(addresses) => {
                self.know_host(addresses);
                if let Some(namespace) = &self.namespace
                    && let Err(error) = namespace.close_host(&self.host_addresses)
                {
                    tracing::warn!(
                        error = error_chain(&error),
                        "new addresses of the host are open to guests"
                    );
                }
            }
            Ask::Close(reply) => drop(reply.send(self.close())),
        }
        if std::mem::take(&mut self.rejoined) {
            match self.repair() {
                Ok(repaired) => {
                    tracing::warn!("the network has a keeper again, and is as it was");
                    for (vm, left) in repaired.left {
                        tracing::warn!(?vm, error = left.message, causes = ?left.causes, "but for this");
                    }
                }
                Err(error) => tracing::error!(
                    error = error_chain(&error),
                    "the network has lost its keeper and is not as it was"
                ),
            }
        }
        // Only now: nobody's start waits for it.
        if std::mem::take(&mut self.tell_resolver) {
            self.host_names = Some(self.resolver());
        }
    }

    /// Tells the host's resolver who knows names below `.vm`. Answers what came of it.
    fn resolver(&self) -> String {
        let Some(host) = &self.setup.host else {
            return "without root the host's resolver is not told".to_owned();
        };
        let ensure = HostOp::EnsureResolved {
            instance: self.setup.instance,
            pool: self.setup.pool,
            dns: self.setup.pool.gateway(),
        };
        match host.perform(&ensure, &[]) {
            Ok((HostAnswer::Resolved(report), _)) => match report {
                ResolvedReport::Routed => ROUTED,
                ResolvedReport::NotRunning => {
                    "systemd-resolved does not run here: ask the server by its address"
                }
                ResolvedReport::NoBusctl => {
                    "`busctl` is not installed, which tells systemd-resolved: `sudo apt-get install systemd`"
                }
            }
            .to_owned(),
            Ok(_) => "the host side answered something else".to_owned(),
            Err(error) => error_chain(&error),
        }
    }

    /// Finds a namespace that an earlier daemon left to its VMs, if there is one.
    fn adopt(&mut self) -> Result<(), NetworkError> {
        if self.namespace.is_some() {
            return Ok(());
        }
        match Keeper::connect(&self.setup.keeper_socket) {
            Ok(keeper) => {
                let namespace = Namespace::open(keeper)?;
                self.hold(namespace);
                Ok(())
            }
            Err(KeeperError::Unreachable { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Finds the namespace of a VM that an earlier daemon left, through its keeper, or else through its shim.
    fn find(&mut self, shim: i32, plan: &PortPlan) -> Result<(), NetworkError> {
        self.adopt()?;
        if self.namespace.is_none() {
            let file = |kind| PathBuf::from(format!("/proc/{shim}/ns/{kind}"));
            let namespace = namespace::join(&self.setup, &file("net"), &file("user"))?;
            self.hold(namespace);
        }
        // Another keeper knows of no port, and somebody may have deleted it.
        let namespace = self.prepare()?;
        namespace
            .keeper
            .request(NamespaceOp::EnsurePort(plan.port()))?;
        Ok(())
    }

    /// The namespace, made if need be.
    fn ensure(&mut self) -> Result<&mut Namespace, NetworkError> {
        let lost = self.namespace.take_if(|namespace| !namespace.lives());
        if let Some(lost) = lost {
            // VMs may live in it.
            let namespace = lost.rejoin(&self.setup)?;
            self.rejoined = true;
            return Ok(self.hold(namespace));
        }
        self.adopt()?;
        match self.namespace.take() {
            Some(namespace) => Ok(self.namespace.insert(namespace)),
            None => {
                let made = namespace::make(
                    &self.setup.keeper_program,
                    &self.setup.keeper_socket,
                    self.setup.mode != Mode::Root,
                );
                match made {
                    Ok(namespace) => {
                        self.named = false;
                        Ok(self.hold(namespace))
                    }
                    // One that a daemon had begun before it was killed may have come first.
                    Err(error) => {
                        self.adopt()?;
                        self.namespace.as_mut().ok_or(error)
                    }
                }
            }
        }
    }

    /// Keeps a namespace, and hears of its keeper's end.
    fn hold(&mut self, namespace: Namespace) -> &mut Namespace {
        if let Ok((NamespaceAnswer::Hello { pid, .. }, _)) =
            namespace.keeper.request(NamespaceOp::Hello)
        {
            host_watch::follow_keeper(pid, self.inbox.clone());
        }
        self.namespace.insert(namespace)
    }

    fn keeper_ended(&mut self) {
        if self.plans.is_empty() {
            // Nobody lives in it; the next VM gets another.
            self.namespace.take_if(|namespace| !namespace.lives());
            return;
        }
        tracing::warn!("the keeper of the network namespace is gone");
        if let Err(error) = self.ensure() {
            tracing::error!(
                error = error_chain(&error),
                "the network gets no other keeper"
            );
        }
    }

    /// The namespace with all that VMs share in it, and its end on the host.
    fn prepare(&mut self) -> Result<&mut Namespace, NetworkError> {
        self.ensure()?;
        self.watch_host();
        let Self {
            namespace: Some(namespace),
            setup,
            tell_resolver,
            named,
            host_addresses,
            ..
        } = self
        else {
            return Err(NetworkError::Closed);
        };
        if namespace.prepared {
            return Ok(namespace);
        }
        let pool = setup.pool;
        namespace.keeper.request(NamespaceOp::EnsureBase { pool })?;
        // A keeper that found the ruleset of another one has loaded its own, in which nobody has anything yet.
        namespace.look()?;
        if let Some(host) = &setup.host {
            let instance = setup.instance;
            let attach = HostOp::AttachVeth { instance, pool };
            host.perform(&attach, &[namespace.network.as_fd()])?;
            namespace
                .keeper
                .request(NamespaceOp::EnsureUplink { pool })?;
        }
        namespace.close_host(host_addresses)?;
        namespace.prepared = true;
        if *named {
            return Ok(namespace);
        }
        match namespace.keeper.request(NamespaceOp::DnsSockets) {
            Ok((_, sockets)) => {
                *named = true;
                // Four sockets: the host reaches two of them.
                *tell_resolver = sockets.len() > 2;
                // The server takes the newest; a full queue means that it has newer ones already.
                let _ = setup.names.try_send(sockets);
            }
            Err(error) => tracing::warn!(error = error_chain(&error), "guests have no name server"),
        }
        Ok(namespace)
    }

    /// From the first port on, hears of changes on the host.
    fn watch_host(&mut self) {
        if std::mem::replace(&mut self.watching, true) {
            return;
        }
        match addresses::own_addresses() {
            Ok(addresses) => self.know_host(addresses),
            Err(error) => tracing::warn!(
                error = error_chain(&error),
                "the host's addresses are not known"
            ),
        }
        host_watch::follow_addresses(self.inbox.clone());
        self.keeping = self.setup.host.as_deref().and_then(host_watch::keep);
    }

    fn know_host(&mut self, addresses: BTreeSet<Ipv4Addr>) {
        self.setup.zone.set_host_addresses(addresses.clone());
        self.host_addresses = addresses;
    }

    fn now(&mut self) -> Result<Now, NetworkError> {
        self.adopt()?;
        self.look_at_way_out();
        // It may have been started, or installed, since.
        if self
            .host_names
            .as_deref()
            .is_some_and(|said| said != ROUTED)
        {
            self.host_names = Some(self.resolver());
        }
        let mut now = Now {
            way_out: Some(self.way_out.clone()),
            host_names: self.host_names.clone(),
            problems: self.problems.values().cloned().collect(),
            ..Now::default()
        };
        if let Some(host) = &self.setup.host
            && let (HostAnswer::Owned { objects }, _) = host.perform(&HostOp::ListOwned {}, &[])?
        {
            now.owned = objects;
        }
        let Some(namespace) = &mut self.namespace else {
            return Ok(now);
        };
        if let (NamespaceAnswer::Hello { pid, .. }, _) =
            namespace.keeper.request(NamespaceOp::Hello)?
        {
            now.keeper = Some(pid);
        }
        namespace.look()?;
        now.ports = namespace.ports()?;
        now.nat = namespace.nat.iter().copied().collect();
        now.private = namespace.private.iter().copied().collect();
        now.published = namespace.publications()?;
        if let Some(NamespaceAnswer::Counters { dropped, repairs }) =
            namespace.known(NamespaceOp::Counters)?
        {
            now.dropped = dropped;
            now.repairs = repairs;
        }
        Ok(now)
    }

    fn settle(&mut self) -> Result<(), NetworkError> {
        self.settled = true;
        self.adopt()?;
        // What this daemon has prepared is for the next VM, also if one that lived has ended by now.
        let unused = self.plans.is_empty()
            && match &self.namespace {
                Some(namespace) => !namespace.prepared && namespace.ports()?.is_empty(),
                None => true,
            };
        if unused {
            self.detach_host()?;
        } else if !self.plans.values().any(|plan| plan.nat) {
            // With somebody who needs it, it may be open though it could not be looked at.
            way_out::close(&self.setup)?;
        }
        match &mut self.namespace {
            Some(namespace) => namespace.set_joins(plan::joins(&self.plans)),
            None => Ok(()),
        }
    }

    /// Does everything again, whatever is thought to be there. What cannot be done keeps nothing else from being done.
    fn repair(&mut self) -> Result<Repaired, NetworkError> {
        self.adopt()?;
        let mut repaired = Repaired::default();
        if self.plans.is_empty() {
            return Ok(repaired);
        }
        let lives = match &self.namespace {
            Some(namespace) if namespace.lives() => true,
            Some(_) => {
                let done = "started another keeper of the network namespace";
                repaired.done.push(Mend::shared(done));
                false
            }
            None => {
                let done = "made the network namespace";
                repaired.done.push(Mend::shared(done));
                false
            }
        };
        let before = self.measure(lives)?;
        if let Some(namespace) = &mut self.namespace {
            namespace.prepared = false;
        }
        self.prepare()?.look()?;
        // What another keeper lacks is made now.
        self.rejoined = false;
        self.way_out = WayOut::Closed;
        let plans: Vec<PortPlan> = self.plans.values().cloned().collect();
        // All ports first: joins are between two of them.
        for plan in &plans {
            if let Some(namespace) = &self.namespace
                && let Err(error) = namespace
                    .keeper
                    .request(NamespaceOp::EnsurePort(plan.port()))
            {
                repaired.leave(Some(plan.vm), &error.into());
            }
        }
        // The way out is everybody's, and may take long to fail.
        let mut way_out = Ok(());
        if plans.iter().any(|plan| plan.nat) {
            way_out = self.open_way_out();
        }
        if let Err(error) = &way_out {
            repaired.leave(None, error);
        }
        for plan in plans {
            let nat = match way_out {
                Err(_) if plan.nat => Ok(()),
                _ => self.let_out(&plan),
            };
            for (part, problem) in self.open_after_nat(&plan, nat) {
                // Joins are set for all at once.
                let vm = (part != Part::Joins).then_some(plan.vm);
                repaired.leave(vm, &problem);
            }
        }
        let after = self.measure(true)?;
        repaired
            .done
            .extend(before.changes(&after, &self.plans, self.setup.mode));
        if let WayOut::Open { closed_by, .. } = &self.way_out {
            for closed in closed_by {
                repaired.leave_closed(closed);
            }
        }
        Ok(repaired)
    }

    /// What is there now; of the namespace only if its keeper lives.
    fn measure(&mut self, lives: bool) -> Result<Measured, NetworkError> {
        let mut measured = Measured::default();
        if let Some(host) = &self.setup.host
            && let (HostAnswer::Owned { objects }, _) = host.perform(&HostOp::ListOwned {}, &[])?
        {
            let own = |object: &OwnedObject| {
                object.instance == self.setup.instance && object.kind != OwnedKind::Snapshot
            };
            measured.owned = objects.into_iter().filter(own).collect();
        }
        let Some(namespace) = self.namespace.as_mut().filter(|_| lives) else {
            return Ok(measured);
        };
        namespace.look()?;
        measured.links = namespace.links()?;
        let ports = namespace.ports()?.into_iter();
        measured.ports = ports
            .filter(|port| port.link && port.allowed.is_some())
            .map(|port| port.tap)
            .collect();
        measured.nat = namespace.nat.clone();
        measured.private = namespace.private.clone();
        measured.joins = namespace.joins.clone();
        measured.published = namespace.published.values().cloned().collect();
        Ok(measured)
    }

    /// Nobody lives, and nothing is there to live in: then nothing on the host is of use.
    fn sweep(&mut self) -> Result<(), NetworkError> {
        self.adopt()?;
        if self.namespace.is_none() && self.plans.is_empty() {
            self.detach_host()?;
        }
        Ok(())
    }

    /// Nothing of the instance is left on the host's side.
    fn detach_host(&self) -> Result<(), NetworkError> {
        if let Some(host) = &self.setup.host {
            let instance = self.setup.instance;
            host.perform(&HostOp::DetachVeth { instance }, &[])?;
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), NetworkError> {
        let Some(namespace) = self.namespace.take() else {
            return self.sweep();
        };
        let unused = matches!(namespace.ports(), Ok(ports) if ports.is_empty());
        if unused {
            self.detach_host()?;
        }
        if unused {
            namespace::let_go(namespace);
        }
        Ok(())
    }
}

mod guests;
#[cfg(test)]
mod tests;
