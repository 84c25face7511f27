//! A container's first process: sleeps for as many milliseconds as its argument says.

fn main() {
    let time = std::env::args().nth(1).and_then(|argument| argument.parse().ok()).expect("milliseconds");
    std::thread::sleep(std::time::Duration::from_millis(time));
}
