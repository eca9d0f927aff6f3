//! Whatever is posted, executed, acknowledged, lost and polled before, between and after the phases of a checkpoint, and whoever
//! drives it: every request completes once, in order, and takes effect once; or, where an answer is lost that cannot be asked for
//! again, and only then, the queue pair ends in the error state. What the wire loses of an unreliable transport stays lost, and
//! nothing else is. An event comes if it is owed, and never if it was not asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use proptest::prelude::*;
use reverbs::control::socket;
use reverbs_benches::restart::Machine;
use reverbs_model::apart::apart;
use reverbs_model::cycle::{Cycled, Moment, cycle};
use reverbs_model::fabric::{Truth, fabric};
use reverbs_model::program::{Kind, LONGEST, LONGEST_DELAY, Plan, Program, Transport, Wish};
use reverbs_model::verbs::{verbs, wrapped};
use reverbs_wrappers::plan::Plan as Wrapper;

/// What happens next. Links and queue pairs are counted around.
#[derive(Clone, Debug)]
enum Step {
    Post {
        link: usize,
        end: usize,
        wishes: Vec<Wish>,
        spoiled: Option<usize>,
    },
    Receive {
        link: usize,
        end: usize,
        elements: u32,
    },
    /// A few packets of a queue pair leave, the first of which may be lost.
    Deliver {
        pair: usize,
        packets: u32,
        loses: bool,
    },
    Acknowledge {
        pair: usize,
        requests: u32,
    },
    Poll {
        side: usize,
    },
    Arm {
        side: usize,
    },
    TakeEvents {
        side: usize,
    },
    Control(Control),
}

/// What waits for the end of a checkpoint.
#[derive(Clone, Debug)]
enum Control {
    Advance { link: usize, end: usize },
    Fail { link: usize, end: usize },
    Recreate { link: usize, polite: bool },
}

/// More than a program has.
const MANY: usize = 64;

fn wish() -> impl Strategy<Value = Wish> {
    let kind = prop_oneof![
        4 => Just(Kind::Send),
        2 => Just(Kind::SendWithImmediate),
        3 => Just(Kind::Write),
        2 => Just(Kind::WriteWithImmediate),
        1 => Just(Kind::Read),
        1 => Just(Kind::Add),
        1 => Just(Kind::CompareAndSwap),
    ];
    (
        kind,
        8..LONGEST,
        any::<bool>(),
        prop::bool::weighted(0.2),
        1..4_u32,
    )
        .prop_map(|(kind, length, signaled, inline, elements)| Wish {
            kind,
            length,
            signaled,
            inline,
            elements,
        })
}

fn wishes() -> impl Strategy<Value = Vec<Wish>> {
    prop_oneof![
        3 => wish().prop_map(|wish| vec![wish]),
        1 => prop::collection::vec(wish(), 1..5),
    ]
}

fn control() -> impl Strategy<Value = Control> {
    prop_oneof![
        4 => (0..MANY, 0..2_usize).prop_map(|(link, end)| Control::Advance { link, end }),
        1 => (0..MANY, 0..2_usize).prop_map(|(link, end)| Control::Fail { link, end }),
        1 => (0..MANY, any::<bool>()).prop_map(|(link, polite)| Control::Recreate { link, polite }),
    ]
}

/// `events`: how often they are asked for and taken.
fn step(events: u32) -> impl Strategy<Value = Step> {
    let spoiled = prop_oneof![9 => Just(None), 1 => (0..4_usize).prop_map(Some)];
    prop_oneof![
        16 => (0..MANY, 0..2_usize, wishes(), spoiled)
            .prop_map(|(link, end, wishes, spoiled)| Step::Post { link, end, wishes, spoiled }),
        8 => (0..MANY, 0..2_usize, 1..3_u32)
            .prop_map(|(link, end, elements)| Step::Receive { link, end, elements }),
        16 => (0..MANY, 1..5_u32, prop::bool::weighted(0.1))
            .prop_map(|(pair, packets, loses)| Step::Deliver { pair, packets, loses }),
        10 => (0..MANY, 1..4_u32)
            .prop_map(|(pair, requests)| Step::Acknowledge { pair, requests }),
        4 => (0..2_usize).prop_map(|side| Step::Poll { side }),
        events => (0..2_usize).prop_map(|side| Step::Arm { side }),
        events => (0..2_usize).prop_map(|side| Step::TakeEvents { side }),
        2 => control().prop_map(Step::Control),
    ]
}

fn plan() -> impl Strategy<Value = Plan> {
    let transport = prop_oneof![
        3 => Just(Transport::Reliable),
        1 => Just(Transport::Unreliable),
        1 => Just(Transport::Datagram),
    ];
    let stage = || prop_oneof![5 => Just(3_usize), 1 => 0..3_usize];
    (
        transport,
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.2),
        any::<bool>(),
        stage(),
        stage(),
    )
        .prop_map(
            |(transport, shared, signal_all, extended, first, second)| Plan {
                transport,
                shared,
                signal_all,
                extended,
                stages: [first, second],
            },
        )
}

/// What is around the device, for a share of the programs: it delays and reorders completions, and fails while hardware is made.
fn wrapper() -> impl Strategy<Value = Option<Wrapper>> {
    let failures = prop_oneof![
        1 => Just(""),
        1 => Just("fail=create_qp%10:ENOMEM fail=create_cq%10:ENOMEM fail=reg_mr%5:ENOMEM fail=create_srq%10:EIO"),
        1 => Just("fail=modify_qp%8:EIO fail=post_recv%8:ENOMEM fail=post_srq_recv%30:ENOMEM fail=open_device%20:EAGAIN"),
    ];
    let text =
        (any::<u64>(), 0..LONGEST_DELAY / 2, failures).prop_map(|(seed, delay, failures)| {
            let text = format!("seed={seed} delay={delay} reorder=yes {failures}");
            Some(text.parse().expect("a plan"))
        });
    prop_oneof![1 => Just(None), 1 => text]
}

/// What happens before a checkpoint, what between its phases, and when its orchestrators die.
#[derive(Clone, Debug)]
struct Round {
    before: Vec<Step>,
    between: Vec<(usize, Step)>,
    deaths: Vec<usize>,
}

/// `deaths`: how many moments, from the first on, are those at which an orchestrator may die.
fn round(events: u32, deaths: usize) -> impl Strategy<Value = Round> {
    let before = prop::collection::vec(step(events), 0..40);
    let between = prop::collection::vec((0..Moment::ALL.len(), step(events)), 0..30);
    let deaths = prop_oneof![4 => Just(vec![]), 1 => prop::collection::vec(0..deaths, 1..3)];
    (before, between, deaths).prop_map(|(before, between, deaths)| Round {
        before,
        between,
        deaths,
    })
}

fn take(program: &mut Program, step: &Step, open: bool) {
    let number = |pair: usize| {
        let all: Vec<u32> = fabric().pairs().collect();
        all.get(pair % all.len().max(1)).copied()
    };
    match step {
        Step::Post {
            link,
            end,
            wishes,
            spoiled,
        } => program.post(*link, *end, wishes, *spoiled),
        Step::Receive {
            link,
            end,
            elements,
        } => program.receive(*link, *end, *elements),
        Step::Deliver {
            pair,
            packets,
            loses,
        } => {
            if let Some(number) = number(*pair) {
                (0..*packets).for_each(|packet| {
                    fabric().deliver(number, *loses && packet == 0);
                });
            }
        }
        Step::Acknowledge { pair, requests } => {
            if let Some(number) = number(*pair) {
                (0..*requests).for_each(|_| {
                    fabric().acknowledge(number);
                });
            }
        }
        Step::Poll { side } => program.poll(*side),
        Step::Arm { side } => program.arm(*side),
        Step::TakeEvents { side } => program.take_events(*side, open),
        Step::Control(control) if open => match *control {
            Control::Advance { link, end } => program.advance(link, end),
            Control::Fail { link, end } => program.fail(link, end),
            Control::Recreate { link, polite } => program.recreate(link, polite),
        },
        Step::Control(_) => {}
    }
}

fn runtime_dir() -> PathBuf {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(Machine::new);
    socket::runtime_dir().expect("the folder of the machine")
}

/// The ends of all links.
fn ends(program: &Program) -> impl Iterator<Item = (usize, usize)> + use<> {
    (0..program.links()).flat_map(|link| [(link, 0), (link, 1)])
}

fn play(
    folder: &Path,
    seed: u64,
    stale: bool,
    wrapper: Option<Wrapper>,
    plans: &[Plan],
    rounds: &[Round],
) {
    fabric().begin(seed, stale);
    let fails = wrapper
        .as_ref()
        .is_some_and(|plan| !plan.failures.is_empty());
    let device = wrapper.map_or_else(verbs, wrapped);
    let mut program = Program::new(1 << 40, plans, device);
    // What is not here is younger than the last restart and has the number that the program knows.
    let mut hardware: BTreeMap<u32, u32> = BTreeMap::new();
    for round in rounds {
        for step in &round.before {
            take(&mut program, step, true);
        }
        let mut truths = BTreeMap::new();
        let deaths = round.deaths.iter().map(|death| Moment::ALL[*death]);
        let cycled = cycle(folder, fails, deaths.collect(), |moment| {
            // Nothing may be executed from here on, although some of it may still be on the way.
            if moment == Moment::Asked {
                for (link, end) in ends(&program) {
                    let number = program.number(link, end);
                    let below = hardware.get(&number).copied().unwrap_or(number);
                    let truth = fabric().truth(below, program.has_failed(link, 1 - end));
                    truths.insert((link, end), truth);
                }
            }
            if moment == Moment::Settled {
                // From here on the application may see it.
                for ((link, end), truth) in &truths {
                    if *truth == Truth::Lost {
                        program.break_down(*link, *end);
                    }
                }
            }
            let now = round.between.iter();
            for (_, step) in now.filter(|(at, _)| Moment::ALL[*at] == moment) {
                take(&mut program, step, moment == Moment::Begun);
            }
        });
        check_states(&program, &cycled, &truths);
        if cycled.replaced {
            hardware.clear();
            for pair in &cycled.status.contexts[0].queue_pairs {
                let below = pair.hardware_qpn.expect("it has hardware").0;
                hardware.insert(pair.virtual_qpn.0, below);
            }
        }
    }
    program.finish();
}

/// A queue pair is in the error state if the program has put it there, or an answer was lost; not else.
fn check_states(program: &Program, cycled: &Cycled, truths: &BTreeMap<(usize, usize), Truth>) {
    let pairs = &cycled.status.contexts[0].queue_pairs;
    for (link, end) in ends(program) {
        let number = program.number(link, end);
        let pair = pairs
            .iter()
            .find(|pair| pair.virtual_qpn.0 == number)
            .expect("a queue pair keeps its number");
        let lost = truths.get(&(link, end)) == Some(&Truth::Lost);
        let in_error = pair.state == "ERR";
        assert!(
            in_error == (program.has_failed(link, end) || lost)
                || program.is_down(link) && !program.has_failed(link, end),
            "link {link}, end {end} is in {}: {:?}",
            pair.state,
            cycled.status.notes
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    /// `stale`: on a device that does not tell how far a responder came, so that messages are counted.
    fn every_request_once(
        seed: u64,
        stale in prop::bool::weighted(0.25),
        wrapper in wrapper(),
        plans in prop::collection::vec(plan(), 1..4),
        rounds in prop::collection::vec(round(2, Moment::ALL.len()), 0..5),
    ) {
        let folder = runtime_dir();
        apart(|| play(&folder, seed, stale, wrapper, &plans, &rounds));
    }

    /// Programs that wait for events, and checkpoints that are often given up.
    fn every_event_that_is_owed(
        seed: u64,
        plan in plan(),
        rounds in prop::collection::vec(round(16, 3), 1..4),
    ) {
        let folder = runtime_dir();
        apart(|| play(&folder, seed, false, None, &[plan], &rounds));
    }
}

/// One after the other: each forks, and a process that forks should have no other thread at work.
#[test]
fn whatever_happens() {
    every_request_once();
    every_event_that_is_owed();
    an_event_when_a_checkpoint_is_given_up();
    a_device_that_nobody_had_open_at_a_restart();
}

/// No device is open at the restart, so the job's tables have no address. One that is opened later is where it is.
fn a_device_that_nobody_had_open_at_a_restart() {
    let folder = runtime_dir();
    for transport in [Transport::Reliable, Transport::Datagram] {
        let plan = Plan {
            transport,
            shared: false,
            signal_all: true,
            extended: false,
            stages: [3, 3],
        };
        apart(|| {
            fabric().begin(0, false);
            drop(Program::new(1 << 41, &[plan], verbs()));
            assert!(cycle(&folder, false, vec![], |_| {}).replaced);
            let between_posts = Round {
                before: vec![],
                between: vec![],
                deaths: vec![],
            };
            play(&folder, 0, false, None, &[plan], &[between_posts]);
        });
    }
}

/// A completion is there, and cannot be polled because the gates are closed; the program asks for an event, finds nothing, and would
/// wait. Then the checkpoint is given up.
fn an_event_when_a_checkpoint_is_given_up() {
    let plan = Plan {
        transport: Transport::Reliable,
        shared: false,
        signal_all: true,
        extended: false,
        stages: [3, 3],
    };
    let wish = Wish {
        kind: Kind::Write,
        length: 8,
        signaled: true,
        inline: false,
        elements: 1,
    };
    let post = Step::Post {
        link: 0,
        end: 0,
        wishes: vec![wish],
        spoiled: None,
    };
    let mut before = vec![post];
    for pair in 0..2 {
        before.push(Step::Deliver {
            pair,
            packets: 1,
            loses: false,
        });
        before.push(Step::Acknowledge { pair, requests: 1 });
    }
    let at = |moment| Moment::ALL.iter().position(|one| *one == moment);
    let at = |moment| at(moment).expect("a moment");
    let given_up = Round {
        before,
        between: vec![
            (at(Moment::Closed), Step::Arm { side: 0 }),
            (at(Moment::Drained), Step::Poll { side: 0 }),
        ],
        deaths: vec![at(Moment::Drained)],
    };
    let later = Round {
        before: vec![Step::TakeEvents { side: 0 }],
        between: vec![],
        deaths: vec![],
    };
    let folder = runtime_dir();
    apart(|| play(&folder, 0, false, None, &[plan], &[given_up, later]));
}
