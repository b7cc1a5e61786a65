//! `banger doctor`: what this host can do, and what to do about what it cannot.

use crate::drivers::describe_kvm;
use crate::host_boot;
use crate::server::App;
use banger_api::daemon::{Check, Mode, Verdict};
use banger_api::host::Mended;
use banger_api::network::WayOut;
use banger_host::net::pasta;
use banger_host::probe;
use banger_image::image::ImageManifest;
use banger_image::image::ROOT_IMAGE;

fn check(subject: &str, verdict: Verdict, message: impl Into<String>, hint: Option<&str>) -> Check {
    Check {
        subject: subject.to_owned(),
        verdict,
        message: message.into(),
        hint: hint.map(str::to_owned),
    }
}

/// Looks at everything.
pub(crate) async fn run(app: &App) -> Vec<Check> {
    let looked = app.clone();
    let mut checks = tokio::task::spawn_blocking(move || look(&looked))
        .await
        .unwrap_or_default();
    checks.extend(network(app).await);
    for notice in &app.world.notices {
        checks.push(check("start-up", Verdict::Note, notice.clone(), None));
    }
    checks
}

/// Puts right what differs from the records. VMs that are stopped have nothing on the host but what is left over.
pub(crate) async fn repair(app: &App) -> Mended {
    let mut mended = Mended::default();
    match app.world.network.repair().await {
        Ok(done) => mended.done.extend(done),
        Err(error) => mended.left.push(banger_host::error_chain(&error)),
    }
    let objects = match crate::ledger::list(app).await {
        Ok(objects) => objects,
        Err(error) => {
            mended.left.push(error.message);
            return mended;
        }
    };
    for object in objects.iter().filter(|object| !object.expected) {
        let text = format!("{} {} of {}", object.kind, object.name, object.owner);
        if object.kind != "tap" {
            mended.left.push(text);
            continue;
        }
        match app.world.network.release(object.name.clone()).await {
            Ok(()) => mended.done.push(format!("removed {text}")),
            Err(error) => mended
                .left
                .push(format!("{text}: {}", banger_host::error_chain(&error))),
        }
    }
    mended
}

fn look(app: &App) -> Vec<Check> {
    let world = &app.world;
    let mut checks = Vec::new();
    checks.push(match world.mode {
        Mode::Root => check(
            "mode",
            Verdict::Good,
            "root: the host reaches guests by address",
            None,
        ),
        Mode::Helper => check(
            "mode",
            Verdict::Good,
            "helper: `banger-helper` does what only root may, so the host reaches guests by address",
            None,
        ),
        Mode::Rootless => check(
            "mode",
            Verdict::Good,
            "rootless: guests are reached through the daemon (`banger vm ssh`)",
            None,
        ),
    });
    let vmlinux = world.images.default_vmlinux();
    let kvm = world.drivers.kvm(vmlinux.as_deref());
    let text = describe_kvm(&kvm);
    checks.push(match kvm {
        probe::Verdict::Works => check("kvm", Verdict::Good, text, None),
        probe::Verdict::NoPermission { .. } => check(
            "kvm",
            Verdict::Note,
            text,
            Some("add yourself to the group that may: `sudo usermod -aG kvm $USER`, then log in again"),
        ),
        probe::Verdict::NoDevice | probe::Verdict::CannotRunGuests { .. } => {
            check("kvm", Verdict::Note, format!("{text}; guests run by software emulation"), None)
        }
    });
    let drivers = world.drivers.list(vmlinux.as_deref());
    let any = drivers.iter().any(|driver| driver.usable);
    for driver in drivers {
        let verdict = if driver.usable {
            Verdict::Good
        } else {
            Verdict::Note
        };
        let version = driver
            .version
            .map(|version| format!("{version}: "))
            .unwrap_or_default();
        checks.push(check(
            driver.driver.name(),
            verdict,
            format!("{version}{}", driver.reason),
            None,
        ));
    }
    if !any {
        checks.push(check(
            "drivers",
            Verdict::Bad,
            "no VMM can run guests here",
            Some("install QEMU: `sudo apt-get install qemu-system-x86`"),
        ));
    }
    checks.push(tun());
    for (program, package) in [
        ("ssh", "openssh-client"),
        ("nft", "nftables"),
        ("mmdebstrap", "mmdebstrap"),
    ] {
        checks.push(match banger_host::exec::find(program) {
            Some(path) => check(program, Verdict::Good, path.display().to_string(), None),
            None => check(
                program,
                Verdict::Bad,
                "not installed",
                Some(&format!("`sudo apt-get install {package}`")),
            ),
        });
    }
    if world.mode == Mode::Rootless {
        checks.push(pasta(&world.config.network.pasta()));
    }
    checks.push(match banger_host::storage::space(&world.paths.state) {
        Ok(space) if space.available < 1 << 30 => check(
            "disk",
            Verdict::Bad,
            format!(
                "{} MiB free in `{}`",
                space.available >> 20,
                world.paths.state.display()
            ),
            Some("free some space: VMs write there"),
        ),
        Ok(space) => check(
            "disk",
            Verdict::Good,
            format!("{} GiB free", space.available >> 30),
            None,
        ),
        Err(error) => check("disk", Verdict::Bad, banger_host::error_chain(&error), None),
    });
    checks.push(
        match crate::storage::choose(world, world.config.storage.choice) {
            Ok((storage, why)) => {
                check("storage", Verdict::Good, format!("{storage} ({why})"), None)
            }
            Err(error) => check(
                "storage",
                Verdict::Bad,
                error.to_string(),
                Some("set `[storage] choice` in the settings to \"auto\""),
            ),
        },
    );
    checks.push(images(app));
    checks.push(host_boot::check());
    checks
}

fn images(app: &App) -> Check {
    let images = app.world.images.images();
    let broken: Vec<String> = images
        .iter()
        .filter(|image| {
            !app.world
                .images
                .folder::<ImageManifest>(image.id)
                .join(ROOT_IMAGE)
                .is_file()
        })
        .map(|image| image.id.to_string())
        .collect();
    if !broken.is_empty() {
        return check(
            "images",
            Verdict::Bad,
            format!("the files of {} are missing", broken.join(", ")),
            None,
        );
    }
    match (images.len(), app.world.images.kernels().len()) {
        (0, _) => check(
            "images",
            Verdict::Note,
            "there is no image yet",
            Some("`banger image build`"),
        ),
        (_, 0) => check(
            "images",
            Verdict::Note,
            "there is no kernel yet",
            Some("`banger kernel import`"),
        ),
        (images, kernels) => check(
            "images",
            Verdict::Good,
            format!("{images} image(s), {kernels} kernel(s)"),
            None,
        ),
    }
}

fn tun() -> Check {
    match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
    {
        Ok(_) => check("/dev/net/tun", Verdict::Good, "can be opened", None),
        Err(error) => check(
            "/dev/net/tun",
            Verdict::Bad,
            error.to_string(),
            Some("guests need it for their network: `sudo chmod 0666 /dev/net/tun`"),
        ),
    }
}

async fn network(app: &App) -> Vec<Check> {
    let now = match app.world.network.now().await {
        Ok(now) => now,
        Err(error) => {
            return vec![check(
                "network",
                Verdict::Bad,
                banger_host::error_chain(&error),
                Some(
                    "`banger daemon logs` tells more; `banger doctor --repair` makes the network whole again",
                ),
            )];
        }
    };
    let mut checks = vec![check(
        "network",
        Verdict::Good,
        format!(
            "{} port(s) of {}",
            now.ports.len(),
            app.world.instance.pool.network()
        ),
        None,
    )];
    checks.extend(way_out(now.way_out.unwrap_or(WayOut::Closed)));
    checks
}

/// What keeps guests from the internet, if anything.
fn way_out(way_out: WayOut) -> Vec<Check> {
    match way_out {
        WayOut::Closed => Vec::new(),
        WayOut::Failed { why } => vec![check(
            "nat",
            Verdict::Bad,
            format!("guests do not reach the internet: {why}"),
            Some("`banger doctor --repair` tries again"),
        )],
        WayOut::Open { closed_by, .. } => closed_by
            .into_iter()
            .map(|closed| {
                check(
                    "nat",
                    Verdict::Bad,
                    format!(
                        "guests do not reach the internet: {} drops what they send",
                        closed.chain
                    ),
                    Some(&format!("as root: {}", closed.remedy)),
                )
            })
            .collect(),
    }
}

/// The program by which guests of an ordinary user get out.
fn pasta(program: &std::path::Path) -> Check {
    match pasta::version(program) {
        Ok(version) if version.loses_ends() => check(
            "pasta",
            Verdict::Note,
            format!(
                "{version}: releases up to 2023 may leave half-closed TCP connections of guests hanging"
            ),
            Some(
                "install a newer `passt` (Debian 13 has one), or give guests another way out: `make install` as root \
                 sets up `banger-helper`",
            ),
        ),
        Ok(version) => check("pasta", Verdict::Good, version.to_string(), None),
        Err(error) => check(
            "pasta",
            Verdict::Note,
            format!("guests have no way out: {error}"),
            Some("`sudo apt-get install passt`"),
        ),
    }
}
