//! A process that does nothing: what starting and ending any program costs.

fn main() {}
