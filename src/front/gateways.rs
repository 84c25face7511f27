//! Gateways that engines have written down: LXC's configuration, and what CNI's plugins answered. They come last, after
//! what is asked for and what the routing tables have, and only files that the host's root alone can write are believed.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::instance::{ContainerId, Door};
use crate::policy::trusted;
use crate::request::pattern::Pattern;
use crate::request::{Rank, Request, Routes, Source, What, Wish};

/// Where libcni keeps its results (CNI specification, "Cached results").
const CNI_RESULTS: &str = "/var/lib/cni/results";

/// The most results that are read for one container: it has one for each network.
const RESULTS_MAX: usize = 32;

/// Adds the gateways that engines know of the container to a request that wants ways out. `ids` are further names that
/// CNI may have for it. A file that cannot be read or believed names none.
pub fn add(request: &mut Request, container: &ContainerId, ids: &[&str], is_initial: bool) {
    if request.asked_routes().is_none_or(|(_, routes)| routes != Routes::Auto) {
        return;
    }
    let ids = [&[container.id.as_str()], ids].concat();
    let files = match container.door {
        Door::Lxc => vec![Path::new(&container.engine).join(&container.id).join("config")],
        Door::Oci | Door::Command => results(Path::new(CNI_RESULTS), &ids),
    };
    for file in files {
        let Ok(Some(text)) = trusted::read(&file, is_initial) else { continue };
        let found = match container.door {
            Door::Lxc => of_lxc(&text),
            Door::Oci | Door::Command => of_cni(&text, &ids),
        };
        for (interface, gateway) in found {
            let source = Source::new(Rank::Runtime, file.display().to_string());
            // The first counts, where two networks disagree about one interface.
            let _ = request.add(Wish::new(What::Gateway(interface, gateway), source));
        }
    }
}

/// The files of these containers: `NETWORK-CONTAINER-INTERFACE`.
fn results(directory: &Path, ids: &[&str]) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let is_its = |name: &str| ids.iter().any(|id| !id.is_empty() && name.contains(&format!("-{id}-")));
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut files: Vec<PathBuf> =
        names.filter(|name| is_its(name)).take(RESULTS_MAX).map(|name| directory.join(name)).collect();
    files.sort();
    files
}

/// An address that can be a next hop.
fn next_hop(text: &str) -> Option<IpAddr> {
    let address: IpAddr = text.trim().parse().ok()?;
    (!address.is_unspecified() && !address.is_multicast() && !address.is_loopback()).then_some(address)
}

/// What LXC's configuration says (lxc.container.conf(5), "NETWORK"): `lxc.net.N.ipv4.gateway` of the networks that have
/// a name in the container. `auto` and `dev` name no address, and files that are included are not read.
fn of_lxc(text: &str) -> Vec<(Pattern, IpAddr)> {
    let mut names: Vec<(&str, &str)> = Vec::new();
    let mut gateways: Vec<(&str, &str, &str)> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once('=') else { continue };
        let (key, value) = (key.trim(), value.trim());
        if key == "lxc.net" && value.is_empty() {
            names.clear();
            gateways.clear();
        }
        let Some((number, key)) = key.strip_prefix("lxc.net.").and_then(|rest| rest.split_once('.')) else { continue };
        match key {
            "name" => {
                names.retain(|(known, _)| *known != number);
                names.push((number, value));
            }
            "ipv4.gateway" | "ipv6.gateway" => {
                gateways.retain(|(known, family, _)| (*known, *family) != (number, key));
                gateways.push((number, key, value));
            }
            _ => {}
        }
    }
    let found = gateways.into_iter().filter_map(|(number, family, value)| {
        let (_, name) = names.iter().find(|(known, _)| *known == number)?;
        let gateway = next_hop(value).filter(|gateway| gateway.is_ipv4() == family.starts_with("ipv4"))?;
        Some((exact(name)?, gateway))
    });
    found.collect()
}

/// The pattern of exactly this interface.
fn exact(name: &str) -> Option<Pattern> {
    name.parse().ok().filter(Pattern::is_exact)
}

/// What a plugin has answered for one interface (libcni, `cniCacheV1`; CNI specification 0.3 and later).
#[derive(Deserialize)]
struct Cached {
    #[serde(rename = "containerId")]
    container: String,
    #[serde(rename = "ifName")]
    interface: String,
    result: Answer,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    ips: Vec<Given>,
}

#[derive(Deserialize)]
struct Given {
    gateway: Option<String>,
}

fn of_cni(text: &str, ids: &[&str]) -> Vec<(Pattern, IpAddr)> {
    // What an older version has written has no such fields, and names no gateway for us.
    let Ok(cached) = serde_json::from_str::<Cached>(text) else { return Vec::new() };
    let Some(name) = exact(&cached.interface).filter(|_| ids.contains(&cached.container.as_str())) else {
        return Vec::new();
    };
    let gateways = cached.result.ips.iter().filter_map(|given| next_hop(given.gateway.as_deref()?));
    gateways.map(|gateway| (name.clone(), gateway)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(found: Vec<(Pattern, IpAddr)>) -> Vec<String> {
        found.into_iter().map(|(name, gateway)| format!("{name} {gateway}")).collect()
    }

    #[test]
    fn what_lxc_says() {
        let text = "# lxc.net.0.ipv4.gateway = 1.2.3.4\n\
                    lxc.net.0.type = veth\nlxc.net.0.name = eth0\nlxc.net.0.ipv4.gateway = 10.0.1.1\n\
                    lxc.net.1.ipv4.gateway=10.0.2.9\nlxc.net.1.ipv4.gateway = 10.0.2.1\nlxc.net.1.name= eth1\n\
                    lxc.net.1.ipv6.gateway = fd00:2::1\n\
                    lxc.net.2.name = eth2\nlxc.net.2.ipv4.gateway = auto\nlxc.net.2.ipv6.gateway = dev\n\
                    lxc.net.3.ipv4.gateway = 10.0.4.1\n\
                    lxc.net.4.name = eth4\nlxc.net.4.ipv4.gateway = fd00::1\n\
                    lxc.net.5.name = eth*\nlxc.net.5.ipv4.gateway = 10.0.6.1\n";
        assert_eq!(shown(of_lxc(text)), ["eth0 10.0.1.1", "eth1 10.0.2.1", "eth1 fd00:2::1"]);
        assert_eq!(shown(of_lxc(&format!("{text}lxc.net =\n"))), [""; 0]);
    }

    #[test]
    fn what_cni_says() {
        let text = r#"{"kind":"cniCacheV1","containerId":"web","ifName":"eth1","networkName":"lte","result":{"cniVersion":"1.0.0",
            "interfaces":[{"name":"eth1"}],"ips":[{"address":"10.0.2.2/24","gateway":"10.0.2.1","interface":0},
            {"address":"fd00:2::2/64","gateway":"fd00:2::1"},{"address":"10.0.3.2/24"},{"address":"x","gateway":"0.0.0.0"}]}}"#;
        assert_eq!(shown(of_cni(text, &["my", "web"])), ["eth1 10.0.2.1", "eth1 fd00:2::1"]);
        assert_eq!(shown(of_cni(text, &["my-web"])), [""; 0], "another's");
        for other in ["", "{}", &text.replace("eth1", "eth*")] {
            assert_eq!(shown(of_cni(other, &["web"])), [""; 0], "{other}");
        }
    }
}
