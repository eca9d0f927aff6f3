//! What is posted, and how.

use std::fmt;
use std::str::FromStr;

/// Requests posted before they are polled.
pub const BATCH: usize = 16;

macro_rules! shapes {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// What is posted, and how; always [`BATCH`] requests, then their completions. Signaled, and of one element, unless
        /// said otherwise.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Shape { $($(#[$doc])* $name,)* }

        impl Shape {
            /// Every shape.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name on a command line.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

shapes! {
    /// SEND, one at a time, polled by 16.
    Send = "send";
    /// RDMA WRITE: a remote key is translated too.
    Write = "write";
    /// SEND, of which only the last of 16 is signaled.
    Unsignaled = "unsignaled";
    /// Four chains of 4, the last of each signaled.
    ChainOf4 = "chain-4";
    /// One chain of 16, the last signaled.
    ChainOf16 = "chain-16";
    /// SEND of four elements.
    FourElements = "elements-4";
    /// SEND of 32 bytes, inline.
    Inline32 = "inline-32";
    /// SEND over 64 queue pairs in turn.
    Pairs64 = "pairs-64";
    /// SEND over 1,024 queue pairs in turn.
    Pairs1024 = "pairs-1024";
    /// SEND by `ibv_wr_*`, one request a batch. Directly: `ibv_post_send`.
    Builders = "builders";
    /// SEND by `ibv_wr_*`, one batch of 16, the last signaled. Directly: one chain.
    BuildersOf16 = "builders-16";
    /// SEND, the completions looked at from one start to one end. Directly: polled one at a time.
    Readers = "readers";
    /// SEND, polled one completion at a time.
    OneAtATime = "poll-1";
    /// Receives of a queue pair.
    Receive = "receive";
    /// Receives of a shared receive queue.
    SharedReceive = "shared-receive";
}

impl Shape {
    /// Queue pairs it needs.
    #[must_use]
    pub fn pairs(self) -> usize {
        match self {
            Self::Pairs64 => 64,
            Self::Pairs1024 => 1024,
            _ => 1,
        }
    }

    /// Requests that go down in one call.
    #[must_use]
    pub fn chain(self) -> usize {
        match self {
            Self::ChainOf4 => 4,
            Self::ChainOf16 | Self::BuildersOf16 => 16,
            _ => 1,
        }
    }

    /// Every how many requests one is signaled.
    #[must_use]
    pub fn signaled_every(self) -> usize {
        match self {
            Self::Unsignaled => BATCH,
            other => other.chain(),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|shape| shape.name() == text);
        found.copied().ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|shape| shape.name()).collect();
            format!("no shape {text}; there are {}", names.join(", "))
        })
    }
}

/// What lies between the application and the device that does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Nothing.
    Direct,
    /// The virtual device, on the hardware it was opened on.
    Before,
    /// The virtual device, after its hardware was replaced.
    After,
}

impl Route {
    /// Every route.
    pub const ALL: [Self; 3] = [Self::Direct, Self::Before, Self::After];

    /// Its name on a command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Before => "before",
            Self::After => "after",
        }
    }
}

impl FromStr for Route {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|route| route.name() == text);
        found.ok_or_else(|| format!("no route {text}; there are direct, before, after"))
    }
}
