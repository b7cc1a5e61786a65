//! Every endpoint of the API, once. One `impl` makes the daemon's route, the client's call and the OpenAPI item.

use crate::daemon::{Check, DaemonStatus, DriverInfo, InstallDriver, Settings, StopDaemon};
use crate::event::{Event, FollowEvents};
use crate::host::{CleanHost, HostObject, Mended};
use crate::image::{BuildImage, Image};
use crate::kernel::{ImportKernel, Kernel};
use crate::network::{ClosePort, DnsStatus, JoinVm, NetworkStatus, PublishPort};
use crate::operation::Operation;
use crate::vm::{
    ConnectVm, CreateVm, DeleteVm, JournalEntry, ListVms, Outcome, ReadLog, ResetVm, RestoreVms,
    SetVm, StopVm, UndeleteVm, Vm, WaitVm,
};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How a request goes out and a reply comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Style {
    /// One JSON value.
    Json,
    /// One JSON value a line, for as long as it takes.
    JsonLines,
    /// Raw bytes, for as long as it takes.
    Bytes,
    /// An HTTP upgrade to a two-way stream of bytes.
    Upgrade,
}

/// One operation of the API.
pub trait Endpoint {
    /// The HTTP method. `GET` and `DELETE` carry the request as a query, the others as a JSON body.
    const METHOD: &'static str;
    /// The path, with `{name}` for a parameter.
    const PATH: &'static str;
    /// Its name in the OpenAPI document.
    const NAME: &'static str;
    /// What it does, in a line.
    const SUMMARY: &'static str;
    /// How the reply comes.
    const STYLE: Style;
    /// What is asked.
    type Request: Serialize + DeserializeOwned + JsonSchema + Default + Send + 'static;
    /// What is answered; of [`Style::JsonLines`], one line.
    type Reply: Serialize + DeserializeOwned + JsonSchema + Send + 'static;
}

/// Nothing to say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// Visits every endpoint; see [`for_each`].
pub trait Visitor {
    /// Is called once an endpoint.
    fn visit<E: Endpoint>(&mut self);
}

macro_rules! endpoints {
    ($($(#[$doc:meta])+ $name:ident: $method:literal $path:literal, $operation:literal, $style:ident, $request:ty => $reply:ty, $summary:literal;)+) => {
        $(
            $(#[$doc])+
            #[derive(Debug, Clone, Copy)]
            pub struct $name;

            impl Endpoint for $name {
                const METHOD: &'static str = $method;
                const PATH: &'static str = $path;
                const NAME: &'static str = $operation;
                const SUMMARY: &'static str = $summary;
                const STYLE: Style = Style::$style;
                type Request = $request;
                type Reply = $reply;
            }
        )+

        /// Shows every endpoint to `visitor`.
        pub fn for_each(visitor: &mut impl Visitor) {
            $(visitor.visit::<$name>();)+
        }
    };
}

endpoints! {
    /// [`DaemonStatus`].
    GetDaemon: "GET" "/v1/daemon", "daemon.show", Json, Nothing => DaemonStatus, "Show the daemon";
    /// Stop the daemon.
    PostDaemonStop: "POST" "/v1/daemon/stop", "daemon.stop", Json, StopDaemon => Nothing, "Stop the daemon; VMs run on unless asked otherwise";
    /// Show the settings.
    GetSettings: "GET" "/v1/settings", "settings.show", Json, Nothing => Settings, "Show all settings as the daemon has them";
    /// Check the host.
    GetDoctor: "GET" "/v1/doctor", "doctor.run", Json, Nothing => Vec<Check>, "Check what this host can do";
    /// List the VMMs.
    GetDrivers: "GET" "/v1/drivers", "driver.list", Json, Nothing => Vec<DriverInfo>, "List the VMMs that were found";
    /// Install Firecracker.
    PostDriverInstall: "POST" "/v1/drivers/firecracker", "driver.install", Json, InstallDriver => Operation, "Install Firecracker from a release archive";
    /// Follow events.
    GetEvents: "GET" "/v1/events", "event.follow", JsonLines, FollowEvents => Event, "Follow events; resumes after a cursor";
    /// List VMs.
    GetVms: "GET" "/v1/vms", "vm.list", Json, ListVms => Vec<Vm>, "List VMs";
    /// Create a VM.
    PostVms: "POST" "/v1/vms", "vm.create", Json, CreateVm => Vm, "Create a VM, and start it if asked";
    /// Show a VM.
    GetVm: "GET" "/v1/vms/{vm}", "vm.show", Json, Nothing => Vm, "Show a VM";
    /// Change a VM.
    PatchVm: "PATCH" "/v1/vms/{vm}", "vm.set", Json, SetVm => Vm, "Change a VM; name, NAT, autostart and CPU limit whatever it does, the rest while it is stopped";
    /// Delete a VM.
    DeleteVmEndpoint: "DELETE" "/v1/vms/{vm}", "vm.delete", Json, DeleteVm => Vm, "Put a VM into the trash, or purge it";
    /// Start a VM.
    PostVmStart: "POST" "/v1/vms/{vm}/start", "vm.start", Json, Nothing => Vm, "Start a VM; answers when its VMM runs";
    /// Stop a VM.
    PostVmStop: "POST" "/v1/vms/{vm}/stop", "vm.stop", Json, StopVm => Vm, "Ask a VM to shut down, wait, then escalate";
    /// Restart a VM.
    PostVmRestart: "POST" "/v1/vms/{vm}/restart", "vm.restart", Json, StopVm => Vm, "Stop a VM, then start it";
    /// Pause a VM.
    PostVmPause: "POST" "/v1/vms/{vm}/pause", "vm.pause", Json, Nothing => Vm, "Pause a VM's vCPUs";
    /// Resume a VM.
    PostVmResume: "POST" "/v1/vms/{vm}/resume", "vm.resume", Json, Nothing => Vm, "Let a paused VM run on";
    /// Kill a VM.
    PostVmKill: "POST" "/v1/vms/{vm}/kill", "vm.kill", Json, Nothing => Vm, "End a VM's VMM at once";
    /// Wait for a VM.
    GetVmWait: "GET" "/v1/vms/{vm}/wait", "vm.wait", Json, WaitVm => Vm, "Wait until a VM is ready, running, stopped or changed";
    /// Reset a VM.
    PostVmReset: "POST" "/v1/vms/{vm}/reset", "vm.reset", Json, ResetVm => Vm, "Throw a stopped VM's overlay away; its work disk stays";
    /// Bring a VM back from the trash.
    PostVmUndelete: "POST" "/v1/vms/{vm}/undelete", "vm.undelete", Json, UndeleteVm => Vm, "Bring a VM back from the trash";
    /// Publish a port.
    PostVmPorts: "POST" "/v1/vms/{vm}/ports", "port.add", Json, PublishPort => Vm, "Lead a port of the host into a VM";
    /// Close a published port.
    DeleteVmPorts: "DELETE" "/v1/vms/{vm}/ports", "port.remove", Json, ClosePort => Vm, "Close a published port";
    /// Join two VMs.
    PostVmJoins: "POST" "/v1/vms/{vm}/joins", "network.join", Json, JoinVm => Vm, "Let two VMs reach each other";
    /// Part two VMs.
    DeleteVmJoins: "DELETE" "/v1/vms/{vm}/joins", "network.leave", Json, JoinVm => Vm, "Let two VMs reach each other no longer";
    /// Bring VMs back to what is desired.
    PostRestore: "POST" "/v1/restore", "vm.restore", Json, RestoreVms => Vec<Outcome>, "Start all stopped VMs that are to run";
    /// Empty the trash.
    PostTrashEmpty: "POST" "/v1/trash/empty", "trash.empty", Json, Nothing => Vec<Outcome>, "Remove all VMs in the trash permanently";
    /// Show the network.
    GetNetwork: "GET" "/v1/network", "network.show", Json, Nothing => NetworkStatus, "Show NAT, published ports and joins";
    /// Show the names.
    GetDns: "GET" "/v1/dns", "dns.show", Json, Nothing => DnsStatus, "Show the name server and all names";
    /// List what is on the host.
    GetHost: "GET" "/v1/host", "host.list", Json, Nothing => Vec<HostObject>, "List everything that banger has on the host";
    /// Clean the host.
    PostHostClean: "POST" "/v1/host/clean", "host.clean", Json, CleanHost => Mended, "Remove everything that banger has on the host; VMs keep their files";
    /// Repair the host.
    PostDoctorRepair: "POST" "/v1/doctor/repair", "doctor.repair", Json, Nothing => Mended, "Put right what differs from the records";
    /// Metrics.
    GetMetrics: "GET" "/v1/metrics", "metrics.show", Bytes, Nothing => Nothing, "Counters and gauges in Prometheus' text form";
    /// A VM's story.
    GetVmWhy: "GET" "/v1/vms/{vm}/why", "vm.why", Json, Nothing => Vec<JournalEntry>, "Tell what happened to a VM, step by step";
    /// A VM's logs.
    GetVmLogs: "GET" "/v1/vms/{vm}/logs", "vm.logs", Bytes, ReadLog => Nothing, "Read the console or the VMM's log";
    /// A connection to a VM.
    GetVmConnect: "GET" "/v1/vms/{vm}/connect", "vm.connect", Upgrade, ConnectVm => Nothing, "Connect to a TCP port of the guest";
    /// List images.
    GetImages: "GET" "/v1/images", "image.list", Json, Nothing => Vec<Image>, "List images";
    /// Build an image.
    PostImages: "POST" "/v1/images", "image.build", Json, BuildImage => Operation, "Build an image from distribution packages";
    /// Show an image.
    GetImage: "GET" "/v1/images/{image}", "image.show", Json, Nothing => Image, "Show an image";
    /// Delete an image.
    DeleteImage: "DELETE" "/v1/images/{image}", "image.delete", Json, Nothing => Nothing, "Delete an image that no VM uses";
    /// List kernels.
    GetKernels: "GET" "/v1/kernels", "kernel.list", Json, Nothing => Vec<Kernel>, "List kernels";
    /// Import a kernel.
    PostKernels: "POST" "/v1/kernels", "kernel.import", Json, ImportKernel => Operation, "Import a kernel from a package or a file";
    /// Delete a kernel.
    DeleteKernel: "DELETE" "/v1/kernels/{kernel}", "kernel.delete", Json, Nothing => Nothing, "Delete a kernel that no VM uses";
    /// List operations.
    GetOperations: "GET" "/v1/operations", "operation.list", Json, Nothing => Vec<Operation>, "List operations";
    /// Show an operation.
    GetOperation: "GET" "/v1/operations/{operation}", "operation.show", Json, Nothing => Operation, "Show an operation";
    /// Follow an operation.
    GetOperationFollow: "GET" "/v1/operations/{operation}/follow", "operation.follow", JsonLines, Nothing => Operation, "Follow an operation to its end";
    /// Cancel an operation.
    DeleteOperation: "DELETE" "/v1/operations/{operation}", "operation.cancel", Json, Nothing => Operation, "Cancel an operation";
}

/// `path` with its parameters filled in, percent-encoded.
pub fn fill_path(path: &str, parameters: &[(&str, &str)]) -> String {
    parameters
        .iter()
        .fold(path.to_owned(), |path, (name, value)| {
            path.replace(&format!("{{{name}}}"), &encode(value))
        })
}

/// `value` as a part of a path or query.
pub fn encode(value: &str) -> String {
    value
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                (byte as char).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_cannot_leave_its_place_in_the_path() {
        assert_eq!(
            fill_path(GetVm::PATH, &[("vm", "../daemon?x=1")]),
            "/v1/vms/..%2Fdaemon%3Fx%3D1"
        );
    }
}
