//! The program: everything is in the library.

fn main() -> std::process::ExitCode {
    mptcp_hook::run(std::env::args_os().skip(1).collect())
}
