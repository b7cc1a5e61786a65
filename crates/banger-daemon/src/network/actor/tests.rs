use super::*;
use banger_core::addr::Pool;
use banger_core::id::{InstanceId, VmId};
use banger_host::host_side::{HelperClient, HostSide};
use banger_host::net::seqpacket::{self, Place};
use banger_host::op::{HostReply, HostRequest};
use std::path::Path;
use std::sync::mpsc as std_mpsc;
use uuid::Uuid;

const POOL: Pool = Pool::at(Ipv4Addr::new(172, 16, 0, 0));

/// Plays the helper, which does all that it is asked, and tells of it.
fn helper(socket: &Path) -> std_mpsc::Receiver<HostOp> {
    let (told, asked) = std_mpsc::channel();
    let place = Place::open(socket).unwrap();
    let listener = seqpacket::socket().unwrap();
    rustix::net::bind(&listener, &place.address().unwrap()).unwrap();
    rustix::net::listen(&listener, 8).unwrap();
    std::thread::spawn(move || {
        while let Ok(client) = rustix::net::accept(&listener) {
            let (bytes, _) = seqpacket::receive(&client, None).unwrap().unwrap();
            let request: HostRequest = serde_json::from_slice(&bytes).unwrap();
            let reply = HostReply {
                result: Ok(HostAnswer::Done),
            };
            seqpacket::send(&client, &serde_json::to_vec(&reply).unwrap(), &[]).unwrap();
            let _ = told.send(request.op);
        }
    });
    asked
}

#[test]
fn a_vm_that_lives_keeps_what_it_has_on_the_host_though_its_namespace_is_not_found() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("helper.sock");
    let asked = helper(&socket);
    let client = HelperClient::connect(&socket).unwrap();
    assert_eq!(asked.recv().unwrap(), HostOp::Hello {});
    let (inbox, _asks) = mpsc::channel(1);
    let (names, _servers) = mpsc::channel(1);
    let instance = InstanceId::from_uuid(Uuid::from_u128(7));
    let setup = NetworkSetup {
        instance,
        pool: POOL,
        mode: Mode::Helper,
        host: Some(Arc::new(HostSide::Helper(client))),
        keeper_program: folder.path().join("no-such-program"),
        keeper_socket: folder.path().join("netns.sock"),
        pasta: PathBuf::from("pasta"),
        names,
        zone: banger_dns::Zone::new(POOL),
    };
    let mut actor = Actor::new(setup, inbox.downgrade());
    let plan = PortPlan {
        vm: VmId::from_uuid(Uuid::from_u128(2)),
        address: Ipv4Addr::new(172, 16, 0, 2),
        nat: true,
        nat_private: false,
        ports: BTreeSet::new(),
        joins: BTreeSet::new(),
    };
    let shim = rustix::process::getpid().as_raw_nonzero().get();
    actor.take_over(plan.clone(), Some(shim)).unwrap_err();
    actor.settle().unwrap();
    assert_eq!(asked.try_recv(), Err(std_mpsc::TryRecvError::Empty));
    // Nobody lives any more.
    actor.release(&plan.tap()).unwrap();
    actor.settle().unwrap();
    assert_eq!(asked.recv().unwrap(), HostOp::DetachVeth { instance });
}
