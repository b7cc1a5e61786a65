//! Host operations in this process, which is root.
//!
//! Every operation on the network holds the ledger, so that one at a time changes it; and every one ends by settling
//! all that is recorded: what has lost its veth is forgotten, and what differs is put right.

use super::ledger::{Ledger, Record, TableMark};
use super::table::{self, Contents, Tables};
use super::tag::Tag;
use super::{closed, descriptor, forwarding, resolved, veth};
use crate::crash::{operation, step};
use crate::error_chain;
use crate::net::host::HostOpError;
use crate::net::links::{Link, Links};
use crate::net::nft::Rules;
use crate::op::{HostAnswer, HostOp, NatReport, OwnedKind, OwnedObject, ResolvedReport};
use crate::storage::ops;
use banger_core::addr::{Ipv4Net, Pool};
use banger_core::id::InstanceId;
use rustix::fd::{BorrowedFd, OwnedFd};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// Where the machine's own facts about our objects are. Gone after a reboot, as the objects are.
const RUN_FOLDER: &str = "/run/banger";
/// The most instances that one user, other than root, may have attached.
pub const MAX_INSTANCES: usize = 4;

/// For whom an operation is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The user's id: objects carry it.
    pub uid: u32,
}

impl Caller {
    /// This process itself.
    pub fn this_process() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
        }
    }
}

/// The host as this process, which is root, changes it: always the network namespace that the calling thread is in.
#[derive(Debug, Clone)]
pub struct Host {
    folder: PathBuf,
}

/// What settling found to do.
#[derive(Debug, Default)]
pub struct Settled {
    /// How many instances are attached.
    pub attached: usize,
    /// Those whose table had to be loaded again, because somebody changed it or the default routes.
    pub repaired: Vec<InstanceId>,
    /// Those that had lost their veth; nothing of them is left.
    pub ended: Vec<InstanceId>,
    /// Those that could not be put right, and why.
    pub failed: Vec<(InstanceId, HostOpError)>,
}

impl Settled {
    /// What the log should have of it, a line each. The same lines may come again and again.
    pub fn lines(&self) -> Vec<String> {
        let repaired = self.repaired.iter().map(|instance| {
            format!(
                "the rules of instance {instance} were not as they should be; they are repaired"
            )
        });
        let failed = self.failed.iter().map(|(instance, error)| {
            let error = error_chain(error);
            format!("cannot settle what instance {instance} has on the host: {error}")
        });
        repaired.chain(failed).collect()
    }
}

impl Host {
    /// The machine that this process runs on.
    pub fn of_this_machine() -> Self {
        Self::with_folder(RUN_FOLDER.into())
    }

    /// One whose facts are in `folder`, made when needed, for its owner alone.
    pub fn with_folder(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Does `op` for `caller`, within what others of the machine leave it in turns.
    ///
    /// # Errors
    /// The kernel refuses, or the caller may not do this.
    pub fn perform(
        &self,
        caller: Caller,
        op: &HostOp,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(HostAnswer, Vec<OwnedFd>), HostOpError> {
        if descriptors.len() != op.descriptors() {
            return Err(HostOpError::Descriptors {
                operation: op.name(),
                wanted: op.descriptors(),
                given: descriptors.len(),
            });
        }
        let tag = |instance: &InstanceId| Tag::new(caller, *instance);
        operation(op.name());
        let answer = match op {
            HostOp::Hello {} => HostAnswer::Hello {
                pid: rustix::process::getpid().as_raw_nonzero().get(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            HostOp::AttachVeth { instance, pool } => {
                veth::check_pool(*pool)?;
                descriptor::own_network_namespace(descriptors[0], caller.uid)?;
                self.work(Renews::One(*instance))?
                    .attach(tag(instance), *pool, descriptors[0])?;
                HostAnswer::Done
            }
            HostOp::DetachVeth { instance } => {
                self.work(Renews::One(*instance))?.detach(tag(instance))?;
                HostAnswer::Done
            }
            HostOp::EnsureNat { instance, pool } => HostAnswer::Nat(
                self.work(Renews::One(*instance))?
                    .ensure_nat(tag(instance), *pool)?,
            ),
            HostOp::RemoveNat { instance } => {
                self.work(Renews::One(*instance))?
                    .remove_nat(tag(instance))?;
                HostAnswer::Done
            }
            HostOp::EnsureResolved {
                instance,
                pool,
                dns,
            } => HostAnswer::Resolved(self.ensure_resolved(tag(instance), *pool, *dns)?),
            HostOp::AttachSnapshot { .. }
            | HostOp::DetachSnapshot { .. }
            | HostOp::GrowSnapshot { .. }
            | HostOp::SnapshotStatus { .. } => ops::perform(caller.uid, op, descriptors)?,
            HostOp::ListOwned {} => {
                let mut objects = self.work(Renews::Nobody)?.list_owned(caller)?;
                objects.extend(ops::list(caller.uid));
                HostAnswer::Owned { objects }
            }
        };
        Ok((answer, Vec::new()))
    }

    /// Puts right whatever differs from what was asked for: a table that somebody flushed, other default routes; and
    /// forgets the instances whose veth went with their namespace.
    ///
    /// # Errors
    /// The kernel's tables cannot be read.
    pub fn settle(&self) -> Result<Settled, HostOpError> {
        self.work(Renews::All)?.settle()
    }

    /// The resolver is asked while others may work: it can take long to answer.
    fn ensure_resolved(
        &self,
        tag: Tag,
        pool: Pool,
        dns: Ipv4Addr,
    ) -> Result<ResolvedReport, HostOpError> {
        let work = self.work(Renews::Nobody);
        let link = work?.note_resolver(tag, pool, dns)?;
        step("resolver", || resolved::route(link, pool.guests(), dns))
            .map_err(HostOpError::Resolved)
    }

    pub(super) fn work(&self, renews: Renews) -> Result<Work, HostOpError> {
        Ok(Work {
            renews,
            ledger: Ledger::open(&self.folder)?,
            links: Links::new(),
            tables: Tables::new(),
        })
    }
}

/// Whose table is made anew for no other reason than that another version of us made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Renews {
    Nobody,
    One(InstanceId),
    All,
}

/// One operation, alone on the host.
pub(super) struct Work {
    renews: Renews,
    ledger: Ledger,
    links: Links,
    tables: Tables,
}

impl Work {
    /// What is recorded of the instance.
    ///
    /// # Errors
    /// It, or a table with its name, is somebody else's.
    fn record(&mut self, tag: Tag) -> Result<Option<Record>, HostOpError> {
        let records = self.ledger.records()?;
        let named = |record: &&Record| record.instance.tail(12) == tag.instance.tail(12);
        let record = records.iter().find(named).cloned();
        if let Some(other) = record.as_ref().filter(|record| record.tag() != tag) {
            return Err(HostOpError::Foreign {
                what: "instance",
                name: other.instance.to_string(),
                tag: tag.to_string(),
            });
        }
        self.refuse_foreign_table(tag)?;
        Ok(record)
    }

    fn refuse_foreign_table(&mut self, tag: Tag) -> Result<(), HostOpError> {
        let name = table::name(tag.instance);
        match self.tables.list()?.get(&name) {
            Some(comment) if comment.as_deref().and_then(Tag::parse) != Some(tag) => {
                Err(HostOpError::Foreign {
                    what: "table",
                    name,
                    tag: tag.to_string(),
                })
            }
            _ => Ok(()),
        }
    }

    /// The record of an instance whose veth is there.
    fn attached(&mut self, tag: Tag, pool: Pool) -> Result<Record, HostOpError> {
        let record = self.record(tag)?;
        let veth = veth::find(&mut self.links, tag)?;
        let (Some(record), Some(_)) = (record, veth) else {
            return Err(HostOpError::NotAttached(tag.instance));
        };
        if record.pool != pool {
            return Err(HostOpError::OtherPool {
                instance: tag.instance,
                attached: record.pool.network(),
                asked: pool.network(),
            });
        }
        Ok(record)
    }

    fn attach(
        &mut self,
        tag: Tag,
        pool: Pool,
        namespace: BorrowedFd<'_>,
    ) -> Result<(), HostOpError> {
        // What has lost its veth neither counts nor says what an instance was told before.
        self.settle()?;
        let known = self.record(tag)?;
        let existing = veth::find(&mut self.links, tag)?;
        // Who has its pool keeps it, whatever a VPN routes by now: guests live in it, and its own route is the closer.
        let has_it = known.as_ref().is_some_and(|known| known.pool == pool) && existing.is_some();
        if !has_it {
            veth::refuse_overlap(
                &mut self.links,
                pool,
                existing.as_ref().map(|link| link.index),
            )?;
        }
        let record = match known {
            Some(record) if record.pool == pool => record,
            Some(record) => {
                return Err(HostOpError::OtherPool {
                    instance: tag.instance,
                    attached: record.pool.network(),
                    asked: pool.network(),
                });
            }
            None => {
                self.refuse_too_many(tag.uid)?;
                Record {
                    uid: tag.uid,
                    instance: tag.instance,
                    pool,
                    nat: false,
                    table: None,
                    dns: None,
                }
            }
        };
        let is_new = existing.is_none();
        // Recorded first, so that whatever happens now is found again.
        self.ledger.save(&record)?;
        let attached = self.make(record, namespace);
        if attached.is_err() && is_new {
            // The first error is the one to tell.
            let _ = self.detach(tag);
        }
        attached
    }

    fn make(&mut self, record: Record, namespace: BorrowedFd<'_>) -> Result<(), HostOpError> {
        let (tag, pool) = (record.tag(), record.pool);
        let veth = veth::ensure(&mut self.links, tag, pool, namespace)?;
        // Closed before it is up.
        self.settle_one(tag)?;
        veth::enable(&mut self.links, &veth, pool)
    }

    fn refuse_too_many(&self, uid: u32) -> Result<(), HostOpError> {
        let records = self.ledger.records()?;
        let count = records.iter().filter(|record| record.uid == uid).count();
        if uid != 0 && count >= MAX_INSTANCES {
            return Err(HostOpError::TooManyInstances {
                uid,
                limit: MAX_INSTANCES,
            });
        }
        Ok(())
    }

    /// All that is of the instance, as far as it is there; the veth goes before the table that closes it.
    fn detach(&mut self, tag: Tag) -> Result<(), HostOpError> {
        self.record(tag)?;
        if veth::find(&mut self.links, tag)?.is_some() {
            let name = tag.instance.veth_name();
            step("remove-veth", || self.links.delete(&name))?;
        }
        self.tables.delete(&table::name(tag.instance))?;
        self.ledger.forget(tag.instance)?;
        self.settle()?;
        Ok(())
    }

    fn ensure_nat(&mut self, tag: Tag, pool: Pool) -> Result<NatReport, HostOpError> {
        let mut record = self.attached(tag, pool)?;
        if !record.nat {
            record.nat = true;
            self.ledger.save(&record)?;
        }
        let uplinks = self.settle_one(tag)?;
        let links = self.links.dump()?;
        let mut names = self.default_names(&links)?.into_iter();
        if let Some(odd) = names.find(|name| !table::is_plain_name(name)) {
            return Err(HostOpError::OddName(odd));
        }
        let forward_closed_by = closed::forward_closed_by(&tag.instance.veth_name())?;
        Ok(NatReport {
            uplinks,
            forward_closed_by,
        })
    }

    fn remove_nat(&mut self, tag: Tag) -> Result<(), HostOpError> {
        let Some(mut record) = self.record(tag)? else {
            return Ok(());
        };
        if record.nat {
            record.nat = false;
            self.ledger.save(&record)?;
        }
        self.settle_one(tag)?;
        Ok(())
    }

    /// Remembers the resolver's server. Answers with the number of the link.
    fn note_resolver(&mut self, tag: Tag, pool: Pool, dns: Ipv4Addr) -> Result<u32, HostOpError> {
        let mut record = self.attached(tag, pool)?;
        if !pool.network().contains(dns) {
            return Err(HostOpError::BadNameServer {
                dns,
                pool: pool.network(),
            });
        }
        // First: who cannot be told now is told later.
        if record.dns != Some(dns) {
            record.dns = Some(dns);
            self.ledger.save(&record)?;
        }
        let link = veth::find(&mut self.links, tag)?;
        link.map(|link| link.index)
            .ok_or(HostOpError::NotAttached(tag.instance))
    }

    /// What the host's resolver is to know: for whom, by way of which link, which guests, and who is asked.
    pub(super) fn told(
        &mut self,
    ) -> Result<Vec<(InstanceId, u32, Ipv4Net, Ipv4Addr)>, HostOpError> {
        let mut told = Vec::new();
        for record in self.ledger.records()? {
            let Some(dns) = record.dns else { continue };
            // Else it was forgotten just now, or has another owner.
            if let Ok(Some(link)) = veth::find(&mut self.links, record.tag()) {
                told.push((record.instance, link.index, record.pool.guests(), dns));
            }
        }
        Ok(told)
    }

    fn list_owned(&mut self, caller: Caller) -> Result<Vec<OwnedObject>, HostOpError> {
        self.settle()?;
        let mut objects = Vec::new();
        let mut add = |kind, name: String, words: Option<&str>| {
            if let Some(tag) = words
                .and_then(Tag::parse)
                .filter(|tag| tag.uid == caller.uid)
            {
                let instance = tag.instance;
                objects.push(OwnedObject {
                    kind,
                    name,
                    instance,
                });
            }
        };
        for link in self.links.dump()? {
            add(OwnedKind::Veth, link.name, link.alias.as_deref());
        }
        for (name, comment) in self.tables.list()? {
            add(OwnedKind::NftTable, name, comment.as_deref());
        }
        let lent = self.ledger.lent()?;
        for record in self.ledger.records()? {
            if record.uid == caller.uid && record.nat {
                objects.extend(lent.keys().map(|device| OwnedObject {
                    kind: OwnedKind::Forwarding,
                    name: device.clone(),
                    instance: record.instance,
                }));
            }
        }
        objects.sort_unstable();
        Ok(objects)
    }

    /// Settles all, and fails if this one could not be. Answers with the devices that lead out.
    fn settle_one(&mut self, tag: Tag) -> Result<Vec<String>, HostOpError> {
        let mut settled = self.settle()?;
        let failed = settled
            .failed
            .iter()
            .position(|(instance, _)| *instance == tag.instance);
        match failed {
            Some(position) => Err(settled.failed.swap_remove(position).1),
            None => {
                let links = self.links.dump()?;
                self.uplinks(&links)
            }
        }
    }

    /// The devices of the default routes, but for our own, and for those whose name no rule can carry: only who asks
    /// for NAT is told of these.
    fn uplinks(&mut self, links: &[Link]) -> Result<Vec<String>, HostOpError> {
        let names = self.default_names(links)?.into_iter();
        Ok(names.filter(|name| table::is_plain_name(name)).collect())
    }

    fn default_names(&mut self, links: &[Link]) -> Result<BTreeSet<String>, HostOpError> {
        let devices = self.links.default_devices()?;
        Ok(links
            .iter()
            .filter(|link| devices.contains(&link.index))
            .filter(|link| link.alias.as_deref().and_then(Tag::parse).is_none())
            .map(|link| link.name.clone())
            .collect())
    }

    pub(super) fn settle(&mut self) -> Result<Settled, HostOpError> {
        let mut settled = Settled::default();
        let mut records = Vec::new();
        for record in self.ledger.records()? {
            match veth::find(&mut self.links, record.tag()) {
                Ok(Some(_)) => records.push(record),
                // Also if somebody else has taken the name meanwhile: then it is gone as well.
                Ok(None) | Err(HostOpError::Foreign { .. }) => match self.bury(&record) {
                    Ok(()) => settled.ended.push(record.instance),
                    Err(error) => settled.failed.push((record.instance, error)),
                },
                Err(error) => settled.failed.push((record.instance, error)),
            }
        }
        settled.attached = records.len();
        let links = self.links.dump()?;
        let uplinks = if records.iter().any(|record| record.nat) {
            self.uplinks(&links)?
        } else {
            Vec::new()
        };
        let needed = uplinks.iter().cloned().collect();
        let lent = forwarding::settle(&self.ledger, &links, &needed)?;
        for record in records {
            let instance = record.instance;
            match self.settle_record(record, &uplinks, &lent) {
                Ok(false) => {}
                Ok(true) => settled.repaired.push(instance),
                Err(error) => settled.failed.push((instance, error)),
            }
        }
        Ok(settled)
    }

    /// Makes the table what the record asks for; says whether that took something.
    fn settle_record(
        &mut self,
        mut record: Record,
        uplinks: &[String],
        lent: &[String],
    ) -> Result<bool, HostOpError> {
        let tag = record.tag();
        let (uplinks, lent) = if record.nat {
            (uplinks, lent)
        } else {
            (&[][..], &[][..])
        };
        let name = table::name(record.instance);
        let is_whole = match &record.table {
            Some(mark) => {
                mark.uplinks == uplinks
                    && mark.lent == lent
                    && (mark.made_from == table::made_from() || !self.renews(record.instance))
                    && self.tables.checksum(&name)? == Some(mark.checksum)
            }
            None => false,
        };
        if !is_whole {
            self.refuse_foreign_table(tag)?;
            let mut rules = Rules::new();
            let before = rules.generation()?;
            let contents = Contents {
                tag,
                pool: record.pool,
                uplinks,
                lent,
            };
            self.tables.load(contents, &self.ledger.lock)?;
            let checksum = self.tables.checksum(&name)?;
            // What somebody may have changed before it was measured is made once more at the next occasion, of which
            // the watch tells.
            let ours_alone = before.wrapping_add(1) == rules.generation()?;
            record.table = checksum.filter(|_| ours_alone).map(|checksum| TableMark {
                uplinks: uplinks.to_vec(),
                lent: lent.to_vec(),
                checksum,
                made_from: table::made_from(),
            });
            self.ledger.save(&record)?;
        }
        // After the rules, so that nothing passes that they do not know.
        forwarding::set(&record.instance.veth_name(), record.nat)?;
        Ok(!is_whole)
    }

    fn renews(&self, instance: InstanceId) -> bool {
        match self.renews {
            Renews::Nobody => false,
            Renews::One(one) => one == instance,
            Renews::All => true,
        }
    }

    /// Removes what is left of an instance whose veth is gone.
    fn bury(&mut self, record: &Record) -> Result<(), HostOpError> {
        if self.refuse_foreign_table(record.tag()).is_ok() {
            self.tables.delete(&table::name(record.instance))?;
        }
        Ok(self.ledger.forget(record.instance)?)
    }
}
