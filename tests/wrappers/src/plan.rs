//! What a wrapper is to do, as text: words of the form `key=value`.
//!
//! | | |
//! |---|---|
//! | `seed=N` | of all that is random |
//! | `trace=FILE` | one line for each verb of the control path, for each failure and each loss, is added to this file |
//! | `delay=N` | a completion is held back for up to N polls |
//! | `reorder=yes` | completions overtake each other, but never one of the same queue of the same queue pair |
//! | `lose=P` | of the messages of UC and UD queue pairs, P percent are not received by anybody |
//! | `fail=VERB:ERRNO` | the verb (without `ibv_`) fails |
//! | `fail=VERB@N:ERRNO` | its Nth call fails |
//! | `fail=VERB%P:ERRNO` | P percent of its calls fail |
//! | `queue=N` | the device says that a queue has room for N requests at most |
//! | `while=FOLDER` | a verb fails, and its calls are counted, only while there is a file of its name in this folder |
//!
//! `modify_qp` to the error state goes by the name `stop_qp`.
//!
//! Posts fail in the middle of a chain too: what is in front of the request that fails goes down.

use std::path::PathBuf;

/// What to do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    pub seed: u64,
    pub trace: Option<PathBuf>,
    pub delay: u32,
    pub reorder: bool,
    /// Percent.
    pub lose: u32,
    /// 0 for what the device below says.
    pub queue: i32,
    pub failures: Vec<Failure>,
    pub failing_while: Option<PathBuf>,
}

/// A verb that fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub verb: String,
    pub when: When,
    pub errno: i32,
}

/// Which of its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Always,
    /// Counted from 1.
    Call(u64),
    Percent(u32),
}

const ERRNOS: &[(&str, i32)] = &[
    ("EAGAIN", libc::EAGAIN),
    ("EBUSY", libc::EBUSY),
    ("EFAULT", libc::EFAULT),
    ("EINVAL", libc::EINVAL),
    ("EIO", libc::EIO),
    ("ENOMEM", libc::ENOMEM),
];

impl std::str::FromStr for Plan {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut plan = Self::default();
        for word in text.split_whitespace() {
            let (key, value) = word.split_once('=').ok_or_else(|| unknown(word))?;
            match key {
                "seed" => plan.seed = number(word, value)?,
                "trace" => plan.trace = Some(value.into()),
                "delay" => plan.delay = number(word, value)?,
                "reorder" => plan.reorder = value == "yes",
                "queue" => plan.queue = number(word, value)?,
                "lose" => plan.lose = number(word, value)?,
                "fail" => plan.failures.push(failure(word, value)?),
                "while" => plan.failing_while = Some(value.into()),
                _ => return Err(unknown(word)),
            }
        }
        Ok(plan)
    }
}

fn unknown(word: &str) -> String {
    format!("not understood: {word}")
}

fn number<T: std::str::FromStr>(word: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| unknown(word))
}

fn failure(word: &str, text: &str) -> Result<Failure, String> {
    let (which, errno) = text.split_once(':').ok_or_else(|| unknown(word))?;
    let (_, errno) = ERRNOS
        .iter()
        .find(|(name, _)| *name == errno)
        .ok_or_else(|| unknown(word))?;
    let (verb, when) = match (which.split_once('@'), which.split_once('%')) {
        (Some((verb, call)), _) => (verb, When::Call(number(word, call)?)),
        (_, Some((verb, percent))) => (verb, When::Percent(number(word, percent)?)),
        _ => (which, When::Always),
    };
    Ok(Failure {
        verb: verb.to_owned(),
        when,
        errno: *errno,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_what_it_says() {
        let text = "seed=7 delay=3 reorder=yes lose=10 fail=create_qp@2:ENOMEM fail=reg_mr%5:EIO \
            fail=modify_qp:EINVAL while=/tmp/now trace=/tmp/trace";
        let plan: Plan = text.parse().unwrap();
        assert_eq!((plan.seed, plan.delay, plan.lose), (7, 3, 10));
        assert!(plan.reorder);
        let when: Vec<_> = plan.failures.iter().map(|failure| failure.when).collect();
        assert_eq!(when, [When::Call(2), When::Percent(5), When::Always]);
        assert_eq!(plan.failures[2].errno, libc::EINVAL);
        assert_eq!(plan.failing_while, Some("/tmp/now".into()));
    }

    #[test]
    fn what_is_not_understood_is_said() {
        for text in [
            "dealy=3",
            "seed=x",
            "fail=reg_mr:ENOSUCH",
            "fail=reg_mr",
            "reorder",
        ] {
            let error = text.parse::<Plan>().unwrap_err();
            assert!(error.contains(text), "{error}");
        }
    }
}
