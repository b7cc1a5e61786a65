//! Whether something listens on the ssh port.

/// Whether a line of `/proc/net/tcp` or `tcp6` is a listener on port 22.
fn is_ssh_listener(line: &str) -> bool {
    let mut words = line.split_ascii_whitespace().skip(1);
    let local = words.next().unwrap_or_default();
    let state = words.nth(1).unwrap_or_default();
    local.ends_with(":0016") && state == "0A"
}

/// Looks at the kernel's tables.
pub(crate) fn ssh_listens() -> bool {
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|path| {
        std::fs::read_to_string(path).is_ok_and(|table| table.lines().skip(1).any(is_ssh_listener))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_listener_on_port_22_counts() {
        let rest = "00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1 1 0 100";
        assert!(is_ssh_listener(&format!("   0: 00000000:0016 {rest}")));
        let six = "00000000000000000000000000000000";
        assert!(is_ssh_listener(&format!(
            "   0: {six}:0016 {six}:0000 0A 0 0"
        )));
        assert!(!is_ssh_listener(&format!("   0: 00000000:0050 {rest}")));
        assert!(!is_ssh_listener(
            "   1: 020010AC:0016 010010AC:9C40 01 00000000:00000000"
        ));
        assert!(!is_ssh_listener(""));
    }
}
