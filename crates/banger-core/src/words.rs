//! Names for VMs that were given none: an adjective and an animal.

use crate::name::VmName;

/// Adjectives, all kind.
pub const ADJECTIVES: [&str; 48] = [
    "agile", "amber", "brave", "bright", "brisk", "calm", "clever", "coral", "crisp", "curious",
    "daring", "deft", "eager", "early", "fair", "fleet", "fond", "gentle", "glad", "golden",
    "happy", "hardy", "honest", "jolly", "keen", "kind", "lively", "loyal", "lucky", "mellow",
    "merry", "mild", "neat", "nimble", "noble", "patient", "plucky", "polite", "proud", "quick",
    "quiet", "ready", "silver", "sunny", "swift", "tidy", "warm", "witty",
];

/// Animals.
pub const ANIMALS: [&str; 48] = [
    "badger", "beaver", "bison", "bobcat", "cricket", "crane", "curlew", "dingo", "dolphin",
    "falcon", "ferret", "finch", "fox", "gecko", "gibbon", "heron", "hare", "ibis", "jackal",
    "kestrel", "kiwi", "koala", "lark", "lemur", "lynx", "magpie", "marmot", "marten", "mole",
    "moose", "newt", "ocelot", "otter", "owl", "panda", "pika", "plover", "puffin", "quail",
    "raven", "robin", "seal", "stoat", "swan", "tapir", "tern", "vole", "wren",
];

/// The name that `seed` picks.
pub fn random_name(seed: u64) -> VmName {
    let adjective = ADJECTIVES[(seed % ADJECTIVES.len() as u64) as usize];
    let animal = ANIMALS[(seed / ADJECTIVES.len() as u64 % ANIMALS.len() as u64) as usize];
    VmName::new(format!("{adjective}-{animal}")).expect("the word lists hold DNS labels only")
}

/// A name that `taken` does not know: the one that `seed` picks, or the next free pair, or a numbered one.
pub fn free_name(seed: u64, taken: impl Fn(&VmName) -> bool) -> VmName {
    let pairs = (ADJECTIVES.len() * ANIMALS.len()) as u64;
    if let Some(name) = (0..pairs)
        .map(|step| random_name(seed.wrapping_add(step)))
        .find(|name| !taken(name))
    {
        return name;
    }
    (2u64..)
        .map(|number| {
            VmName::new(format!("{}-{number}", random_name(seed)))
                .expect("a short label with a number")
        })
        .find(|name| !taken(name))
        .expect("the numbers do not end")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_pair_is_reached_and_all_differ() {
        let pairs = (ADJECTIVES.len() * ANIMALS.len()) as u64;
        let names: HashSet<_> = (0..pairs).map(random_name).collect();
        assert_eq!(names.len() as u64, pairs);
    }

    #[test]
    fn a_taken_name_is_stepped_over_even_when_all_pairs_are_taken() {
        let taken = random_name(7);
        assert_ne!(free_name(7, |name| *name == taken), taken);
        let numbered = free_name(7, |name| name.as_str().matches('-').count() == 1);
        assert_eq!(numbered.as_str(), format!("{taken}-2"));
    }
}
