//! `mptcp-hook capture`: what it says of real traffic is what tshark says of the same packets; nothing that comes by
//! stops it; it ends when it should.

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use nix::sched::{CloneFlags, setns};
use serde_json::Value;

/// A `capture` under way. Dropping it ends it.
struct Listening {
    running: Running,
}

impl Listening {
    fn start(sandbox: &Sandbox, arguments: &[&str]) -> Self {
        let program = hook().display().to_string();
        let mut running = sandbox.spawn(&[&[program.as_str(), "capture"], arguments].concat());
        wait_for("a capture that listens", LIMIT, || {
            assert!(running.is_running(), "{}{}", running.stdout(), running.stderr());
            running.stderr().contains("capturing").then_some(())
        });
        Self { running }
    }

    /// The packets until now, by `--json`.
    fn packets(&self) -> Vec<Value> {
        let parse = |line: &String| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        self.running.lines().iter().map(parse).collect()
    }

    /// All packets when there is an end of them: [`mark`] comes last, and what came before it is in the file as well.
    #[track_caller]
    fn packets_to_mark(&self) -> Vec<Value> {
        self.wait_option("MP_PRIO", |_, option| option["address_id"] == MARK);
        self.packets()
    }

    /// Waits for a packet with an option of this subtype for which `is` holds.
    #[track_caller]
    fn wait_option(&self, subtype: &str, is: impl Fn(&Value, &Value) -> bool) -> Value {
        wait_for(&format!("a packet with {subtype}"), LIMIT, || {
            self.packets()
                .into_iter()
                .find(|packet| options(packet).iter().any(|option| option["subtype"] == subtype && is(packet, option)))
        })
    }

    /// Waits for a line of text with all `parts`.
    #[track_caller]
    fn wait_line(&self, parts: &[&str]) -> String {
        wait_for(&format!("a line with {parts:?}"), LIMIT, || {
            self.running.lines().into_iter().find(|line| parts.iter().all(|part| line.contains(part)))
        })
    }
}

/// The address id of a packet that marks the end.
const MARK: u8 = 0x77;

/// Sends a packet that comes after all others: the last sockets that could send anything are gone.
#[track_caller]
fn mark(sandbox: &Sandbox, paths: &TwoPaths) {
    let is_alive = |line: &str| !line.starts_with("LISTEN") && !line.starts_with("TIME-WAIT");
    for netns in [paths.server(), &ctr()] {
        let sockets = || sandbox.run_in(netns, &["ss", "-tanH"]).ok();
        wait_until("the end of all sockets", LIMIT, || !sockets().lines().any(is_alive));
    }
    inject(sandbox, paths.server(), "eth0", vec![frame(&format!("1e04 51{MARK:02x}"), 0x10, false)]);
}

fn options(packet: &Value) -> &[Value] {
    packet["options"].as_array().map(Vec::as_slice).expect("options is a list")
}

/// A server, and the namespace `ctr` with two paths to it.
fn world(sandbox: &Sandbox) -> TwoPaths<'_> {
    let paths = TwoPaths::with_container_netns(sandbox, &Wiring::new().dual_stack());
    paths.raise_limits(&Netns::named("ctr"));
    paths
}

const CTR: [&str; 2] = ["--netns", "/run/netns/ctr"];

/// The columns that are compared with tshark's: its field, and what it is in `--json` as (subtype, member). It does not show
/// checksums (4.0).
const COLUMNS: [(&str, &[(&str, &str)]); 21] = [
    ("tcp.options.mptcp.version", &[("MP_CAPABLE", "version")]),
    ("tcp.options.mptcp.checksumreq.flags", &[("MP_CAPABLE", "checksum_required")]),
    ("tcp.options.mptcp.sendkey", &[("MP_CAPABLE", "sender_key")]),
    ("tcp.options.mptcp.recvkey", &[("MP_CAPABLE", "receiver_key"), ("MP_FASTCLOSE", "receiver_key")]),
    ("tcp.options.mptcp.backup.flag", &[("MP_JOIN", "backup"), ("MP_PRIO", "backup")]),
    (
        "tcp.options.mptcp.addrid",
        &[
            ("MP_JOIN", "address_id"),
            ("ADD_ADDR", "address_id"),
            ("REMOVE_ADDR", "address_ids"),
            ("MP_PRIO", "address_id"),
        ],
    ),
    ("tcp.options.mptcp.recvtok", &[("MP_JOIN", "token")]),
    ("tcp.options.mptcp.sendrand", &[("MP_JOIN", "nonce")]),
    ("tcp.options.mptcp.sendtrunchmac", &[("MP_JOIN", "hmac of 8")]),
    ("tcp.options.mptcp.sendhmac", &[("MP_JOIN", "hmac of 20")]),
    ("tcp.options.mptcp.datafin.flag", &[("DSS", "data_fin")]),
    ("tcp.options.mptcp.rawdataack", &[("DSS", "data_ack")]),
    ("tcp.options.mptcp.rawdataseqno", &[("DSS", "mapping.data_sequence"), ("MP_FAIL", "data_sequence")]),
    ("tcp.options.mptcp.subflowseqno", &[("DSS", "mapping.subflow_sequence")]),
    ("tcp.options.mptcp.datalvllen", &[("MP_CAPABLE", "data_length"), ("DSS", "mapping.data_length")]),
    ("tcp.options.mptcp.ipv4", &[("ADD_ADDR", "address of 4")]),
    ("tcp.options.mptcp.ipv6", &[("ADD_ADDR", "address of 6")]),
    ("tcp.options.mptcp.port", &[("ADD_ADDR", "port")]),
    ("tcp.options.mptcp.addaddrtrunchmac", &[("ADD_ADDR", "hmac")]),
    ("tcp.options.mptcp.flag_T.flag", &[("MP_TCPRST", "transient")]),
    ("tcp.options.mptcp.rst_reason", &[("MP_TCPRST", "reason")]),
];

/// The subtypes by number.
const SUBTYPES: [&str; 9] =
    ["MP_CAPABLE", "MP_JOIN", "DSS", "ADD_ADDR", "REMOVE_ADDR", "MP_PRIO", "MP_FAIL", "MP_FASTCLOSE", "MP_TCPRST"];

/// What tshark says of a file: a line per packet, a column per field.
fn tshark(file: &Path, fields: &[&str]) -> Vec<Vec<String>> {
    require("tshark", "tshark");
    let mut command = Command::new("tshark");
    command.arg("-n").arg("-r").arg(file).args(["-T", "fields", "-E", "separator=|"]).stdin(Stdio::null());
    for field in fields {
        command.args(["-e", field]);
    }
    let output = command.output().expect("starting tshark");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("tshark's UTF-8");
    text.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect()
}

/// A value of an option in the form that tshark prints, separated by commas where there are several.
fn as_tshark(column: &str, option: &Value, member: &str) -> Option<String> {
    let (member, kind) = member.split_once(" of ").map_or((member, None), |(member, kind)| (member, Some(kind)));
    let value = member.split('.').fold(option, |value, part| &value[part]);
    let text = match value {
        Value::Null => return None,
        Value::Bool(is_set) => u8::from(*is_set).to_string(),
        Value::Array(all) => all.iter().map(Value::to_string).collect::<Vec<_>>().join(","),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let digits = text.strip_prefix("0x");
    let is_other = match kind {
        Some("4") => text.contains(':'),
        Some("6") => !text.contains(':'),
        Some(bytes) => digits.map(|digits| (digits.len() / 2).to_string()).as_deref() != Some(bytes),
        None => false,
    };
    match digits {
        _ if is_other => None,
        Some(digits) if column.ends_with("sendhmac") => Some(digits.into()),
        Some(digits) => Some(u64::from_str_radix(digits, 16).expect("hexadecimal").to_string()),
        None if column.ends_with("rst_reason") => value.as_u64().map(|reason| format!("0x{reason:02x}")),
        None => Some(text),
    }
}

/// Compares each packet of `--json` with what tshark says of it.
#[track_caller]
fn assert_as_tshark(packets: &[Value], file: &Path) {
    let general = [
        "tcp.options.mptcp.subtype",
        "frame.time_epoch",
        "sll.ifindex",
        "sll.pkttype",
        "tcp.srcport",
        "tcp.dstport",
        "tcp.flags",
        "tcp.len",
        "ip.src",
        "ipv6.src",
        "ip.dst",
        "ipv6.dst",
    ];
    let fields: Vec<&str> = general.into_iter().chain(COLUMNS.iter().map(|(field, _)| *field)).collect();
    let rows = tshark(file, &fields);
    assert_eq!(rows.len(), packets.len());
    for (packet, row) in packets.iter().zip(rows) {
        let joined =
            |f: &dyn Fn(&Value) -> Option<String>| options(packet).iter().filter_map(f).collect::<Vec<_>>().join(",");
        let number = |option: &Value| SUBTYPES.iter().position(|name| option["subtype"] == *name);
        let flags = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
        let set = packet["flags"].as_array().expect("flags is a list");
        let bits = flags.iter().enumerate().filter(|(_, flag)| set.iter().any(|set| set == *flag));
        let bits: u32 = bits.map(|(bit, _)| 1 << bit).sum();
        let source = packet["source"].as_str().expect("an address");
        let destination = packet["destination"].as_str().expect("an address");
        let of =
            |address: &str, is_v6: bool| if address.contains(':') == is_v6 { address.to_owned() } else { "".into() };
        let mut expected = vec![
            joined(&|option| Some(number(option).expect("a known subtype").to_string())),
            row[1].clone(),
            packet["ifindex"].to_string(),
            if packet["direction"] == "out" { "4" } else { "0" }.to_owned(),
            packet["source_port"].to_string(),
            packet["destination_port"].to_string(),
            format!("0x{bits:04x}"),
            packet["payload"].to_string(),
            of(source, false),
            of(source, true),
            of(destination, false),
            of(destination, true),
        ];
        for (field, members) in COLUMNS {
            expected.push(joined(&|option| {
                let values = members.iter().filter(|(subtype, _)| option["subtype"] == *subtype);
                let values: Vec<String> = values.filter_map(|(_, member)| as_tshark(field, option, member)).collect();
                (!values.is_empty()).then(|| values.join(","))
            }));
        }
        // Newer versions print booleans as words.
        let row: Vec<String> = row.iter().map(|cell| cell.replace("True", "1").replace("False", "0")).collect();
        for ((field, expected), said) in fields.iter().zip(&expected).zip(&row) {
            assert_eq!(expected, said, "{field} of {packet:#}");
        }
        // Nanoseconds: to the last digit.
        let fraction = row[1].split('.').nth(1).expect("a fraction of a second");
        let time = packet["time"].as_str().expect("a time");
        assert!(time.ends_with(&format!(".{}Z", &fraction[..9])), "{time} is not {}", row[1]);
    }
}

#[test]
fn real_traffic_is_read_as_tshark_reads_it() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let ctr = Netns::named("ctr");
    sandbox.hook(&["apply", CTR[0], CTR[1], "--interface", "eth1=backup"]).ok();
    sandbox.sh_in(paths.server(), "ip mptcp endpoint add 10.0.2.1 signal; ip mptcp endpoint add fd00:2::1 signal");
    let file = sandbox.dir().join("all.pcap");
    let write = file.display().to_string();
    let _server = Server::start(&sandbox, paths.server());
    let all = Listening::start(&sandbox, &[CTR[0], CTR[1], "--json", "--dss", "--write", &write]);
    let some = Listening::start(&sandbox, &[CTR[0], CTR[1], "--json"]);
    for (address, port) in [(paths.address(), 5001), (paths.address6(), 5002)] {
        // It goes on for as long as it is needed.
        let mut sender = Sender::start(&sandbox, &ctr, address, 1 << 30, Some(200_000));
        sender.wait_sent(1);
        all.wait_option("MP_JOIN", |packet, _| packet["flags"] == serde_json::json!(["ACK"]));
        sandbox.hook(&["apply", CTR[0], CTR[1], "--interface", "eth1=subflow"]).ok();
        all.wait_option("MP_PRIO", |_, _| true);
        // Taken back while the connection lives: REMOVE_ADDR.
        let announced = format!("ip mptcp endpoint flush; ip mptcp endpoint add 10.0.1.1 signal port {port}");
        sandbox.sh_in(paths.server(), &announced);
        all.wait_option("REMOVE_ADDR", |_, _| true);
        drop(sender);
        // One that ends by itself.
        assert!(Sender::start(&sandbox, &ctr, address, 1_500_000, Some(1_000_000)).finish(LIMIT).mptcp);
        sandbox.hook(&["apply", CTR[0], CTR[1], "--interface", "eth1=backup"]).ok();
    }
    mark(&sandbox, &paths);

    let packets = all.packets_to_mark();
    let has = |subtype: &str| packets.iter().flat_map(options).filter(|option| option["subtype"] == subtype).count();
    for subtype in ["MP_CAPABLE", "MP_JOIN", "DSS", "ADD_ADDR", "REMOVE_ADDR", "MP_PRIO"] {
        assert!(has(subtype) > 0, "no {subtype} in {} packets", packets.len());
    }
    assert_eq!(has("malformed") + has("unknown"), 0);
    assert!(packets.len() > 300, "{} packets", packets.len());
    assert_as_tshark(&packets, &file);

    // Without --dss exactly those that have another option.
    let control: Vec<&Value> =
        packets.iter().filter(|packet| options(packet).iter().any(|option| option["subtype"] != "DSS")).collect();
    let some = some.packets_to_mark();
    assert_eq!(some.len(), control.len());
    let untimed = |packet: &Value| {
        let mut packet = packet.clone();
        packet.as_object_mut().expect("an object").remove("time");
        packet
    };
    for (one, other) in some.iter().zip(control) {
        assert_eq!(untimed(one), untimed(other));
    }
}

#[test]
fn a_connection_that_is_ended_by_force() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let file = sandbox.dir().join("force.pcap");
    let write = file.display().to_string();
    let capture = Listening::start(&sandbox, &[CTR[0], CTR[1], "--json", "--write", &write]);
    // A receiver that is killed before it has read everything.
    let server = Server::start(&sandbox, paths.server());
    let mut sender = Sender::start(&sandbox, &Netns::named("ctr"), paths.address(), 20_000_000_000, None);
    sender.wait_sent(1_000_000);
    server.stop_reading();
    sender.wait_blocked();
    // Of the sender's side that says nothing: it may have been kept from going on.
    let unread = || sandbox.run_in(paths.server(), &["ss", "-MnH", "state", "established"]).ok();
    wait_until("something unread", LIMIT, || unread().lines().any(|line| !line.trim_start().starts_with("0 ")));
    drop(server);
    let packet = capture.wait_option("MP_FASTCLOSE", |packet, _| packet["direction"] == "in");
    assert_eq!(packet["flags"], serde_json::json!(["RST", "ACK"]));
    drop(sender);
    mark(&sandbox, &paths);
    assert_as_tshark(&capture.packets_to_mark(), &file);
}

#[test]
fn what_a_person_looks_for_is_on_the_line() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let container = Bare::in_netns(&sandbox, "web", &Netns::named("ctr"));
    container.oci(&["--interface", "eth1=backup"]).ok();
    sandbox.sh_in(paths.server(), "ip mptcp endpoint add 10.0.2.1 signal");
    let _server = Server::start(&sandbox, paths.server());
    // By its name in the ledger.
    let capture = Listening::start(&sandbox, &[container.id()]);
    // It goes on for as long as it is needed.
    let mut sender = Sender::start(&sandbox, &container.netns(), paths.address(), 1 << 30, Some(100_000));
    sender.wait_sent(20_000);
    capture.wait_line(&[" eth0 out 10.0.1.2:", " > 10.0.0.1:5000 SYN MP_CAPABLE v1"]);
    capture.wait_line(&[" eth0 in 10.0.0.1:5000 > 10.0.1.2:", " SYN,ACK MP_CAPABLE v1"]);
    capture.wait_line(&[" eth1 out 10.0.2.2:", " SYN MP_JOIN id 1 backup token 0x"]);
    capture.wait_line(&[" eth0 in 10.0.0.1:5000", " ADD_ADDR id 1 10.0.2.1"]);
    capture.wait_line(&[" eth0 out 10.0.1.2:", " ADD_ADDR id 1 10.0.2.1 (echo)"]);
    sandbox.hook(&["apply", container.id(), "--interface", "eth1=subflow"]).ok();
    capture.wait_line(&[" eth1 out 10.0.2.2:", "MP_PRIO normal"]);
    sandbox.hook(&["apply", container.id(), "--interface", "eth1=backup"]).ok();
    capture.wait_line(&[" eth1 out 10.0.2.2:", "MP_PRIO backup"]);
    drop(sender);
    for line in capture.running.lines() {
        let time = line.split(' ').next().expect("a time");
        assert!(time.len() == 15 && time.as_bytes()[8] == b'.', "{line}");
    }
}

#[test]
fn interfaces_that_come_later() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let ctr = Netns::named("ctr");
    let _server = Server::start(&sandbox, paths.server());
    let capture = Listening::start(&sandbox, &[CTR[0], CTR[1], "--json"]);
    let connect = |name: &str| {
        assert!(Sender::start(&sandbox, &ctr, [10, 7, 0, 1].into(), 10_000, None).finish(LIMIT).mptcp);
        for direction in ["in", "out"] {
            capture
                .wait_option("MP_CAPABLE", |packet, _| packet["interface"] == name && packet["direction"] == direction);
        }
    };
    sandbox.sh_in(
        &ctr,
        "ip link add late0 type veth peer name late0 netns srv; ip addr add 10.7.0.2/24 dev late0; ip link set late0 up",
    );
    sandbox.sh_in(paths.server(), "ip addr add 10.7.0.1/24 dev late0; ip link set late0 up");
    connect("late0");
    // A name that changes while it is looked at.
    sandbox.sh_in(&ctr, "ip link set late0 down; ip link set late0 name renamed; ip link set renamed up");
    connect("renamed");
}

#[test]
fn tags_in_both_directions() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let file = sandbox.dir().join("tags.pcap");
    let write = file.display().to_string();
    let capture = Listening::start(&sandbox, &[CTR[0], CTR[1], "--json", "--write", &write]);
    let mut sent = Vec::new();
    for is_v6 in [false, true] {
        let plain = frame("1e03 51", 0x10, is_v6);
        let once = [&plain[..12], &[0x81, 0, 0x60, 5], &plain[12..]].concat();
        let twice = [&plain[..12], &[0x88, 0xa8, 0, 6], &once[12..]].concat();
        sent.extend([plain, once, twice]);
    }
    // What comes in has its outer tag beside it, what goes out of a packet socket still has all in it.
    inject(&sandbox, paths.server(), "eth0", sent.clone());
    inject(&sandbox, &Netns::named("ctr"), "eth0", sent);
    wait_until("all frames", LIMIT, || capture.packets().len() == 12);
    let packets = capture.packets();
    assert_as_tshark(&packets, &file);
    let vlans: Vec<String> = packets.iter().map(|packet| packet["vlans"].to_string()).collect();
    assert_eq!(vlans, ["null", "[5]", "[6,5]"].repeat(4));
    for (vlans, row) in vlans.iter().zip(tshark(&file, &["ieee8021ad.id", "vlan.id"])) {
        let said = row.iter().filter(|cell| !cell.is_empty()).cloned().collect::<Vec<_>>().join(",");
        assert_eq!(vlans.trim_matches(['[', ']']).replace("null", ""), said);
    }
}

/// A tun interface of a namespace: what is written to the file comes in there.
#[allow(unsafe_code)]
fn tun(sandbox: &Sandbox, netns: &Netns, name: &str) -> File {
    /// `TUNSETIFF`, `IFF_TUN` and `IFF_NO_PI` of include/uapi/linux/if_tun.h.
    const TUNSETIFF: u64 = 0x4004_54ca;
    const MODE: u16 = 0x1001;
    let namespace = File::open(sandbox.netns_path(netns)).expect("the namespace");
    // struct ifreq: the name, then the flags.
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&MODE.to_ne_bytes());
    let opened = std::thread::spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).expect("entering the namespace");
        let file = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
        // SAFETY: the kernel reads and writes a struct ifreq, which has the size of `request`.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, request.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        file
    });
    opened.join().expect("a tun interface")
}

#[test]
fn interfaces_without_a_link_layer() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let ctr = Netns::named("ctr");
    let file = sandbox.dir().join("tun.pcap");
    let write = file.display().to_string();
    let capture = Listening::start(&sandbox, &[CTR[0], CTR[1], "--json", "--write", &write]);
    let mut device = tun(&sandbox, &ctr, "tun7");
    sandbox
        .sh_in(&ctr, "ip addr add 10.7.0.2/24 dev tun7; ip addr add fd00:7::2/64 dev tun7 nodad; ip link set tun7 up");
    for is_v6 in [false, true] {
        device.write_all(&frame("1e03 51", 0x10, is_v6)[14..]).expect("writing to the tun interface");
    }
    // Nobody answers; the SYN is enough.
    let sender = Sender::start(&sandbox, &ctr, [10, 7, 0, 1].into(), 1, None);
    let outgoing = capture.wait_option("MP_CAPABLE", |packet, _| packet["direction"] == "out");
    assert_eq!((&outgoing["interface"], &outgoing["source"]), (&"tun7".into(), &"10.7.0.2".into()));
    for source in ["10.0.1.1", "fd00:1::1"] {
        let incoming = capture.wait_option("MP_PRIO", |packet, _| packet["source"] == source);
        assert_eq!((&incoming["interface"], &incoming["direction"]), (&"tun7".into(), &"in".into()));
    }
    drop(sender);
    mark(&sandbox, &paths);
    assert_as_tshark(&capture.packets_to_mark(), &file);
}

/// Sends frames out of an interface of a namespace as they are.
#[allow(unsafe_code)]
fn inject(sandbox: &Sandbox, netns: &Netns, interface: &str, frames: Vec<Vec<u8>>) {
    let namespace = File::open(sandbox.netns_path(netns)).expect("the namespace");
    let index: i32 = sandbox
        .sh_in(
            netns,
            &format!(
                "cat /sys/class/net/{interface}/ifindex 2>/dev/null || \
        ip -o link show {interface} | cut -d: -f1"
            ),
        )
        .trim()
        .parse()
        .expect("an index");
    // setns concerns this thread only.
    let sent = std::thread::spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).expect("entering the namespace");
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        let socket =
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).expect("a packet socket");
        for frame in frames {
            // SAFETY: all zeros is a valid sockaddr_ll; the pointers are to live values of the sizes that are given.
            let sent = unsafe {
                let mut to: libc::sockaddr_ll = std::mem::zeroed();
                to.sll_family = libc::AF_PACKET as u16;
                to.sll_ifindex = index;
                let to = (&raw const to).cast();
                let length = size_of::<libc::sockaddr_ll>() as u32;
                libc::sendto(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, to, length)
            };
            assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
        }
    });
    sent.join().expect("the frames are sent");
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.chars().filter_map(|c| Some(c.to_digit(16)? as u8)).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// An Ethernet frame with a TCP packet with these options and flags; `is_v6`: from fd00:1::1 instead of 10.0.1.1.
fn frame(options: &str, flags: u8, is_v6: bool) -> Vec<u8> {
    let mut options = bytes(options);
    options.resize(options.len().next_multiple_of(4), 1);
    let mut frame = bytes("ffffffffffff 020000000001");
    let length = 20 + options.len();
    match is_v6 {
        true => {
            frame.extend(bytes("86dd 60000000"));
            frame.extend((length as u16).to_be_bytes());
            frame.extend(bytes("0640 fd000001000000000000000000000001 fd000001000000000000000000000002"));
        }
        false => {
            frame.extend(bytes("0800 4500"));
            frame.extend((20 + length as u16).to_be_bytes());
            frame.extend(bytes("00010000 4006 0000 0a000101 0a000102"));
        }
    }
    frame.extend(bytes("1389 9c41 00000001 00000002"));
    frame.extend([(length / 4) as u8 * 16, flags]);
    frame.extend(bytes("ffff 0000 0000"));
    frame.extend(options);
    frame
}

#[test]
fn version_0_made_by_hand_is_read_as_tshark_reads_it() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let file = sandbox.dir().join("v0.pcap");
    let write = file.display().to_string();
    let capture = Listening::start(&sandbox, &[CTR[0], CTR[1], "--json", "--dss", "--write", &write]);
    let (syn, syn_ack, ack) = (0x02, 0x12, 0x10);
    let known = [
        ("020405b4 1e0c 0081 0102030405060708", syn),
        ("1e0c 0001 1112131415161718", syn_ack),
        ("1e14 0001 0102030405060708 1112131415161718", ack),
        ("1e0c 1107 1a2b3c4d 0a0b0c0d", syn),
        ("1e10 1003 0102030405060708 0a0b0c0d", syn_ack),
        ("1e18 1000 000102030405060708090a0b0c0d0e0f10111213", ack),
        ("1e08 2001 00000007", ack),
        ("1e1c 200f 0000000000000007 0000000000000009 00000001 0064 beef", ack),
        ("1e08 3402 0a000202", ack),
        ("1e0a 3402 0a000202 1388", ack),
        ("1e14 3603 fd000000000000000000000000000002", ack),
        ("1e16 3603 fd000000000000000000000000000002 1388", ack),
        ("1e04 4002", ack),
        ("1e06 4002 0305", ack),
        ("1e03 51", ack),
        ("1e04 5004", ack),
        ("1e0c 6000 0102030405060708", ack),
        ("1e0c 7000 0102030405060708", ack),
    ];
    let frames: Vec<Vec<u8>> =
        [false, true].iter().flat_map(|is_v6| known.map(|(options, flags)| frame(options, flags, *is_v6))).collect();
    let count = frames.len();
    inject(&sandbox, paths.server(), "eth0", frames);
    wait_until("all frames", LIMIT, || {
        capture.packets().iter().filter(|packet| packet["source_port"] == 5001).count() == count
    });
    let packets = capture.packets();
    assert!(packets.iter().flat_map(options).all(|option| option["subtype"] != "malformed"));
    assert_as_tshark(&packets, &file);
}

#[test]
fn malformed_packets_are_said_and_survived() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let capture = Listening::start(&sandbox, &[CTR[0], CTR[1]]);
    let good = frame("1e0c 1107 1a2b3c4d 0a0b0c0d", 0x02, false);
    // Torn at every byte and flipped at every byte: whatever comes of it.
    let mut frames: Vec<Vec<u8>> = (14..good.len()).map(|length| good[..length].to_vec()).collect();
    for at in 12..good.len() {
        for value in [0, 0x1e, 0x7f, 0xff] {
            let mut flipped = good.clone();
            flipped[at] = value;
            frames.push(flipped);
        }
    }
    for options in ["1e00", "1e01", "1e02 0101", "0101 011e", "1e20 1101 1a2b", "1e05 1101 00", "1e04 f000"] {
        frames.push(frame(options, 0x10, false));
        frames.push(frame(options, 0x10, true));
    }
    frames.push(frame("1e03 51", 0x10, false));
    inject(&sandbox, paths.server(), "eth0", frames);
    capture.wait_line(&["5001 > 10.0.1.2:40001 ACK MP_PRIO backup"]);
    for part in [
        "ACK malformed MPTCP option (its length is 0)",
        "ACK malformed MPTCP option (its length is 1)",
        "ACK malformed MPTCP option (its length is 2)",
        "ACK malformed MPTCP option (it has no length)",
        "ACK malformed MP_JOIN (its length is 32, with 8 bytes left)",
        "ACK malformed MP_JOIN (it has 5 bytes)",
        "ACK subtype 15",
    ] {
        for source in ["10.0.1.1:5001 > ", "[fd00:1::1]:5001 > "] {
            capture.wait_line(&[source, part]);
        }
    }
    assert_eq!(capture.running.stderr().lines().count(), 1, "{}", capture.running.stderr());
}

#[test]
fn count_and_duration_end_it() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let capture = Listening::start(&sandbox, &[CTR[0], CTR[1], "--json", "--count", "3"]);
    let prio = || frame("1e03 51", 0x10, false);
    inject(&sandbox, paths.server(), "eth0", vec![prio(); 10]);
    let outcome = capture.running.wait(LIMIT);
    assert_eq!(outcome.ok().lines().count(), 3);

    // A machine that is too slow to send anything in time gets another try with more of it.
    let ended = [4, 15, 60].into_iter().find_map(|seconds| {
        let began = Instant::now();
        let mut capture = Listening::start(&sandbox, &[CTR[0], CTR[1], "--duration", &seconds.to_string()]);
        inject(&sandbox, paths.server(), "eth0", vec![prio(); 2]);
        capture.running.is_running().then(|| {
            let lines = capture.running.wait(LIMIT).ok().lines().count();
            (lines, began.elapsed() >= Duration::from_secs(seconds))
        })
    });
    assert_eq!(ended, Some((2, true)));
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let program = hook().display().to_string();
    for with_packet in [true, false] {
        let argv = [&program, "capture", CTR[0], CTR[1]];
        let mut child = sandbox.start_in(&sandbox.open_netns(&Netns::Host), &argv, |command| {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        });
        let mut errors = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut said = String::new();
        errors.read_line(&mut said).expect("what it says");
        assert!(said.contains("capturing"), "{said}");
        // As `head` does.
        drop(child.stdout.take());
        if with_packet {
            inject(&sandbox, paths.server(), "eth0", vec![frame("1e03 51", 0x10, false)]);
        }
        let status = wait_for("its end", LIMIT, || child.try_wait().expect("waiting"));
        let mut rest = String::new();
        errors.read_to_string(&mut rest).expect("what it says");
        assert_eq!((status.code(), rest.as_str()), (Some(0), ""));
    }
}

#[test]
fn it_ends_with_the_container() {
    let sandbox = Sandbox::new();
    let _paths = world(&sandbox);
    let mut container = Bare::in_netns(&sandbox, "web", &Netns::named("ctr"));
    let pid = container.pid().to_string();
    let capture = Listening::start(&sandbox, &["--pid", &pid]);
    container.kill();
    let outcome = capture.running.wait(LIMIT);
    assert!(outcome.stderr.contains("has ended"), "{outcome}");
    outcome.ok();
}

/// Packets come all the time, and faster than they are read: the end is seen all the same.
#[test]
fn it_ends_in_time_while_packets_wait() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let mut container = Bare::in_netns(&sandbox, "web", &Netns::named("ctr"));
    let _server = Server::start(&sandbox, paths.server());
    let mut sender = Sender::start(&sandbox, &Netns::named("ctr"), paths.address(), 1 << 40, Some(1_000_000));
    sender.wait_sent(1);
    let program = hook().display().to_string();
    // Whether a reader that is slow has had enough: a pipe is full by then.
    let capture = |arguments: &str| {
        let script = format!(
            "{{ {program} capture {arguments} --dss; echo ended >&2; }} | while read -r line; do echo; sleep 0.01; done"
        );
        let running = sandbox.spawn(&["sh", "-c", &script]);
        let is_over = || running.stderr().contains("ended");
        wait_until("a reader that is slow", LIMIT, || running.stdout().len() > 100 || is_over());
        (running.stdout().len() > 100).then_some(running)
    };
    let ends = |running: &Running| wait_until("the end", LIMIT, || running.stderr().contains("ended"));
    // A machine that is too slow for the first duration gets a longer one.
    let timed =
        [2, 10, 60].into_iter().find_map(|seconds| capture(&format!("--netns /run/netns/ctr --duration {seconds}")));
    ends(&timed.expect("a capture that ends by itself while packets wait"));
    let running = capture(&format!("--pid {}", container.pid())).expect("a capture that goes on");
    container.kill();
    ends(&running);
    assert!(running.stderr().contains("first process has ended"), "{}", running.stderr());
}

/// The capture's process, as it is known in the sandbox.
fn own_pid(sandbox: &Sandbox) -> String {
    sandbox.sh("pidof mptcp-hook")
}

#[test]
fn while_it_listens_it_may_do_nothing() {
    let sandbox = Sandbox::new();
    let _paths = world(&sandbox);
    let _capture = Listening::start(&sandbox, &CTR);
    let status = sandbox.sh(&format!("cat /proc/{}/status", own_pid(&sandbox)));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(status.contains(&format!("{set}:\t0000000000000000")), "{status}");
    }
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
}

#[test]
fn a_signal_ends_it_and_the_file_is_whole() {
    let sandbox = Sandbox::new();
    let paths = world(&sandbox);
    let file = sandbox.dir().join("x.pcap");
    let write = file.display().to_string();
    let mut capture = Listening::start(&sandbox, &[CTR[0], CTR[1], "--json", "--write", &write]);
    inject(&sandbox, paths.server(), "eth0", vec![frame("1e03 51", 0x10, false); 5]);
    wait_until("five packets", LIMIT, || capture.packets().len() == 5);
    // Not SIGINT: whoever runs the tests in the background has it ignored.
    sandbox.sh(&format!("kill -TERM {}", own_pid(&sandbox)));
    wait_until("its end", LIMIT, || !capture.running.is_running());
    assert_as_tshark(&capture.packets(), &file);
    // Written over by the next, and by nobody else.
    let capture = Listening::start(&sandbox, &[CTR[0], CTR[1], "--json", "--write", &write]);
    assert_eq!(tshark(&file, &["frame.number"]).len(), 0);
    drop(capture);
    let link = sandbox.dir().join("link");
    std::os::unix::fs::symlink(&file, &link).expect("a link");
    let program = ["capture", CTR[0], CTR[1], "--write"];
    for (path, says) in [(link, "symbolic link"), (PathBuf::from("/dev/null"), "not a regular file")] {
        let outcome = sandbox.hook(&[&program[..], &[&path.display().to_string()]].concat());
        let said = outcome.fails_with(1);
        assert!(said.contains(says), "{said}");
    }
}

#[test]
fn targets_that_are_not_there_and_users_without_rights() {
    let sandbox = Sandbox::new();
    let _paths = world(&sandbox);
    let mut container = Bare::in_netns(&sandbox, "web", &Netns::named("ctr"));
    container.oci(&["--interface", "eth1=backup"]).ok();
    let fails = |arguments: &[&str], code: i32, parts: &[&str]| {
        let outcome = sandbox.hook(&[&["capture"], arguments].concat());
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        let said = outcome.fails_with(code);
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    };
    fails(&["nobody"], 2, &["nobody", "mptcp-hook status"]);
    fails(&[], 2, &["name the container"]);
    fails(&["--netns", "/run/netns/nowhere"], 1, &["/run/netns/nowhere", "No such file"]);
    fails(&["--netns", "/etc/hostname"], 1, &["/etc/hostname", "not a namespace"]);
    fails(&["--pid", "999999"], 1, &["999999"]);
    fails(&[&CTR[..], &["--count", "0"]].concat(), 2, &["--count", "from 1 on"]);
    container.kill();
    fails(&[container.id()], 1, &[container.id(), "not running"]);

    require("setpriv", "util-linux");
    let program = readable_hook(&sandbox).display().to_string();
    let user = ["setpriv", "--reuid", "61235", "--regid", "61235", "--clear-groups", &program, "capture"];
    let as_user = |target: &[&str]| sandbox.run(&[&user[..], target].concat()).fails_with(1);
    let said = as_user(&CTR);
    assert!(said.contains("cannot enter the network namespace") && said.contains("run as root"), "{said}");
    let init = as_user(&["--pid", "1"]);
    assert!(init.contains("run as root"), "{init}");
    let said = as_user(&["--netns", "/proc/self/ns/net"]);
    assert!(said.contains("CAP_NET_RAW") && said.contains("run as root"), "{said}");
}

#[test]
fn the_owner_of_a_user_namespace_may() {
    require("setpriv", "util-linux");
    let sandbox = Sandbox::new();
    let program = readable_hook(&sandbox).display().to_string();
    // A process of the user's, in a user and a network namespace of its own.
    let owner = ["setpriv", "--reuid", "61235", "--regid", "61235", "--clear-groups"];
    let script = "ip link set lo up; echo $$; exec sleep 1000";
    let inside = sandbox.spawn(&[&owner[..], &["unshare", "-Urn", "sh", "-ec", script]].concat());
    let pid = wait_for("its pid", LIMIT, || inside.stdout().trim().parse::<i32>().ok());
    let pid = pid.to_string();
    let mut running = sandbox.spawn(&[&owner[..], &[&program, "capture", "--pid", &pid, "--json"]].concat());
    wait_for("a capture that listens", LIMIT, || {
        assert!(running.is_running(), "{}{}", running.stdout(), running.stderr());
        running.stderr().contains("capturing").then_some(())
    });
    let capture = Listening { running };
    // Nobody listens there; the SYN is enough.
    let traffic = traffic_program().display().to_string();
    sandbox.run(&[
        "nsenter",
        "-t",
        &pid,
        "-U",
        "-n",
        "--preserve-credentials",
        &traffic,
        "send",
        "127.0.0.1:5000",
        "--bytes",
        "1",
    ]);
    let packet = capture.wait_option("MP_CAPABLE", |packet, _| packet["flags"] == serde_json::json!(["SYN"]));
    assert_eq!(packet["interface"], "lo");
}
