//! Replaces the hardware under this process, by asking its agent for one phase after the other, as `reverbs cycle` does.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use kmod_compat::devices::NodeType;
use kmod_compat::ports::{
    DeviceFacts, Gid, GidEntry, GidType, LinkLayer, PhysicalState, PortFacts, PortState,
};
use kmod_compat::sysfs::Sysfs;
use reverbs::control::message::{PROTOCOL_VERSION, Phase, Reply, Request, Session};
use reverbs::control::socket;
use tempfile::TempDir;

use crate::null_device::{GID, NAME};

/// What the virtual device finds around it: a folder for its agent, and one that describes the null device.
#[derive(Debug)]
pub struct Machine {
    folder: TempDir,
}

impl Machine {
    /// To be made first, once in a process.
    ///
    /// # Panics
    /// The folder cannot be written.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "there is no second one")]
    pub fn new() -> Self {
        let folder = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .expect("a private folder");
        // SAFETY: the process has no other thread yet that reads the environment.
        unsafe { std::env::set_var("REVERBS_RUNTIME_DIR", folder.path()) };
        describe_device(folder.path());
        Self { folder }
    }

    /// Closes the gates, lets go of the hardware of all contexts, takes fresh hardware, and opens the gates.
    ///
    /// # Panics
    /// The agent refuses a phase, or a queue pair does not find its peer.
    pub fn replace_hardware(&self) {
        replace_hardware(self.folder.path());
    }
}

/// The kernel does not know the null device, so the virtual device is led to a description in `folder`.
fn describe_device(folder: &Path) {
    let class = folder.join("class");
    std::fs::create_dir(&class).expect("a folder for the device's facts");
    let port = PortFacts {
        number: 1,
        state: PortState::ACTIVE,
        physical_state: PhysicalState(5),
        link_layer: LinkLayer::Ethernet,
        lid: 0,
        lid_mask_count: 0,
        subnet_manager_lid: 0,
        subnet_manager_service_level: 0,
        capability_mask: 0,
        rate: None,
        gids: vec![GidEntry {
            gid: Gid(GID),
            gid_type: Some(GidType::RoceV2),
            network_interface: None,
        }],
        pkeys: vec![0xffff],
    };
    let facts = DeviceFacts {
        name: NAME.to_string_lossy().into_owned(),
        node_type: NodeType(1),
        node_guid: "0000:0000:0000:0001".into(),
        system_image_guid: "0000:0000:0000:0001".into(),
        node_description: None,
        firmware_version: None,
        ports: vec![port],
    };
    kmod_compat::sysfs_tree::write(&class.join("infiniband"), &facts, |_| true)
        .expect("the device's facts");
    reverbs::virt::ports::read_facts_in(Sysfs::at(folder));
}

/// The agent of this process, and a session with it.
#[derive(Debug)]
pub struct Agent(UnixStream);

impl Agent {
    /// Connects, and begins.
    ///
    /// # Panics
    /// It does not listen, or is at work for somebody else.
    #[must_use]
    pub fn begin(runtime_dir: &Path) -> Self {
        let (mut agent, _) = Self::connect(runtime_dir);
        agent.ask(Self::claim("this process", false));
        agent
    }

    /// Connects; says where the process stands.
    ///
    /// # Panics
    /// It does not listen.
    #[must_use]
    pub fn connect(runtime_dir: &Path) -> (Self, Phase) {
        let pid = std::process::id().cast_signed();
        let stream = UnixStream::connect(socket::agent_socket(runtime_dir, pid));
        let mut agent = Self(stream.expect("the agent"));
        match agent.ask(Request::Hello {
            version: PROTOCOL_VERSION,
        }) {
            Reply::Hello { phase, .. } => (agent, phase),
            other => panic!("hello is answered by {other:?}"),
        }
    }

    /// A claim on the process by the session called `id`.
    #[must_use]
    pub fn claim(id: &str, takeover: bool) -> Request {
        Request::Begin {
            session: Session {
                id: id.into(),
                pid: std::process::id().cast_signed(),
            },
            takeover,
        }
    }

    /// # Panics
    /// It refuses.
    pub fn ask(&mut self, request: Request) -> Reply {
        let name = request.name();
        self.try_ask(request)
            .unwrap_or_else(|(_, reason)| panic!("{name}: {reason}"))
    }

    /// # Errors
    /// It refuses: where the process stands, and why.
    ///
    /// # Panics
    /// It hangs up.
    pub fn try_ask(&mut self, request: Request) -> Result<Reply, (Phase, String)> {
        socket::send(&mut self.0, &request).expect("the agent takes requests");
        match socket::receive(&mut self.0).expect("the agent answers") {
            None => panic!("the agent hung up at {request:?}"),
            Some(Reply::Refused { phase, reason }) => Err((phase, reason)),
            Some(reply) => Ok(reply),
        }
    }
}

fn replace_hardware(runtime_dir: &Path) {
    let mut agent = Agent::begin(runtime_dir);
    let mut ask = |request| agent.ask(request);
    ask(Request::Close { limit_ms: 1000 });
    ask(Request::Drain {
        limit_ms: 1000,
        arrivals: false,
    });
    ask(Request::Stop { limit_ms: 1000 });
    let Reply::Responders { responders } = ask(Request::Responders) else {
        panic!("responders are answered by responders");
    };
    ask(Request::Settle { responders });
    ask(Request::Release);
    ask(Request::Rebuild { devices: vec![] });
    let Reply::Numbers { numbers } = ask(Request::Publish) else {
        panic!("numbers are answered by numbers");
    };
    for pair in numbers
        .contexts
        .iter()
        .flat_map(|context| &context.queue_pairs)
    {
        assert_ne!(
            pair.virtual_qpn.0, pair.hardware_qpn.0,
            "nothing to translate"
        );
    }
    ask(Request::Connect {
        numbers: vec![numbers],
    });
    ask(Request::Resume);
    let Reply::Status { status } = ask(Request::Status) else {
        panic!("status is answered by a status");
    };
    assert!(status.notes.is_empty(), "{:?}", status.notes);
}
