//! When a VM that fills the host is paused, and when it goes on: before a write is lost, with room between the two, and
//! asked no more often than the headroom makes necessary.

/// What a guest may write in a second, in bytes, where nothing limits it: more than a usual disk takes.
pub const UNLIMITED_WRITES: u64 = 1 << 30;

/// Never asked more often than this, in milliseconds.
pub const SHORTEST_MS: u64 = 20;
/// Never asked less often than this, in milliseconds.
const LONGEST_MS: u64 = 60_000;
/// How often it is asked whether a paused VM may go on, in milliseconds.
const PAUSED_MS: u64 = 1_000;

/// The room at which VMs that grow are paused is between these, in bytes, or a tenth of a small filesystem.
const PAUSE_ROOM: std::ops::RangeInclusive<u64> = (128 << 20)..=(1 << 30);

/// What is to be done about a filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// There is room: all may go on.
    Ok,
    /// Those that grow are paused; those that are paused stay so.
    PauseGrowing,
    /// The last room: all that may write are paused.
    PauseAll,
    /// Nobody is paused anew, and nobody goes on yet.
    Hold,
}

/// A verdict, and when to ask again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watermark {
    /// What is to be done now.
    pub verdict: Verdict,
    /// When to ask again, in milliseconds.
    pub next_check_ms: u64,
}

/// The free bytes of a filesystem of `total` bytes at which VMs that grow are paused. All are at half of it, and
/// those that are paused go on at twice.
pub fn pause_at(total: u64) -> u64 {
    (total / 50)
        .clamp(*PAUSE_ROOM.start(), *PAUSE_ROOM.end())
        .min(total / 10)
}

/// Judges a filesystem with `free` of `total` bytes, on which the running VMs together may write `write_limit` bytes a
/// second; `paused` says that one is paused for its sake.
pub fn filesystem(free: u64, total: u64, write_limit: u64, paused: bool) -> Watermark {
    let pause = pause_at(total);
    let verdict = if free <= pause / 2 {
        Verdict::PauseAll
    } else if free <= pause {
        Verdict::PauseGrowing
    } else if paused && free < pause.saturating_mul(2) {
        Verdict::Hold
    } else {
        Verdict::Ok
    };
    let mut next_check_ms = match verdict {
        // Below the mark it is zero that must not be reached.
        Verdict::PauseAll | Verdict::PauseGrowing => time_to_write(free, write_limit),
        Verdict::Ok | Verdict::Hold => time_to_write(free - pause, write_limit),
    };
    if paused {
        next_check_ms = next_check_ms.min(PAUSED_MS);
    }
    Watermark {
        verdict,
        next_check_ms: next_check_ms.clamp(SHORTEST_MS, LONGEST_MS),
    }
}

/// Half of the milliseconds that writing `bytes` takes at least.
fn time_to_write(bytes: u64, write_limit: u64) -> u64 {
    let milliseconds = u128::from(bytes) * 500 / u128::from(write_limit.max(1));
    u64::try_from(milliseconds).unwrap_or(u64::MAX)
}

/// Whether it helps who needs `needed` bytes, and found no room where `free` are, to remove what the trash holds there.
pub const fn trash_would_do(needed: u64, free: u64, held: u64) -> bool {
    free < needed.saturating_add(CREATE_ROOM) && needed <= free.saturating_add(held)
}

/// What making a VM takes at most beside its layer, in bytes: small files, and what the filesystem needs for itself.
const CREATE_ROOM: u64 = 64 << 20;

/// What is to be done about a snapshot's copy-on-write file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CowVerdict {
    /// There is room in it.
    Ok,
    /// It is to be grown to so many bytes.
    Grow(u64),
    /// The kernel has dropped the snapshot: nothing helps.
    Full,
}

/// How large a copy-on-write file is at first, and by how much it grows, in bytes. Its room is reserved on the host,
/// so that the kernel never fails to write to it.
pub const COW_STEP: u64 = 512 << 20;
/// A VM whose copy-on-write file is fuller than this and cannot be grown is paused, in percent.
pub const COW_PAUSE_PERCENT: u64 = 95;
/// A copy-on-write file is grown when it is fuller than this, in percent.
const COW_GROW_PERCENT: u64 = 80;

/// The bytes that a copy-on-write file can ever need for a snapshot of `bytes` bytes: every chunk of 4 KiB once, and
/// 16 bytes about each.
pub const fn cow_most(bytes: u64) -> u64 {
    bytes + bytes / 256 + (1 << 20)
}

/// The size in bytes at which the copy-on-write file of a snapshot of `bytes` bytes begins.
pub fn cow_first(bytes: u64) -> u64 {
    COW_STEP.min(cow_most(bytes))
}

/// Judges a copy-on-write file of `size` bytes, of which `used` are taken, and which will never need more than `most`.
pub fn cow(used: u64, size: u64, most: u64) -> CowVerdict {
    if used >= size {
        CowVerdict::Full
    } else if used >= percent(size, COW_GROW_PERCENT) && size < most {
        // By more the faster it fills: a step, or a quarter of what is there.
        CowVerdict::Grow(size.saturating_add(COW_STEP.max(size / 4)).min(most))
    } else {
        CowVerdict::Ok
    }
}

/// Whether a VM whose copy-on-write file could not be grown must be paused now.
pub fn cow_must_pause(used: u64, size: u64) -> bool {
    used >= percent(size, COW_PAUSE_PERCENT)
}

/// When to ask again how full a copy-on-write file is, in milliseconds.
pub fn cow_next_check_ms(used: u64, size: u64, write_limit: u64) -> u64 {
    let mark = percent(size, COW_GROW_PERCENT);
    let headroom = if used < mark {
        mark - used
    } else {
        size - used.min(size)
    };
    time_to_write(headroom, write_limit).clamp(SHORTEST_MS, LONGEST_MS)
}

/// For how many milliseconds a copy-on-write file that nobody can look at, or grow, is surely not fuller than where its
/// VM must be paused.
pub fn cow_safe_ms(used: u64, size: u64, write_limit: u64) -> u64 {
    let headroom = percent(size, COW_PAUSE_PERCENT).saturating_sub(used);
    time_to_write(headroom, write_limit).saturating_mul(2)
}

fn percent(of: u64, percent: u64) -> u64 {
    // Whole hundredths first: sizes are far larger, and nothing overflows.
    of / 100 * percent
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    #[test]
    fn a_filesystem_with_room_is_looked_at_rarely() {
        let mark = filesystem(500 * GIB, 1000 * GIB, UNLIMITED_WRITES, false);
        assert_eq!((mark.verdict, mark.next_check_ms), (Verdict::Ok, 60_000));
        let mark = filesystem(11 * GIB, 100 * GIB, UNLIMITED_WRITES, false);
        assert_eq!((mark.verdict, mark.next_check_ms), (Verdict::Ok, 5_000));
    }

    #[test]
    fn growing_vms_are_paused_first_then_all_and_go_on_only_with_room_to_spare() {
        let at = |free, paused| filesystem(free, 100 * GIB, UNLIMITED_WRITES, paused).verdict;
        assert_eq!(pause_at(100 * GIB), GIB);
        assert_eq!(at(GIB + 1, false), Verdict::Ok);
        assert_eq!(at(GIB, false), Verdict::PauseGrowing);
        assert_eq!(at(GIB / 2, true), Verdict::PauseAll);
        assert_eq!(at(GIB + 1, true), Verdict::Hold);
        assert_eq!(at(2 * GIB, true), Verdict::Ok);
    }

    #[test]
    fn the_trash_is_kept_where_it_would_not_help() {
        assert!(trash_would_do(512 * MIB, 400 * MIB, 200 * MIB));
        // Another filesystem is full.
        assert!(!trash_would_do(512 * MIB, 100 * GIB, 200 * MIB));
        // All of it is not enough.
        assert!(!trash_would_do(50 * GIB, 10 * GIB, 20 * GIB));
        assert!(trash_would_do(0, 0, 1));
    }

    #[test]
    fn a_small_filesystem_keeps_a_tenth() {
        assert_eq!(pause_at(64 * MIB), 64 * MIB / 10);
        let mark = filesystem(60 * MIB, 64 * MIB, UNLIMITED_WRITES, false);
        assert_eq!((mark.verdict, mark.next_check_ms), (Verdict::Ok, 26));
    }

    #[test]
    fn a_copy_on_write_file_grows_at_four_fifths_until_it_can_hold_everything() {
        let most = cow_most(10 * GIB);
        assert_eq!(cow(0, COW_STEP, most), CowVerdict::Ok);
        assert_eq!(cow(410 * MIB, 512 * MIB, most), CowVerdict::Grow(GIB));
        assert_eq!(cow(9 * GIB, 10 * GIB, most), CowVerdict::Grow(most));
        assert_eq!(cow(10 * GIB, most, most), CowVerdict::Ok);
        assert_eq!(cow(GIB, GIB, most), CowVerdict::Full);
        assert!(!cow_must_pause(480 * MIB, 512 * MIB) && cow_must_pause(490 * MIB, 512 * MIB));
        assert_eq!(cow_first(16 * MIB), cow_most(16 * MIB));
        assert_eq!(cow_next_check_ms(0, 512 * MIB, UNLIMITED_WRITES), 199);
    }

    #[test]
    fn a_copy_on_write_file_that_nobody_looks_at_is_safe_until_its_vm_could_have_filled_it() {
        let safe = |used, size| cow_safe_ms(used * MIB, size * MIB, UNLIMITED_WRITES);
        assert_eq!((safe(0, 512), safe(490, 512), safe(512, 512)), (474, 0, 0));
        // There is time for another try after one that failed.
        assert!(safe(409, 512) > cow_next_check_ms(409 * MIB, 512 * MIB, UNLIMITED_WRITES));
    }

    proptest! {
        #[test]
        fn no_guest_takes_a_filesystem_to_zero(
            total in MIB..(1_u64 << 50),
            part in 0.0..1.0_f64,
            limit in 1_u64..(1 << 34),
            paused: bool,
        ) {
            let free = (total as f64 * part) as u64;
            let mark = filesystem(free, total, limit, paused);
            // Who writes as fast as it may has not used up the headroom when it is looked at again.
            if mark.next_check_ms > SHORTEST_MS {
                let written = u128::from(limit) * u128::from(mark.next_check_ms) / 1000;
                let floor = if mark.verdict == Verdict::Ok { pause_at(total) } else { 0 };
                prop_assert!(written <= u128::from(free - floor.min(free)));
            }
        }

        #[test]
        fn a_copy_on_write_file_never_shrinks_and_never_exceeds_its_most(
            used in 0..(1_u64 << 45),
            size in 1..(1_u64 << 45),
            bytes in 0..(1_u64 << 45),
        ) {
            let most = cow_most(bytes);
            if let CowVerdict::Grow(to) = cow(used, size, most) {
                prop_assert!(to > size && to <= most);
            }
        }
    }
}
