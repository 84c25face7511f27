//! The filter that the kernel runs on each packet: classic BPF (`Documentation/networking/filter.rst`), which knows no
//! loops, so that the walks over VLAN tags, extension headers and TCP options are written out step by step.
//!
//! It passes what [`super::packet::Packet::parse`] finds and [`super::packet::Packet::matters`] keeps, and next to nothing
//! else: an options field of more than [`OPTIONS_MAX`] options before MPTCP's is left to the reader.

use libc::sock_filter;

use super::option::{KIND, KIND_END, KIND_PADDING, SUBTYPE_DSS};
use super::packet::{
    ETHERNET_ADDRESSES, ETHERNET_TYPES, EXTENSION_HEADERS, EXTENSION_HEADERS_MAX, FRAGMENT_HEADER, TAGS_MAX, TCP,
    TCP_HEADER, VLAN_TYPES,
};

/// How many options are walked over. A packet of ours has up to ten, padding included. The program counts against
/// `net.core.optmem_max`, 20 KiB before Linux 6.7.
const OPTIONS_MAX: usize = 16;
/// How much of a packet is kept, in bytes: all headers, however they are nested, and little of the data.
pub const KEPT: u32 = 512;

// `include/uapi/linux/filter.h` and `bpf_common.h`.
const LOAD_BYTE: u16 = 0x50;
const LOAD_HALF: u16 = 0x48;
const LOAD_ANCILLARY: u16 = 0x20;
const LOAD_MEMORY: u16 = 0x60;
const LOAD_X: u16 = 0x01;
const LOAD_X_MEMORY: u16 = 0x61;
const STORE: u16 = 0x02;
const ADD: u16 = 0x04;
const ADD_X: u16 = 0x0c;
const AND: u16 = 0x54;
const SHIFT_LEFT: u16 = 0x64;
const SHIFT_RIGHT: u16 = 0x74;
const A_TO_X: u16 = 0x07;
const X_TO_A: u16 = 0x87;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_AT_LEAST: u16 = 0x35;
const IF_AT_LEAST_X: u16 = 0x3d;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;
/// `SKF_AD_OFF + SKF_AD_HATYPE`: the type of the interface instead of a part of the packet.
const HARDWARE: u32 = (-0x1000 + 28_i32) as u32;

// The program's memory: M[0] to M[15].
/// Where the walk is.
const CURSOR: u32 = 0;
/// Where the TCP header ends.
const END: u32 = 1;
/// The protocol of what is at the cursor.
const NEXT: u32 = 2;

/// A place in the program that is jumped to, always forward.
#[derive(Clone, Copy)]
struct Label(usize);

/// A program that is being written.
#[derive(Default)]
struct Program {
    code: Vec<sock_filter>,
    /// Jumps whose distance is not known yet.
    jumps: Vec<(usize, Label)>,
    /// Where the labels are, once they are placed.
    labels: Vec<usize>,
}

impl Program {
    fn op(&mut self, code: u16, k: u32) {
        self.code.push(sock_filter { code, jt: 0, jf: 0, k });
    }

    fn label(&mut self) -> Label {
        self.labels.push(0);
        Label(self.labels.len() - 1)
    }

    fn place(&mut self, label: Label) {
        self.labels[label.0] = self.code.len();
    }

    /// Jumps if what `test` asks of A and `k` is so; goes on otherwise.
    fn jump_if(&mut self, test: u16, k: u32, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.op(test, k);
    }

    fn jump(&mut self, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.op(JUMP, 0);
    }

    /// Ends here without the packet if `test` is so.
    fn drop_if(&mut self, test: u16, k: u32) {
        self.op(test, k);
        let at = self.code.len() - 1;
        self.code[at].jf = 1;
        self.op(RETURN, 0);
    }

    /// Ends here without the packet unless `test` is so.
    fn drop_unless(&mut self, test: u16, k: u32) {
        self.op(test, k);
        let at = self.code.len() - 1;
        self.code[at].jt = 1;
        self.op(RETURN, 0);
    }

    fn finish(mut self) -> Vec<sock_filter> {
        for (at, label) in self.jumps {
            let distance = self.labels[label.0] - at - 1;
            match self.code[at].code {
                JUMP => self.code[at].k = distance as u32,
                // Each is within one step of a walk: the longest has some forty instructions.
                _ => self.code[at].jt = u8::try_from(distance).expect("a conditional jump within a step"),
            }
        }
        self.code
    }
}

/// The program. `dss`: packets that have no MPTCP option but DSS pass as well.
pub fn program(dss: bool) -> Vec<sock_filter> {
    let mut program = Program::default();
    link(&mut program);
    network(&mut program);
    transport(&mut program);
    for _ in 0..OPTIONS_MAX {
        option(&mut program, dss);
    }
    program.op(LOAD_MEMORY, CURSOR);
    program.op(LOAD_X_MEMORY, END);
    program.drop_if(IF_AT_LEAST_X, 0);
    program.op(RETURN, KEPT);
    program.finish()
}

/// Leaves the start of the IP header in X.
fn link(program: &mut Program) {
    let (ethernet, network) = (program.label(), program.label());
    program.op(LOAD_ANCILLARY, HARDWARE);
    for hardware in ETHERNET_TYPES {
        program.jump_if(IF_EQUAL, hardware.into(), ethernet);
    }
    program.op(LOAD_X, 0);
    program.jump(network);
    program.place(ethernet);
    program.op(LOAD_X, ETHERNET_ADDRESSES as u32);
    let typed = program.label();
    for _ in 0..TAGS_MAX {
        let tagged = program.label();
        program.op(LOAD_HALF, 0);
        for protocol in VLAN_TYPES {
            program.jump_if(IF_EQUAL, protocol.into(), tagged);
        }
        program.jump(typed);
        program.place(tagged);
        program.op(X_TO_A, 0);
        program.op(ADD, 4);
        program.op(A_TO_X, 0);
    }
    program.place(typed);
    program.op(LOAD_HALF, 0);
    let ip = program.label();
    program.jump_if(IF_EQUAL, 0x0800, ip);
    program.drop_unless(IF_EQUAL, 0x86dd);
    program.place(ip);
    program.op(X_TO_A, 0);
    program.op(ADD, 2);
    program.op(A_TO_X, 0);
    program.place(network);
}

/// From the start of the IP header to that of the TCP header, both in X.
fn network(program: &mut Program) {
    let (ipv4, tcp) = (program.label(), program.label());
    program.op(LOAD_BYTE, 0);
    program.op(SHIFT_RIGHT, 4);
    program.jump_if(IF_EQUAL, 4, ipv4);
    program.drop_unless(IF_EQUAL, 6);

    program.op(LOAD_BYTE, 6);
    program.op(STORE, NEXT);
    program.op(X_TO_A, 0);
    program.op(ADD, 40);
    program.op(STORE, CURSOR);
    let found = program.label();
    for _ in 0..EXTENSION_HEADERS_MAX {
        let (fragment, common, next) = (program.label(), program.label(), program.label());
        program.op(LOAD_X_MEMORY, CURSOR);
        program.op(LOAD_MEMORY, NEXT);
        program.jump_if(IF_EQUAL, FRAGMENT_HEADER.into(), fragment);
        for number in EXTENSION_HEADERS {
            program.jump_if(IF_EQUAL, number.into(), common);
        }
        program.jump(found);
        program.place(common);
        program.op(LOAD_BYTE, 0);
        program.op(STORE, NEXT);
        program.op(LOAD_BYTE, 1);
        program.op(ADD, 1);
        program.op(SHIFT_LEFT, 3);
        program.op(ADD_X, 0);
        program.op(STORE, CURSOR);
        program.jump(next);
        program.place(fragment);
        program.op(LOAD_HALF, 2);
        program.drop_if(IF_ANY_BIT, 0xfff8);
        program.op(LOAD_BYTE, 0);
        program.op(STORE, NEXT);
        program.op(X_TO_A, 0);
        program.op(ADD, 8);
        program.op(STORE, CURSOR);
        program.place(next);
    }
    program.place(found);
    program.op(LOAD_MEMORY, NEXT);
    program.drop_unless(IF_EQUAL, TCP.into());
    program.op(LOAD_X_MEMORY, CURSOR);
    program.jump(tcp);

    program.place(ipv4);
    program.op(LOAD_BYTE, 9);
    program.drop_unless(IF_EQUAL, TCP.into());
    program.op(LOAD_HALF, 6);
    program.drop_if(IF_ANY_BIT, 0x1fff);
    program.op(LOAD_BYTE, 0);
    program.op(AND, 0x0f);
    program.op(SHIFT_LEFT, 2);
    program.drop_unless(IF_AT_LEAST, 20);
    program.op(ADD_X, 0);
    program.op(A_TO_X, 0);
    program.place(tcp);
}

/// From the start of the TCP header, in X, to the memory: where the options begin and end.
fn transport(program: &mut Program) {
    program.op(LOAD_BYTE, 12);
    program.op(SHIFT_RIGHT, 4);
    program.op(SHIFT_LEFT, 2);
    program.op(ADD_X, 0);
    program.op(STORE, END);
    program.op(X_TO_A, 0);
    program.op(ADD, TCP_HEADER as u32);
    program.op(STORE, CURSOR);
}

/// Looks at the option at the cursor and goes over it.
fn option(program: &mut Program, dss: bool) {
    let (mptcp, length, over, pass) = (program.label(), program.label(), program.label(), program.label());
    program.op(LOAD_MEMORY, CURSOR);
    program.op(LOAD_X_MEMORY, END);
    program.drop_if(IF_AT_LEAST_X, 0);
    program.op(A_TO_X, 0);
    program.op(LOAD_BYTE, 0);
    program.drop_if(IF_EQUAL, KIND_END.into());
    program.jump_if(IF_EQUAL, KIND.into(), mptcp);
    // In this one A has the length already.
    program.jump_if(IF_EQUAL, KIND_PADDING.into(), over);
    program.jump(length);

    program.place(mptcp);
    if dss {
        program.jump(pass);
    } else {
        // Too near to the end, or too short, to have a subtype: malformed.
        program.op(X_TO_A, 0);
        program.op(ADD, 2);
        program.op(LOAD_X_MEMORY, END);
        program.jump_if(IF_AT_LEAST_X, 0, pass);
        program.op(LOAD_X_MEMORY, CURSOR);
        program.op(LOAD_BYTE, 1);
        let (long, walk) = (program.label(), program.label());
        program.jump_if(IF_AT_LEAST, 3, long);
        program.jump(pass);
        program.place(long);
        program.op(LOAD_BYTE, 2);
        program.op(SHIFT_RIGHT, 4);
        program.jump_if(IF_EQUAL, SUBTYPE_DSS.into(), walk);
        program.jump(pass);
        program.place(walk);
        program.jump(length);
    }
    program.place(pass);
    program.op(RETURN, KEPT);

    program.place(length);
    program.op(LOAD_BYTE, 1);
    program.drop_unless(IF_AT_LEAST, 2);
    program.place(over);
    program.op(ADD_X, 0);
    program.op(STORE, CURSOR);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::packet::{Frame, Packet};
    use super::super::testing::{PRIO, bytes, ethernet, extension, fragment, frame, ipv4, ipv6, ipv6_with, tcp, vlan};
    use super::*;

    /// Runs a program on a packet as `___bpf_prog_run` of `kernel/bpf/core.c` would: how much of it is kept. A load from
    /// beyond the packet ends it with nothing.
    fn run(program: &[sock_filter], hardware: u16, packet: &[u8]) -> u32 {
        let (mut a, mut x, mut memory, mut at) = (0u32, 0u32, [0u32; 16], 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let load = |size: usize| {
                let start = x.wrapping_add(k) as usize;
                let bytes = packet.get(start..start.checked_add(size)?)?;
                Some(bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
            };
            let mut jump = |is_so: bool| at += usize::from(if is_so { jt } else { jf });
            match code {
                LOAD_BYTE | LOAD_HALF => match load(if code == LOAD_BYTE { 1 } else { 2 }) {
                    Some(value) => a = value,
                    None => return 0,
                },
                LOAD_ANCILLARY if k == HARDWARE => a = hardware.into(),
                LOAD_MEMORY => a = memory[k as usize],
                LOAD_X => x = k,
                LOAD_X_MEMORY => x = memory[k as usize],
                STORE => memory[k as usize] = a,
                ADD => a = a.wrapping_add(k),
                ADD_X => a = a.wrapping_add(x),
                AND => a &= k,
                SHIFT_LEFT => a <<= k,
                SHIFT_RIGHT => a >>= k,
                A_TO_X => x = a,
                X_TO_A => a = x,
                JUMP => at += k as usize,
                IF_EQUAL => jump(a == k),
                IF_AT_LEAST => jump(a >= k),
                IF_AT_LEAST_X => jump(a >= x),
                IF_ANY_BIT => jump(a & k != 0),
                RETURN => return k,
                _ => panic!("instruction {code:#x} at {}", at - 1),
            }
        }
    }

    /// The kernel's filter and the reader are of one mind about a packet, which is what they say.
    #[track_caller]
    fn passes(hardware: u16, packet: &[u8], dss: bool) -> bool {
        let kept = run(&program(dss), hardware, packet);
        let wanted = Packet::parse(&Frame { hardware, ..frame(packet) }).is_some_and(|packet| packet.matters(dss));
        assert_eq!(kept != 0, wanted, "{packet:02x?}");
        assert!(kept == 0 || kept == KEPT);
        wanted
    }

    #[test]
    fn small_enough_for_every_kernel() {
        for dss in [false, true] {
            let program = program(dss);
            // BPF_MAXINSNS; and eight instructions of the kernel's own for each, at eight bytes, are within 20 KiB on
            // average only if they are few.
            assert!(program.len() < 900, "{} instructions", program.len());
            assert!(program.last().is_some_and(|last| last.code == RETURN));
        }
    }

    #[test]
    fn what_matters_passes() {
        for (options, matters, has_any) in [
            (PRIO, true, true),
            ("", false, false),
            ("020405b4 0402 080a0000000100000002 01 030307", false, false),
            ("020405b4 0402 080a0000000100000002 01 030307 1e040101", true, true),
            ("0101 080a0000000100000002 1e08 2001 00000007", false, true),
            ("0101 080a0000000100000002 1e08 2001 00000007 1e0351 01", true, true),
            ("1e08 2001 00000007 1e04 8103", true, true),
            ("00 1e0351", false, false),
            ("0101010101 0101010101 01 1e0351 0101", true, true),
            // Malformed: of no length, too short, too long.
            ("1e00", true, true),
            ("1e02 01", true, true),
            ("1e02 2001", true, true),
            ("1eff 1001", true, true),
            ("1eff 2001", false, true),
            ("0101 011e", true, true),
            ("0101 1e03", true, true),
            ("0500 1e0351", false, false),
            ("05ff 1e0351", false, false),
        ] {
            for payload in [0, 100] {
                let segment = tcp(options, payload);
                for packet in [ipv4(&segment), ipv6(&segment)] {
                    for dss in [false, true] {
                        let expected = if dss { has_any } else { matters };
                        assert_eq!(passes(1, &ethernet(&packet), dss), expected, "{options} {dss}");
                        assert_eq!(passes(772, &ethernet(&packet), dss), expected, "{options} {dss}");
                        assert_eq!(passes(65534, &packet, dss), expected, "{options} {dss}");
                    }
                }
            }
        }
    }

    #[test]
    fn tags_and_extension_headers() {
        let segment = tcp(PRIO, 0);
        let plain = ethernet(&ipv4(&segment));
        let once = vlan(&plain, 0x8100, 5);
        let twice = vlan(&once, 0x88a8, 6);
        assert!(passes(1, &once, false) && passes(1, &twice, false));
        assert!(!passes(1, &vlan(&twice, 0x8100, 7), false));
        let mut packet = (TCP, segment.clone());
        for number in 0..EXTENSION_HEADERS_MAX {
            packet = extension(EXTENSION_HEADERS[number % 3], &packet, number * 8);
            assert!(passes(1, &ethernet(&ipv6_with(packet.0, &packet.1)), false));
        }
        packet = extension(60, &packet, 0);
        assert!(!passes(1, &ethernet(&ipv6_with(packet.0, &packet.1)), false));
        for (offset, is_first) in [(0, true), (8, false)] {
            let (next, rest) = fragment(offset, &(TCP, segment.clone()));
            assert_eq!(passes(1, &ethernet(&ipv6_with(next, &rest)), false), is_first);
        }
    }

    #[test]
    fn more_options_than_are_walked_over_are_the_readers() {
        let walked = "0402".repeat(OPTIONS_MAX);
        for (options, passes) in [(walked.clone() + "01010101", true), (walked, false)] {
            assert_eq!(run(&program(false), 1, &ethernet(&ipv4(&tcp(&options, 0)))) != 0, passes, "{options}");
        }
    }

    /// One of the options there are, or bytes that are none.
    fn an_option() -> impl Strategy<Value = Vec<u8>> {
        let known = [
            "01",
            "020405b4",
            "080a0000000100000002",
            "1e035101",
            "1e0820010000000a",
            "1e0c11011a2b3c4d00000005",
            "00",
        ];
        prop_oneof![
            proptest::sample::select(known.to_vec()).prop_map(bytes),
            proptest::collection::vec(any::<u8>(), 1..6)
        ]
    }

    proptest! {
        #[test]
        fn whatever_matters_passes(
            options in proptest::collection::vec(an_option(), 0..9),
            payload in 0..40usize,
            changed in proptest::collection::vec((0..74usize, any::<u8>()), 0..3),
            length in 0..200usize,
            is_v6 in any::<bool>(),
            dss in any::<bool>(),
        ) {
            let mut options = options.concat();
            options.truncate(40);
            let hex: String = options.iter().map(|byte| format!("{byte:02x}")).collect();
            let segment = tcp(&hex, payload);
            let mut packet = ethernet(&if is_v6 { ipv6(&segment) } else { ipv4(&segment) });
            for (at, value) in changed {
                if let Some(byte) = packet.get_mut(at) {
                    *byte = value;
                }
            }
            packet.truncate(length.max(14));
            let matters = Packet::parse(&frame(&packet)).is_some_and(|packet| packet.matters(dss));
            prop_assert!(!matters || run(&program(dss), 1, &packet) != 0, "{packet:02x?}");
        }
    }
}
