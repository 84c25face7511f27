//! What arrives on a netlink socket: the first byte chooses the parser, the rest is the datagram or a message's payload.
#![no_main]

use anyhow::Result;
use invariants as must;
use libfuzzer_sys::fuzz_target;
use mptcp_hook::fuzzing;
use mptcp_hook::kernel::netlink::diag::{MptcpSocket, TcpSocket};
use mptcp_hook::kernel::netlink::neighbours::Neighbour;
use mptcp_hook::kernel::netlink::routing::Entry;
use mptcp_hook::kernel::netlink::{Body, attributes};
use mptcp_hook::kernel::{Address, Endpoint, Limits, Link, Rule, TableRoute};

const SEQUENCE: u32 = 7;
const PORT: u32 = 4711;

fuzz_target!(|input: &[u8]| {
    let Some((choice, input)) = input.split_first() else { return };
    let outcome = match choice % 12 {
        0 => answer(input),
        1 => Endpoint::parse(input).map(drop),
        2 => Limits::parse(input).map(drop),
        3 => Link::parse(input).map(|link| {
            assert!(!link.name.contains('\0') && link.name.len() <= 3 * input.len());
        }),
        4 => Address::parse(input).map(|address| {
            if let Some(address) = address {
                let says_no = address.ip.is_loopback() || address.ip.is_multicast() || address.scope != 0;
                assert!(!(says_no && address.is_usable()), "{address:?}");
            }
        }),
        5 => Rule::parse(input).map(drop),
        6 => fuzzing::family_id(input).map(drop),
        7 => walk(input),
        8 => TcpSocket::parse(input).map(drop),
        9 => MptcpSocket::parse(input).map(drop),
        // A next hop takes eight bytes, an interface beside them eight more.
        10 => Entry::parse(input).map(|entry| {
            let Some(entry) = entry else { return };
            assert!(entry.hops.len() <= input.len() / 8);
            for route in TableRoute::of(&entry) {
                assert!(route.gateway.is_none_or(|gateway| gateway.is_ipv4() == route.destination.is_ipv4()));
            }
        }),
        _ => Neighbour::parse(input).map(drop),
    };
    if let Err(error) = outcome {
        must::one_line_error(&error);
    }
});

/// Whatever is taken for an answer's payload is a part of the datagram, in order.
fn answer(datagram: &[u8]) -> Result<()> {
    let (found, _) = fuzzing::netlink_answer(datagram, SEQUENCE, PORT)?;
    let taken: usize = found.iter().map(|payload| payload.len() + 16).sum();
    assert!(taken <= datagram.len());
    // Nobody else's request is answered by it where none of its messages carries our number.
    let number = [SEQUENCE.to_ne_bytes(), PORT.to_ne_bytes()].concat();
    assert!(found.is_empty() || datagram.windows(8).any(|window| window == number));
    // A message that was good once is good as the payload of another.
    for payload in &found {
        let (again, complete) = fuzzing::netlink_answer(&message(payload), SEQUENCE, PORT)?;
        assert!(again == [payload.clone()] && !complete);
    }
    Ok(())
}

/// `struct nlmsghdr` before a payload.
fn message(payload: &[u8]) -> Vec<u8> {
    let mut message = (payload.len() as u32 + 16).to_ne_bytes().to_vec();
    message.extend([100, 0, 2, 0]);
    message.extend(SEQUENCE.to_ne_bytes());
    message.extend(PORT.to_ne_bytes());
    message.extend(payload);
    message
}

/// Attributes that are read and written again are read as the same.
fn walk(input: &[u8]) -> Result<()> {
    let read = attributes(input).collect::<Result<Vec<_>>>()?;
    let mut written = Vec::new();
    for (kind, value) in &read {
        written.extend((value.len() as u16 + 4).to_ne_bytes());
        written.extend(kind.to_ne_bytes());
        written.extend(*value);
        written.resize(written.len().next_multiple_of(4), 0);
    }
    let again = attributes(&written).collect::<Result<Vec<_>>>()?;
    assert_eq!(again, read);
    // As the program itself writes them; lengths of 64 KiB and more it never sends.
    let body = read.iter().fold(Body::new(&[]), |body, (kind, value)| body.attribute(*kind, value));
    let _ = body;
    Ok(())
}
