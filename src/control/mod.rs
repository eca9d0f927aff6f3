//! What the agent in every process and the orchestrator say to each other.
//!
//! One request, one reply, over a unix stream socket that only its user can open (`socket`). A message is a length
//! (u32, little endian) and that many bytes of JSON. The agent never speaks first.
//!
//! Also what whoever drives the phases has to decide, be it the command or a process by itself (`crate::agent`, chaos).

pub mod choice;
pub mod drain;
pub mod job_numbers;
pub mod message;
pub mod needs;
pub mod outside;
pub mod owner;
pub mod socket;
