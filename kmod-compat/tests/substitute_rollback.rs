//! A replacement that fails half-way leaves the registrations as they were.
//!
//! Alone in its process, since it lowers the limit on open files.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use kmod_compat::substitute::{SubstituteError, substitute};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const HIGH_NUMBER: i32 = 300;
const LOWERED_LIMIT: u64 = 100;

#[test]
fn registrations_return_when_the_exchange_fails() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let (new, _new_writer) = rustix::pipe::pipe().unwrap();
    // SAFETY: nothing in this process has the number; dup2 makes it ours.
    let watched = unsafe {
        assert_eq!(libc::dup2(reader.as_raw_fd(), HIGH_NUMBER), HIGH_NUMBER);
        OwnedFd::from_raw_fd(HIGH_NUMBER)
    };
    drop(reader);
    let instances = [1, 2].map(|data| {
        let instance = epoll::create(CreateFlags::CLOEXEC).unwrap();
        epoll::add(
            &instance,
            &watched,
            EventData::new_u64(data),
            EventFlags::IN,
        )
        .unwrap();
        instance
    });

    // Under this limit dup3 refuses the number, though it is open.
    let limit = getrlimit(Resource::Nofile);
    let lowered = Rlimit {
        current: Some(LOWERED_LIMIT),
        ..limit
    };
    setrlimit(Resource::Nofile, lowered).unwrap();
    let error = substitute(HIGH_NUMBER, new).unwrap_err();
    setrlimit(Resource::Nofile, limit).unwrap();

    let SubstituteError::Failed {
        number,
        action,
        source,
    } = error
    else {
        panic!("unexpected: {error:?}")
    };
    assert_eq!((number, action), (HIGH_NUMBER, "replace"));
    assert_eq!(source.raw_os_error(), Some(libc::EBADF));
    rustix::io::write(&writer, b"old").unwrap();
    for (instance, data) in instances.iter().zip([1, 2]) {
        let mut events = Vec::with_capacity(1);
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        epoll::wait(
            instance,
            rustix::buffer::spare_capacity(&mut events),
            Some(&now),
        )
        .unwrap();
        let told: Vec<u64> = events
            .into_iter()
            .map(|event: Event| { event.data }.u64())
            .collect();
        assert_eq!(told, [data]);
    }
}
