//! Whether making a VM grows with its image.

use super::home::{Home, Images, succeed};
use super::stats::Target;
use super::table::Row;
use super::{PAIRS, pairs};
use crate::command::command;
use crate::failure::{Failure, Result};
use serde_json::Value;
use std::cell::Cell;
use std::path::Path;
use std::time::Instant;

const TARGET: Target = Target {
    at_most: 1.10,
    margin: 0.15,
    at_most_more: None,
};

pub(super) fn run(dist: &Path) -> Result<Vec<Row>> {
    let home = Home::new(dist, Images::Tiny)?;
    // The daemon takes up images that it finds when it starts.
    home.succeed(&["daemon", "stop"])?;
    let tiny = home.only_image()?;
    for (name, id, gib) in [("two", 2, 2), ("twenty", 3, 20)] {
        enlarge(&tiny, name, id, gib)?;
    }
    home.succeed(&["daemon", "start"])?;
    let number = Cell::new(0);
    let create = |storage: &str, image: &str| {
        let name = number.replace(number.get() + 1);
        let body = format!(
            r#"{{"name": "vm{name}", "image": "{image}", "storage": "{storage}", "start": false}}"#
        );
        let start = Instant::now();
        home.post("/v1/vms", &body)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let mut rows = Vec::new();
    for storage in ["overlay", "reflink", "snapshot"] {
        match create(storage, "two") {
            Ok(_) => {}
            // What this host has no filesystem or module for is told and left out.
            Err(failure) if storage != "overlay" => {
                eprintln!("create, {storage}: not measured here: {failure}");
                continue;
            }
            Err(failure) => return Err(failure),
        }
        let created = pairs(
            PAIRS,
            || create(storage, "twenty"),
            || create(storage, "two"),
        )?;
        let name = format!("create, {storage}: image of 20 GiB / of 2 GiB");
        rows.push(Row::pairs(&name, &created, TARGET, PAIRS));
    }
    Ok(rows)
}

/// Puts an image beside `tiny` that is it, `gib` GiB large and otherwise a hole.
fn enlarge(tiny: &Path, name: &str, id: u32, gib: u64) -> Result<()> {
    let failed = || Failure::io(format!("cannot make an image of {gib} GiB"));
    let manifest = std::fs::read(tiny.join("image.json")).map_err(failed())?;
    let mut manifest: Value = serde_json::from_slice(&manifest)
        .map_err(|error| Failure::new(format!("the image's manifest is none: {error}")))?;
    let id = format!("0198aaaa-0000-7000-8000-{id:012}");
    let folder = tiny.with_file_name(&id);
    std::fs::create_dir(&folder).map_err(failed())?;
    let root = folder.join("root.img");
    let mut copy = command("cp");
    copy.arg("--sparse=always").arg(tiny.join("root.img"));
    succeed(copy.arg(&root))?;
    let mut grow = command("truncate");
    succeed(grow.arg(format!("--size={gib}G")).arg(&root))?;
    manifest["id"] = id.into();
    manifest["name"] = name.into();
    manifest["bytes"] = (gib << 30).into();
    std::fs::write(folder.join("image.json"), manifest.to_string()).map_err(failed())
}
