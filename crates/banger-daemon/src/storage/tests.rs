//! The same suite over every storage driver, on every filesystem that this machine can mount. Snapshots need
//! device-mapper: where there is none they are told as skipped here, and the test host's own suite tests them alone.

use super::*;
use banger_host::exec::Run;
use std::os::unix::fs::MetadataExt;

const IMAGE_BYTES: u64 = 64 << 20;
const OVERLAY_BYTES: u64 = 128 << 20;

fn drivers() -> StorageHost {
    StorageHost::new(HostSide::find().unwrap().map(Arc::new))
}

/// Where images and VMs are: a folder, or a filesystem of the test's own.
struct Place {
    folder: tempfile::TempDir,
    mounted: bool,
}

impl Place {
    fn folder() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            mounted: false,
        }
    }

    /// A filesystem in a file. `None`, said, where it cannot be made or mounted.
    fn mounted(test: &str, mkfs: &str) -> Option<Self> {
        let skip = |why: String| {
            eprintln!("SKIPPED: {test}: {why}");
            None
        };
        if !rustix::process::geteuid().is_root() {
            return skip("only root mounts filesystems".to_owned());
        }
        let mut place = Self::folder();
        let file = place.folder.path().join("filesystem");
        std::fs::File::create(&file)
            .unwrap()
            .set_len(1 << 30)
            .unwrap();
        std::fs::create_dir(place.root()).unwrap();
        if let Err(error) = Run::new(mkfs).arg("-q").arg(&file).run() {
            return skip(banger_host::error_chain(&error));
        }
        let mount = Run::new("mount")
            .args(["-o", "loop"])
            .arg(&file)
            .arg(place.root());
        match mount.run() {
            Ok(_) => {
                place.mounted = true;
                Some(place)
            }
            Err(error) => skip(banger_host::error_chain(&error)),
        }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// An image with a file in it, and a VM's layer over it that is not made yet.
    fn layer(&self) -> Layer {
        let (images, vm) = (self.root().join("images"), self.root().join("vm"));
        for folder in [&images, &vm] {
            std::fs::create_dir_all(folder).unwrap();
        }
        let cache = self.root().join("cache");
        let (image, image_uuid) = (images.join(ROOT_IMAGE), Uuid::now_v7());
        make_empty(&cache, IMAGE_BYTES, &image, image_uuid).unwrap();
        put(&image, "from-image", b"as the image has it");
        Layer {
            owner: Owner {
                instance: InstanceId::from_uuid(Uuid::now_v7()),
                vm: VmId::from_uuid(Uuid::now_v7()),
            },
            name: VmName::new("calm-otter").unwrap(),
            image,
            image_uuid: image_uuid.to_string(),
            image_digest: "digest".to_owned(),
            made_over: "digest".to_owned(),
            file: vm.join("overlay.img"),
            overlay_uuid: Uuid::now_v7(),
            overlay_bytes: OVERLAY_BYTES,
            precious: false,
            cache,
        }
    }

    fn allows(&self, test: &str, driver: &dyn StorageDriver) -> bool {
        let (images, vms) = self.layer_folders();
        let facts = StorageFacts::measure(&images, &vms);
        match driver.judge(&facts) {
            Ok(_) => true,
            Err(why) => {
                // A driver's own name, without what it is made of.
                let name = format!("{driver:?}");
                let name = name.split(' ').next().unwrap_or_default();
                eprintln!("SKIPPED: {test}: {name}: {why}");
                false
            }
        }
    }

    fn layer_folders(&self) -> (PathBuf, PathBuf) {
        let folders = (self.root().join("images"), self.root().join("vm"));
        for folder in [&folders.0, &folders.1] {
            std::fs::create_dir_all(folder).unwrap();
        }
        folders
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.mounted {
            Run::new("umount").arg(self.root()).run().unwrap();
        }
    }
}

/// Puts a file into an ext4 that nobody has mounted.
fn put(filesystem: &Path, name: &str, content: &[u8]) {
    let source = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(source.path(), content).unwrap();
    let request = format!("write {} {name}", source.path().display());
    Run::new("debugfs")
        .args(["-w", "-R", &request])
        .arg(filesystem)
        .run()
        .unwrap();
    assert_eq!(get(filesystem, name).as_deref(), Some(content));
}

fn get(filesystem: &Path, name: &str) -> Option<Vec<u8>> {
    let target = tempfile::NamedTempFile::new().unwrap();
    let request = format!("dump {name} {}", target.path().display());
    let output = Run::new("debugfs")
        .args(["-R", &request])
        .arg(filesystem)
        .run()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    (!said.contains("not found")).then(|| std::fs::read(target.path()).unwrap())
}

fn is_clean(filesystem: &Path) {
    Run::new("e2fsck")
        .args(["-f", "-n"])
        .arg(filesystem)
        .run()
        .unwrap();
}

/// What the guest writes to.
fn written(root: &RootDrive) -> PathBuf {
    match &root.overlay {
        Some((path, _)) => path.clone(),
        None => root.path.clone(),
    }
}

/// What the guest does when it boots from a drive that is larger than its filesystem.
fn grow_as_the_guest_does(root: &RootDrive) {
    Run::new("resize2fs").arg(written(root)).run().unwrap();
}

/// The bytes of the filesystem that the guest writes to.
fn filesystem_bytes(root: &RootDrive) -> u64 {
    let output = Run::new("dumpe2fs").arg("-h").arg(written(root)).run();
    let said = String::from_utf8(output.unwrap().stdout).unwrap();
    let field = |name: &str| -> u64 {
        let line = said.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    };
    field("Block count:") * field("Block size:")
}

fn conforms(test: &str, place: &Place, driver: &dyn StorageDriver) {
    if !place.allows(test, driver) {
        return;
    }
    let layer = place.layer();
    let image = std::fs::read(&layer.image).unwrap();
    let folder = layer.file.parent().unwrap().to_owned();

    driver.create(&layer).unwrap();
    assert_eq!(layer.file.metadata().unwrap().mode() & 0o777, 0o600);
    assert!(
        driver.create(&layer).is_err(),
        "a layer that is there is never made again"
    );
    let root = driver.open(&layer).unwrap();
    assert_eq!(root, driver.open(&layer).unwrap());
    let first = written(&root);
    is_clean(&first);
    grow_as_the_guest_does(&root);
    is_clean(&first);
    put(&first, "mine", b"written by the guest");
    driver.close(&layer.owner).unwrap();
    driver.close(&layer.owner).unwrap();
    assert!(banger_host::storage::allocated(&layer.file).unwrap() > 0);

    let layer = Layer {
        precious: true,
        ..layer
    };
    let root = driver.open(&layer).unwrap();
    assert_eq!(
        get(&written(&root), "mine").unwrap(),
        b"written by the guest"
    );
    let below = if root.own { &root.path } else { &layer.image };
    assert_eq!(get(below, "from-image").unwrap(), b"as the image has it");
    is_clean(&written(&root));
    let before = filesystem_bytes(&root);
    driver.close(&layer.owner).unwrap();

    // More room, and what is there stays.
    let layer = Layer {
        overlay_bytes: 2 * OVERLAY_BYTES,
        ..layer
    };
    driver.grow(&layer).unwrap();
    driver.grow(&layer).unwrap();
    let root = driver.open(&layer).unwrap();
    grow_as_the_guest_does(&root);
    assert_eq!(filesystem_bytes(&root), before + OVERLAY_BYTES);
    assert_eq!(
        get(&written(&root), "mine").unwrap(),
        b"written by the guest"
    );
    is_clean(&written(&root));
    driver.close(&layer.owner).unwrap();

    // What a reset that was broken off leaves.
    std::fs::write(fresh_beside(&layer.file), "torn").unwrap();
    driver.reset(&layer).unwrap();
    let root = driver.open(&layer).unwrap();
    assert_eq!(get(&written(&root), "mine"), None);
    is_clean(&written(&root));
    driver.close(&layer.owner).unwrap();

    // A creation that was broken off: made anew, unless it may hold data.
    let torn = std::fs::OpenOptions::new().write(true).open(&layer.file);
    torn.unwrap().set_len(700).unwrap();
    assert!(driver.open(&layer).is_err());
    assert_eq!(layer.file.metadata().unwrap().len(), 700);
    let layer = Layer {
        precious: false,
        ..layer
    };
    is_clean(&written(&driver.open(&layer).unwrap()));
    driver.close(&layer.owner).unwrap();
    std::fs::remove_file(&layer.file).unwrap();
    is_clean(&written(&driver.open(&layer).unwrap()));
    driver.close(&layer.owner).unwrap();

    assert!(image == std::fs::read(&layer.image).unwrap());
    let left: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["overlay.img"]);
}

#[test]
fn every_driver_conforms_in_an_ordinary_folder() {
    for storage in Storage::ALL {
        conforms(
            "every_driver_conforms_in_an_ordinary_folder",
            &Place::folder(),
            drivers().driver(storage),
        );
    }
}

#[test]
fn every_driver_conforms_on_xfs_and_btrfs_which_share_blocks() {
    let test = "every_driver_conforms_on_xfs_and_btrfs_which_share_blocks";
    for (mkfs, name) in [("mkfs.xfs", "XFS"), ("mkfs.btrfs", "btrfs")] {
        let Some(place) = Place::mounted(test, mkfs) else {
            continue;
        };
        let (images, vms) = place.layer_folders();
        let facts = StorageFacts::measure(&images, &vms);
        let root = place.root();
        assert_eq!(
            facts.reflink,
            Ok(format!("{} is {name}", root.display())),
            "a new {name} shares blocks"
        );
        for storage in Storage::ALL {
            conforms(test, &place, drivers().driver(storage));
            for folder in [images.clone(), vms.clone()] {
                std::fs::remove_dir_all(folder).unwrap();
            }
        }
    }
}

#[test]
fn a_reflink_takes_no_room_for_what_the_image_holds() {
    let test = "a_reflink_takes_no_room_for_what_the_image_holds";
    let Some(place) = Place::mounted(test, "mkfs.xfs") else {
        return;
    };
    let layer = place.layer();
    let filler = vec![0x5a; 32 << 20];
    put(&layer.image, "filler", &filler);
    let used = || {
        rustix::fs::syncfs(std::fs::File::open(place.root()).unwrap()).unwrap();
        let space = banger_host::storage::space(&place.root()).unwrap();
        space.total - space.available
    };
    let before = used();
    drivers().driver(Storage::Reflink).create(&layer).unwrap();
    let taken = used().saturating_sub(before);
    assert!(taken < 1 << 20, "{taken} bytes");
    assert_eq!(get(&layer.file, "filler").unwrap(), filler);
}

#[test]
fn an_overlay_over_another_image_is_refused() {
    let place = Place::folder();
    let layer = place.layer();
    let drivers = drivers();
    let overlay = drivers.driver(Storage::Overlay);
    overlay.create(&layer).unwrap();
    let other = Layer {
        image_digest: "another".to_owned(),
        ..layer
    };
    let error = overlay.open(&other).unwrap_err();
    assert!(error.message.contains("calm-otter"), "{}", error.message);
}
