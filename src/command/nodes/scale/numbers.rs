//! What processes tell each other at a restart, measured: JSON made and read, and the directory that each process builds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use sha2::Sha256;

use reverbs::control::message::{
    ContextNumbers, PortNumbers, ProcessNumbers, QueuePairNumbers, Reply, Request,
};
use reverbs::control::socket::LARGEST_FRAME;
use reverbs::handle::{
    HardwareGid, HardwareKey, HardwareLid, HardwareQpn, Psn, VirtualGid, VirtualKey, VirtualLid,
    VirtualQpn,
};
use reverbs::translate::{Address, Directory};

use super::super::relay::Call;
use super::PROCESSES;
use crate::command::job::{NodeId, ProcessId};
use crate::command::node::NodeRequest;

#[derive(Debug)]
struct Measured {
    /// Of what one process says.
    said: usize,
    /// Of what every process is told.
    told: usize,
    made: Duration,
    read: Duration,
    directory: Duration,
}

/// Two GIDs a port, as RoCE has for one address of one version of IP.
fn numbers(process: u32, queue_pairs: u32, keys: u32) -> ProcessNumbers {
    let mut random = fastrand::Rng::with_seed(u64::from(process));
    let node = process / PROCESSES.cast_unsigned();
    let gid = |version: u8, index: u8| {
        let mut gid = [0; 16];
        gid[8..12].copy_from_slice(&node.to_be_bytes());
        (gid[0], gid[15]) = (version, index);
        gid
    };
    let mut qpn =
        |place: u32| (process % PROCESSES.cast_unsigned()) << 20 | place << 4 | random.u32(..16);
    let queue_pairs = (0..queue_pairs).map(|place| QueuePairNumbers {
        port: 1,
        virtual_qpn: VirtualQpn(qpn(place)),
        hardware_qpn: HardwareQpn(qpn(place)),
        first_psn: Psn(place.wrapping_mul(0x9e_3779) & 0xff_ffff),
        mtu: 12,
    });
    let queue_pairs = queue_pairs.collect();
    let mut key =
        |place: u32| (process % PROCESSES.cast_unsigned()) << 28 | place << 8 | random.u32(..256);
    ProcessNumbers {
        pid: 100_000 + process.cast_signed(),
        contexts: vec![ContextNumbers {
            device: "mlx5_0".into(),
            hardware_device: "mlx5_0".into(),
            ports: vec![PortNumbers {
                port: 1,
                lid: (VirtualLid(0), HardwareLid(0)),
                gids: [0, 1]
                    .map(|index| (VirtualGid(gid(1, index)), HardwareGid(gid(2, index))))
                    .to_vec(),
            }],
            queue_pairs,
            rkeys: (1..=keys)
                .map(|place| (VirtualKey(key(place)), HardwareKey(key(place))))
                .collect(),
        }],
    }
}

fn measure(processes: u32, queue_pairs: u32, keys: u32) -> Measured {
    let all: Vec<_> = (0..processes)
        .map(|process| numbers(process, queue_pairs, keys))
        .collect();
    let said = Reply::Numbers {
        numbers: all[0].clone(),
    };
    let said = serde_json::to_vec(&said).unwrap().len();
    let request = Request::Connect { numbers: all };
    let began = Instant::now();
    let told = serde_json::to_vec(&request).unwrap();
    let made = began.elapsed();
    let began = Instant::now();
    let Request::Connect { numbers } = serde_json::from_slice(&told).unwrap() else {
        unreachable!("it was Connect")
    };
    let read = began.elapsed();
    let began = Instant::now();
    let directory = Directory::new(&numbers);
    let built = began.elapsed();
    for process in &numbers {
        let context = &process.contexts[0];
        let address = Address::Gid(context.ports[0].gids[1].0);
        for pair in &context.queue_pairs {
            let peer = directory.peer(address, pair.virtual_qpn).unwrap();
            assert_eq!(peer.qpn, pair.hardware_qpn);
            assert!(
                context
                    .rkeys
                    .first()
                    .is_none_or(|(old, new)| peer.keys.get(old.0) == Some(new.0))
            );
        }
    }
    Measured {
        said,
        told: told.len(),
        made,
        read,
        directory: built,
    }
}

#[test]
fn what_is_told_grows_with_all_numbers_of_the_job() {
    let [none, pairs, keys, more] = [(8, 0, 0), (8, 100, 0), (8, 0, 100), (16, 100, 100)]
        .map(|(processes, pairs, keys)| measure(processes, pairs, keys).told);
    let (of_pairs, of_keys) = ((pairs - none) / 800, (keys - none) / 800);
    assert!(
        (80..130).contains(&of_pairs),
        "{of_pairs} bytes a queue pair"
    );
    assert!((10..30).contains(&of_keys), "{of_keys} bytes a key");
    let sum = 2 * (pairs + keys - none);
    assert!(more.abs_diff(sum) < sum / 50, "{more} and {sum}");
}

/// docs/scale.md has what it prints.
#[test]
#[ignore = "takes a while, and only says how long things take"]
fn measure_for_the_documentation() {
    for (processes, queue_pairs, keys) in [
        (8, 1_000, 1_000),
        (8, 10_000, 10_000),
        (64, 1_000, 1_000),
        (64, 10_000, 0),
        (64, 0, 10_000),
        (512, 1_000, 1_000),
    ] {
        let measured = measure(processes, queue_pairs, keys);
        let seconds =
            [measured.made, measured.read, measured.directory].map(|one| one.as_secs_f64());
        let most = usize::try_from(LARGEST_FRAME).unwrap() / (measured.told / processes as usize);
        eprintln!(
            "| {processes} | {queue_pairs} | {keys} | {} | {} | {:.3} | {:.3} | {:.3} | {most} |",
            measured.said, measured.told, seconds[0], seconds[1], seconds[2]
        );
    }
}

/// What `wire` takes for the making and reading of messages.
#[test]
#[ignore = "only says how long things take"]
fn measure_the_handling_of_a_call() {
    let targets = (0..10_000).map(|place| ProcessId {
        node: NodeId(place / 8),
        pid: 100_000 + (place % 8).cast_signed(),
    });
    let targets: Vec<_> = targets.collect();
    let call = Call {
        to: Some(targets.iter().map(|process| process.node).collect()),
        request: NodeRequest::Ask {
            targets,
            request: Arc::new(Request::Release),
        },
    };
    let (mut made, mut sealed, mut read, mut bytes) =
        (Duration::MAX, Duration::MAX, Duration::MAX, 0);
    for _ in 0..20 {
        let began = Instant::now();
        let body = serde_json::to_vec(&call).unwrap();
        made = made.min(began.elapsed());
        let began = Instant::now();
        let mut mac = Hmac::<Sha256>::new_from_slice(b"a key").unwrap();
        mac.update(&body);
        std::hint::black_box(mac.finalize());
        sealed = sealed.min(began.elapsed());
        let began = Instant::now();
        std::hint::black_box(serde_json::from_slice::<Call>(&body).unwrap());
        read = read.min(began.elapsed());
        bytes = body.len();
    }
    let bytes = u32::try_from(bytes).unwrap();
    let each = |time: Duration| time.as_secs_f64() * 1e9 / f64::from(bytes);
    eprintln!(
        "{bytes} bytes; each, in ns: made {:.1}, sealed {:.1}, read {:.1}",
        each(made),
        each(sealed),
        each(read)
    );
}
