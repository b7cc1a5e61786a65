//! The handlers of the endpoints about the host: network, names, ledger, trash, restore, metrics.

use super::{App, Call, json_route, raw_route, to_its_end};
use crate::blocking::blocking;
use crate::network::status;
use crate::record::VmRecord;
use crate::vm::{Ask, Change};
use crate::{convert, doctor, ledger, metrics, names};
use axum::Router;
use axum::response::IntoResponse;
use banger_api::endpoint::*;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::network::{ClosePort, JoinVm, PublishPort};
use banger_api::vm::{ResetVm, UndeleteVm, Vm};
use banger_core::decide::Request;
use banger_core::name::VmName;
use banger_core::spec::{LivePatch, VmSpecPatch};
use jiff::Timestamp;

pub(super) fn routes(router: Router<App>) -> Router<App> {
    let router = json_route::<PostVmReset, _>(router, |call| to_its_end(reset(call)));
    let router = json_route::<PostVmUndelete, _>(router, undelete);
    let router = json_route::<PostVmPorts, _>(router, publish);
    let router = json_route::<DeleteVmPorts, _>(router, unpublish);
    let router = json_route::<PostVmJoins, _>(router, |call| join(call, true));
    let router = json_route::<DeleteVmJoins, _>(router, |call| join(call, false));
    let router = json_route::<PostRestore, _>(router, |call| async move {
        super::routes::going_down(&call)?;
        let autostart = call.request.autostart;
        let wanted = move |record: &VmRecord| !autostart || record.spec.autostart;
        to_its_end(async move { Ok(call.app.registry.restore(wanted).await) }).await
    });
    let router = json_route::<PostTrashEmpty, _>(router, |call| {
        to_its_end(async move { Ok(call.app.registry.empty_trash(Timestamp::now()).await) })
    });
    let router =
        json_route::<GetNetwork, _>(
            router,
            |call| async move { status::status(&call.app).await },
        );
    let router =
        json_route::<GetDns, _>(
            router,
            |call| async move { Ok(names::status(&call.app).await) },
        );
    let router =
        json_route::<GetHost, _>(router, |call| async move { ledger::list(&call.app).await });
    let router = json_route::<PostHostClean, _>(router, |call| {
        to_its_end(async move { ledger::clean(&call.app, &call.request).await })
    });
    let router = json_route::<PostDoctorRepair, _>(router, |call| {
        to_its_end(async move { Ok(doctor::repair(&call.app).await) })
    });
    raw_route::<GetMetrics, _>(router, |call, _| async move {
        let kind = "text/plain; version=0.0.4";
        let headers = [(axum::http::header::CONTENT_TYPE, kind)];
        Ok((headers, metrics::text(&call.app)).into_response())
    })
}

async fn reset(call: Call<ResetVm>) -> Result<Vm, ErrorBody> {
    let handle = call.app.registry.find(call.parameter("vm"))?;
    let storage = match call.request.storage {
        None => None,
        Some(choice) => {
            let world = call.app.world.clone();
            // Trying what the filesystem can do takes system calls on the disk.
            let chosen = blocking(move || crate::storage::choose(&world, choice)).await?;
            Some(chosen.map_err(|error| crate::storage::impossible(&error))?)
        }
    };
    let ask = Ask {
        storage,
        ..Ask::new(Request::Reset)
    };
    Ok(convert::vm(&call.app.world, &handle.ask(ask).await?))
}

async fn undelete(call: Call<UndeleteVm>) -> Result<Vm, ErrorBody> {
    let handle = call.app.registry.find_trashed(call.parameter("vm"))?;
    let name = call.request.name.map(VmName::new).transpose();
    let name = name.map_err(|error| convert::invalid(&error))?;
    let registry = call.app.registry.clone();
    let back = to_its_end(async move { registry.undelete(&handle, name).await });
    Ok(convert::vm(&call.app.world, &back.await?))
}

async fn change<T>(call: &Call<T>, live: LivePatch) -> Result<Vm, ErrorBody> {
    let handle = call.app.registry.find(call.parameter("vm"))?;
    let change = Change {
        patch: VmSpecPatch {
            live,
            ..VmSpecPatch::default()
        },
        ..Change::default()
    };
    let registry = call.app.registry.clone();
    let changed = to_its_end(async move { registry.change(&handle, change).await });
    Ok(convert::vm(&call.app.world, &changed.await?))
}

async fn publish(call: Call<PublishPort>) -> Result<Vm, ErrorBody> {
    let publish = Some(call.request.0.clone());
    convert::published(&call.request.0)?;
    let live = LivePatch {
        publish,
        ..LivePatch::default()
    };
    change(&call, live).await
}

async fn unpublish(call: Call<ClosePort>) -> Result<Vm, ErrorBody> {
    let ClosePort { protocol, listen } = call.request;
    let handle = call.app.registry.find(call.parameter("vm"))?;
    let record = handle.latest().record;
    let known = record.spec.ports.iter();
    if !known
        .clone()
        .any(|port| (port.protocol, port.listen) == (protocol, listen))
    {
        let message = format!("`{}` has no port at {listen} ({protocol})", record.name);
        return Err(ErrorBody::new(ErrorCode::NotFound, message).hint(format!(
            "`banger port list {}` shows those it has",
            record.name
        )));
    }
    let live = LivePatch {
        unpublish: Some((protocol, listen)),
        ..LivePatch::default()
    };
    change(&call, live).await
}

async fn join(call: Call<JoinVm>, on: bool) -> Result<Vm, ErrorBody> {
    let registry = &call.app.registry;
    let one = registry.find(call.parameter("vm"))?;
    let other = registry.find(&call.request.other)?;
    if one.id == other.id {
        return Err(
            ErrorBody::new(ErrorCode::InvalidRequest, "a VM reaches itself anyway")
                .hint("name two VMs"),
        );
    }
    if on {
        let live = LivePatch {
            join: Some(other.id),
            ..LivePatch::default()
        };
        return change(&call, live).await;
    }
    // Either of the two may have said it.
    let leave = |id| Change {
        patch: VmSpecPatch {
            live: LivePatch {
                leave: Some(id),
                ..LivePatch::default()
            },
            ..VmSpecPatch::default()
        },
        ..Change::default()
    };
    let registry = registry.clone();
    let parted = to_its_end(async move {
        registry.change(&other, leave(one.id)).await?;
        registry.change(&one, leave(other.id)).await
    });
    Ok(convert::vm(&call.app.world, &parted.await?))
}
