//! The actor's part that changes a VM: its spec, its name, its overlay.

use super::Ask;
use super::actor::{Actor, Reply, Run, answer_to};
use super::files::lock_error;
use super::teardown::close_storage;
use crate::blocking::blocking;
use crate::crash::{Side, point};
use crate::images::ImageRecord;
use crate::network::{Part, network_error};
use crate::storage::{self, Layer};
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::name::VmName;
use banger_core::publish::PublishedPort;
use banger_core::size::{CpuLimit, DiskBytes};
use banger_core::spec::Storage;
use banger_image::kernel::KernelManifest;
use banger_vmm::lock::{Locked, try_lock};
use std::collections::BTreeSet;
use std::sync::Arc;
use uuid::Uuid;

impl Actor {
    pub(super) async fn set(&mut self, ask: &Ask, reply: Reply) {
        let answer = self.changed(ask).await;
        if ask.change.kernel.is_some() {
            // What its record names is all that it pins.
            let spec = &self.record.spec;
            let images = &self.world.images;
            images.repin(spec.image, spec.kernel, self.record.id);
        }
        answer_to(reply, answer.map(|()| self.view.borrow().clone()));
    }

    /// The network of a live VM first, and its limit, since they may be refused; then the record. Whoever dies in
    /// between leaves what the next daemon brings back to the record.
    async fn changed(&mut self, ask: &Ask) -> Result<(), ErrorBody> {
        let change = &ask.change;
        if let Some(generation) = change.generation
            && generation != self.record.generation
        {
            let message = format!(
                "`{}` is at generation {}, not {generation}: someone else changed it",
                self.record.name, self.record.generation
            );
            return Err(ErrorBody::new(ErrorCode::Conflict, message)
                .hint("show it again and repeat the change"));
        }
        if let Some(port) = &change.patch.live.publish {
            self.refuse_collision(port)?;
        }
        // What is refused, and what may find no room, comes before anything is thrown away.
        let spec = &self.record.spec;
        self.refuse_shrinking("work disk", spec.disk_bytes, change.disk_bytes)?;
        self.refuse_shrinking("overlay", Some(spec.overlay_bytes), change.overlay_bytes)?;
        if let Some(bytes) = change.disk_bytes
            && Some(bytes) != self.record.spec.disk_bytes
        {
            self.grow_disk(bytes).await?;
        }
        if let Some(bytes) = change.overlay_bytes
            && bytes != self.record.spec.overlay_bytes
        {
            self.grow_overlay(bytes).await?;
        }
        if let Some(kernel) = change.kernel {
            // Unless it is gone by now; the next start boots it.
            let images = &self.world.images;
            images.pin::<KernelManifest>(&kernel.to_string(), self.record.id)?;
        }
        if let Some(image) = &change.image
            && image.manifest.id != self.record.spec.image
        {
            self.change_image(image).await?;
        }
        let mut changed = (*self.record).clone();
        changed.spec = changed.spec.patched(&change.patch);
        if let Some(kernel) = change.kernel {
            changed.spec.kernel = kernel;
        }
        if let Some(name) = &change.name {
            changed.name = name.clone();
        }
        let named = Part::named(&change.patch.live);
        let live = matches!(self.run, Run::Live(_));
        let limit = change.patch.live.cpu_limit;
        if changed == *self.record {
            if let Some(limit) = limit {
                self.limit_cpu(limit).await?;
            }
            if live && !named.is_empty() {
                // It is wanted already, and may not be there any more.
                let applied = self.world.network.apply(changed.port_plan(), named).await;
                applied.map_err(|error| network_error(&error))?;
            }
            return Ok(());
        }
        let renamed = changed.name != self.record.name;
        let networked = changed.port_plan() != self.record.port_plan();
        point("set", "network", Side::Before);
        if live && networked {
            let plan = changed.port_plan();
            let applied = self.world.network.apply(plan, named.clone()).await;
            applied.map_err(|error| network_error(&error))?;
        }
        point("set", "network", Side::After);
        if let Some(limit) = limit
            && let Err(error) = self.limit_cpu(limit).await
        {
            self.take_back(live && networked, named, None).await;
            return Err(error);
        }
        point("set", "record", Side::Before);
        let (spec, name) = (changed.spec.clone(), changed.name.clone());
        let stored = self
            .change(|record| {
                if record.spec != spec {
                    record.generation += 1;
                }
                record.spec = spec;
                record.name = name;
            })
            .await;
        point("set", "record", Side::After);
        if let Err(error) = stored {
            self.take_back(live && networked, named, limit).await;
            return Err(error);
        }
        if renamed {
            self.note("set", format!("called `{}` now", self.record.name), None);
        } else {
            self.note("set", "the spec was changed", None);
        }
        self.publish(|_| {});
        Ok(())
    }

    /// Brings a live VM back to what is recorded, after a change that was not.
    async fn take_back(
        &mut self,
        networked: bool,
        named: BTreeSet<Part>,
        limited: Option<Option<CpuLimit>>,
    ) {
        if networked
            && let Err(error) = self
                .world
                .network
                .apply(self.record.port_plan(), named)
                .await
        {
            tracing::warn!(vm = %self.record.id, error = banger_host::error_chain(&error), "the network is not as recorded");
        }
        if limited.is_some()
            && let Err(error) = self.limit_cpu(self.record.spec.cpu_limit).await
        {
            tracing::warn!(vm = %self.record.id, error = error.message, "the limit of CPU time is not as recorded");
        }
    }

    /// Pins the image, unless it is gone by now, and throws the overlay of the old one away. The VM's requests come one
    /// by one, so what its record names afterwards is all that it pins.
    async fn change_image(&mut self, image: &ImageRecord) -> Result<(), ErrorBody> {
        let images = &self.world.images;
        let image = images.pin(&image.manifest.id.to_string(), self.record.id)?;
        let done = self.reset(None, Some(image)).await;
        let spec = &self.record.spec;
        let images = &self.world.images;
        images.repin(spec.image, spec.kernel, self.record.id);
        done
    }

    /// Throws the overlay away: first the promise, then the layer. What a crash leaves is done before the next start.
    pub(super) async fn reset(
        &mut self,
        storage: Option<(Storage, String)>,
        image: Option<ImageRecord>,
    ) -> Result<(), ErrorBody> {
        // Held to the end: nothing starts on this layer.
        let _lock = self.own_lock("reset")?;
        // By the driver that attached it; the record may name another afterwards.
        self.detach("reset").await?;
        point("reset", "record", Side::Before);
        self.change(|record| {
            record.reset_pending = true;
            record.overlay_uuid = Uuid::now_v7();
            if storage.is_some() || image.is_some() {
                record.generation += 1;
            }
            if let Some((storage, reason)) = storage {
                record.spec.storage = storage;
                record.storage_reason = reason;
            }
            if let Some(image) = image {
                record.spec.image = image.manifest.id;
                record.image_digest = image.manifest.sha256;
            }
        })
        .await?;
        point("reset", "record", Side::After);
        self.note("reset", "the overlay was thrown away", None);
        self.publish(|_| {});
        self.finish_reset().await
    }

    /// Nothing of the layer is attached afterwards. The lock is the caller's.
    async fn detach(&mut self, verb: &'static str) -> Result<(), ErrorBody> {
        let Some(problem) = close_storage(&self.world, &self.record, verb).await else {
            return Ok(());
        };
        let message = format!(
            "the storage of VM `{}` cannot be detached",
            self.record.name
        );
        let mut error = ErrorBody::new(ErrorCode::Internal, message);
        error.causes.push(problem);
        Err(error.hint("`banger daemon logs` tells more"))
    }

    /// As [`Actor::finish_reset`], of a promise that a crash or a full disk broke.
    pub(super) async fn finish_promised_reset(&mut self) -> Result<(), ErrorBody> {
        let _lock = self.own_lock("start")?;
        self.finish_reset().await
    }

    /// Makes the fresh overlay that was promised. The lock is the caller's.
    async fn finish_reset(&mut self) -> Result<(), ErrorBody> {
        point("reset", "layer", Side::Before);
        let (world, record, files) = (
            Arc::clone(&self.world),
            Arc::clone(&self.record),
            self.files.clone(),
        );
        blocking(move || {
            let layer = Layer::of(&world, &record, &files)?;
            world.storage.driver(record.spec.storage).reset(&layer)
        })
        .await??;
        point("reset", "layer", Side::After);
        point("reset", "done", Side::Before);
        self.change(|record| record.reset_pending = false).await?;
        point("reset", "done", Side::After);
        Ok(())
    }

    /// Gives the VM its first work disk, or a larger one. The file comes first: a record never promises more than is
    /// there. A filesystem is grown in the guest, which knows what it holds; the host never reads it.
    async fn grow_disk(&mut self, bytes: DiskBytes) -> Result<(), ErrorBody> {
        let _lock = self.own_lock("grow the disk of")?;
        let path = self.files.disk();
        let fresh = match self.record.disk_uuid {
            Some(_) => None,
            None => Some(Uuid::now_v7()),
        };
        point("set", "disk", Side::Before);
        let cache = self.world.paths.cache.clone();
        blocking(move || match fresh {
            Some(uuid) => storage::replace_empty(&cache, bytes.get(), &path, uuid),
            None => storage::extend(&path, bytes.get()).and_then(|()| storage::make_durable(&path)),
        })
        .await??;
        point("set", "disk", Side::After);
        self.change(|record| {
            record.spec.disk_bytes = Some(bytes);
            record.disk_uuid = record.disk_uuid.or(fresh);
            record.generation += 1;
        })
        .await?;
        self.note(
            "set",
            format!("the work disk has {} bytes", bytes.get()),
            None,
        );
        self.publish(|_| {});
        Ok(())
    }

    /// Lets the VM write more to `/`. The layer comes first, as in [`Actor::grow_disk`].
    async fn grow_overlay(&mut self, bytes: DiskBytes) -> Result<(), ErrorBody> {
        let _lock = self.own_lock("grow the overlay of")?;
        point("set", "overlay", Side::Before);
        // A layer that is thrown away is made anew as large as the record says.
        if !self.record.reset_pending {
            self.detach("set").await?;
            let (world, mut record, files) = (
                Arc::clone(&self.world),
                (*self.record).clone(),
                self.files.clone(),
            );
            record.spec.overlay_bytes = bytes;
            blocking(move || {
                let layer = Layer::of(&world, &record, &files)?;
                world.storage.driver(record.spec.storage).grow(&layer)
            })
            .await??;
        }
        point("set", "overlay", Side::After);
        self.change(|record| {
            record.spec.overlay_bytes = bytes;
            record.generation += 1;
        })
        .await?;
        self.note("set", format!("may write {} bytes", bytes.get()), None);
        self.publish(|_| {});
        Ok(())
    }

    fn refuse_shrinking(
        &self,
        what: &str,
        now: Option<DiskBytes>,
        wanted: Option<DiskBytes>,
    ) -> Result<(), ErrorBody> {
        match (now, wanted) {
            (Some(now), Some(wanted)) if wanted < now => {
                let message = format!(
                    "cannot shrink the {what} of VM `{}` from {} to {} bytes",
                    self.record.name,
                    now.get(),
                    wanted.get()
                );
                Err(ErrorBody::new(ErrorCode::InvalidRequest, message)
                    .hint("a disk only grows; copy what you need to a new VM with a smaller one"))
            }
            _ => Ok(()),
        }
    }

    /// The lock of a VM that is stopped, to do `verb` with it.
    fn own_lock(&self, verb: &str) -> Result<Locked, ErrorBody> {
        try_lock(&self.files.lock()).map_err(|error| lock_error(&self.record.name, verb, &error))
    }

    fn refuse_collision(&self, port: &PublishedPort) -> Result<(), ErrorBody> {
        let taken = self.record.spec.ports.iter();
        match taken
            .filter(|other| *other != port)
            .find(|other| other.collides(port))
        {
            None => Ok(()),
            Some(other) => Err(port_taken(port, other, &self.record.name, choose_another)),
        }
    }
}

/// What helps when a port's place is taken, besides the way in which the other one gives it up.
pub(crate) fn choose_another(way: &str) -> String {
    format!("choose another port of the host, or {way}")
}

/// The place of a port is another's already. `hint` is told how that one gives it up.
pub(crate) fn port_taken(
    port: &PublishedPort,
    other: &PublishedPort,
    name: &VmName,
    hint: impl FnOnce(&str) -> String,
) -> ErrorBody {
    let message = format!(
        "cannot publish {} ({}): `{name}` has {other} there",
        port.listen, port.protocol
    );
    let way = format!(
        "`banger port rm {name} {}/{}`",
        other.listen, other.protocol
    );
    ErrorBody::new(ErrorCode::Conflict, message).hint(hint(&way))
}
