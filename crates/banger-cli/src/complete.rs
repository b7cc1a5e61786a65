//! Names for the shell's completion. Never starts the daemon, never takes longer than a blink, never complains.

use crate::context::Context;
use banger_api::endpoint::{Endpoint, GetImages, GetKernels, GetVms, Nothing};
use banger_api::vm::{ListVms, Vm};
use banger_core::publish::{Protocol, PublishedPort};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

const LIMIT: Duration = Duration::from_millis(200);

/// Completes names of VMs.
pub(crate) fn vms() -> ArgValueCandidates {
    vms_in(false)
}

/// Completes names of VMs in the trash.
pub(crate) fn trashed_vms() -> ArgValueCandidates {
    vms_in(true)
}

/// Completes names of VMs; of those in the trash as well where the line has `--purge`.
pub(crate) fn purgeable_vms() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let purge = words().any(|word| word == "--purge");
        let shelves: &[bool] = if purge { &[false, true] } else { &[false] };
        shelves.iter().flat_map(|&trash| named_vms(trash)).collect()
    })
}

/// Completes places on the host where the VMs that the line names have ports; all VMs' if it names none.
pub(crate) fn places() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let all = ask::<GetVms>(&ListVms { trash: false }).unwrap_or_default();
        let words: Vec<String> = words().collect();
        let is_named = |vm: &Vm| words.iter().any(|word| *word == *vm.name.as_str());
        let any = all.iter().any(is_named);
        let chosen = all.iter().filter(|vm| !any || is_named(vm));
        chosen.flat_map(places_of).collect()
    })
}

fn places_of(vm: &Vm) -> Vec<CompletionCandidate> {
    let ports = vm.spec.ports.iter();
    ports
        .map(|port| candidate(&place(port), format!("{} {}", vm.name, port.guest_port)))
        .collect()
}

/// As short as it can be typed: bash takes a colon for the end of a word.
fn place(port: &PublishedPort) -> String {
    let place = match port.listen.ip() {
        IpAddr::V4(Ipv4Addr::LOCALHOST) => port.listen.port().to_string(),
        _ => port.listen.to_string(),
    };
    match port.protocol {
        Protocol::Tcp => place,
        Protocol::Udp => format!("{place}/udp"),
    }
}

/// The line that is completed: this process has all of its words as arguments.
fn words() -> impl Iterator<Item = String> {
    std::env::args_os().filter_map(|word| word.into_string().ok())
}

fn vms_in(trash: bool) -> ArgValueCandidates {
    ArgValueCandidates::new(move || named_vms(trash))
}

fn named_vms(trash: bool) -> Vec<CompletionCandidate> {
    let vms = ask::<GetVms>(&ListVms { trash }).unwrap_or_default();
    let help = |vm: &Vm| match vm.trashed_at {
        Some(_) => "in the trash".to_owned(),
        None => format!("{} {}", vm.phase.name(), vm.address),
    };
    vms.iter()
        .map(|vm| candidate(vm.name.as_str(), help(vm)))
        .collect()
}

/// Completes names of images.
pub(crate) fn images() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let images = ask::<GetImages>(&Nothing {}).unwrap_or_default();
        let named = images
            .iter()
            .filter_map(|image| Some((image.name.as_ref()?, &image.source)));
        named
            .map(|(name, source)| candidate(name.as_str(), source.clone()))
            .collect()
    })
}

/// Completes names of kernels.
pub(crate) fn kernels() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let kernels = ask::<GetKernels>(&Nothing {}).unwrap_or_default();
        let named = kernels
            .iter()
            .filter_map(|kernel| Some((kernel.name.as_ref()?, &kernel.release)));
        named
            .map(|(name, release)| candidate(name.as_str(), release.clone()))
            .collect()
    })
}

fn candidate(name: &str, help: String) -> CompletionCandidate {
    CompletionCandidate::new(name).help(Some(help.into()))
}

fn ask<E: Endpoint>(request: &E::Request) -> Option<E::Reply> {
    let client = Context::from_env().ok()?.client();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    let reply = runtime
        .block_on(async { tokio::time::timeout(LIMIT, client.call::<E>(&[], request)).await });
    reply.ok()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_completed_to_what_closes_the_port() {
        for (port, typed) in [
            ("8080:80", "8080"),
            ("53:53/udp", "53/udp"),
            ("0.0.0.0:8080:80", "0.0.0.0:8080"),
            ("[::1]:53:53/udp", "[::1]:53/udp"),
        ] {
            let port: PublishedPort = port.parse().unwrap();
            assert_eq!(place(&port), typed);
            let closed = crate::value::place(typed).unwrap();
            assert_eq!(
                (closed.protocol, closed.listen),
                (port.protocol, port.listen)
            );
        }
    }
}
