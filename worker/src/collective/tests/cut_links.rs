//! Links that are cut: packets are dropped without notice. Each member is a process in a network namespace of its own,
//! with a router between them. Needs root and `ip`.
//!
//!     cargo test -p ulmus-worker --lib cut_links -- --ignored --nocapture

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::*;

const SIZE: usize = 3;
const RANK: &str = "ULMUS_TEST_RING_RANK";
/// The rank that does not enter the second operation, so that the others wait with nothing in flight.
const IDLE: &str = "ULMUS_TEST_RING_IDLE";
/// A dead link is noticed after `DEAD_AFTER`; the rest is time for the error to go round.
const WITHIN: Duration = Duration::from_secs(5);
/// A member that gives up tells its neighbours.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The namespaces `<prefix>0`, ... of the members and `<prefix>r` of the router; deleted on drop.
struct Network {
    prefix: String,
}

fn ip(arguments: &str) -> bool {
    let output = Command::new("ip").args(arguments.split_whitespace()).output();
    output.is_ok_and(|output| output.status.success())
}

impl Network {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let network = Self { prefix: format!("u{}-{number}-", std::process::id()) };
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
        assert!(done && network.forward(true), "no network namespaces here: root and `ip` are needed");
        network
    }

    /// Switches forwarding by the router on or off.
    fn forward(&self, on: bool) -> bool {
        let set = format!("echo {} > /proc/sys/net/ipv4/ip_forward", u8::from(on));
        let router = format!("{}r", self.prefix);
        let status = Command::new("ip").args(["netns", "exec", &router, "sh", "-c", &set]).status();
        status.is_ok_and(|status| status.success())
    }

    /// Makes the router drop packets to `rank`, but not those from it.
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

/// A member's process in the tests below.
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
    // A third of it does not fit the buffers of a socket.
    let mut data = vec![1_i64; 4_000_000];
    group.all_reduce(&mut data).unwrap();
    println!("\nformed");
    let line = || std::io::stdin().lines().next().map(Result::unwrap);
    // Wait until the other process says so, or closes the pipe.
    if line().is_none() {
        return;
    }
    println!("\ntraining");
    if number(IDLE) == Some(rank) {
        line();
        return;
    }
    let error = loop {
        if let Err(error) = group.all_reduce(&mut data) {
            break error;
        }
    };
    println!("\nblames {:?}: {error}", error.blames().unwrap());
}

/// The members of a formed group, and their output.
struct Members {
    processes: Vec<Child>,
    outputs: Vec<Box<dyn Iterator<Item = String>>>,
}

impl Members {
    fn formed(network: &Network, idle: Option<usize>) -> Self {
        let mut processes: Vec<Child> = (0..SIZE).map(|rank| network.member(rank, idle)).collect();
        let output = |member: &mut Child| -> Box<dyn Iterator<Item = String>> {
            Box::new(BufReader::new(member.stdout.take().unwrap()).lines().map(Result::unwrap))
        };
        let outputs = processes.iter_mut().map(output).collect();
        let mut members = Self { processes, outputs };
        for rank in 0..SIZE {
            members.printed(rank, "formed");
        }
        members
    }

    fn train(&mut self, rank: usize) {
        writeln!(self.processes[rank].stdin.as_ref().unwrap(), "train").unwrap();
        self.printed(rank, "training");
    }

    /// Waits for a line that begins with `begins`.
    fn printed(&mut self, rank: usize, begins: &str) -> String {
        self.outputs[rank].find(|line| line.starts_with(begins)).unwrap()
    }

    fn blames(&mut self, rank: usize, since: Instant, within: Duration, of: &str) {
        let blame = self.printed(rank, "blames");
        let after = since.elapsed();
        println!("{of}: after {after:?} rank {rank} {blame}");
        assert!(after < within, "rank {rank}: {after:?}");
    }

    fn leave(&mut self, rank: usize) {
        drop(self.processes[rank].stdin.take());
        assert!(self.processes[rank].wait().unwrap().success());
    }
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_cut_link_ends_the_group_within_seconds() {
    // With data in flight or without; with both directions cut or one.
    for (idle, one_way) in [(None, false), (None, true), (Some(2), false), (Some(2), true)] {
        let network = Network::new();
        let mut members = Members::formed(&network, idle);
        (0..SIZE).for_each(|rank| members.train(rank));
        assert!(if one_way { network.drop_towards(1) } else { network.forward(false) });
        let cut = Instant::now();
        for rank in (0..SIZE).filter(|rank| idle != Some(*rank)) {
            members.blames(rank, cut, WITHIN, &format!("idle {idle:?}, one way {one_way}"));
        }
        (0..SIZE).for_each(|rank| members.leave(rank));
    }
}

/// Data in flight do not reach a member; all that its neighbours learn is that it leaves.
#[test]
#[ignore = "needs root and network namespaces"]
#[expect(clippy::disallowed_methods, reason = "no event tells that nothing more will come")]
fn a_member_that_leaves_behind_a_cut_link_is_noticed_at_once() {
    let network = Network::new();
    let mut members = Members::formed(&network, None);
    assert!(network.drop_towards(1));
    members.train(0);
    members.train(2);
    // Let its neighbour come to wait for nothing but room for its own data.
    std::thread::sleep(AT_ONCE);
    members.leave(1);
    let left = Instant::now();
    for rank in [0, 2] {
        members.blames(rank, left, AT_ONCE, "left");
        members.leave(rank);
    }
}
