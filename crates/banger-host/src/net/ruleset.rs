//! The ruleset as it must be, and its way back there.
//!
//! The keeper alone changes it, so what the sets hold is kept here and not read back. Whether somebody else changed
//! anything is seen from the kernel's generation number: one request, however much there is.

use super::nft::elements::{Change, Elements};
use super::nft::{Fingerprint, NftError, Rules, Shape};

/// What must be loaded.
#[derive(Debug, Default)]
pub(crate) struct Ruleset {
    loaded: Option<Loaded>,
    elements: Elements,
    repairs: u64,
}

#[derive(Debug, Clone, Copy)]
struct Loaded {
    shape: Shape,
    /// What it looks like whole; unknown if somebody else changed something while it was loaded.
    fingerprint: Option<Fingerprint>,
    /// When it was last seen whole; unknown if somebody else changed something since.
    generation: Option<u32>,
}

impl Ruleset {
    /// What is loaded; nothing before the first time.
    pub(crate) fn shape(&self) -> Option<Shape> {
        self.loaded.map(|loaded| loaded.shape)
    }

    /// What the sets must hold.
    pub(crate) fn elements(&self) -> &Elements {
        &self.elements
    }

    /// How often it was found changed by somebody else.
    pub(crate) fn repairs(&self) -> u64 {
        self.repairs
    }

    /// Loads it if it is not loaded in this shape, or no longer whole.
    pub(crate) fn ensure(&mut self, rules: &mut Rules, shape: Shape) -> Result<(), NftError> {
        if self.shape() == Some(shape) {
            self.repair(rules)?;
            return Ok(());
        }
        self.load(rules, shape)
    }

    /// Loads it again if it is no longer whole, and says whether it had to. Does nothing before the first load.
    pub(crate) fn repair(&mut self, rules: &mut Rules) -> Result<bool, NftError> {
        let Some(loaded) = &mut self.loaded else {
            return Ok(false);
        };
        let generation = rules.generation()?;
        if loaded.generation == Some(generation) {
            return Ok(false);
        }
        loaded.generation = None;
        if Some(rules.fingerprint()?) == loaded.fingerprint && rules.hold(&self.elements)? {
            loaded.generation = Some(generation);
            return Ok(false);
        }
        let shape = loaded.shape;
        self.load(rules, shape)?;
        self.repairs += 1;
        Ok(true)
    }

    fn load(&mut self, rules: &mut Rules, shape: Shape) -> Result<(), NftError> {
        let known = self.loaded.filter(|loaded| loaded.shape == shape);
        let known = known.and_then(|loaded| loaded.fingerprint);
        let before = rules.generation()?;
        rules.load(shape, &self.elements)?;
        let (fingerprint, generation) = match known {
            // It is measured at the next occasion.
            Some(fingerprint) => (Some(fingerprint), None),
            // The first time it is taken as it was loaded, if nobody else was at work: else at the next occasion, of
            // which the watch tells, it is loaded once more.
            None => {
                let fingerprint = rules.fingerprint()?;
                let after = rules.generation()?;
                let ours_alone = before.wrapping_add(1) == after;
                (
                    ours_alone.then_some(fingerprint),
                    ours_alone.then_some(after),
                )
            }
        };
        self.loaded = Some(Loaded {
            shape,
            fingerprint,
            generation,
        });
        Ok(())
    }

    /// Changes what the sets must hold, and the sets. An error leaves what must be, for the next repair.
    pub(crate) fn change(
        &mut self,
        rules: &mut Rules,
        change: impl FnOnce(&mut Elements) -> Change,
    ) -> Result<(), NftError> {
        let repaired = self.repair(rules);
        let change = change(&mut self.elements);
        if change.is_empty() {
            return repaired.map(|_| ());
        }
        let Some(loaded) = &mut self.loaded else {
            return Ok(());
        };
        let before = loaded.generation.take();
        repaired?;
        if let Err(error) = rules.change(&change) {
            // Somebody took the table away just now.
            let shape = loaded.shape;
            return self.load(rules, shape).map_err(|_| error.into());
        }
        let after = rules.generation()?;
        // A step of more than one is not ours alone.
        if before.map(|before| before.wrapping_add(1)) == Some(after) {
            loaded.generation = Some(after);
        }
        Ok(())
    }
}
