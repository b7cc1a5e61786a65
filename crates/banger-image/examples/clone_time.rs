//! Measures how long cloning an empty filesystem takes: `clone_time FOLDER`.

use banger_image::Context;
use banger_image::template::{clone_empty_ext4, ensure_empty_ext4};
use std::time::Instant;
use uuid::Uuid;

fn main() -> Result<(), banger_image::BuildError> {
    let folder = std::path::PathBuf::from(std::env::args().nth(1).unwrap_or_default());
    for bytes in [64 << 20, 8 << 30, 64u64 << 30] {
        let started = Instant::now();
        let template = ensure_empty_ext4(bytes, &Context::quiet(&folder))?;
        println!("template of {bytes}: {:.2?}", started.elapsed());
        for _ in 0..5 {
            let target = folder.join(Uuid::now_v7().to_string());
            let started = Instant::now();
            clone_empty_ext4(&template, &target, Uuid::now_v7())?;
            println!("clone of {bytes}: {:.2?}", started.elapsed());
            std::fs::remove_file(&target).ok();
        }
    }
    Ok(())
}
