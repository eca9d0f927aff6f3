//! reverbs.
