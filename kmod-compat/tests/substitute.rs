//! Replacing descriptors under an application: what it set must hold for the new file.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kmod_compat::fds;
use kmod_compat::substitute::{SubstituteError, substitute};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fs::OFlags;
use rustix::io::{Errno, FdFlags};

const DATA: u64 = 0xdead_beef_cafe_1234;

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe().unwrap()
}

fn write_byte(fd: &OwnedFd, byte: u8) {
    assert_eq!(rustix::io::write(fd, &[byte]), Ok(1));
}

fn read_byte(fd: impl AsFd) -> Result<Option<u8>, Errno> {
    let mut byte = [0];
    Ok((rustix::io::read(fd, &mut byte)? == 1).then_some(byte[0]))
}

/// The events that are ready now: (data, flags).
fn ready(epoll: &OwnedFd) -> Vec<(u64, EventFlags)> {
    let mut events = Vec::with_capacity(8);
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    epoll::wait(
        epoll,
        rustix::buffer::spare_capacity(&mut events),
        Some(&now),
    )
    .unwrap();
    events
        .into_iter()
        // Events are packed: fields can be copied, not borrowed.
        .map(|event: Event| ({ event.data }.u64(), event.flags))
        .collect()
}

/// The lines of an epoll instance's fdinfo about `number`.
fn registered(epoll: &OwnedFd, number: RawFd) -> Vec<String> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", epoll.as_raw_fd())).unwrap();
    let of_number = |line: &&str| {
        let mut fields = line.split_whitespace();
        fields.next() == Some("tfd:") && fields.next() == Some(&number.to_string())
    };
    // Without position and inode, which belong to the file.
    let without_file = |line: &str| line.split(" pos:").next().unwrap().to_owned();
    info.lines().filter(of_number).map(without_file).collect()
}

fn watch(epoll: &OwnedFd, fd: impl AsFd, data: u64, flags: EventFlags) {
    epoll::add(epoll, fd, EventData::new_u64(data), flags).unwrap();
}

fn new_epoll() -> OwnedFd {
    epoll::create(CreateFlags::CLOEXEC).unwrap()
}

#[test]
fn the_new_file_is_under_the_number() {
    let (old, old_writer) = pipe();
    let (new, new_writer) = pipe();
    let new_number = new.as_raw_fd();
    write_byte(&old_writer, b'o');
    write_byte(&new_writer, b'n');
    substitute(old.as_raw_fd(), new).unwrap();
    assert_eq!(read_byte(&old), Ok(Some(b'n')));
    // The old file is closed: its writer has no reader left.
    assert!(
        poll_error(&old_writer),
        "the old read end is still open somewhere"
    );
    // The number that came in was given up.
    assert!(
        fds::duplicates(old.as_raw_fd()).unwrap().is_empty(),
        "left open as {new_number}"
    );
}

/// Whether a pipe's write end has lost its last reader.
fn poll_error(writer: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::new(writer, PollFlags::OUT)];
    poll(
        &mut fds,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    )
    .unwrap();
    fds[0].revents().contains(PollFlags::ERR)
}

#[test]
fn status_and_descriptor_flags_are_kept_either_way() {
    for nonblocking in [false, true] {
        for close_on_exec in [false, true] {
            let (old, _old_writer) = pipe();
            let (new, _new_writer) = pipe();
            let mut flags = OFlags::empty();
            flags.set(OFlags::NONBLOCK, nonblocking);
            rustix::fs::fcntl_setfl(&old, flags).unwrap();
            // The new file comes with the opposite.
            rustix::fs::fcntl_setfl(&new, flags ^ OFlags::NONBLOCK).unwrap();
            let mut descriptor_flags = FdFlags::empty();
            descriptor_flags.set(FdFlags::CLOEXEC, close_on_exec);
            rustix::io::fcntl_setfd(&old, descriptor_flags).unwrap();
            rustix::io::fcntl_setfd(&new, descriptor_flags ^ FdFlags::CLOEXEC).unwrap();

            substitute(old.as_raw_fd(), new).unwrap();
            let status = rustix::fs::fcntl_getfl(&old).unwrap();
            assert_eq!(status.contains(OFlags::NONBLOCK), nonblocking);
            assert_eq!(rustix::io::fcntl_getfd(&old).unwrap(), descriptor_flags);
            if nonblocking {
                assert_eq!(read_byte(&old), Err(Errno::AGAIN));
            }
        }
    }
}

#[test]
fn signal_driven_input_keeps_owner_and_signal() {
    const F_SETSIG: i32 = 10;
    const F_GETSIG: i32 = 11;
    let (old, _old_peer) = UnixStream::pair().unwrap();
    let (new, _new_peer) = UnixStream::pair().unwrap();
    let own = std::process::id() as i32;
    // SIGURG is ignored unless handled.
    // SAFETY: fcntl with integers.
    unsafe {
        assert_eq!(libc::fcntl(old.as_raw_fd(), libc::F_SETOWN, own), 0);
        assert_eq!(libc::fcntl(old.as_raw_fd(), F_SETSIG, libc::SIGURG), 0);
        assert_eq!(
            libc::fcntl(old.as_raw_fd(), libc::F_SETFL, libc::O_ASYNC),
            0
        );
    }
    substitute(old.as_raw_fd(), new.into()).unwrap();
    // SAFETY: fcntl with integers.
    unsafe {
        assert_eq!(libc::fcntl(old.as_raw_fd(), libc::F_GETOWN), own);
        assert_eq!(libc::fcntl(old.as_raw_fd(), F_GETSIG), libc::SIGURG);
        assert_ne!(
            libc::fcntl(old.as_raw_fd(), libc::F_GETFL) & libc::O_ASYNC,
            0
        );
    }
}

#[test]
fn registrations_keep_events_and_all_64_bits_of_data() {
    let (old, _old_writer) = pipe();
    let (new, new_writer) = pipe();
    let epoll = new_epoll();
    watch(&epoll, &old, DATA, EventFlags::IN | EventFlags::ET);
    let before = registered(&epoll, old.as_raw_fd());
    assert_eq!(before.len(), 1);

    substitute(old.as_raw_fd(), new).unwrap();
    assert_eq!(registered(&epoll, old.as_raw_fd()), before);
    assert_eq!(ready(&epoll), []);
    write_byte(&new_writer, 1);
    assert_eq!(ready(&epoll), [(DATA, EventFlags::IN)]);
    // Edge triggered: the same byte is told once.
    assert_eq!(ready(&epoll), []);
    write_byte(&new_writer, 2);
    assert_eq!(ready(&epoll), [(DATA, EventFlags::IN)]);
}

#[test]
fn events_that_wait_in_the_new_file_are_told() {
    for flags in [EventFlags::IN, EventFlags::IN | EventFlags::ET] {
        let (old, _old_writer) = pipe();
        let (new, new_writer) = pipe();
        write_byte(&new_writer, 1);
        let epoll = new_epoll();
        watch(&epoll, &old, 7, flags);
        substitute(old.as_raw_fd(), new).unwrap();
        assert_eq!(ready(&epoll), [(7, EventFlags::IN)]);
    }
}

#[test]
fn two_instances_keep_their_own_registrations() {
    let (old, _old_writer) = pipe();
    let (new, new_writer) = pipe();
    let (other, other_writer) = pipe();
    let (first, second) = (new_epoll(), new_epoll());
    watch(&first, &old, 1, EventFlags::IN);
    watch(&first, &other, 10, EventFlags::IN);
    watch(
        &second,
        &old,
        u64::MAX,
        EventFlags::IN | EventFlags::RDHUP | EventFlags::ET,
    );
    let before = [
        registered(&first, old.as_raw_fd()),
        registered(&second, old.as_raw_fd()),
    ];
    substitute(old.as_raw_fd(), new).unwrap();
    let after = [
        registered(&first, old.as_raw_fd()),
        registered(&second, old.as_raw_fd()),
    ];
    assert_eq!(after, before);
    write_byte(&new_writer, 1);
    write_byte(&other_writer, 1);
    let mut events = ready(&first);
    events.sort_by_key(|(data, _)| *data);
    assert_eq!(events, [(1, EventFlags::IN), (10, EventFlags::IN)]);
    assert_eq!(ready(&second), [(u64::MAX, EventFlags::IN)]);
}

#[test]
fn an_instance_under_two_numbers_gets_one_registration() {
    let (old, _old_writer) = pipe();
    let (new, new_writer) = pipe();
    let epoll = new_epoll();
    let same = rustix::io::dup(&epoll).unwrap();
    watch(&epoll, &old, DATA, EventFlags::IN);
    substitute(old.as_raw_fd(), new).unwrap();
    assert_eq!(registered(&epoll, old.as_raw_fd()).len(), 1);
    write_byte(&new_writer, 1);
    assert_eq!(ready(&same), [(DATA, EventFlags::IN)]);
}

#[test]
fn a_surviving_duplicate_of_the_old_file_does_not_fire() {
    let (old, old_writer) = pipe();
    let (new, _new_writer) = pipe();
    let saved = rustix::io::dup(&old).unwrap();
    assert_eq!(
        fds::duplicates(old.as_raw_fd()).unwrap(),
        [saved.as_raw_fd()]
    );
    let epoll = new_epoll();
    watch(&epoll, &old, DATA, EventFlags::IN);
    substitute(old.as_raw_fd(), new).unwrap();
    write_byte(&old_writer, 1);
    assert_eq!(ready(&epoll), []);
    assert_eq!(registered(&epoll, old.as_raw_fd()).len(), 1);
    // And the registration that is there can be taken off by number.
    assert_eq!(epoll::delete(&epoll, &old), Ok(()));
    assert_eq!(read_byte(&saved), Ok(Some(1)));
}

#[test]
fn an_entry_left_over_from_an_earlier_file_is_not_confused_with_ours() {
    let (earlier, earlier_writer) = pipe();
    let saved = rustix::io::dup(&earlier).unwrap();
    let epoll = new_epoll();
    watch(&epoll, &earlier, 0xbad, EventFlags::IN | EventFlags::ET);
    let (current, _current_writer) = pipe();
    // The application's own dup2, which leaves an entry behind as `saved` lives.
    let mut number = earlier;
    rustix::io::dup2(&current, &mut number).unwrap();
    drop(current);
    watch(&epoll, &number, DATA, EventFlags::IN);
    assert_eq!(registered(&epoll, number.as_raw_fd()).len(), 2);

    let (new, new_writer) = pipe();
    substitute(number.as_raw_fd(), new).unwrap();
    write_byte(&new_writer, 1);
    assert_eq!(ready(&epoll), [(DATA, EventFlags::IN)]);
    assert_eq!(registered(&epoll, number.as_raw_fd()).len(), 2);
    write_byte(&earlier_writer, 1);
    assert!(
        ready(&epoll).contains(&(0xbad, EventFlags::IN)),
        "the left-over entry is as it was"
    );
    drop(saved);
}

#[test]
fn a_fired_one_shot_registration_stays_silent() {
    let (old, old_writer) = pipe();
    let (new, new_writer) = pipe();
    let epoll = new_epoll();
    watch(&epoll, &old, 3, EventFlags::IN | EventFlags::ONESHOT);
    write_byte(&old_writer, 1);
    assert_eq!(ready(&epoll), [(3, EventFlags::IN)]);
    substitute(old.as_raw_fd(), new).unwrap();
    write_byte(&new_writer, 1);
    assert_eq!(ready(&epoll), []);
    epoll::modify(&epoll, &old, EventData::new_u64(3), EventFlags::IN).unwrap();
    assert_eq!(ready(&epoll), [(3, EventFlags::IN)]);
}

#[test]
fn exclusive_registrations_are_kept() {
    let (old, _old_writer) = pipe();
    let (new, new_writer) = pipe();
    let epoll = new_epoll();
    watch(&epoll, &old, 4, EventFlags::IN | EventFlags::EXCLUSIVE);
    let before = registered(&epoll, old.as_raw_fd());
    substitute(old.as_raw_fd(), new).unwrap();
    assert_eq!(registered(&epoll, old.as_raw_fd()), before);
    write_byte(&new_writer, 1);
    assert_eq!(ready(&epoll), [(4, EventFlags::IN)]);
}

#[test]
fn a_thread_in_epoll_wait_goes_on_with_the_new_file() {
    let (old, _old_writer) = pipe();
    let (new, new_writer) = pipe();
    let epoll = new_epoll();
    watch(&epoll, &old, DATA, EventFlags::IN);
    let waiting = rustix::io::dup(&epoll).unwrap();
    let (sender, receiver) = mpsc::channel();
    let thread = thread::spawn(move || {
        let mut events = Vec::with_capacity(1);
        sender.send(rustix::thread::gettid()).unwrap();
        let limit = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        epoll::wait(
            &waiting,
            rustix::buffer::spare_capacity(&mut events),
            Some(&limit),
        )
        .unwrap();
        events
            .iter()
            .map(|event: &Event| event.data.u64())
            .collect::<Vec<_>>()
    });
    wait_until_asleep(receiver.recv().unwrap());
    substitute(old.as_raw_fd(), new).unwrap();
    write_byte(&new_writer, 1);
    assert_eq!(thread.join().unwrap(), [DATA]);
}

/// Waits until a thread of this process sleeps in the kernel.
fn wait_until_asleep(thread: rustix::thread::Pid) {
    let path = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
    let mut asleep = 0;
    // It also sleeps for moments on its way there: seen asleep ten times in a row is there.
    while asleep < 10 {
        thread::sleep(Duration::from_millis(1));
        let stat = std::fs::read_to_string(&path).unwrap();
        let state = stat.rsplit(") ").next().unwrap().chars().next();
        asleep = if state == Some('S') { asleep + 1 } else { 0 };
    }
}

#[test]
fn a_thread_blocked_in_read_stays_with_the_old_file() {
    let (old, old_writer) = pipe();
    let (new, new_writer) = pipe();
    let number = old.as_raw_fd();
    let (sender, receiver) = mpsc::channel();
    let thread = thread::spawn(move || {
        sender.send(rustix::thread::gettid()).unwrap();
        let first = read_byte(&old).unwrap();
        let second = read_byte(&old).unwrap();
        (first, second)
    });
    wait_until_asleep(receiver.recv().unwrap());
    write_byte(&new_writer, b'n');
    substitute(number, new).unwrap();
    assert!(!thread.is_finished());
    write_byte(&old_writer, b'o');
    assert_eq!(thread.join().unwrap(), (Some(b'o'), Some(b'n')));
}

#[test]
fn other_threads_never_find_the_number_closed() {
    let (old, _old_writer) = pipe();
    let number = old.as_raw_fd();
    let (stop_sender, stop) = mpsc::channel::<()>();
    let reader = thread::spawn(move || {
        let mut looks = 0u64;
        while stop.try_recv() == Err(mpsc::TryRecvError::Empty) {
            // SAFETY: whether this number is open is the question of the test.
            let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_getfd(borrowed).expect("the number was closed for a moment");
            looks += 1;
        }
        looks
    });
    let mut writers = Vec::new();
    for _ in 0..200 {
        let (new, writer) = pipe();
        writers.push(writer);
        substitute(number, new).unwrap();
    }
    drop(stop_sender);
    assert!(reader.join().unwrap() > 0);
    drop(old);
}

#[test]
fn a_file_that_cannot_be_watched_is_refused_before_anything_changes() {
    let (old, old_writer) = pipe();
    let epoll = new_epoll();
    watch(&epoll, &old, DATA, EventFlags::IN);
    let null = std::fs::File::open("/dev/null").unwrap();
    let error = substitute(old.as_raw_fd(), null.into()).unwrap_err();
    assert!(
        matches!(error, SubstituteError::NotWatchable { epoll: found, .. }
        if found == epoll.as_raw_fd())
    );
    assert!(
        error
            .to_string()
            .contains(&format!("file descriptor {}", old.as_raw_fd()))
    );
    write_byte(&old_writer, 9);
    assert_eq!(ready(&epoll), [(DATA, EventFlags::IN)]);
    assert_eq!(read_byte(&old), Ok(Some(9)));
    // Unwatched, the same file is welcome.
    epoll::delete(&epoll, &old).unwrap();
    substitute(
        old.as_raw_fd(),
        std::fs::File::open("/dev/null").unwrap().into(),
    )
    .unwrap();
    assert_eq!(read_byte(&old), Ok(None));
}

#[test]
fn sockets_and_messages_in_them_travel() {
    let (mut application, _old_peer) = UnixStream::pair().unwrap();
    let (new, mut new_peer) = UnixStream::pair().unwrap();
    new_peer.write_all(b"event").unwrap();
    application.set_nonblocking(true).unwrap();
    substitute(application.as_raw_fd(), new.into()).unwrap();
    let mut buffer = [0; 5];
    application.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"event");
    assert_eq!(
        application.read(&mut buffer).unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock
    );
}

#[test]
fn closed_and_impossible_numbers_are_named() {
    // A number far above what the tests open.
    for number in [-1, 900_000] {
        let error = substitute(number, pipe().0).unwrap_err();
        assert!(matches!(error, SubstituteError::NotOpen { .. }));
        assert_eq!(
            error.to_string(),
            format!("file descriptor {number} is not open")
        );
    }
}

#[test]
fn the_same_number_is_left_alone() {
    let (reader, writer) = pipe();
    let number = reader.into_raw_fd();
    // SAFETY: the number was just released by its owner; the copy below is forgotten by
    // `substitute`, so the last line is the only one to close it.
    substitute(number, unsafe { OwnedFd::from_raw_fd(number) }).unwrap();
    // SAFETY: as above.
    let reader = unsafe { OwnedFd::from_raw_fd(number) };
    write_byte(&writer, 5);
    assert_eq!(read_byte(&reader), Ok(Some(5)));
}
