//! The way out of the namespace to the internet; the only thing that differs by mode.

use super::namespace::Namespace;
use super::{NetworkError, NetworkSetup, network_error};
use banger_api::network::{ClosedForward, WayOut};
use banger_host::net::pasta;
use banger_host::op::{HostAnswer, HostOp, NatReport};

/// Makes it, or sees to it that it is as it should be.
pub(super) fn open(setup: &NetworkSetup, namespace: &Namespace) -> Result<WayOut, NetworkError> {
    let Some(host) = &setup.host else {
        pasta::ensure(&namespace.keeper, &setup.keeper_program, &setup.pasta)?;
        return Ok(WayOut::Open {
            by: vec!["pasta".to_owned()],
            closed_by: Vec::new(),
        });
    };
    let ensure = HostOp::EnsureNat {
        instance: setup.instance,
        pool: setup.pool,
    };
    match host.perform(&ensure, &[])? {
        (HostAnswer::Nat(report), _) => Ok(told(report)),
        _ => Err(NetworkError::Answer),
    }
}

/// Closes it. `pasta` stays as long as the namespace: without an element in the sets nobody passes.
pub(super) fn close(setup: &NetworkSetup) -> Result<(), NetworkError> {
    if let Some(host) = &setup.host {
        let remove = HostOp::RemoveNat {
            instance: setup.instance,
        };
        host.perform(&remove, &[])?;
    }
    Ok(())
}

/// It could not be made.
pub(super) fn failed(error: &NetworkError) -> WayOut {
    WayOut::Failed {
        why: banger_host::error_chain(error),
        hints: network_error(error).hints,
    }
}

fn told(report: NatReport) -> WayOut {
    let closed_by = report.forward_closed_by.into_iter();
    WayOut::Open {
        by: report.uplinks,
        closed_by: closed_by
            .map(|closed| ClosedForward {
                chain: closed.chain,
                remedy: closed.remedy,
            })
            .collect(),
    }
}
