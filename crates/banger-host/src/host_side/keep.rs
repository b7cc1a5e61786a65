//! The thread that keeps what was asked of the host as it is, whoever changes it.

use super::host::{Host, Renews, Settled};
use super::resolved;
use crate::net::host::HostOpError;
use crate::net::resolver_starts::ResolverStarts;
use crate::net::watch::{Changes, Waited, Watch};
use rustix::fd::AsFd as _;
use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

/// When what could not be put right is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// A thread that keeps what was asked for as it is; it ends when this is dropped.
#[derive(Debug)]
pub struct Keeping {
    _alive: io::PipeWriter,
}

impl Host {
    /// Settles now, and again whenever somebody changes the packet filter, links, routes or forwarding, or starts the
    /// resolver. It does so in a thread of its own until the answer is dropped, or until `report`, which gets every
    /// outcome, breaks off. After a [`HostOpError::Watch`] nobody keeps it any more.
    ///
    /// # Errors
    /// Changes cannot be heard of, or the process is out of threads.
    pub fn keep(
        &self,
        mut report: impl FnMut(Result<Settled, HostOpError>) -> ControlFlow<()> + Send + 'static,
    ) -> io::Result<Keeping> {
        let watch = Watch::open()?.with_resolver(ResolverStarts::open()?);
        let (until, alive) = io::pipe()?;
        let host = self.clone();
        std::thread::Builder::new()
            .name("keep-host".to_owned())
            .spawn(move || {
                // A resolver that was started while nobody kept anything knows nothing.
                let mut changes = Changes {
                    resolver: true,
                    ..Changes::default()
                };
                // Later than at the start it is only mended: two keepers of different versions would never be done.
                let mut renews = Renews::All;
                loop {
                    let settled = host.settle_after(changes, renews);
                    renews = Renews::Nobody;
                    let failed = settled
                        .as_ref()
                        .map_or(true, |done| !done.failed.is_empty());
                    let owed = owed(changes, &settled);
                    if report(settled).is_break() {
                        return;
                    }
                    // What failed is tried again though nobody changes anything.
                    let limit = failed.then_some(TRY_AGAIN);
                    changes = match watch.wait(limit, Some(until.as_fd())) {
                        Ok(Waited::Changed(changes)) => Changes {
                            resolver: changes.resolver || owed.resolver,
                            ..changes
                        },
                        Ok(Waited::TimedOut) => owed,
                        Ok(Waited::Ended) => return,
                        Err(error) => {
                            let _ = report(Err(HostOpError::Watch(error)));
                            return;
                        }
                    };
                }
            })?;
        Ok(Keeping { _alive: alive })
    }

    fn settle_after(&self, changes: Changes, renews: Renews) -> Result<Settled, HostOpError> {
        let mut work = self.work(renews)?;
        let mut settled = work.settle()?;
        if !changes.resolver {
            return Ok(settled);
        }
        let told = work.told()?;
        drop(work);
        for (instance, link, guests, dns) in told {
            if let Err(error) = resolved::route(link, guests, dns) {
                let error = HostOpError::Resolved(error);
                settled.failed.push((instance, error));
                // All are told again soon; until then rules have to be kept.
                break;
            }
        }
        Ok(settled)
    }
}

/// What is to be done again of what was to be done after `changes`: all else is measured in any case.
fn owed(changes: Changes, settled: &Result<Settled, HostOpError>) -> Changes {
    let resolver = changes.resolver
        && match settled {
            Ok(done) => done
                .failed
                .iter()
                .any(|(_, error)| matches!(error, HostOpError::Resolved(_))),
            Err(_) => true,
        };
    Changes {
        resolver,
        ..Changes::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::ExecError;
    use banger_core::id::InstanceId;
    use uuid::Uuid;

    #[test]
    fn a_resolver_that_could_not_be_told_is_told_again_and_only_then() {
        let started = Changes {
            resolver: true,
            network: true,
            ruleset: true,
        };
        let settled = |error: Option<HostOpError>| {
            let instance = InstanceId::from_uuid(Uuid::now_v7());
            let failed = error.map(|error| (instance, error)).into_iter().collect();
            Ok(Settled {
                failed,
                ..Settled::default()
            })
        };
        let not_told = || {
            let program = "busctl".to_owned();
            Some(HostOpError::Resolved(ExecError::Missing { program }))
        };
        let again = Changes {
            resolver: true,
            ..Changes::default()
        };
        assert_eq!(owed(started, &settled(not_told())), again);
        assert_eq!(owed(again, &settled(not_told())), again);
        assert_eq!(owed(started, &settled(None)), Changes::default());
        let failed = || HostOpError::Watch(io::Error::other("no"));
        assert_eq!(owed(started, &settled(Some(failed()))), Changes::default());
        // Not even tried.
        assert_eq!(owed(started, &Err(failed())), again);
        assert_eq!(owed(Changes::default(), &Err(failed())), Changes::default());
    }
}
