//! What guests have: their ports, the way out, joins, and published ports.

use super::Actor;
use crate::network::plan::{self, Part, PortPlan};
use crate::network::{Lease, NetworkError, PortProblem, network_error, way_out};
use banger_api::network::WayOut;
use banger_host::error_chain;
use banger_host::net::keeper::KeeperError;
use banger_host::op::NamespaceOp;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

impl Actor {
    pub(super) fn lease(&mut self, plan: PortPlan) -> Result<Lease, NetworkError> {
        let port = plan.port();
        let namespace = self.prepare()?;
        namespace.keeper.request(NamespaceOp::EnsurePort(port))?;
        self.plans.insert(plan.tap(), plan.clone());
        let problems = self.open(&plan);
        let problems = problems.into_iter().map(|(_, problem)| problem).collect();
        let Some(namespace) = &self.namespace else {
            return Err(NetworkError::Closed);
        };
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(NetworkError::Descriptor);
        Ok(Lease {
            keepalive: copy(&namespace.keepalive)?,
            network_namespace: copy(&namespace.network)?,
            user_namespace: namespace.user.as_ref().map(copy).transpose()?,
            problems,
        })
    }

    /// As far as it goes: NAT, published ports and joins of a VM that has its port. Answers what did not.
    fn open(&mut self, plan: &PortPlan) -> Vec<(Part, NetworkError)> {
        let nat = self.set_nat(plan);
        self.open_after_nat(plan, nat)
    }

    /// As [`Actor::open`], after what came of NAT.
    pub(super) fn open_after_nat(
        &mut self,
        plan: &PortPlan,
        nat: Result<(), NetworkError>,
    ) -> Vec<(Part, NetworkError)> {
        let mut problems = Vec::new();
        let mut keep = |part: Part, outcome: Result<(), NetworkError>| {
            if let Err(error) = outcome {
                problems.push((part, error));
            }
        };
        keep(Part::Nat, nat);
        let Some(namespace) = &mut self.namespace else {
            return problems;
        };
        for (port, publication) in plan.ports.iter().zip(plan.publications()) {
            let place = (port.protocol, port.listen);
            match namespace.publish(&publication, &self.plans) {
                Ok(()) => {
                    self.problems.remove(&place);
                }
                Err(error) => {
                    let problem = PortProblem {
                        vm: plan.vm,
                        protocol: port.protocol,
                        listen: port.listen,
                        why: error_chain(&error),
                        hints: network_error(&error).hints,
                    };
                    self.problems.insert(place, problem);
                    keep(Part::Port(place), Err(error));
                }
            }
        }
        let mut joins = plan::joins(&self.plans);
        if !self.settled {
            joins.extend(plan::unknown_joins(&self.plans, &namespace.joins));
        }
        keep(Part::Joins, namespace.set_joins(joins));
        problems
    }

    /// The way out comes first and goes last, so that nobody is let out into nowhere.
    fn set_nat(&mut self, plan: &PortPlan) -> Result<(), NetworkError> {
        if plan.nat {
            self.open_way_out()?;
        }
        self.let_out(plan)
    }

    /// Also if it was open: whoever made it may have ended since, and to ask is cheap.
    pub(super) fn open_way_out(&mut self) -> Result<(), NetworkError> {
        let Some(namespace) = &self.namespace else {
            return Ok(());
        };
        match way_out::open(&self.setup, namespace) {
            Ok(open) => self.way_out = open,
            Err(error) => {
                self.way_out = way_out::failed(&error);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Lets a guest out by the way that is there, or no longer.
    pub(super) fn let_out(&mut self, plan: &PortPlan) -> Result<(), NetworkError> {
        if let Some(namespace) = &mut self.namespace {
            namespace.set_private(plan.address, plan.nat_private)?;
            namespace.set_nat(plan.address, plan.nat)?;
        }
        self.close_way_out()
    }

    /// Closes the way out if nobody needs it.
    fn close_way_out(&mut self) -> Result<(), NetworkError> {
        if self.way_out == WayOut::Closed || self.plans.values().any(|plan| plan.nat) {
            return Ok(());
        }
        way_out::close(&self.setup)?;
        self.way_out = WayOut::Closed;
        Ok(())
    }

    /// Somebody else's rules may have closed the way out since it was made, or opened it; or `pasta` has ended.
    pub(super) fn look_at_way_out(&mut self) {
        let Some(namespace) = &self.namespace else {
            return;
        };
        if matches!(self.way_out, WayOut::Open { .. }) {
            self.way_out = way_out::open(&self.setup, namespace)
                .unwrap_or_else(|error| way_out::failed(&error));
        }
    }

    /// A VM that an earlier daemon left. Without its shim only a namespace that still has its keeper is found.
    pub(super) fn take_over(
        &mut self,
        plan: PortPlan,
        shim: Option<i32>,
    ) -> Result<(), NetworkError> {
        // It lives, so its plan holds whatever fails now: nothing that it has on the host may go.
        self.plans.insert(plan.tap(), plan.clone());
        match shim {
            Some(shim) => self.find(shim, &plan)?,
            None => {
                self.adopt()?;
                if self.namespace.is_none() {
                    // It lives somewhere, and keeps what it has on the host. Another namespace would not help it.
                    return Ok(());
                }
            }
        }
        self.apply(plan, None)
    }

    /// Brings a live VM to its plan. Problems with other parts than the named ones were there before, and were told
    /// then; without names all count. After an error the plan before holds again, if there was one.
    pub(super) fn apply(
        &mut self,
        plan: PortPlan,
        named: Option<&BTreeSet<Part>>,
    ) -> Result<(), NetworkError> {
        self.prepare()?;
        let before = self.plans.insert(plan.tap(), plan.clone());
        let applied = self
            .close_surplus(before.as_ref(), &plan)
            .and_then(|()| self.open_named(&plan, named));
        if let (Err(_), Some(before)) = (&applied, before)
            && before != plan
        {
            self.roll_back(&plan, before);
        }
        applied
    }

    /// Closes the ports that the plan before had and this one has not.
    fn close_surplus(
        &mut self,
        before: Option<&PortPlan>,
        plan: &PortPlan,
    ) -> Result<(), NetworkError> {
        let tap = plan.tap();
        let kept = plan.publications();
        for place in plan::surplus_places(before, plan) {
            self.problems.remove(&place);
        }
        let Some(namespace) = &mut self.namespace else {
            return Ok(());
        };
        // Also what an earlier daemon published for it and the record no longer has.
        let surplus: Vec<_> = namespace
            .published
            .values()
            .filter(|found| found.tap == tap && !kept.contains(found))
            .map(plan::place)
            .collect();
        for place in surplus {
            namespace.unpublish(place)?;
        }
        Ok(())
    }

    fn open_named(
        &mut self,
        plan: &PortPlan,
        named: Option<&BTreeSet<Part>>,
    ) -> Result<(), NetworkError> {
        let mut outcome = Ok(());
        for (part, problem) in self.open(plan) {
            let counts = named.is_none_or(|named| named.contains(&part));
            if counts && outcome.is_ok() {
                outcome = Err(problem);
            } else {
                let error = error_chain(&problem);
                tracing::warn!(vm = %plan.vm, error, "a part of its network is not as it should be");
            }
        }
        outcome
    }

    /// What was there before fails only for reasons that were told where they arose.
    fn roll_back(&mut self, plan: &PortPlan, before: PortPlan) {
        let kept = before.publications();
        for place in plan::surplus_places(Some(plan), &before) {
            self.problems.remove(&place);
        }
        if let Some(namespace) = &mut self.namespace {
            for publication in plan.publications() {
                let place = plan::place(&publication);
                if !kept.contains(&publication)
                    && namespace.published.get(&place) == Some(&publication)
                {
                    let _ = namespace.unpublish(place);
                }
            }
        }
        self.plans.insert(before.tap(), before.clone());
        self.open(&before);
    }

    pub(super) fn release(&mut self, tap: &str) -> Result<(), NetworkError> {
        self.adopt()?;
        let plan = self.plans.remove(tap);
        if let Some(plan) = &plan {
            for port in &plan.ports {
                self.problems.remove(&(port.protocol, port.listen));
            }
        }
        let Some(namespace) = &mut self.namespace else {
            return Ok(());
        };
        let remove = NamespaceOp::RemovePort {
            tap: tap.to_owned(),
        };
        match namespace.keeper.request(remove.clone()) {
            Ok(_) => match plan {
                Some(plan) => namespace.forget(tap, plan.address),
                // Which address went with it is not known.
                None => namespace.look()?,
            },
            // Without its keeper and without a VM the namespace is gone, and the port with it.
            Err(KeeperError::Unreachable { .. }) if self.plans.is_empty() => self.namespace = None,
            Err(KeeperError::Unreachable { .. }) => {
                // Others live in it: another keeper is asked.
                let namespace = self.ensure()?;
                namespace.keeper.request(remove)?;
            }
            Err(error) => return Err(error.into()),
        }
        self.close_way_out()
    }
}
