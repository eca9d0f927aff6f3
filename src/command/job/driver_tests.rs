//! The driver against agents that follow the rules of the protocol and note every rule it breaks.

use reverbs::control::message::{Phase, Session};

use super::driver::Driver;
use super::fake::{FakeAgent, FakeJob, Mishap, process};
use crate::command::interrupt::Interrupt;
use crate::command::progress::Progress;

const PHASES: [Phase; 7] = [
    Phase::Running,
    Phase::Closed,
    Phase::Stopped,
    Phase::Settled,
    Phase::Released,
    Phase::Rebuilt,
    Phase::Connected,
];

const STEPS: [&str; 14] = [
    "begin",
    "examine",
    "close",
    "peers",
    "drain",
    "stop",
    "responders",
    "settle",
    "release",
    "rebuild",
    "publish",
    "connect",
    "resume",
    "resume",
];

const BEFORE_ANYTHING_IS_MOVED: [&str; 5] = ["begin", "examine", "close", "peers", "drain"];

fn session(pid: i32) -> Session {
    Session {
        id: format!("of {pid}"),
        pid,
    }
}

fn drive<T>(job: &mut FakeJob, act: impl FnOnce(&mut Driver<'_, FakeJob>) -> T) -> T {
    let mut progress = Progress::new(true);
    let mut driver = Driver::new(
        job,
        &mut progress,
        Interrupt::default(),
        session(1),
        Vec::new(),
    );
    act(&mut driver)
}

fn cycle(driver: &mut Driver<'_, FakeJob>) -> anyhow::Result<()> {
    driver.attach()?;
    driver.release()?;
    driver.restore_service()
}

fn assert_all_running(job: &FakeJob, case: &str) {
    for (pid, agent) in &job.agents {
        assert_eq!(agent.phase, Phase::Running, "{case}: {pid} {agent:?}");
        assert_eq!(agent.session, None, "{case}: {pid} is still claimed");
    }
}

#[test]
fn a_cycle_takes_everybody_through_every_phase_once() {
    let mut job = FakeJob::of(&[Phase::Running; 3]);
    drive(&mut job, cycle).unwrap();
    assert_all_running(&job, "cycle");
    assert_eq!(job.broken_rules, [""; 0]);
    assert!(job.agents.values().all(|agent| agent.rebuilds == 1));
    assert_eq!(
        job.asked,
        [
            "begin",
            "examine",
            "close",
            "peers",
            "drain",
            "stop",
            "responders",
            "settle",
            "release",
            "rebuild",
            "publish",
            "connect",
            "resume"
        ]
    );
}

#[test]
fn draining_goes_on_while_there_is_progress_and_stops_when_there_is_none() {
    for (outstanding, per_round, arriving, rounds) in [
        (5, 1, 0, 5),
        (0, 1, 0, 1),
        (4, 2, 0, 2),
        (3, 0, 0, 3),
        (1, 0, 9, 11),
    ] {
        let mut job = FakeJob::of(&[Phase::Running]);
        let agent = job.agents.get_mut(&process(100)).unwrap();
        (agent.outstanding, agent.per_round) = (outstanding, per_round);
        agent.arriving = arriving;
        drive(&mut job, cycle).unwrap();
        let asked = job.asked.iter().filter(|name| **name == "drain").count();
        assert_eq!(
            asked, rounds,
            "{outstanding} by {per_round}, {arriving} arriving"
        );
    }
}

#[test]
fn a_failure_in_any_step_fails_the_cycle_and_leaves_everybody_running() {
    for step in STEPS {
        for mishap in [Mishap::Refuses, Mishap::Hangs, Mishap::AnswerLost] {
            let case = format!("{mishap:?} at {step}");
            let mut job = FakeJob::of(&[Phase::Running; 3]);
            job.agents.get_mut(&process(101)).unwrap().mishap = Some((step, mishap));
            drive(&mut job, |driver| {
                let error = cycle(driver).expect_err(&case);
                let told = driver.recover(error, "back").to_string();
                assert_eq!(told, "back", "{case}");
            });
            assert_all_running(&job, &case);
            assert_eq!(job.broken_rules, [""; 0], "{case}");
            if BEFORE_ANYTHING_IS_MOVED.contains(&step) {
                assert!(
                    job.agents.values().all(|agent| agent.rebuilds == 0),
                    "{case}"
                );
            }
        }
    }
}

#[test]
fn the_others_go_on_without_a_process_that_dies() {
    for step in STEPS {
        let mut job = FakeJob::of(&[Phase::Running; 3]);
        job.agents.get_mut(&process(101)).unwrap().mishap = Some((step, Mishap::Dies));
        drive(&mut job, |driver| {
            cycle(driver).unwrap_or_else(|error| panic!("{step}: {error:#}"));
            assert_eq!(driver.ended(), [process(101)], "{step}");
        });
        assert_eq!(job.agents.len(), 2);
        assert_all_running(&job, step);
        assert_eq!(job.broken_rules, [""; 0], "{step}");
    }
}

#[test]
fn a_job_that_ends_altogether_is_said_to_have_ended() {
    for step in &STEPS[..12] {
        let mut job = FakeJob::of(&[Phase::Running; 2]);
        for agent in job.agents.values_mut() {
            agent.mishap = Some((step, Mishap::Dies));
        }
        drive(&mut job, |driver| {
            let error = cycle(driver).expect_err(step);
            let told = driver.recover(error, "back").to_string();
            assert_eq!(told, "the job has ended", "{step}");
        });
    }
}

#[test]
fn nobody_goes_on_without_one_that_always_refuses() {
    for step in ["close", "stop", "settle", "release", "rebuild", "connect"] {
        let mut job = FakeJob::of(&[Phase::Running; 3]);
        let agent = job.agents.get_mut(&process(101)).unwrap();
        agent.mishap = Some((step, Mishap::Refuses));
        agent.stubborn = true;
        let error = drive(&mut job, |driver| {
            let error = cycle(driver).expect_err(step);
            format!("{:#}", driver.recover(error, "back"))
        });
        assert!(error.contains("process 101: told to"), "{step}: {error}");
        // Where nothing was moved nobody has to be asked what it refuses.
        let all_back = step == "close";
        assert_eq!(error.starts_with("back"), all_back, "{step}: {error}");
        for pid in [100, 102] {
            let runs = job.agents[&process(pid)].phase == Phase::Running;
            assert_eq!(runs, all_back, "{step}: {pid}");
        }
        job.agents.get_mut(&process(101)).unwrap().mishap = None;
        drive(&mut job, |driver| {
            driver.attach_abandoned().unwrap();
            driver.bring_back()
        })
        .unwrap_or_else(|error| panic!("{step}: {error:#}"));
        assert_all_running(&job, step);
        assert_eq!(
            job.broken_rules
                .iter()
                .filter(|rule| rule.contains("while"))
                .count(),
            0,
            "{step}"
        );
    }
}

#[test]
fn nobody_goes_on_without_one_that_is_stopped() {
    for step in &STEPS[..13] {
        for comes_back in [true, false] {
            let mut job = FakeJob::of(&[Phase::Running; 3]);
            job.agents.get_mut(&process(101)).unwrap().mishap = Some((step, Mishap::Stops));
            drive(&mut job, |driver| {
                let error = cycle(driver).unwrap_err();
                assert!(
                    error.to_string().contains("process 101: stopped"),
                    "{step}: {error}"
                );
                let error = format!("{:#}", driver.recover(error, "back"));
                assert!(!error.contains("back"), "{step}: {error}");
                assert!(error.contains("process 101: stopped"), "{step}: {error}");
                assert!(error.contains("reverbs resume"), "{step}: {error}");
            });
            let moved = !BEFORE_ANYTHING_IS_MOVED.contains(step);
            for pid in [100, 102] {
                let agent = &job.agents[&process(pid)];
                // Those that were connected may run: nothing that they send is lost to it.
                let waits = moved && *step != "resume";
                assert_eq!(agent.phase != Phase::Running, waits, "{step}: {agent:?}");
            }
            if comes_back {
                job.agents.get_mut(&process(101)).unwrap().stopped = false;
            } else {
                job.agents.remove(&process(101));
            }
            drive(&mut job, |driver| {
                driver.attach_abandoned().unwrap();
                driver.bring_back()
            })
            .unwrap_or_else(|error| panic!("{step}: {error:#}"));
            assert_all_running(&job, step);
            assert_eq!(job.broken_rules, [""; 0], "{step}");
        }
    }
}

#[test]
fn a_process_that_was_quicker_than_the_restart_catches_up() {
    // Restored, and at its first device before anybody has looked for agents.
    let mut job = FakeJob::of(&[Phase::Released, Phase::Running]);
    drive(&mut job, |driver| {
        assert_eq!(driver.attach_abandoned()?, 2);
        driver.restore_service()
    })
    .unwrap();
    assert_all_running(&job, "restart");
    assert_eq!(job.published, [100, 101]);
    assert!(job.agents.values().all(|agent| agent.rebuilds == 1));
}

#[test]
fn a_process_that_opens_a_device_meanwhile_catches_up() {
    for step in ["close", "stop", "settle", "release", "rebuild", "publish"] {
        let mut job = FakeJob::of(&[Phase::Running; 2]);
        job.strict_barriers = false;
        job.appear_after = Some((step, process(200), FakeAgent::at(Phase::Running)));
        drive(&mut job, cycle).unwrap();
        assert_all_running(&job, step);
        assert_eq!(job.agents[&process(200)].rebuilds, 1, "{step}");
        assert_eq!(job.published, [100, 101, 200], "{step}");
        assert_eq!(job.broken_rules, [""; 0], "{step}");
    }
}

#[test]
fn whatever_a_dead_orchestrator_left_is_brought_back() {
    for first in PHASES {
        for second in PHASES {
            for third in PHASES {
                let phases = [first, second, third];
                let mut job = FakeJob::of(&phases);
                job.strict_barriers = false;
                for agent in job.agents.values_mut() {
                    // One that it had only claimed, too.
                    if agent.phase != Phase::Running || third == Phase::Running {
                        agent.session = Some(session(99));
                    }
                }
                drive(&mut job, |driver| driver.bring_back())
                    .unwrap_or_else(|error| panic!("{phases:?}: {error:#}"));
                assert_all_running(&job, &format!("{phases:?}"));
                assert_eq!(job.broken_rules, [""; 0], "{phases:?}");
                let moved = phases.iter().any(|phase| *phase > Phase::Closed);
                let connected = phases.iter().any(|phase| *phase >= Phase::Rebuilt);
                for (agent, before) in job.agents.values().zip(phases) {
                    let rebuilt = moved
                        && before < Phase::Rebuilt
                        && !(connected && before == Phase::Running);
                    assert_eq!(agent.rebuilds, u64::from(rebuilt), "{phases:?} {before:?}");
                }
            }
        }
    }
}

#[test]
fn a_job_with_a_living_orchestrator_is_left_alone() {
    let mut job = FakeJob::of(&[Phase::Closed, Phase::Running]);
    job.agents.get_mut(&process(100)).unwrap().session = Some(session(99));
    job.alive = vec![99];
    for act in [cycle, |driver: &mut Driver<'_, FakeJob>| {
        driver.bring_back()
    }] {
        let error = drive(&mut job, act).unwrap_err().to_string();
        assert!(error.contains("process 99"), "{error}");
        assert_eq!(job.asked, [""; 0]);
    }
}

#[test]
fn a_job_left_half_way_is_refused_with_the_remedy() {
    let mut job = FakeJob::of(&[Phase::Running, Phase::Stopped]);
    job.agents.get_mut(&process(101)).unwrap().session = Some(session(99));
    let error = drive(&mut job, cycle).unwrap_err().to_string();
    assert!(error.contains("reverbs resume"), "{error}");
    assert_eq!(job.asked, [""; 0]);
}

#[test]
fn an_interrupt_before_anything_was_moved_takes_it_back() {
    let mut job = FakeJob::of(&[Phase::Running; 2]);
    let mut progress = Progress::new(true);
    let interrupt = Interrupt::default();
    interrupt.raise();
    let mut driver = Driver::new(&mut job, &mut progress, interrupt, session(1), Vec::new());
    driver.attach().unwrap();
    let error = driver.release().unwrap_err();
    assert_eq!(driver.recover(error, "back").to_string(), "back");
    assert_all_running(&job, "interrupt");
}

#[test]
fn a_job_whose_numbers_cannot_be_told_is_refused_before_anything_is_moved() {
    let mut job = FakeJob::of(&[Phase::Running; 4]);
    for agent in job.agents.values_mut() {
        agent.numbers_bytes = 140 << 20;
    }
    let refused = drive(&mut job, |driver| {
        driver.attach().unwrap();
        let error = driver.release().unwrap_err();
        format!("{:#}", driver.recover(error, "the job runs on"))
    });
    assert!(refused.contains("too many of them"), "{refused}");
    assert_all_running(&job, &refused);
    assert!(job.agents.values().all(|agent| agent.rebuilds == 0));
    for agent in job.agents.values_mut() {
        agent.numbers_bytes = 127 << 20;
    }
    drive(&mut job, cycle).unwrap();
}
