//! App agent.
fn main() {}
