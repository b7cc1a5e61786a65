//! Counters and gauges in Prometheus' text form.

use crate::server::App;
use std::collections::BTreeMap;
use std::fmt::Write;

/// All of them, as they are now.
pub(crate) fn text(app: &App) -> String {
    let mut phases: BTreeMap<&'static str, u64> = BTreeMap::new();
    for handle in app.registry.list(false) {
        *phases.entry(handle.view.borrow().phase.name()).or_default() += 1;
    }
    let trashed = app.registry.list(true).len() as u64;
    let mut text = String::new();
    gauge(
        &mut text,
        "banger_vms",
        "VMs by phase, without those in the trash.",
        phases
            .iter()
            .map(|(phase, count)| (format!("{{phase=\"{phase}\"}}"), *count)),
    );
    let once = |count: u64| [(String::new(), count)].into_iter();
    gauge(
        &mut text,
        "banger_trashed_vms",
        "VMs in the trash.",
        once(trashed),
    );
    gauge(
        &mut text,
        "banger_images",
        "Images.",
        once(app.world.images.images().len() as u64),
    );
    gauge(
        &mut text,
        "banger_kernels",
        "Kernels.",
        once(app.world.images.kernels().len() as u64),
    );
    gauge(
        &mut text,
        "banger_start_time_seconds",
        "When the daemon started, in seconds since 1970.",
        once(app.world.started_at.as_second().unsigned_abs()),
    );
    text
}

fn gauge(text: &mut String, name: &str, help: &str, values: impl Iterator<Item = (String, u64)>) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
    for (labels, value) in values {
        let _ = writeln!(text, "{name}{labels} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_is_help_type_and_a_line_a_value() {
        let mut text = String::new();
        let values = [("{a=\"b\"}".to_owned(), 3), (String::new(), 4)];
        gauge(&mut text, "x", "An x.", values.into_iter());
        assert_eq!(text, "# HELP x An x.\n# TYPE x gauge\nx{a=\"b\"} 3\nx 4\n");
    }
}
