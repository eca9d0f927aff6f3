//! Whatever is posted, executed, acknowledged and polled before, between and after the phases of a checkpoint: every request
//! completes once, in order, and takes effect once; or, where an answer is lost that cannot be asked for again, and only then,
//! the queue pair ends in the error state.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use proptest::prelude::*;
use reverbs::control::socket;
use reverbs_benches::restart::Machine;
use reverbs_model::cycle::{Moment, cycle};
use reverbs_model::fabric::{Truth, fabric};
use reverbs_model::program::{Kind, LONGEST, Program};

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    Post {
        end: usize,
        kind: Kind,
        length: u32,
        signaled: bool,
    },
    Receive {
        end: usize,
    },
    /// A few packets of one direction arrive.
    Deliver {
        direction: usize,
        packets: u32,
    },
    Acknowledge {
        direction: usize,
        requests: u32,
    },
    Poll {
        end: usize,
    },
}

const MOMENTS: [Moment; 10] = [
    Moment::Begun,
    Moment::Closed,
    Moment::Drained,
    Moment::Stopped,
    Moment::Asked,
    Moment::Settled,
    Moment::Released,
    Moment::Rebuilt,
    Moment::Connected,
    Moment::Resumed,
];

fn step() -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        4 => Just(Kind::Send),
        3 => Just(Kind::Write),
        2 => Just(Kind::WriteWithImmediate),
        1 => Just(Kind::Read),
        1 => Just(Kind::Add),
    ];
    prop_oneof![
        4 => (0..2_usize, kind, 8..LONGEST, any::<bool>())
            .prop_map(|(end, kind, length, signaled)| Step::Post { end, kind, length, signaled }),
        2 => (0..2_usize).prop_map(|end| Step::Receive { end }),
        3 => (0..2_usize, 1..5_u32)
            .prop_map(|(direction, packets)| Step::Deliver { direction, packets }),
        2 => (0..2_usize, 1..4_u32)
            .prop_map(|(direction, requests)| Step::Acknowledge { direction, requests }),
        1 => (0..2_usize).prop_map(|end| Step::Poll { end }),
    ]
}

/// What happens before a checkpoint, and what between its phases.
#[derive(Clone, Debug)]
struct Round {
    before: Vec<Step>,
    between: Vec<(usize, Step)>,
}

fn round() -> impl Strategy<Value = Round> {
    let before = prop::collection::vec(step(), 0..30);
    let between = prop::collection::vec((0..MOMENTS.len(), step()), 0..20);
    (before, between).prop_map(|(before, between)| Round { before, between })
}

fn take(program: &mut Program, step: &Step) {
    let number = |direction: usize| fabric().pairs().nth(direction);
    match *step {
        Step::Post {
            end,
            kind,
            length,
            signaled,
        } => program.post(end, kind, length, signaled),
        Step::Receive { end } => program.receive(end),
        Step::Deliver { direction, packets } => {
            if let Some(number) = number(direction) {
                (0..packets).for_each(|_| {
                    fabric().deliver(number);
                });
            }
        }
        Step::Acknowledge {
            direction,
            requests,
        } => {
            if let Some(number) = number(direction) {
                (0..requests).for_each(|_| {
                    fabric().acknowledge(number);
                });
            }
        }
        Step::Poll { end } => program.poll(end),
    }
}

fn runtime_dir() -> PathBuf {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(Machine::new);
    socket::runtime_dir().expect("the folder of the machine")
}

fn play(seed: u64, stale: bool, rounds: &[Round]) {
    static PROGRAMS: AtomicU64 = AtomicU64::new(1);
    /// There is one fabric, and one virtual device, in a process.
    static PLAYING: Mutex<()> = Mutex::new(());
    let _alone = PLAYING.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = runtime_dir();
    fabric().begin(seed, stale);
    let mut program = Program::new(PROGRAMS.fetch_add(1, Ordering::Relaxed) << 40);
    let mut hardware = [program.number(0), program.number(1)];
    for round in rounds {
        for step in &round.before {
            take(&mut program, step);
        }
        let mut truths = [Truth::Known; 2];
        let status = cycle(&folder, |moment| {
            // Nothing may be executed from here on, although some of it may still be on the way.
            if moment == Moment::Asked {
                truths = hardware.map(|number| fabric().truth(number));
            }
            for (_, step) in round
                .between
                .iter()
                .filter(|(at, _)| MOMENTS[*at] == moment)
            {
                take(&mut program, step);
            }
            if moment == Moment::Settled {
                // From here on the application may see it.
                for (end, truth) in truths.iter().enumerate() {
                    if *truth == Truth::Lost {
                        program.break_down(end);
                    }
                }
            }
        });
        let pairs = &status.contexts[0].queue_pairs;
        for (end, truth) in truths.into_iter().enumerate() {
            let number = program.number(end);
            let pair = pairs
                .iter()
                .find(|pair| pair.virtual_qpn.0 == number)
                .expect("a queue pair keeps its number");
            hardware[end] = pair.hardware_qpn.expect("it has hardware").0;
            let lost = pair.state == "ERR";
            assert_eq!(lost, truth == Truth::Lost, "end {end}: {:?}", status.notes);
        }
        if truths.contains(&Truth::Lost) {
            break;
        }
    }
    program.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_request_once(seed: u64, rounds in prop::collection::vec(round(), 0..5)) {
        play(seed, false, &rounds);
    }

    /// On a device that does not tell how far a responder came, where messages are counted.
    #[test]
    fn every_request_once_by_count(seed: u64, rounds in prop::collection::vec(round(), 0..5)) {
        play(seed, true, &rounds);
    }
}
