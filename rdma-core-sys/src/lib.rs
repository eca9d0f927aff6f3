//! The public types of libibverbs.
