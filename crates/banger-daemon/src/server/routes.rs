//! The handlers of the endpoints that answer one JSON value.

use super::streams;
use super::{App, Call, json_route, raw_route, to_its_end};
use crate::blocking::blocking;
use crate::convert;
use crate::vm::{Answer, Ask, Handle};
use crate::world::World;
use crate::{doctor, images, install};
use axum::Router;
use banger_api::daemon::{DaemonStatus, Settings, StopDaemon};
use banger_api::endpoint::*;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::operation::Operation;
use banger_api::version::VERSION;
use banger_api::vm::{
    CreateVm, DeleteVm, JournalEntry, ListVms, SetVm, StopVm, Vm, WaitFor, WaitVm,
};
use banger_core::decide::Request;
use banger_core::phase::Phase;
use banger_image::image::ImageManifest;
use banger_image::kernel::KernelManifest;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use uuid::Uuid;

/// How long a wait lasts that says nothing else.
const WAIT: Duration = Duration::from_secs(60);

/// All routes.
pub(super) fn router() -> Router<App> {
    let router = Router::new().route("/v1/openapi.json", axum::routing::get(openapi));
    let router = super::host_routes::routes(router);
    let router = json_route::<GetDaemon, _>(router, daemon);
    let router = json_route::<PostDaemonStop, _>(router, stop_daemon);
    let router = json_route::<GetSettings, _>(router, |call| async move {
        let world = &call.app.world;
        Ok(Settings {
            file: world.paths.config_file().display().to_string(),
            settings: world
                .config
                .settings(world.instance.pool.network(), world.mode),
        })
    });
    let router =
        json_route::<GetDoctor, _>(
            router,
            |call| async move { Ok(doctor::run(&call.app).await) },
        );
    let router = json_route::<GetDrivers, _>(router, drivers);
    let router = json_route::<PostDriverInstall, _>(router, |call| async move {
        install::start(&call.app.world, call.request)
    });
    let router = json_route::<GetVms, _>(router, list_vms);
    let router = json_route::<PostVms, _>(router, create_vm);
    let router = json_route::<GetVm, _>(router, |call| async move {
        let handle = call.app.registry.find(call.parameter("vm"))?;
        Ok(convert::vm(&call.app.world, &handle.latest()))
    });
    let router = json_route::<PatchVm, _>(router, set_vm);
    let router = json_route::<DeleteVmEndpoint, _>(router, |call| to_its_end(delete_vm(call)));
    let router = json_route::<PostVmStart, _>(router, |call| simple(call, Request::Start));
    let router = json_route::<PostVmStop, _>(router, |call| stop(call, Request::Stop));
    let router = json_route::<PostVmRestart, _>(router, |call| stop(call, Request::Restart));
    let router = json_route::<PostVmPause, _>(router, |call| simple(call, Request::Pause));
    let router = json_route::<PostVmResume, _>(router, |call| simple(call, Request::Resume));
    let router = json_route::<PostVmKill, _>(router, |call| simple(call, Request::Kill));
    let router = json_route::<GetVmWait, _>(router, wait);
    let router = json_route::<GetVmWhy, _>(router, why);
    let router =
        json_route::<GetImages, _>(
            router,
            |call| async move { Ok(call.app.world.images.images()) },
        );
    let router = json_route::<PostImages, _>(router, |call| async move {
        images::start_build(&call.app.world, call.request)
    });
    let router = json_route::<GetImage, _>(router, |call| async move {
        call.app.world.images.image(call.parameter("image"))
    });
    let router = json_route::<DeleteImage, _>(router, |call| async move {
        to_its_end(async move {
            let describe = |vm| call.app.registry.describe(vm);
            let images = &call.app.world.images;
            images
                .delete::<ImageManifest>(call.parameter("image"), describe)
                .await?;
            Ok(Nothing {})
        })
        .await
    });
    let router =
        json_route::<GetKernels, _>(
            router,
            |call| async move { Ok(call.app.world.images.kernels()) },
        );
    let router = json_route::<PostKernels, _>(router, |call| async move {
        images::start_import(&call.app.world, call.request)
    });
    let router = json_route::<DeleteKernel, _>(router, |call| async move {
        to_its_end(async move {
            let describe = |vm| call.app.registry.describe(vm);
            let images = &call.app.world.images;
            images
                .delete::<KernelManifest>(call.parameter("kernel"), describe)
                .await?;
            Ok(Nothing {})
        })
        .await
    });
    let router = json_route::<GetOperations, _>(router, |call| async move {
        Ok(call.app.world.operations.list())
    });
    let router = json_route::<GetOperation, _>(router, |call| async move {
        let operation = call.app.world.operations.follow(operation_id(&call)?);
        operation
            .map(|state| state.borrow().clone())
            .ok_or_else(|| no_operation(&call))
    });
    let router = json_route::<DeleteOperation, _>(router, cancel_operation);
    let router =
        raw_route::<GetOperationFollow, _>(router, |call, _| streams::follow_operation(call));
    let router = raw_route::<GetEvents, _>(router, |call, _| streams::events(call));
    let router = raw_route::<GetVmLogs, _>(router, |call, _| streams::logs(call));
    raw_route::<GetVmConnect, _>(router, streams::connect)
}

async fn openapi() -> axum::Json<serde_json::Value> {
    axum::Json(banger_api::openapi::document())
}

async fn daemon(call: Call<Nothing>) -> Result<DaemonStatus, ErrorBody> {
    let world = &call.app.world;
    let vms = call.app.registry.list(false);
    let live = vms
        .iter()
        .filter(|handle| handle.view.borrow().phase.is_live())
        .count();
    Ok(DaemonStatus {
        version: VERSION.to_owned(),
        build: world.build.clone(),
        schema: crate::store::SCHEMA_VERSION,
        pid: std::process::id(),
        instance: world.instance.id,
        mode: world.mode,
        mode_why: world.mode_reason.to_string(),
        pool: world.instance.pool,
        started_at: world.started_at,
        vms: vms.len(),
        live,
        state_dir: world.paths.state.display().to_string(),
        notices: world.notices.clone(),
    })
}

/// No VM starts while it is there. A daemon that does not go down after all, because a VM does not end or whoever asked
/// has left, starts VMs again.
struct Draining(Arc<World>);

impl Draining {
    fn begin(world: &Arc<World>) -> Self {
        world.draining.store(true, Ordering::Relaxed);
        Self(Arc::clone(world))
    }
}

impl Drop for Draining {
    fn drop(&mut self) {
        if !*self.0.shutdown.borrow() {
            self.0.draining.store(false, Ordering::Relaxed);
        }
    }
}

async fn stop_daemon(call: Call<StopDaemon>) -> Result<Nothing, ErrorBody> {
    let world = &call.app.world;
    if !call.request.vms {
        world.shutdown.send_replace(true);
        return Ok(Nothing {});
    }
    // A VM that started now would be missed.
    let _draining = Draining::begin(world);
    let mut live = call.app.registry.list(false);
    live.retain(|handle| handle.view.borrow().phase.is_live());
    let going_down = call.request.going_down;
    let stop = move |handle: Handle| async move {
        let ask = |request| Ask {
            going_down,
            ..Ask::new(request)
        };
        let stopped = handle.ask(ask(Request::Stop)).await;
        if stopped.is_err() {
            handle.ask(ask(Request::Kill)).await
        } else {
            stopped
        }
    };
    let stops: Vec<_> = live
        .into_iter()
        .map(|handle| tokio::spawn(stop(handle)))
        .collect();
    let mut all = Ok(Nothing {});
    for stop in stops {
        let stopped = stop.await;
        let stopped =
            stopped.unwrap_or_else(|error| Err(ErrorBody::from_error(ErrorCode::Internal, &error)));
        if let Err(error) = stopped {
            all = all.and(Err(error));
        }
    }
    if all.is_ok() {
        world.shutdown.send_replace(true);
    }
    all
}

async fn drivers(call: Call<Nothing>) -> Result<Vec<banger_api::daemon::DriverInfo>, ErrorBody> {
    let world = call.app.world;
    blocking(move || {
        let vmlinux = world.images.default_vmlinux();
        world.drivers.list(vmlinux.as_deref())
    })
    .await
}

async fn list_vms(call: Call<ListVms>) -> Result<Vec<Vm>, ErrorBody> {
    let world = &call.app.world;
    let mut vms: Vec<Vm> = call
        .app
        .registry
        .list(call.request.trash)
        .iter()
        .map(|h| convert::vm(world, &h.view.borrow()))
        .collect();
    vms.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(vms)
}

pub(super) fn going_down<T>(call: &Call<T>) -> Result<(), ErrorBody> {
    if *call.app.world.shutdown.borrow() || call.app.world.draining.load(Ordering::Relaxed) {
        return Err(convert::going_down());
    }
    Ok(())
}

async fn create_vm(call: Call<CreateVm>) -> Result<Vm, ErrorBody> {
    going_down(&call)?;
    let Call {
        app,
        request,
        idempotency_key,
        ..
    } = call;
    let world = app.world.clone();
    let created = to_its_end(async move {
        app.registry
            .create(&app.world, request, idempotency_key)
            .await
    });
    Ok(convert::vm(&world, &created.await?.latest()))
}

async fn ask<T>(call: &Call<T>, ask: Ask) -> Result<Vm, ErrorBody> {
    let handle = call.app.registry.find(call.parameter("vm"))?;
    let answer: Answer = handle.ask(ask).await;
    Ok(convert::vm(&call.app.world, &answer?))
}

async fn simple(call: Call<Nothing>, request: Request) -> Result<Vm, ErrorBody> {
    if request == Request::Start {
        going_down(&call)?;
    }
    ask(&call, Ask::new(request)).await
}

async fn stop(call: Call<StopVm>, request: Request) -> Result<Vm, ErrorBody> {
    if request == Request::Restart {
        going_down(&call)?;
    }
    let timeout = call
        .request
        .timeout_ms
        .map_or(Ask::STOP_TIMEOUT, Duration::from_millis);
    ask(
        &call,
        Ask {
            timeout,
            ..Ask::new(request)
        },
    )
    .await
}

async fn set_vm(call: Call<SetVm>) -> Result<Vm, ErrorBody> {
    let request = &call.request;
    let nothing = SetVm {
        generation: request.generation,
        ..SetVm::default()
    };
    if *request == nothing {
        return Err(
            ErrorBody::new(ErrorCode::InvalidRequest, "nothing to set was named")
                .hint("`banger vm set --help` shows what can be set"),
        );
    }
    let handle = call.app.registry.find(call.parameter("vm"))?;
    let image = match &request.image {
        Some(query) => Some(call.app.world.images.find(query)?),
        None => None,
    };
    let kernel = match &request.kernel {
        Some(query) => {
            let found = call.app.world.images.find::<KernelManifest>(query)?;
            Some(found.manifest.id)
        }
        None => None,
    };
    let change = convert::change(request, image, kernel)?;
    let registry = call.app.registry.clone();
    let changed = to_its_end(async move { registry.change(&handle, change).await });
    Ok(convert::vm(&call.app.world, &changed.await?))
}

async fn delete_vm(call: Call<DeleteVm>) -> Result<Vm, ErrorBody> {
    let DeleteVm { force, purge } = call.request;
    ask(&call, Ask::new(Request::Delete { force, purge })).await
}

async fn wait(call: Call<WaitVm>) -> Result<Vm, ErrorBody> {
    let handle = call.app.registry.find(call.parameter("vm"))?;
    let WaitVm {
        condition,
        timeout_ms,
        after,
    } = call.request;
    let limit = timeout_ms.map_or(WAIT, Duration::from_millis);
    let mut view = handle.view.clone();
    let from = after.unwrap_or_else(|| view.borrow().revision);
    let reached = |view: &crate::vm::View| {
        !view.purged
            && match condition {
                WaitFor::Ready => matches!(view.phase, Phase::Running { ready: true, .. }),
                WaitFor::Running => {
                    matches!(view.phase, Phase::Running { .. } | Phase::Paused { .. })
                }
                WaitFor::Stopped => matches!(view.phase, Phase::Stopped { .. }),
                WaitFor::Change => view.revision > from,
            }
    };
    // A VM that is stopped does not become ready by itself.
    let hopeless = |view: &crate::vm::View| {
        view.purged
            || matches!(condition, WaitFor::Ready | WaitFor::Running)
                && matches!(view.phase, Phase::Stopped { .. })
    };
    let name = view.borrow().record.name.clone();
    let waited =
        tokio::time::timeout(limit, view.wait_for(|view| reached(view) || hopeless(view))).await;
    match waited {
        Ok(Ok(view)) if view.purged => Err(ErrorBody::new(
            ErrorCode::NotFound,
            format!("VM `{name}` was removed permanently"),
        )
        .hint("`banger vm list` shows those that are there")),
        Ok(Ok(view)) if !reached(&view) => {
            let why = match &view.phase {
                Phase::Stopped { why } => why.to_string(),
                other => other.name().to_owned(),
            };
            Err(ErrorBody::new(
                ErrorCode::WrongPhase,
                format!("VM `{name}` is stopped: {why}"),
            )
            .hint(format!(
                "`banger vm start {name}` starts it, `banger vm why {name}` tells what happened"
            )))
        }
        Ok(Ok(view)) => Ok(convert::vm(&call.app.world, &view)),
        Ok(Err(_)) => Err(ErrorBody::new(
            ErrorCode::NotFound,
            format!("VM `{name}` is gone"),
        )),
        Err(_) => {
            let wanted = match condition {
                WaitFor::Ready => "ready",
                WaitFor::Running => "running",
                WaitFor::Stopped => "stopped",
                WaitFor::Change => "changed",
            };
            let message = format!(
                "VM `{name}` was not {wanted} within {} s; it is {}",
                limit.as_secs_f32(),
                handle.latest().phase.name()
            );
            Err(ErrorBody::new(ErrorCode::TimedOut, message).hint(format!(
                "`banger vm logs {name}` and `banger vm why {name}` tell what it is doing"
            )))
        }
    }
}

async fn why(call: Call<Nothing>) -> Result<Vec<JournalEntry>, ErrorBody> {
    let handle = call.app.registry.find(call.parameter("vm"))?;
    call.app
        .world
        .store
        .journal(handle.id)
        .await
        .map_err(|error| images::store_error(&error))
}

fn no_operation<T>(call: &Call<T>) -> ErrorBody {
    let query = call.parameter("operation").escape_debug().to_string();
    ErrorBody::new(
        ErrorCode::NotFound,
        format!("there is no operation `{query}`"),
    )
}

pub(super) fn operation_id<T>(call: &Call<T>) -> Result<Uuid, ErrorBody> {
    call.parameter("operation")
        .parse()
        .map_err(|_| no_operation(call))
}

async fn cancel_operation(call: Call<Nothing>) -> Result<Operation, ErrorBody> {
    let id = operation_id(&call)?;
    call.app
        .world
        .operations
        .cancel(id)
        .await
        .ok_or_else(|| no_operation(&call))
}
