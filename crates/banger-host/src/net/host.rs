//! The operations that need root on the host: the veth between it and the instance's namespace.
#![allow(unused)]

use crate::op::HostOp;
use banger_core::addr::{Ipv4Net, Pool};
use banger_core::id::InstanceId;
use rustix::fd::BorrowedFd;

/// What a host operation could not do.
#[derive(Debug, thiserror::Error)]
#[error("not done yet")]
pub struct HostOpError;

/// Does `op`; `namespace` is the instance's network namespace, which [`HostOp::AttachVeth`] needs.
///
/// # Errors
/// The kernel refuses, or a route of somebody else overlaps the pool.
pub fn perform(op: &HostOp, namespace: Option<BorrowedFd<'_>>) -> Result<(), HostOpError> {
    Err(HostOpError)
}

/// Every IPv4 network that this host has a route to or an address of (default routes are left out), for the choice of
/// a pool.
///
/// # Errors
/// The kernel's tables cannot be read.
pub fn host_routes() -> Result<Vec<Ipv4Net>, HostOpError> {
    Err(HostOpError)
}
