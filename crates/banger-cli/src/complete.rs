//! Names for the shell's completion. Never starts the daemon, never takes longer than a blink, never complains.

use crate::context::Context;
use banger_api::endpoint::{Endpoint, GetImages, GetKernels, GetVms, Nothing};
use banger_api::vm::ListVms;
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
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

fn vms_in(trash: bool) -> ArgValueCandidates {
    ArgValueCandidates::new(move || {
        ask::<GetVms>(&ListVms { trash }).map_or_else(Vec::new, |vms| {
            let help = |vm: &banger_api::vm::Vm| format!("{} {}", vm.phase.name(), vm.address);
            vms.iter()
                .map(|vm| candidate(vm.name.as_str(), help(vm)))
                .collect()
        })
    })
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
