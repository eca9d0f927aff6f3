//! The numbers that cross the virtual device, one type for each side.
//!
//! What the application has seen is *virtual* and never changes; what the device below handed out is *hardware* and
//! changes with every rebuild. The two are never the same type, so that one cannot be passed for the other; going from
//! one to the other is always a named step (`crate::translate`).

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);
    };
}

number!(
    /// A queue pair number as the application sees it (24 bits, IBTA 3.5.10).
    VirtualQpn(u32)
);
number!(
    /// A queue pair number of the device below.
    HardwareQpn(u32)
);
number!(
    /// An lkey or rkey as the application, or a peer of it, sees it.
    VirtualKey(u32)
);
number!(
    /// An lkey or rkey of the device below.
    HardwareKey(u32)
);
number!(
    /// A port GID as the application sees it (network byte order, IBTA 4.1.1).
    VirtualGid([u8; 16])
);
number!(
    /// A port GID of the device below.
    HardwareGid([u8; 16])
);
number!(
    /// A port LID as the application sees it.
    VirtualLid(u16)
);
number!(
    /// A port LID of the device below.
    HardwareLid(u16)
);
number!(
    /// A packet sequence number (24 bits, IBTA 9.7.1).
    Psn(u32)
);

impl Psn {
    const MASK: u32 = 0x00ff_ffff;

    /// The number `packets` further on, modulo 2^24.
    #[must_use]
    pub fn advance(self, packets: u32) -> Self {
        Self(self.0.wrapping_add(packets) & Self::MASK)
    }

    /// How many packets lie from `earlier` to here, modulo 2^24.
    #[must_use]
    pub fn since(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0) & Self::MASK
    }
}
