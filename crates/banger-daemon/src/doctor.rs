//! `banger doctor`: what this host can do, and what to do about what it cannot.

use crate::drivers::describe_kvm;
use crate::host_boot;
use crate::network::{HOST_NAMES_ROUTED, PortProblem, Repaired, network_error};
use crate::server::App;
use crate::world::ModeReason;
use banger_api::daemon::{Check, Mode, Verdict};
use banger_api::error::ErrorBody;
use banger_api::host::Mended;
use banger_api::network::WayOut;
use banger_host::net::keeper::{KeeperError, probe_namespaces};
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

/// Puts right what differs from the records, and removes what is left over. VMs that are stopped have nothing on the
/// host but that.
pub(crate) async fn repair(app: &App) -> Mended {
    let mut mended = Mended::default();
    match app.world.network.repair().await {
        Ok(Repaired { done, left }) => {
            let name = |vm| app.registry.describe(vm);
            mended
                .done
                .extend(done.into_iter().map(|mend| match mend.vm.map(name) {
                    Some(name) => format!("VM `{name}`: {}", mend.what),
                    None => mend.what,
                }));
            mended
                .left
                .extend(left.into_iter().map(|(vm, error)| match vm.map(name) {
                    Some(name) => ErrorBody {
                        message: format!("VM `{name}`: {}", error.message),
                        ..error
                    },
                    None => error,
                }));
        }
        Err(error) => mended.left.push(network_error(&error)),
    }
    match crate::ledger::remove_left_over(app).await {
        Ok(removed) => {
            mended.done.extend(removed.done);
            mended.left.extend(removed.left);
        }
        Err(error) => mended.left.push(error),
    }
    for left in &mut mended.left {
        if left.hints.is_empty() {
            left.hints.push(
                "`banger daemon logs` tells more, `banger doctor` what this host lacks".to_owned(),
            );
        }
    }
    mended
}

fn look(app: &App) -> Vec<Check> {
    let world = &app.world;
    let mut checks = Vec::new();
    checks.push(mode(world.mode, &world.mode_reason));
    if world.mode != Mode::Root {
        checks.push(namespaces(probe_namespaces(&world.programs.keeper)));
    }
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
    for (program, package, needed) in [
        ("ssh", "openssh-client", Verdict::Bad),
        ("nft", "nftables", Verdict::Bad),
        // Only `image build` needs it.
        ("mmdebstrap", "mmdebstrap", Verdict::Note),
    ] {
        checks.push(installed(program, package, needed));
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

fn mode(mode: Mode, reason: &ModeReason) -> Check {
    let means = match mode {
        Mode::Root => "root: the host reaches guests by address",
        Mode::Helper => {
            "helper: `banger-helper` does what only root may, so the host reaches guests by address"
        }
        Mode::Rootless => "rootless: guests are reached through the daemon (`banger vm ssh`)",
    };
    let message = format!("{means}; {}", reason.why);
    check("mode", Verdict::Good, message, reason.hint)
}

/// An ordinary user's network is in a user namespace.
fn namespaces(probed: Result<(), KeeperError>) -> Check {
    const SUBJECT: &str = "user namespaces";
    let error = match probed {
        Ok(()) => return check(SUBJECT, Verdict::Good, "this user may make them", None),
        Err(KeeperError::NotReady { why }) => why,
        Err(error) => {
            let message = format!("cannot find out: {}", banger_host::error_chain(&error));
            return check(SUBJECT, Verdict::Bad, message, None);
        }
    };
    // Where a setting forbids them, the keeper says what helps after it.
    let (why, hint) = match error.split_once("; ") {
        Some((why, hint)) => (why, Some(hint)),
        None => (error.as_str(), None),
    };
    let message = format!("no VM gets a network: {why}");
    check(SUBJECT, Verdict::Bad, message, hint)
}

/// `needed` is what it means that it is missing.
fn installed(program: &str, package: &str, needed: Verdict) -> Check {
    match banger_host::exec::find(program) {
        Some(path) => check(program, Verdict::Good, path.display().to_string(), None),
        None => {
            let message = match needed {
                Verdict::Bad => "not installed",
                Verdict::Good | Verdict::Note => {
                    "not installed: `banger image build` needs it, and nothing else"
                }
            };
            let hint = format!("`sudo apt-get install {package}`");
            check(program, needed, message, Some(&hint))
        }
    }
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
    for problem in &now.problems {
        checks.push(closed_port(problem, &app.registry.describe(problem.vm)));
    }
    checks.extend(now.host_names.as_deref().map(names));
    checks
}

/// A published port that is closed, though its VM runs.
fn closed_port(problem: &PortProblem, vm: &str) -> Check {
    let message = format!(
        "{} ({}) of VM `{vm}` is closed: {}",
        problem.listen, problem.protocol, problem.why
    );
    let then = "`banger doctor --repair` opens it when the place is free";
    let hints = problem.hints.iter().map(String::as_str).chain([then]);
    let hint = hints.collect::<Vec<_>>().join("; ");
    check("port", Verdict::Bad, message, Some(&hint))
}

/// Whether the host's own programs find guests by name.
fn names(said: &str) -> Check {
    if said == HOST_NAMES_ROUTED {
        return check("names", Verdict::Good, said, None);
    }
    let message = format!("the host's programs do not find names below `.vm`: {said}");
    let hint = "`banger vm ssh` needs none of it; `banger dns status` shows the server";
    check("names", Verdict::Note, message, Some(hint))
}

/// What keeps guests from the internet, if anything.
fn way_out(way_out: WayOut) -> Vec<Check> {
    match way_out {
        WayOut::Closed => Vec::new(),
        WayOut::Failed { why, hints } => {
            let again = "`banger doctor --repair` tries again then";
            let hints = hints.iter().map(String::as_str).chain([again]);
            let hint = hints.collect::<Vec<_>>().join("; ");
            let message = format!("guests do not reach the internet: {why}");
            vec![check("nat", Verdict::Bad, message, Some(&hint))]
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use banger_core::publish::Protocol;

    #[test]
    fn forbidden_user_namespaces_are_bad_and_come_with_what_helps() {
        let why = "user namespaces are not allowed for this user: AppArmor restricts them (a setting); as root run \
                   `sysctl -w it=0`";
        let check = namespaces(Err(KeeperError::NotReady {
            why: why.to_owned(),
        }));
        assert_eq!(check.verdict, Verdict::Bad);
        assert!(
            check
                .message
                .ends_with("AppArmor restricts them (a setting)"),
            "{check:?}"
        );
        assert_eq!(check.hint.unwrap(), "as root run `sysctl -w it=0`");
        assert_eq!(namespaces(Ok(())).verdict, Verdict::Good);
    }

    #[test]
    fn what_only_an_image_needs_is_a_note() {
        let missing = installed("banger-has-no-such-program", "mmdebstrap", Verdict::Note);
        assert_eq!(missing.verdict, Verdict::Note);
        assert!(missing.message.contains("image build"), "{missing:?}");
        assert!(missing.hint.unwrap().contains("apt-get install mmdebstrap"));
        let missing = installed("banger-has-no-such-program", "nftables", Verdict::Bad);
        assert_eq!(missing.verdict, Verdict::Bad);
    }

    #[test]
    fn a_mode_is_told_with_its_reason() {
        let reason = ModeReason {
            why: "there is no `banger-helper` here".to_owned(),
            hint: Some("`sudo make install`"),
        };
        let check = mode(Mode::Rootless, &reason);
        assert!(
            check
                .message
                .ends_with("; there is no `banger-helper` here"),
            "{check:?}"
        );
        assert_eq!(check.hint.as_deref(), reason.hint);
    }

    #[test]
    fn a_closed_port_names_its_vm_and_what_helps_before_it_is_tried_again() {
        let problem = PortProblem {
            vm: "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a".parse().unwrap(),
            protocol: Protocol::Tcp,
            listen: "127.0.0.1:8080".parse().unwrap(),
            why: "address in use".to_owned(),
            hints: vec!["`ss -ltnp` shows who listens".to_owned()],
        };
        let check = closed_port(&problem, "otter");
        assert_eq!(check.verdict, Verdict::Bad);
        assert_eq!(
            check.message,
            "127.0.0.1:8080 (tcp) of VM `otter` is closed: address in use"
        );
        assert!(check.hint.unwrap().starts_with("`ss -ltnp`"));
    }

    #[test]
    fn a_failed_way_out_says_what_helps_before_it_is_tried_again() {
        let failed = WayOut::Failed {
            why: "no `pasta`".to_owned(),
            hints: vec!["install passt".to_owned()],
        };
        let checks = way_out(failed);
        let hint = checks[0].hint.as_ref().unwrap();
        assert!(hint.starts_with("install passt; "), "{hint}");
    }

    #[test]
    fn names_that_the_host_does_not_find_are_a_note() {
        assert_eq!(names(HOST_NAMES_ROUTED).verdict, Verdict::Good);
        let note = names("`busctl` is not installed");
        assert_eq!(note.verdict, Verdict::Note);
        assert!(note.message.contains("busctl"), "{note:?}");
    }
}
