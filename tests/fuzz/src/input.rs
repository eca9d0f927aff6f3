//! What libFuzzer's bytes are read as.

use arbitrary::{Arbitrary, Result, Unstructured};
use rdma_core_sys::{IBV_WR_LOCAL_INV, IBV_WR_SEND_WITH_INV};

/// What happens, in order.
#[derive(Arbitrary, Clone, Debug)]
pub struct Input {
    pub steps: Vec<Step>,
}

/// One thing that happens.
#[derive(Arbitrary, Clone, Debug)]
pub enum Step {
    Act(Act),
    Control(Control),
    /// Fresh hardware, with what happens between the phases.
    Cycle(Vec<(u8, Act)>),
}

/// What may happen at any time.
#[derive(Arbitrary, Clone, Debug)]
pub enum Act {
    Send {
        pair: u8,
        chain: Chain<Send>,
    },
    Receive {
        queue: u8,
        chain: Chain<Receive>,
    },
    Execute {
        pair: u8,
        count: u8,
    },
    Acknowledge {
        pair: u8,
        count: u8,
    },
    Poll {
        count: u8,
    },
    /// The device refuses a request that it could take.
    Refuse {
        after: u8,
    },
}

/// What waits while a checkpoint is under way.
#[derive(Arbitrary, Clone, Debug)]
pub enum Control {
    /// The application moves a queue pair to the error state.
    Fail { pair: u8 },
    /// It resets both ends of a connection and connects them again.
    Reset { pair: u8 },
    /// It registers its second region anew; the old key is good for nothing then.
    Register,
}

/// One to six requests.
#[derive(Clone, Debug)]
pub struct Chain<T>(pub Vec<T>);

impl<'a, T: Arbitrary<'a>> Arbitrary<'a> for Chain<T> {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> Result<Self> {
        let length = bytes.int_in_range(1..=6)?;
        (0..length)
            .map(|_| bytes.arbitrary())
            .collect::<Result<_>>()
            .map(Self)
    }
}

/// A request to send.
#[derive(Clone, Debug)]
pub struct Send {
    pub opcode: u32,
    pub flags: u32,
    pub count: i32,
    pub elements: [Element; MOST_ELEMENTS],
    pub remote_key: Key,
}

impl<'a> Arbitrary<'a> for Send {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self {
            opcode: not_of_windows(match bytes.arbitrary::<u8>()? {
                255 => bytes.arbitrary()?,
                small => u32::from(small % 9),
            }),
            flags: bytes.int_in_range(0..=31)?,
            count: count(bytes)?,
            elements: bytes.arbitrary()?,
            remote_key: bytes.arbitrary()?,
        })
    }
}

/// Some are not offered, or not there at all. The application makes no windows, so in the place of requests about them come
/// others that are not offered.
fn not_of_windows(opcode: u32) -> u32 {
    match opcode {
        IBV_WR_LOCAL_INV..=IBV_WR_SEND_WITH_INV => opcode + 3,
        other => other,
    }
}

/// A request to receive.
#[derive(Clone, Debug)]
pub struct Receive {
    pub count: i32,
    pub elements: [Element; MOST_ELEMENTS],
}

impl<'a> Arbitrary<'a> for Receive {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self {
            count: count(bytes)?,
            elements: bytes.arbitrary()?,
        })
    }
}

/// Elements that a request has room for; more than a queue takes.
pub const MOST_ELEMENTS: usize = 5;

/// Mostly a number of elements that are there. Others must be refused before an element is looked at.
fn count(bytes: &mut Unstructured<'_>) -> Result<i32> {
    Ok(match bytes.arbitrary::<u8>()? {
        255 => bytes.arbitrary::<i32>()? | (1 << 20),
        small => i32::from(small % (MOST_ELEMENTS as u8 + 1)),
    })
}

/// A scatter/gather element.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Element {
    pub key: Key,
    pub length: Length,
}

/// How many bytes.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Length {
    None,
    Eight,
    Few(u8),
    Packets(u16),
    Huge(u32),
}

impl Length {
    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Eight => 8,
            Self::Few(length) => u32::from(length),
            Self::Packets(length) => u32::from(length),
            Self::Huge(length) => length,
        }
    }
}

/// Which key.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Key {
    First,
    Second,
    /// One that the second region had.
    Old,
    Any(u32),
}
