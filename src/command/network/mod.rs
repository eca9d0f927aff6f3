//! The IP side of a job: what its sockets are bound and connected to, and how that is kept alive across a checkpoint and a
//! restart. docs/nodes.md has the reasons.

mod addresses;
mod hold;
mod namespace;
mod overlay;
mod tables;
pub(crate) mod tcp_lock;

pub(crate) use addresses::{ForeignBinds, is_here, of_tree, unreachable};
pub(crate) use hold::Hold;
pub(crate) use namespace::Namespace;
pub(crate) use overlay::{Overlay, OverlayNode};
pub(crate) use tables::{Tables, forget_closed_connections};
