//! `reverbs node`: what runs on the other nodes of a job, for as long as a command on the first one needs it.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::mpsc::channel;

use anyhow::{Context, Result, bail};

use super::channel::{self, End, Greeting, Keeper, Writer};
use super::relay::{
    Call, HelloChild, HelloParent, MAGIC, NODES_VERSION, Relay, Subtree, nonce, runtime_folder,
};
use super::stream::read_line;
use crate::command::node::{Outputs, Part};
use crate::command::secret::Secret;

const LONGEST_LINE: usize = 1 << 20;

/// Serves the node that has started us, until it hangs up.
///
/// # Errors
/// It is not of the same user and job, or says what cannot be understood.
pub(crate) fn serve() -> Result<ExitCode> {
    let mut input = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut output = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    let hello = read_line(&mut input, LONGEST_LINE).context("nobody has said hello")?;
    let hello: HelloChild = serde_json::from_str(&hello)
        .context("this is started by `reverbs` on another node, not by hand")?;
    for (name, value) in &hello.environment {
        // SAFETY: no other thread was started yet.
        unsafe { std::env::set_var(name, value) };
    }
    let nonce = nonce()?;
    let secret = agree(&hello);
    let answer = HelloParent {
        version: NODES_VERSION,
        nonce: nonce.clone(),
        refused: secret.as_ref().err().map(|error| format!("{error:#}")),
    };
    output.write_all(format!("{MAGIC}{}\n", serde_json::to_string(&answer)?).as_bytes())?;
    let secret = secret?;
    let greeting = Greeting {
        from_parent: hello.nonce,
        from_child: nonce,
    };
    let (mut reader, writer) =
        channel::begin(End::Child, input.into(), output.into(), &secret, &greeting)?;
    let subtree: Subtree = reader.receive()?.context("no place in the job")?;
    let _keeper = Keeper::of(writer.clone());
    let part = Part::new(subtree.own, runtime_folder()?, Outputs::none()?);
    let (mut relay, opened) = Relay::open(part, &subtree, &secret);
    writer.send(&opened)?;
    // The worker may be at it for minutes, while this thread notices that nobody is there any more.
    let (calls, called) = channel::<Call>();
    let worker = std::thread::spawn(move || {
        // Also when it panics: beats alone are no life.
        let writer = Closing(writer);
        for call in called {
            let answers = relay.call(&call);
            if writer.0.send(&answers).is_err() {
                break;
            }
        }
        // Lets go of everything that it holds.
        drop(relay);
    });
    let outcome = loop {
        match reader.receive() {
            Ok(Some(call)) => {
                if calls.send(call).is_err() {
                    bail!("the connection is lost");
                }
            }
            Ok(None) => break Ok(ExitCode::SUCCESS),
            Err(error) => break Err(error).context("the node above"),
        }
    };
    drop(calls);
    let _ = worker.join();
    outcome
}

/// The other end sees the end of the stream when this is dropped.
struct Closing(Writer);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn agree(hello: &HelloChild) -> Result<Secret> {
    if hello.version != NODES_VERSION {
        bail!(
            "the reverbs of this node speaks version {NODES_VERSION} between nodes, the other {}: install the same on all",
            hello.version
        );
    }
    Secret::from_handover(&hello.handover, &runtime_folder()?)
}
