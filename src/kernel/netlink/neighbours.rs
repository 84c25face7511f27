//! What the kernel knows of other machines on a link, and for how long (rtnetlink(7),
//! `include/uapi/linux/neighbour.h`).

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use super::route::Route;
use super::{Body, array, attributes, header, ip};

/// `NUD_*`: states in which a neighbour was asked and has not answered.
const NUD_INCOMPLETE: u16 = 0x01;
const NUD_FAILED: u16 = 0x20;

/// The names of the `NUD_*` bits, from the lowest.
const NUD_NAMES: [&str; 8] = ["INCOMPLETE", "REACHABLE", "STALE", "DELAY", "PROBE", "FAILED", "NOARP", "PERMANENT"];

const NDA_DST: u16 = 1;
const NDA_CACHEINFO: u16 = 3;
/// Where `struct nda_cacheinfo` has `ndm_updated`.
const UPDATED: usize = 8;
/// How many of the kernel's ticks are a second for programs (`USER_HZ`), whatever its own clock is.
const TICKS_PER_SECOND: u64 = 100;

/// What the kernel knows of another machine on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The link.
    pub ifindex: u32,
    /// The machine's address.
    pub address: IpAddr,
    /// `NUD_*`.
    pub state: u16,
    /// For how long it is known; none if the kernel does not say.
    pub age: Option<Duration>,
}

impl Neighbour {
    /// Reads an RTM_NEWNEIGH message (after `struct nlmsghdr`); None for those that are no IP address (bridges).
    pub fn parse(payload: &[u8]) -> Result<Option<Self>> {
        let (info, rest) = header::<12>(payload)?;
        if ![libc::AF_INET, libc::AF_INET6].contains(&i32::from(info[0])) {
            return Ok(None);
        }
        let (mut address, mut age) = (None, None);
        for attribute in attributes(rest) {
            match attribute? {
                (NDA_DST, value) => address = Some(ip(value)?),
                (NDA_CACHEINFO, value) => {
                    let (info, _) = header::<{ UPDATED + 4 }>(value)?;
                    let ticks = u64::from(u32::from_ne_bytes(array(&info[UPDATED..])?));
                    age = Some(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND));
                }
                _ => {}
            }
        }
        let ifindex = u32::from_ne_bytes([info[4], info[5], info[6], info[7]]);
        let state = u16::from_ne_bytes([info[8], info[9]]);
        Ok(address.map(|address| Self { ifindex, address, state, age }))
    }

    /// Whether it was asked and has not answered.
    pub fn is_silent(&self) -> bool {
        self.state & (NUD_INCOMPLETE | NUD_FAILED) != 0
    }

    /// Whether the kernel waits for its answer.
    pub fn is_being_asked(&self) -> bool {
        self.state & NUD_INCOMPLETE != 0
    }

    /// The state as ip-neighbour(8) shows it.
    pub fn state_name(&self) -> String {
        let names = NUD_NAMES.iter().enumerate().filter(|(bit, _)| self.state & 1 << bit != 0);
        let names: Vec<&str> = names.map(|(_, name)| *name).collect();
        if names.is_empty() { "NONE".into() } else { names.join("|") }
    }
}

impl Route {
    /// The machines on the links that the kernel has asked for.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>> {
        self.connection()
            .dump(libc::RTM_GETNEIGH, &Body::new(&[0; 12]), Neighbour::parse)
            .context("cannot list the neighbours")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::testing::{in_namespace, ip, payload, soon, torment};
    use super::*;

    #[test]
    fn neighbours_are_read() {
        let mut info = [0; 12];
        (info[0], info[4], info[8]) = (libc::AF_INET as u8, 7, 0x20);
        let mut times = [0; 16];
        times[UPDATED..UPDATED + 4].copy_from_slice(&u32::to_ne_bytes(1234));
        let message = || Body::new(&info).attribute(NDA_DST, &[10, 0, 2, 1]);
        let timed = payload(message().attribute(NDA_CACHEINFO, &times));
        let found = Neighbour::parse(&timed).unwrap().unwrap();
        assert_eq!((found.ifindex, found.address, found.state_name().as_str()), (7, [10, 0, 2, 1].into(), "FAILED"));
        assert_eq!(found.age, Some(Duration::from_millis(12_340)));
        assert!(found.is_silent() && !found.is_being_asked());
        assert_eq!(Neighbour::parse(&payload(message())).unwrap().unwrap().age, None);
        assert!(Neighbour::parse(&payload(message().attribute(NDA_CACHEINFO, &times[..UPDATED]))).is_err());
        torment(&timed, |message| drop(Neighbour::parse(message)));
    }

    #[test]
    fn a_neighbours_age_in_a_namespace() {
        in_namespace(|| {
            ip("link add eth0 type veth peer name peer0\nlink set eth0 up\nlink set peer0 up\n\
                neigh add 10.0.0.1 dev eth0 nud failed\n");
            let mut ways = Route::open(soon()).unwrap();
            let gateway = IpAddr::from([10, 0, 0, 1]);
            let mut age = || {
                let all = ways.neighbours().unwrap();
                all.into_iter().find(|neighbour| neighbour.address == gateway).unwrap().age.unwrap()
            };
            let begin = Instant::now();
            let first = age();
            std::thread::sleep(Duration::from_millis(300));
            let (later, passed) = (age(), begin.elapsed());
            assert!(later >= first + Duration::from_millis(250), "{first:?} {later:?}");
            assert!(later <= first + passed + Duration::from_millis(50), "{first:?} {later:?} {passed:?}");
        });
    }
}
