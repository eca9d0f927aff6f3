//! Against a real RDMA device of the kernel (in the test machine: rxe0); skipped without one.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Mutex;

use kmod_compat::devices::{self, DriverId};
use kmod_compat::fds::{self, DescriptorKind, Process};
use kmod_compat::netlink::Connection;
use kmod_compat::ports;
use kmod_compat::restrack::{self, ObjectKind, Owner};
use kmod_compat::substitute::substitute;
use kmod_compat::sysfs::Sysfs;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

/// The tests count the descriptors of their process.
static ALONE: Mutex<()> = Mutex::new(());

const VERBS_DEVICE: &str = "/dev/infiniband/uverbs0";
const MANAGER_DEVICE: &str = "/dev/infiniband/rdma_cm";

macro_rules! require {
    ($path:expr) => {
        if !Path::new($path).exists() {
            eprintln!("skipped: no {} (no RDMA device in this kernel)", $path);
            return;
        }
    };
}

fn open(path: &str) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

/// One command of the write interface (`rdma/ib_user_verbs.h`) without arguments; returns the
/// answer's first word.
fn command(device: &File, number: u32, answer_words: u16) -> u32 {
    #[repr(C)]
    struct Request {
        command: u32,
        request_words: u16,
        answer_words: u16,
        answer: u64,
    }
    let mut answer = [0u32; 8];
    let request = Request {
        command: number,
        request_words: 4,
        answer_words,
        answer: answer.as_mut_ptr() as u64,
    };
    // SAFETY: the kernel reads 16 bytes, which `Request` has, and writes at most
    // `answer_words` (up to 8) words to `answer`, which outlives the call.
    let written = unsafe {
        libc::write(
            device.as_raw_fd(),
            (&raw const request).cast(),
            size_of::<Request>(),
        )
    };
    assert_eq!(
        written,
        16,
        "command {number}: {}",
        std::io::Error::last_os_error()
    );
    answer[0]
}

/// A context with its two event files: (verbs, async events, completion events).
fn open_context() -> (File, OwnedFd, OwnedFd) {
    const GET_CONTEXT: u32 = 0;
    const CREATE_COMP_CHANNEL: u32 = 17;
    let device = open(VERBS_DEVICE);
    // SAFETY: the kernel has just made this descriptor for us.
    let own = |number: u32| unsafe { OwnedFd::from_raw_fd(number as RawFd) };
    let async_events = own(command(&device, GET_CONTEXT, 2));
    let completion_events = own(command(&device, CREATE_COMP_CHANNEL, 1));
    (device, async_events, completion_events)
}

fn held() -> Vec<(RawFd, DescriptorKind)> {
    let found = fds::rdma_descriptors(&Sysfs::host(), Process::Own).unwrap();
    found
        .into_iter()
        .map(|found| (found.number, found.kind))
        .collect()
}

#[test]
fn a_context_and_its_event_files_can_all_be_replaced() {
    require!(VERBS_DEVICE);
    let _alone = ALONE.lock().unwrap();
    let (device, async_events, completion_events) = open_context();
    let mut expected = vec![
        (
            device.as_raw_fd(),
            DescriptorKind::Verbs {
                device: "uverbs0".to_owned(),
            },
        ),
        (async_events.as_raw_fd(), DescriptorKind::Events),
        (completion_events.as_raw_fd(), DescriptorKind::Events),
    ];
    if Path::new(MANAGER_DEVICE).exists() {
        let manager = open(MANAGER_DEVICE);
        expected.push((manager.as_raw_fd(), DescriptorKind::ConnectionManager));
        assert_eq!(held(), expected);
        substitute(manager.as_raw_fd(), File::open("/dev/null").unwrap().into()).unwrap();
        expected.pop();
    }
    assert_eq!(held(), expected);

    let instance = epoll::create(CreateFlags::CLOEXEC).unwrap();
    let watched_for = EventFlags::IN | EventFlags::ET;
    let data = EventData::new_u64(0x1234_5678_9abc_def0);
    epoll::add(&instance, &completion_events, data, watched_for).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    substitute(completion_events.as_raw_fd(), reader).unwrap();
    rustix::io::write(&writer, &[0; 8]).unwrap();
    let mut events = Vec::with_capacity(2);
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    epoll::wait(
        &instance,
        rustix::buffer::spare_capacity(&mut events),
        Some(&now),
    )
    .unwrap();
    let told: Vec<u64> = events
        .into_iter()
        .map(|event: Event| { event.data }.u64())
        .collect();
    assert_eq!(told, [0x1234_5678_9abc_def0]);

    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    substitute(async_events.as_raw_fd(), reader).unwrap();
    assert_eq!(held(), [(device.as_raw_fd(), expected.swap_remove(0).1)]);
    substitute(device.as_raw_fd(), File::open("/dev/null").unwrap().into()).unwrap();
    assert_eq!(held(), []);
}

#[test]
fn contexts_are_attributed_to_their_process_by_thread() {
    require!(VERBS_DEVICE);
    let _alone = ALONE.lock().unwrap();
    let mut connection = Connection::open().unwrap();
    let own = std::process::id();
    let kinds = [ObjectKind::Context];
    let contexts = |connection: &mut Connection| {
        let holdings = restrack::holdings(connection, own, &kinds).unwrap();
        (holdings.owned, holdings.unattributed.len())
    };
    let (owned, unattributed_before) = contexts(&mut connection);
    assert_eq!(owned, []);

    // This test's thread is not the process's first one, whose id is the process id.
    let context = open_context();
    let (owned, _) = contexts(&mut connection);
    assert_eq!(owned.len(), 1, "{owned:?}");
    let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
    assert_ne!(thread, own);
    assert_eq!(owned[0].owner, Owner::Thread(thread));
    drop(context);
    assert_eq!(contexts(&mut connection).0, []);

    // Once the thread has ended, the kernel no longer says whose the object is.
    let orphan = std::thread::spawn(open_context).join().unwrap();
    let (owned, unattributed) = contexts(&mut connection);
    assert_eq!((owned, unattributed), (vec![], unattributed_before + 1));
    drop(orphan);
}

#[test]
fn the_driver_id_comes_from_netlink() {
    require!(VERBS_DEVICE);
    let sysfs = Sysfs::host();
    let mut found = devices::list(&sysfs).unwrap();
    assert!(!found.is_empty());
    devices::identify(&mut found, &mut Connection::open().unwrap()).unwrap();
    for device in &found {
        if device.name.starts_with("rxe") {
            assert_eq!(device.driver, Some(DriverId(14)));
        }
        assert!(
            device.index.is_some() && device.driver.is_some(),
            "{device:?}"
        );
        let facts = ports::read_device(&sysfs, &device.name).unwrap();
        assert_eq!(facts.ports.len(), device.ports.len());
        for port in &facts.ports {
            assert!(!port.gids.is_empty() && !port.pkeys.is_empty());
        }
    }
}
