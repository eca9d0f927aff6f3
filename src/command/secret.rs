//! What proves that a message comes from the job's own user: a secret that only this user can read.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

const BYTES: usize = 32;

/// Random bytes, as hexadecimal digits where they are written.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Secret")
    }
}

/// Where the other end finds the secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Handover {
    /// In its runtime folder, where it was left when the job was started.
    Kept { job: String },
    /// In a credential that MUNGE has made for this user alone.
    Munge { credential: String },
    /// Here: the launcher's own channel is as private as the job (ssh).
    Given { secret: Secret },
}

impl Secret {
    /// # Errors
    /// The kernel gives no random bytes.
    pub(crate) fn fresh() -> Result<Self> {
        let mut bytes = [0; BYTES];
        let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        ensure!(filled == BYTES, "too few random bytes");
        Ok(Self(hexadecimal(&bytes)))
    }

    /// Leaves it in the runtime folder of this node.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn keep(&self, runtime_folder: &Path, job: &str) -> Result<()> {
        let path = kept(runtime_folder, job)?;
        let write = || -> std::io::Result<()> {
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            options.open(&path)?.write_all(self.0.as_bytes())
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// # Errors
    /// It is not there, or others can read it.
    pub(crate) fn kept(runtime_folder: &Path, job: &str) -> Result<Self> {
        let path = kept(runtime_folder, job)?;
        let read = || -> Result<Self> {
            let mut file = File::open(&path)?;
            let found = file.metadata()?;
            let us = rustix::process::geteuid().as_raw();
            ensure!(
                found.uid() == us && found.mode() & 0o077 == 0,
                "it must belong to user {us} alone"
            );
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            Ok(Self(text))
        };
        read().with_context(|| format!("the secret of the job, {}", path.display()))
    }

    /// For the other end of a fresh connection, under MUNGE where there is one.
    pub(crate) fn for_handover(&self) -> Handover {
        match munge(&self.0) {
            Some(credential) => Handover::Munge { credential },
            None => Handover::Given {
                secret: self.clone(),
            },
        }
    }

    /// What the other end has handed over.
    ///
    /// # Errors
    /// It cannot be found, or is not for this user.
    pub(crate) fn from_handover(handover: &Handover, runtime_folder: &Path) -> Result<Self> {
        match handover {
            Handover::Kept { job } => Self::kept(runtime_folder, job),
            Handover::Munge { credential } => unmunge(credential).map(Self),
            Handover::Given { secret } => Ok(secret.clone()),
        }
    }

    /// A key for one connection and one direction.
    pub(crate) fn key(&self, purpose: &str) -> Hmac<Sha256> {
        let mut derived = keyed(self.0.as_bytes());
        derived.update(purpose.as_bytes());
        keyed(&derived.finalize().into_bytes())
    }
}

fn keyed(bytes: &[u8]) -> Hmac<Sha256> {
    match Hmac::new_from_slice(bytes) {
        Ok(hmac) => hmac,
        Err(_) => unreachable!("HMAC takes keys of any length (RFC 2104)"),
    }
}

/// Names of jobs come from other nodes: nothing but letters, digits and dashes may be part of a path.
fn kept(runtime_folder: &Path, job: &str) -> Result<PathBuf> {
    ensure!(
        !job.is_empty()
            && job
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'),
        "\"{job}\" is no name of a job"
    );
    Ok(runtime_folder.join(format!("job-{job}.secret")))
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `None` where there is no MUNGE.
fn munge(text: &str) -> Option<String> {
    let user = rustix::process::geteuid().as_raw().to_string();
    let credential = filter(
        "munge",
        &["--no-input", "--restrict-uid", &user, "--string", text],
    )
    .ok()?;
    Some(credential.trim().to_owned())
}

fn unmunge(credential: &str) -> Result<String> {
    let mut child = Command::new("unmunge")
        .args(["--no-output", "--metadata=/dev/null"])
        .args(["--output", "/dev/stdout"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start `unmunge`, which the first node has")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(credential.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("MUNGE refuses the credential of the first node");
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn filter(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()?;
    ensure!(output.status.success(), "{program} failed");
    Ok(String::from_utf8(output.stdout)?)
}
