//! All VMs: who has which name, address, port of the host and idempotency key, and what is asked of several at once,
//! of the trash above all.

mod reserve;

use crate::blocking::blocking;
use crate::images::find;
use crate::keys;
use crate::record::VmRecord;
use crate::storage::Layer;
use crate::vm::actor::{self, Found};
use crate::vm::changing::{choose_another, port_taken};
use crate::vm::files::VmFiles;
use crate::vm::{Ask, Change, Handle, View};
use crate::world::World;
use crate::{convert, create};
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::event::EventKind;
use banger_api::vm::{CreateVm, Outcome};
use banger_core::decide::Request;
use banger_core::id::VmId;
use banger_core::name::VmName;
use banger_core::phase::{Desired, Phase};
use banger_core::publish::PublishedPort;
use banger_core::watermark::trash_would_do;
use banger_core::words::free_name;
use banger_host::storage::{allocated, space};
use jiff::Timestamp;
use reserve::{HeldName, HeldPorts, Reservation};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;
use uuid::Uuid;

/// All VMs.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    handles: BTreeMap<VmId, Handle>,
    /// Names and addresses of VMs that are being created.
    reserved_names: HashSet<VmName>,
    reserved_keys: HashSet<String>,
    reserved_addresses: HashSet<Ipv4Addr>,
    /// Ports that are about to be a VM's.
    reserved_ports: Vec<(VmId, PublishedPort)>,
    last_address: Option<Ipv4Addr>,
    /// Creations by idempotency key.
    created: HashMap<String, VmId>,
}

/// A purge that spares whoever has left the trash, or came into it, after `until`.
fn purge_from_trash(until: Timestamp) -> Ask {
    Ask {
        trashed_until: Some(until),
        ..Ask::new(Request::Delete {
            force: false,
            purge: true,
        })
    }
}

/// Asks several VMs the same, a few at a time so that a host with two cores is not asked to boot twenty guests at
/// once.
pub(crate) async fn each(handles: Vec<Handle>, ask: Ask) -> Vec<Outcome> {
    const AT_ONCE: usize = 4;
    let mut outcomes = Vec::new();
    for some in handles.chunks(AT_ONCE) {
        let mut asked = tokio::task::JoinSet::new();
        for handle in some.iter().cloned() {
            let ask = ask.clone();
            asked.spawn(async move {
                let name = handle.latest().record.name.clone();
                let error = handle.ask(ask).await.err();
                Outcome {
                    id: handle.id,
                    name,
                    error,
                }
            });
        }
        outcomes.extend(asked.join_all().await);
    }
    outcomes.sort_by(|one, other| one.name.cmp(&other.name));
    outcomes
}

impl Registry {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the actor of a VM and adds it, until it is purged. The receiver resolves as that of [`actor::spawn`].
    pub(crate) fn spawn(
        self: &Arc<Self>,
        world: &Arc<World>,
        record: VmRecord,
        found: Found,
    ) -> (Handle, oneshot::Receiver<()>) {
        let (registry, id) = (Arc::downgrade(self), record.id);
        let ended = move || {
            if let Some(registry) = registry.upgrade() {
                registry.forget(id);
            }
        };
        let (handle, looked) = actor::spawn(Arc::clone(world), record, found, ended);
        self.add(handle.clone());
        (handle, looked)
    }

    fn add(&self, handle: Handle) {
        let mut state = self.state();
        let View { record, purged, .. } = handle.latest();
        if purged {
            // Its actor went on with a purge, and has ended before it was added.
            return;
        }
        if let Some(key) = &record.idempotency_key {
            state.created.insert(key.clone(), handle.id);
        }
        state.last_address = state.last_address.max(Some(record.address));
        state.handles.insert(handle.id, handle);
    }

    fn forget(&self, id: VmId) {
        let mut state = self.state();
        state.handles.remove(&id);
        state.created.retain(|_, created| *created != id);
    }

    /// All VMs that are there; those in the trash or those outside it.
    pub(crate) fn list(&self, trash: bool) -> Vec<Handle> {
        let mut handles: Vec<Handle> = self.state().handles.values().cloned().collect();
        handles.retain(|handle| {
            let view = handle.view.borrow();
            !view.purged && view.record.trashed_at.is_some() == trash
        });
        handles
    }

    /// Finds a VM by name, id or prefix of either. A whole name comes before a prefix, and after that those outside
    /// the trash come first.
    pub(crate) fn find(&self, query: &str) -> Result<Handle, ErrorBody> {
        self.find_first(query, false)
    }

    /// As [`Registry::find`], but those in the trash come first.
    pub(crate) fn find_trashed(&self, query: &str) -> Result<Handle, ErrorBody> {
        self.find_first(query, true)
    }

    /// The one VM of this very name, in the trash or outside it. Most requests name one so, and all VMs need not be
    /// written down to find it.
    fn named(&self, name: &str, trash: bool) -> Option<Handle> {
        let state = self.state();
        let mut named = state.handles.values().filter(|handle| {
            let view = handle.view.borrow();
            let record = &view.record;
            !view.purged && record.trashed_at.is_some() == trash && record.name.as_str() == name
        });
        // Several may have had the same name by the time they came into the trash.
        named.next().filter(|_| named.next().is_none()).cloned()
    }

    fn find_first(&self, query: &str, trash: bool) -> Result<Handle, ErrorBody> {
        // An id is a possible name, and comes before one.
        if query.parse::<VmId>().is_err()
            && let Some(handle) = self.named(query, trash)
        {
            return Ok(handle);
        }
        let first = self.find_among(query, trash);
        let whole = |found: &Result<Handle, ErrorBody>| match found {
            Ok(handle) => {
                handle.latest().record.name.as_str() == query || handle.id.to_string() == query
            }
            Err(_) => false,
        };
        if whole(&first) {
            return first;
        }
        let second = self.find_among(query, !trash);
        match first {
            _ if whole(&second) => second,
            Err(error) if error.code == ErrorCode::NotFound => second.map_err(|_| error),
            first => first,
        }
    }

    /// A VM's name, and whether it is in the trash; its id if it is still being made.
    pub(crate) fn describe(&self, id: VmId) -> String {
        let Some(handle) = self.state().handles.get(&id).cloned() else {
            return id.to_string();
        };
        let record = handle.latest().record;
        match record.trashed_at {
            Some(_) => format!("{} (in the trash)", record.name),
            None => record.name.to_string(),
        }
    }

    fn find_among(&self, query: &str, trash: bool) -> Result<Handle, ErrorBody> {
        let handles = self.list(trash);
        let named: Vec<(String, Handle)> = handles
            .into_iter()
            .map(|handle| (handle.latest().record.name.to_string(), handle))
            .collect();
        find(
            "VM",
            query,
            &named,
            |(name, _)| Some(name.clone()),
            |(_, handle)| handle.id.to_string(),
        )
        .map(|(_, handle)| handle.clone())
    }

    /// Holds the places of ports, unless another VM that is not in the trash has one of them, or is about to; `hint`
    /// says what helps then.
    fn hold_ports(
        self: &Arc<Self>,
        own: VmId,
        ports: &BTreeSet<PublishedPort>,
        hint: impl Fn(&str) -> String,
    ) -> Result<HeldPorts, ErrorBody> {
        let mut state = self.state();
        for handle in state.handles.values().filter(|handle| handle.id != own) {
            let view = handle.view.borrow();
            if view.purged || view.record.trashed_at.is_some() {
                continue;
            }
            for port in ports {
                let mut others = view.record.spec.ports.iter();
                if let Some(other) = others.find(|other| other.collides(port)) {
                    return Err(port_taken(port, other, &view.record.name, hint));
                }
            }
        }
        for port in ports {
            let mut held = state.reserved_ports.iter();
            if let Some((_, other)) = held.find(|(id, held)| *id != own && held.collides(port)) {
                let message = format!(
                    "cannot publish {} ({}): another VM is being given {other}",
                    port.listen, port.protocol
                );
                return Err(ErrorBody::new(ErrorCode::Conflict, message)
                    .hint(hint("`banger port list` shows whose it is")));
            }
        }
        let held = ports.iter().map(|port| (own, port.clone()));
        state.reserved_ports.extend(held);
        Ok(HeldPorts {
            registry: Arc::clone(self),
            own,
            ports: ports.clone(),
        })
    }

    /// Changes a VM. A new name or port is held until the change is made, so that nobody else takes it.
    pub(crate) async fn change(
        self: &Arc<Self>,
        handle: &Handle,
        change: Change,
    ) -> Result<View, ErrorBody> {
        let port = change.patch.live.publish.iter().cloned().collect();
        let _port = self.hold_ports(handle.id, &port, choose_another)?;
        let _held = match &change.name {
            Some(name) if *name != handle.latest().record.name => {
                let held = self.hold_name(name);
                Some(held.map_err(|error| {
                    error.hint("choose another name; `banger vm list` shows those that are taken")
                })?)
            }
            _ => None,
        };
        let request = change.request();
        handle
            .ask(Ask {
                change,
                ..Ask::new(request)
            })
            .await
    }

    /// Brings a VM back from the trash, under another name if its own is taken and one was given.
    pub(crate) async fn undelete(
        self: &Arc<Self>,
        handle: &Handle,
        name: Option<VmName>,
    ) -> Result<View, ErrorBody> {
        let record = handle.latest().record;
        if record.trashed_at.is_none() {
            return match name {
                Some(wanted) if wanted != record.name => {
                    let message = format!("`{}` is not in the trash", record.name);
                    Err(ErrorBody::new(ErrorCode::WrongPhase, message).hint(format!(
                        "`banger vm set {} --name {wanted}` gives it another name",
                        record.name
                    )))
                }
                _ => Ok(handle.latest()),
            };
        }
        let wanted = name.clone().unwrap_or_else(|| record.name.clone());
        let _held = self.hold_name(&wanted).map_err(|error| {
            error.hint(format!(
                "`banger vm undelete --name OTHER {}` brings it back under another name",
                record.id
            ))
        })?;
        // Its own ports stay as they are while it is in the trash.
        let give_up = |way: &str| {
            let name = &record.name;
            format!(
                "{way}, then `banger vm undelete {name}` again: no port of a VM in the trash can be changed"
            )
        };
        let _ports = self.hold_ports(handle.id, &record.spec.ports, give_up)?;
        handle
            .ask(Ask {
                name,
                ..Ask::new(Request::Undelete)
            })
            .await
    }

    fn hold_name(self: &Arc<Self>, name: &VmName) -> Result<HeldName, ErrorBody> {
        let mut state = self.state();
        let taken = state.reserved_names.contains(name)
            || state.handles.values().any(|handle| {
                let view = handle.view.borrow();
                !view.purged && view.record.trashed_at.is_none() && view.record.name == *name
            });
        if taken {
            return Err(ErrorBody::new(
                ErrorCode::NameTaken,
                format!("there is already a VM `{name}`"),
            ));
        }
        state.reserved_names.insert(name.clone());
        Ok(HeldName {
            registry: Arc::clone(self),
            name: name.clone(),
        })
    }

    /// Starts all stopped VMs that are to run, and of which `wanted` says so.
    pub(crate) async fn restore(&self, wanted: impl Fn(&VmRecord) -> bool) -> Vec<Outcome> {
        let stopped = self.list(false).into_iter().filter(|handle| {
            let view = handle.view.borrow();
            matches!(view.phase, Phase::Stopped { .. })
                && view.record.desired == Desired::On
                && wanted(&view.record)
        });
        each(stopped.collect(), Ask::new(Request::Start)).await
    }

    /// Removes all VMs permanently that have been in the trash since `until` or before.
    pub(crate) async fn empty_trash(&self, until: Timestamp) -> Vec<Outcome> {
        let old = self.list(true).into_iter().filter(|handle| {
            let trashed_at = handle.view.borrow().record.trashed_at;
            trashed_at.is_some_and(|at| at <= until)
        });
        each(old.collect(), purge_from_trash(until)).await
    }

    /// Whether a VM found no room that the trash holds: another filesystem may be full, or all of it not enough.
    async fn trash_would_do(&self, world: &Arc<World>, record: &VmRecord) -> bool {
        let trashed: Vec<VmId> = self.list(true).iter().map(|handle| handle.id).collect();
        let (world, record) = (Arc::clone(world), record.clone());
        let judged = tokio::task::spawn_blocking(move || {
            let layer = Layer::of(&world, &record, &VmFiles::of(&world.paths, record.id)).ok()?;
            let free = space(&world.paths.vms()).ok()?.available;
            let held = trashed.into_iter().map(|id| {
                let files = VmFiles::of(&world.paths, id);
                [files.overlay(), files.disk()]
                    .iter()
                    .map(|file| allocated(file).unwrap_or_default())
                    .sum::<u64>()
            });
            Some(trash_would_do(
                layer.room(record.spec.storage),
                free,
                held.sum(),
            ))
        });
        judged.await.ok().flatten().unwrap_or_default()
    }

    /// Room is needed: removes the VM that has been in the trash for longest. Whether there was one that could go.
    pub(crate) async fn give_way(&self) -> bool {
        let mut trashed = self.list(true);
        trashed.sort_by_key(|handle| handle.view.borrow().record.trashed_at);
        let purge = purge_from_trash(Timestamp::now());
        for handle in trashed {
            let name = handle.latest().record.name.clone();
            match handle.ask(purge.clone()).await {
                Ok(_) => {
                    tracing::warn!(vm = %handle.id, %name, "removed from the trash: the disk needs the room");
                    return true;
                }
                Err(error) => {
                    tracing::warn!(vm = %handle.id, %name, error = error.message, "it cannot be removed from the trash")
                }
            }
        }
        false
    }

    fn reserve(
        self: &Arc<Self>,
        world: &World,
        name: Option<VmName>,
        key: Option<String>,
    ) -> Result<Reservation, ErrorBody> {
        let seed = keys::random::<8>().map(u64::from_le_bytes);
        let seed = seed.map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
        let mut state = self.state();
        if key
            .as_ref()
            .is_some_and(|key| state.reserved_keys.contains(key))
        {
            return Err(ErrorBody::new(
                ErrorCode::Conflict,
                "a VM is being created under the same idempotency key",
            )
            .hint("repeat the request when that is done: it answers the VM that was made"));
        }
        let made = key.as_ref().and_then(|key| state.created.get(key));
        if made.is_some_and(|id| {
            let made = state.handles.get(id);
            made.is_some_and(|handle| !handle.view.borrow().purged)
        }) {
            return Err(ErrorBody::new(
                ErrorCode::Conflict,
                "a VM was created under the same idempotency key meanwhile",
            )
            .hint("repeat the request: it answers that VM"));
        }
        let mut names = HashSet::new();
        let mut addresses = HashSet::new();
        for handle in state.handles.values() {
            let view = handle.view.borrow();
            if view.purged {
                continue;
            }
            addresses.insert(view.record.address);
            if view.record.trashed_at.is_none() {
                names.insert(view.record.name.clone());
            }
        }
        let taken = |name: &VmName| names.contains(name) || state.reserved_names.contains(name);
        let name = match name {
            Some(name) if taken(&name) => {
                return Err(ErrorBody::new(
                    ErrorCode::NameTaken,
                    format!("there is already a VM `{name}`"),
                )
                .hint(format!("choose another name, or `banger vm delete {name}`")));
            }
            Some(name) => name,
            None => free_name(seed, taken),
        };
        let address = world
            .instance
            .pool
            .next_address(state.last_address, |a| addresses.contains(&a) || state.reserved_addresses.contains(&a))
            .ok_or_else(|| {
                ErrorBody::new(ErrorCode::HostUnfit, "all addresses of the instance's pool are taken")
                    .hint("`banger vm delete --purge` frees the address of a VM, also of one in the trash")
            })?;
        state.last_address = Some(address);
        state.reserved_names.insert(name.clone());
        state.reserved_keys.extend(key.clone());
        state.reserved_addresses.insert(address);
        Ok(Reservation {
            registry: Arc::clone(self),
            key,
            name,
            address,
        })
    }

    /// Creates a VM, and starts it if asked. A repeated key answers the VM that was made the first time.
    pub(crate) async fn create(
        self: &Arc<Self>,
        world: &Arc<World>,
        request: CreateVm,
        key: Option<String>,
    ) -> Result<Handle, ErrorBody> {
        let repeated = key.as_ref().and_then(|key| {
            let state = self.state();
            let made = state.created.get(key).and_then(|id| state.handles.get(id));
            made.filter(|handle| !handle.view.borrow().purged).cloned()
        });
        let handle = match repeated {
            Some(handle) => handle,
            None => self.create_new(world, &request, key).await?,
        };
        if request.start {
            let started = handle.ask(Ask::new(Request::Start)).await;
            started.map_err(|error| {
                let name = handle.latest().record.name.clone();
                error.hint(format!(
                    "`{name}` was created: `banger vm start {name}` tries again, `banger vm delete {name}` removes it"
                ))
            })?;
        }
        Ok(handle)
    }

    async fn create_new(
        self: &Arc<Self>,
        world: &Arc<World>,
        request: &CreateVm,
        key: Option<String>,
    ) -> Result<Handle, ErrorBody> {
        let name = request
            .name
            .as_ref()
            .map(|name| VmName::new(name.as_str()))
            .transpose();
        let name = name.map_err(|error| {
            convert::invalid(&error)
                .hint("a name is a DNS label: up to 63 of a-z, 0-9 and inner hyphens")
        })?;
        let id = VmId::from_uuid(Uuid::now_v7());
        let record = {
            // Choosing a driver may have to probe KVM, which takes seconds once for each boot of the host.
            let (world, request, key) = (Arc::clone(world), request.clone(), key.clone());
            blocking(move || create::draft(&world, &request, id, key)).await
        };
        let (record, held) = match record.flatten().and_then(|draft| {
            let ports = self.hold_ports(id, &draft.spec.ports, choose_another)?;
            let reservation = self.reserve(world, name, key)?;
            let record = draft.complete(reservation.name.clone(), reservation.address);
            Ok((record, (ports, reservation)))
        }) {
            Ok(made) => made,
            Err(error) => {
                world.images.unpin(id);
                return Err(error);
            }
        };
        while let Err(error) = create::make(world, &record).await {
            // A VM that is made is worth more than one that was thrown away.
            if error.code == ErrorCode::NoSpace
                && self.trash_would_do(world, &record).await
                && self.give_way().await
            {
                continue;
            }
            world.images.unpin(id);
            return Err(error);
        }
        actor::note(
            world,
            id,
            "create",
            format!("created as `{}`", record.name),
            None,
        );
        let (handle, _) = self.spawn(world, record, Found::Stopped);
        drop(held);
        world.hub.publish(EventKind::VmChanged {
            vm: Box::new(convert::vm(world, &handle.latest())),
        });
        Ok(handle)
    }
}

#[cfg(test)]
mod tests;
