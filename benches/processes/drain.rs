//! A process that reads its standard input to the end: the least that an OCI hook may do.

use std::io::Read;

fn main() {
    let mut buffer = [0; 8192];
    let mut stdin = std::io::stdin().lock();
    while stdin.read(&mut buffer).is_ok_and(|n| n > 0) {}
}
