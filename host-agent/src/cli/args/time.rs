//! Times on the command line.

pub(in crate::cli) use crate::duration::parse_duration as duration;
