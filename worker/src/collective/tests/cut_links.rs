//! Links that are cut: packets are dropped, and nobody is told. Each member is a process in a network namespace of its
//! own, with a router between them. Wants root and `ip`; where they are missing the test says so and does nothing.
//!
//!     cargo test -p ulmus-worker --lib cut_links -- --ignored --nocapture

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;

const SIZE: usize = 3;
const RANK: &str = "ULMUS_TEST_RING_RANK";
/// The rank that does not enter the second operation: the others wait while nothing is under way.
const IDLE: &str = "ULMUS_TEST_RING_IDLE";
/// A dead link is noticed after `DEAD_AFTER`; the rest is for the error to go round.
const WITHIN: Duration = Duration::from_secs(5);

/// Namespaces `<prefix>0`, ... of the members and `<prefix>r` of the router; gone when it is dropped.
struct Network {
    prefix: String,
}

fn ip(arguments: &str) -> bool {
    let output = Command::new("ip").args(arguments.split_whitespace()).output();
    output.is_ok_and(|output| output.status.success())
}

impl Network {
    fn new() -> Option<Self> {
        let network = Self { prefix: format!("ulmus{}-", std::process::id()) };
        let prefix = &network.prefix;
        let mut done = ip(&format!("netns add {prefix}r"));
        for rank in 0..SIZE {
            let (member, router) = (format!("{prefix}{rank}"), format!("{prefix}r"));
            done = done
                && ip(&format!("netns add {member}"))
                && ip(&format!("link add m{rank} netns {member} type veth peer name r{rank} netns {router}"))
                && ip(&format!("-n {member} address add 10.77.{rank}.2/24 dev m{rank}"))
                && ip(&format!("-n {router} address add 10.77.{rank}.1/24 dev r{rank}"))
                && ip(&format!("-n {member} link set m{rank} up"))
                && ip(&format!("-n {router} link set r{rank} up"))
                && ip(&format!("-n {member} route add default via 10.77.{rank}.1"));
        }
        (done && network.forward(true)).then_some(network)
    }

    /// Whether the router passes packets on.
    fn forward(&self, on: bool) -> bool {
        let set = format!("echo {} > /proc/sys/net/ipv4/ip_forward", u8::from(on));
        let router = format!("{}r", self.prefix);
        let status = Command::new("ip").args(["netns", "exec", &router, "sh", "-c", &set]).status();
        status.is_ok_and(|status| status.success())
    }

    /// The router drops what goes to `rank`, and passes on what comes from it.
    fn drop_towards(&self, rank: usize) -> bool {
        ip(&format!("-n {}r route add blackhole 10.77.{rank}.2/32", self.prefix))
    }

    fn member(&self, rank: usize, idle: Option<usize>) -> Child {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &format!("{}{rank}", self.prefix)])
            .arg(std::env::current_exe().unwrap())
            .args(["--ignored", "--nocapture", "tests::cut_links::member_of_a_ring"])
            .env(RANK, rank.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(idle) = idle {
            command.env(IDLE, idle.to_string());
        }
        command.spawn().unwrap()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in (0..SIZE).map(|rank| rank.to_string()).chain(["r".to_owned()]) {
            ip(&format!("netns delete {}{name}", self.prefix));
        }
    }
}

/// The other side of [`a_cut_link_ends_the_group_within_seconds`].
#[test]
#[ignore = "a process of another test"]
fn member_of_a_ring() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<usize>().unwrap());
    let Some(rank) = number(RANK) else { return };
    let address = |rank: usize| format!("10.77.{rank}.2:7000");
    let peers: Vec<Peer> = (0..SIZE)
        .map(|rank| Peer {
            address: address(rank),
            worker: WorkerId::new("w", Incarnation::new(rank as u64)).unwrap(),
        })
        .collect();
    let mut listener = Listener::bind(address(rank).parse().unwrap(), Incarnation::new(rank as u64)).unwrap();
    let mut group = form(&mut listener, &place(1, rank, &peers)).unwrap();
    let mut data = vec![1_i64; 1_000_000];
    group.all_reduce(&mut data).unwrap();
    println!("\ntraining");
    if number(IDLE) == Some(rank) {
        // Until the other process closes it.
        std::io::stdin().read_line(&mut String::new()).unwrap();
        return;
    }
    let error = loop {
        if let Err(error) = group.all_reduce(&mut data) {
            break error;
        }
    };
    println!("\nblames {:?}: {error}", error.blames().unwrap());
}

#[test]
#[ignore = "wants root and network namespaces"]
fn a_cut_link_ends_the_group_within_seconds() {
    // Data are under way or not; both directions are cut or one.
    for (idle, one_way) in [(None, false), (None, true), (Some(2), false), (Some(2), true)] {
        let Some(network) = Network::new() else {
            println!("skipped: no network namespaces here (root and `ip` are needed)");
            return;
        };
        let mut members: Vec<Child> = (0..SIZE).map(|rank| network.member(rank, idle)).collect();
        let mut outputs: Vec<_> = members
            .iter_mut()
            .map(|member| BufReader::new(member.stdout.take().unwrap()).lines().map(Result::unwrap))
            .collect();
        for output in &mut outputs {
            assert!(output.any(|line| line == "training"));
        }
        assert!(if one_way { network.drop_towards(1) } else { network.forward(false) });
        let cut = Instant::now();
        for (rank, output) in outputs.iter_mut().enumerate().filter(|(rank, _)| idle != Some(*rank)) {
            let blame = output.find(|line| line.starts_with("blames")).unwrap();
            let after = cut.elapsed();
            println!("idle {idle:?}, one way {one_way}: after {after:?} rank {rank} {blame}");
            assert!(after < WITHIN, "rank {rank}: {after:?}");
        }
        for member in &mut members {
            drop(member.stdin.take());
            assert!(member.wait().unwrap().success());
        }
    }
}
