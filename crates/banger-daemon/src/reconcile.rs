//! What the folders say when the database is lost, older, or damaged.
//!
//! A VM's folder alone is enough to rebuild its record; of row and mirror the one with the higher record version
//! wins. A folder whose name starts with `.new-` is a VM only if its row was committed.

use crate::images::{Bundle, Manifest, STAGING};
use crate::record::{VM_FILE, VmRecord};
use crate::store::{Rows, Store, StoreError};
use banger_api::paths::Paths;
use banger_core::id::VmId;
use banger_core::name::VmName;
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// Names in a folder, without errors: a folder that cannot be read has none.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Makes rows and folders agree. Answers all VMs, images and kernels, and reports what it repaired in `notices`.
pub(crate) async fn reconcile(
    paths: &Paths,
    store: &Store,
    rows: Rows,
    notices: &mut Vec<String>,
) -> Result<Rows, StoreError> {
    let vms = reconcile_vms(paths, store, rows.vms, notices).await?;
    let images = reconcile_bundles(paths, store, rows.images, notices).await?;
    let kernels = reconcile_bundles(paths, store, rows.kernels, notices).await?;
    Ok(Rows {
        vms,
        images,
        kernels,
    })
}

async fn reconcile_vms(
    paths: &Paths,
    store: &Store,
    rows: Vec<VmRecord>,
    notices: &mut Vec<String>,
) -> Result<Vec<VmRecord>, StoreError> {
    let mut records: HashMap<VmId, VmRecord> =
        rows.into_iter().map(|record| (record.id, record)).collect();
    let mut newer = Vec::new();
    let mut rescued = Vec::new();
    for name in names(&paths.vms()) {
        let folder = paths.vms().join(&name);
        if let Some(id) = name.strip_prefix(STAGING) {
            match id.parse::<VmId>() {
                Ok(id) if records.contains_key(&id) => {
                    // The row was committed: the creation goes on.
                    if let Err(error) = std::fs::rename(&folder, paths.vm(id)) {
                        notices.push(format!(
                            "the folder of VM {id} could not be given its name: {error}"
                        ));
                    }
                }
                _ => {
                    // Never acknowledged, never started.
                    if let Err(error) = std::fs::remove_dir_all(&folder) {
                        notices.push(format!(
                            "the unfinished VM folder {name} could not be removed: {error}"
                        ));
                    }
                }
            }
            continue;
        }
        let Ok(id) = name.parse::<VmId>() else {
            notices.push(format!(
                "`{}` is no VM's folder; it was left alone",
                folder.display()
            ));
            continue;
        };
        match (VmRecord::from_mirror(&folder), records.get(&id)) {
            (Ok(mirror), _) if mirror.id != id => {
                notices.push(format!(
                    "`{}` holds the record of another VM; it was left alone",
                    folder.display()
                ));
            }
            (Ok(mirror), Some(row)) if mirror.record_version > row.record_version => {
                notices.push(format!(
                    "VM `{}`: its vm.json was newer than the database; the database was updated",
                    mirror.name
                ));
                newer.push(mirror);
            }
            (Ok(_), Some(_)) => {}
            (Ok(mirror), None) => rescued.push(mirror),
            (Err(_), Some(row)) if row.purging => {}
            (Err(error), Some(row)) => {
                tracing::warn!(vm = %id, %error, "the mirror is made again");
                if let Err(error) = row.mirror(&folder, None) {
                    notices.push(format!(
                        "VM `{}`: its {VM_FILE} could not be written: {error}",
                        row.name
                    ));
                }
            }
            (Err(error), None) => {
                let chain = banger_host::error_chain(&error);
                notices.push(format!(
                    "`{}` could not be read as a VM and was left alone: {chain}",
                    folder.display()
                ));
            }
        }
    }
    for record in records.values().filter(|record| !record.purging) {
        let folder = paths.vm(record.id);
        if folder.exists() {
            continue;
        }
        notices.push(format!("the folder of VM `{}` is gone", record.name));
        if !record.started_once {
            // It held no data yet: its next start makes what is missing.
            let made =
                crate::vm::files::make_folder(&folder).and_then(|()| record.mirror(&folder, None));
            if let Err(error) = made {
                notices.push(format!(
                    "the folder of VM `{}` could not be made again: {error}",
                    record.name
                ));
            }
        }
    }
    // All names together: what the folders know may be a swap, or a name that was given to another VM since.
    for record in &newer {
        records.remove(&record.id);
    }
    let mut taken = records
        .values()
        .filter(|record| holds_name(record))
        .map(|record| record.name.clone())
        .collect();
    number_names(&mut taken, &mut newer, notices);
    number_names(&mut taken, &mut rescued, notices);
    store.update_vms(newer.clone()).await?;
    for record in rescued {
        notices.push(format!("VM `{}` was rebuilt from its folder", record.name));
        store.insert_vm(record.clone()).await?;
        records.insert(record.id, record);
    }
    records.extend(newer.into_iter().map(|record| (record.id, record)));
    let mut records: Vec<VmRecord> = records.into_values().collect();
    records.sort_by_key(|record| record.id);
    Ok(records)
}

fn holds_name(record: &VmRecord) -> bool {
    record.trashed_at.is_none() && !record.purging
}

/// Gives a number to each name that is `taken`, and takes the rest.
fn number_names(taken: &mut HashSet<VmName>, records: &mut [VmRecord], notices: &mut Vec<String>) {
    records.sort_by_key(|record| record.id);
    for record in records.iter_mut().filter(|record| holds_name(record)) {
        if taken.insert(record.name.clone()) {
            continue;
        }
        let short: String = record.name.as_str().chars().take(50).collect();
        let free = (2u64..).find_map(|number| {
            let name = VmName::new(format!("{short}-{number}")).ok();
            name.filter(|name| !taken.contains(name))
        });
        if let Some(free) = free {
            notices.push(format!(
                "VM `{}` is now called `{free}`: the name was taken",
                record.name
            ));
            taken.insert(free.clone());
            record.name = free;
            record.record_version += 1;
        }
    }
}

/// Removes unfinished builds and answers the ids of finished folders without a row.
fn sweep<I: std::str::FromStr + PartialEq>(
    folder: &Path,
    known: &[I],
    notices: &mut Vec<String>,
) -> Vec<I> {
    let mut unknown = Vec::new();
    for name in names(folder) {
        if name.starts_with(STAGING) {
            if let Err(error) = remove(&folder.join(&name)) {
                notices.push(format!(
                    "the unfinished build {name} could not be removed: {error}"
                ));
            }
        } else if let Ok(id) = name.parse::<I>()
            && !known.contains(&id)
        {
            unknown.push(id);
        }
    }
    unknown
}

fn remove(path: &Path) -> std::io::Result<()> {
    if path.is_dir() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    }
}

async fn reconcile_bundles<M: Manifest>(
    paths: &Paths,
    store: &Store,
    mut records: Vec<Bundle<M>>,
    notices: &mut Vec<String>,
) -> Result<Vec<Bundle<M>>, StoreError> {
    let (kind, shelf) = (M::KIND, M::shelf(paths));
    records.retain(|record| {
        let id = record.manifest.id();
        let there = shelf.join(id.to_string()).exists();
        if !there {
            notices.push(format!("{kind} {id} has no folder any more"));
        }
        there
    });
    let known: Vec<M::Id> = records.iter().map(|record| record.manifest.id()).collect();
    let mut unknown = sweep(&shelf, &known, notices);
    // The newest keeps a name that several had.
    unknown.sort_by(|a, b| b.cmp(a));
    for id in unknown {
        match M::read(&shelf.join(id.to_string())) {
            Ok(manifest) => {
                let mut record = Bundle::of(manifest);
                let taken = records.iter().any(|other| other.name == record.name);
                record.name = record.name.filter(|_| !taken);
                store.put_bundle(record.clone()).await?;
                notices.push(format!("{kind} {id} was rebuilt from its folder"));
                records.push(record);
            }
            Err(error) => notices.push(format!(
                "{kind} folder {id} was left alone: {}",
                banger_host::error_chain(&error)
            )),
        }
    }
    Ok(records)
}
