//! A packet as `capture` gets it: the first byte chooses the interface's type, whether the kernel has taken a VLAN tag out of
//! it, and whether it was cut; the rest is the frame.
#![no_main]

use invariants as must;
use libfuzzer_sys::fuzz_target;
use mptcp_hook::capture::option::{self, MptcpOption};
use mptcp_hook::capture::packet::{Frame, Packet, Tag};

fuzz_target!(|input: &[u8]| {
    let Some((choice, bytes)) = input.split_first() else { return };
    let hardware = [1, 772, 65534, 32][usize::from(choice & 3)];
    let tag = (choice & 4 != 0).then_some(Tag { protocol: 0x8100, control: 0x2005 });
    let length = if choice & 8 != 0 { bytes.len() + 70_000 } else { bytes.len() };
    let frame = Frame { hardware, tag, bytes, length };
    let network = frame.network();
    if let Some(network) = &network {
        // What is left is the end of the frame, and no tag is invented.
        assert!(bytes.ends_with(network.bytes) && !network.bytes.is_empty());
        assert!(network.tags.len() <= 3 && network.tags.starts_with(tag.as_slice()));
        assert!([0x0800, 0x86dd].contains(&network.protocol));
    }
    if let Some(packet) = Packet::parse(&frame) {
        assert_eq!(Some(packet.vlans.len()), network.map(|network| network.tags.len()));
        assert!(packet.source.is_ipv4() == packet.destination.is_ipv4());
        assert!(packet.payload <= length.max(0xffff + 40));
        // A header of TCP has 40 bytes of options, and each of ours at least one.
        assert!((1..=40).contains(&packet.options.len()));
        assert!(packet.matters(true));
        packet.options.iter().for_each(said);
        packet.flags().iter().for_each(|flag| must::one_line(flag));
    }
    // As options alone, of any length.
    option::all(bytes).iter().for_each(said);
});

/// An option is said in one line and as JSON with its subtype.
fn said(option: &MptcpOption) {
    let text = option.to_string();
    assert!(!text.is_empty());
    if !matches!(option, MptcpOption::RemoveAddr { .. }) {
        must::one_line(&text);
    }
    let json = serde_json::to_value(option).expect("serializes");
    let subtype = json["subtype"].as_str().expect("a subtype");
    let is_named = text.starts_with(subtype);
    let other = matches!(option, MptcpOption::Unknown { .. } | MptcpOption::Malformed { .. });
    assert!(is_named || other, "{text} is not {subtype}");
    assert!(option.number().is_none_or(|number| number < 16));
}
