//! Places for worlds: machines of their own, two at a time, which each world must leave as it found them.

use banger_testkit::env::TestEnv;
use banger_testkit::host::Host;
use banger_testkit::machine::{Helper, Machine, Mode};
use banger_testkit::run::eventually;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A machine, and what was on it before the first world.
pub(crate) struct Place {
    pub(crate) mode: Mode,
    pub(crate) machine: Machine,
    /// Who does what needs root, unless the worlds bring their own.
    helper: Option<Helper>,
    before: String,
}

impl Place {
    /// Makes the calling thread's machine. Nothing, and says why, where that cannot be.
    pub(crate) fn enter(test: &str, mode: Mode) -> Option<Self> {
        let machine = Machine::enter(test, mode)?;
        // Whether worlds can be made is asked once.
        drop(mode.env(test, banger_testkit::env::Vmm::Scripted(String::new()))?);
        let before = machine.network();
        let helper = (mode == Mode::Helper).then(|| Helper::start(&[]));
        Some(Self {
            mode,
            machine,
            helper,
            before,
        })
    }

    /// Another helper in place of the one that is there; only until it dies it has the `variables`.
    pub(crate) fn helper(&mut self, variables: &[(&str, &str)]) {
        // First the one, then the other.
        self.helper = None;
        self.helper = Some(Helper::start(variables));
    }

    /// Ends a world, after which nothing of it is left.
    pub(crate) fn leave(&self, env: TestEnv, at: &str) {
        let namespaces = env.host().hold_namespaces();
        super::ok(&env, &["daemon", "stop"], at);
        // What holds an ordinary user's way out ends by itself, after the keeper.
        eventually(&format!("{at}: all of the world has ended"), || {
            (env.host() == Host::default()).then_some(())
        });
        // What ends has it until it is gone.
        for namespace in &namespaces {
            eventually(&format!("{at}: {namespace:?} is left by all"), || {
                (!namespace.is_used()).then_some(())
            });
        }
        drop(env);
        self.assert_as_before(at);
    }

    pub(crate) fn assert_as_before(&self, at: &str) {
        self.machine.assert_network(&self.before, at);
    }
}

/// Ends the work of all when one fails.
struct EndAll<'a>(&'a AtomicUsize);

impl Drop for EndAll<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(usize::MAX / 2, Ordering::Relaxed);
        }
    }
}

/// Does all jobs, two at a time, each of the two in a place of its own; answers what each answered.
pub(crate) fn two_at_a_time<J: Sync, A: Send>(
    test: &str,
    mode: Mode,
    jobs: &[J],
    work: impl Fn(&mut Place, &J) -> A + Sync,
) -> Option<Vec<A>> {
    let next = AtomicUsize::new(0);
    let answers = Mutex::new(BTreeMap::new());
    let made = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let thread = std::thread::Builder::new().name(test.to_owned());
                let work = || {
                    let _end = EndAll(&next);
                    let mut place = Place::enter(test, mode)?;
                    while let Some((at, job)) = {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        jobs.get(at).map(|job| (at, job))
                    } {
                        let answer = work(&mut place, job);
                        answers.lock().unwrap().insert(at, answer);
                    }
                    Some(())
                };
                thread.spawn_scoped(scope, work).unwrap()
            })
            .collect();
        let ended = workers.into_iter().map(|worker| match worker.join() {
            Ok(made) => made.is_some(),
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ended.collect::<Vec<_>>().into_iter().all(|made| made)
    });
    let answers = answers.into_inner().unwrap();
    made.then(|| {
        assert_eq!(answers.len(), jobs.len());
        answers.into_values().collect()
    })
}
