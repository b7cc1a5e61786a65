//! The files of a guest's identity as text: pure, so that every rule has a test.

use std::net::Ipv4Addr;

const BLOCK_BEGIN: &str = "# banger: begin, written at every boot";
const BLOCK_END: &str = "# banger: end";

/// `existing` with banger's block of lines at its top; what stands outside the block is the person's and stays.
pub(crate) fn with_block(existing: &str, lines: &[String]) -> String {
    let mut text = format!("{BLOCK_BEGIN}\n");
    for line in lines {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str(BLOCK_END);
    text.push('\n');
    // A begin without its end is only a line, so that a damaged file loses nothing.
    let whole_block = existing
        .find(BLOCK_BEGIN)
        .is_some_and(|at| existing[at..].contains(BLOCK_END));
    let mut inside = false;
    for line in existing.lines() {
        match line {
            BLOCK_BEGIN if whole_block => inside = true,
            BLOCK_END => inside = false,
            BLOCK_BEGIN => {}
            line if !inside => {
                text.push_str(line);
                text.push('\n');
            }
            _ => {}
        }
    }
    text
}

/// `/etc/hosts` with this host's names at its top.
pub(crate) fn hosts(existing: &str, hostname: &str, address: Option<Ipv4Addr>) -> String {
    let own = address.unwrap_or(Ipv4Addr::new(127, 0, 1, 1));
    with_block(
        existing,
        &[
            "127.0.0.1 localhost".to_owned(),
            format!("{own} {hostname}"),
            "::1 localhost ip6-localhost ip6-loopback".to_owned(),
        ],
    )
}

/// `/etc/resolv.conf` for these name servers.
pub(crate) fn resolv_conf(servers: &[Ipv4Addr]) -> String {
    let mut text = "# Written by banger at every boot.\n".to_owned();
    for server in servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    text
}

/// Whether a word names a drive after the first: `/dev/vdb` to `/dev/vdz`, partitions too.
fn is_stale_device(word: &str) -> bool {
    let Some(rest) = word.strip_prefix("/dev/vd") else {
        return false;
    };
    let mut bytes = rest.bytes();
    bytes
        .next()
        .is_some_and(|letter| (b'b'..=b'z').contains(&letter))
        && bytes.all(|byte| byte.is_ascii_digit())
}

/// Whether an `/etc/fstab` has nothing but comments.
pub(crate) fn fstab_is_empty(text: &str) -> bool {
    text.lines()
        .map(str::trim_start)
        .all(|line| line.is_empty() || line.starts_with('#'))
}

/// `/etc/fstab` with lines commented out that would mount what this VM does not have: drives after the first and,
/// where `/` is an overlay, the root itself. `None` if there are none.
pub(crate) fn fstab(existing: &str, root_is_overlay: bool) -> Option<String> {
    let mut changed = false;
    let mut text = String::with_capacity(existing.len() + 64);
    for line in existing.lines() {
        let mut words = line.split_whitespace();
        let device = words.next().unwrap_or_default();
        let target = words.next().unwrap_or_default();
        let stale = !device.starts_with('#')
            && (is_stale_device(device) || (root_is_overlay && target == "/"));
        if stale {
            changed = true;
            text.push_str("# banger: ");
        }
        text.push_str(line);
        text.push('\n');
    }
    changed.then_some(text)
}

/// Whether a systemd mount unit mounts a drive after the first.
pub(crate) fn is_stale_mount_unit(unit: &str) -> bool {
    unit.lines()
        .filter_map(|line| line.trim().strip_prefix("What"))
        .filter_map(|rest| rest.trim_start().strip_prefix('='))
        .any(|device| is_stale_device(device.trim()))
}

/// `/etc/machine-id` for a VM id: its 32 hexadecimal digits. `None` if it is not such an id.
pub(crate) fn machine_id(vm_id: &str) -> Option<String> {
    let digits: String = vm_id
        .chars()
        .filter(|c| *c != '-')
        .map(|c| c.to_ascii_lowercase())
        .collect();
    let right = digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    right.then(|| digits + "\n")
}

/// 32 bytes from 64 hexadecimal digits.
pub(crate) fn seed(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> = text
        .chars()
        .map(|c| c.to_digit(16).map(|digit| digit as u8))
        .collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits
        .chunks_exact(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect();
    if digits.len() == 64 {
        bytes.try_into().ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_put_on_top_and_replaced_the_next_time() {
        let once = with_block("mine\n", &["a".to_owned()]);
        assert_eq!(once, format!("{BLOCK_BEGIN}\na\n{BLOCK_END}\nmine\n"));
        let twice = with_block(&once, &["b".to_owned()]);
        assert_eq!(twice, format!("{BLOCK_BEGIN}\nb\n{BLOCK_END}\nmine\n"));
        assert_eq!(with_block(&twice, &["b".to_owned()]), twice);
    }

    #[test]
    fn a_block_without_its_end_does_not_swallow_what_follows() {
        let damaged = format!("{BLOCK_BEGIN}\nold\nmine\n");
        let text = with_block(&damaged, &["new".to_owned()]);
        assert!(text.contains("\nmine\n"), "{text}");
        assert_eq!(text.matches(BLOCK_BEGIN).count(), 1);
    }

    #[test]
    fn hosts_names_the_guest_by_its_address_and_keeps_a_persons_lines() {
        let text = hosts(
            "10.0.0.9 nas\n",
            "calm-otter",
            Some(Ipv4Addr::new(172, 16, 0, 2)),
        );
        assert!(text.contains("127.0.0.1 localhost\n172.16.0.2 calm-otter\n::1 localhost"));
        assert!(text.ends_with("10.0.0.9 nas\n"));
        assert!(hosts("", "x", None).contains("127.0.1.1 x\n"));
    }

    #[test]
    fn resolv_conf_lists_the_servers_in_order() {
        let text = resolv_conf(&[Ipv4Addr::new(172, 16, 0, 1), Ipv4Addr::new(9, 9, 9, 9)]);
        assert!(text.ends_with("nameserver 172.16.0.1\nnameserver 9.9.9.9\n"));
    }

    #[test]
    fn fstab_lines_of_drives_after_the_first_are_commented_out() {
        let old = "# a comment\n/dev/vda / ext4 defaults 0 1\n/dev/vdb /home ext4 defaults 0 2\n /dev/vdc1 none swap sw\nUUID=1 /srv ext4\n";
        let new = "# a comment\n/dev/vda / ext4 defaults 0 1\n# banger: /dev/vdb /home ext4 defaults 0 2\n# banger:  /dev/vdc1 none swap sw\nUUID=1 /srv ext4\n";
        assert_eq!(fstab(old, false).as_deref(), Some(new));
    }

    #[test]
    fn an_fstab_without_such_lines_is_left_alone_and_rewriting_ends() {
        assert_eq!(fstab("/dev/vda / ext4 defaults 0 1\n", false), None);
        assert_eq!(fstab("", true), None);
        assert_eq!(fstab("# banger: /dev/vdb /home ext4\n", false), None);
        assert_eq!(fstab("/dev/vdbogus /x ext4\n", false), None);
    }

    #[test]
    fn the_root_line_goes_only_where_the_root_is_an_overlay() {
        let root = "UUID=1 / ext4 errors=remount-ro 0 1\n";
        assert_eq!(fstab(root, false), None);
        assert_eq!(fstab(root, true), Some(format!("# banger: {root}")));
    }

    #[test]
    fn a_mount_unit_is_stale_when_it_mounts_a_drive_after_the_first() {
        assert!(is_stale_mount_unit("[Mount]\nWhat=/dev/vdb\nWhere=/home\n"));
        assert!(is_stale_mount_unit("[Mount]\n What = /dev/vdc1\n"));
        assert!(!is_stale_mount_unit("[Mount]\nWhat=/dev/vda\n"));
        assert!(!is_stale_mount_unit("[Mount]\nWhat=server:/home\n"));
    }

    #[test]
    fn a_machine_id_is_the_ids_digits() {
        let id = machine_id("0192F3A4-1111-7222-8333-444455556666");
        assert_eq!(id.as_deref(), Some("0192f3a4111172228333444455556666\n"));
        assert_eq!(machine_id("short"), None);
        assert_eq!(machine_id("zz92f3a4111172228333444455556666"), None);
    }

    #[test]
    fn a_seed_is_exactly_64_hexadecimal_digits() {
        assert_eq!(seed(&"0f".repeat(32)), Some([15; 32]));
        assert_eq!(seed(&"0f".repeat(31)), None);
        assert_eq!(seed(&"0f".repeat(33)), None);
        assert_eq!(seed(&"xy".repeat(32)), None);
    }
}
