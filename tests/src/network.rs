//! The network of a cluster: each machine is a network namespace, and they are connected by a switch whose ports can be
//! made to silently drop everything.

use std::process::Command;

/// First three bytes of all addresses. The switch has the first address, the machines those after it.
const SUBNET: &str = "10.77.7";
/// States of a port, with the kernel's numbers.
const DISABLED: u8 = 0;
const FORWARDING: u8 = 3;

/// A switch, on which a coordinator may run, and the machines that are connected to it. Removed when this value is
/// dropped.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    machines: usize,
}

impl Network {
    /// Makes a network of this many machines; `None` if the system does not permit that, which takes root and `ip`.
    pub fn new(machines: usize) -> Option<Self> {
        let network = Self { prefix: format!("ulmus{}-", std::process::id()), machines };
        let switch = network.switch();
        let mut done = ip(&format!("netns add {switch}"))
            && ip(&format!("-n {switch} link set lo up"))
            && ip(&format!("-n {switch} link add switch type bridge"))
            && ip(&format!("-n {switch} address add {SUBNET}.1/24 dev switch"))
            && ip(&format!("-n {switch} link set switch up"));
        for number in 0..machines {
            let machine = network.machine(number);
            let address = format!("{SUBNET}.{}/24", number + 2);
            done = done
                && ip(&format!("netns add {machine}"))
                && ip(&format!("-n {machine} link set lo up"))
                && ip(&format!(
                    "link add m{number} netns {machine} type veth peer name s{number} netns {switch}"
                ))
                && ip(&format!("-n {switch} link set s{number} master switch"))
                && ip(&format!("-n {switch} link set s{number} up"))
                && ip(&format!("-n {machine} address add {address} dev m{number}"))
                && ip(&format!("-n {machine} link set m{number} up"));
        }
        done.then_some(network)
    }

    /// The number of machines, without the switch.
    pub const fn machines(&self) -> usize {
        self.machines
    }

    /// The namespace of the switch.
    pub fn switch(&self) -> String {
        format!("{}switch", self.prefix)
    }

    /// The address of the switch.
    pub fn address(&self) -> String {
        format!("{SUBNET}.1")
    }

    /// The namespace of a machine.
    pub fn machine(&self, number: usize) -> String {
        format!("{}{number}", self.prefix)
    }

    /// Makes the switch drop all packets from and to a machine. Returns whether that worked.
    pub fn cut(&self, machine: usize) -> bool {
        self.set_port(machine, DISABLED)
    }

    /// Makes the switch pass on a machine's packets again. Returns whether that worked.
    pub fn heal(&self, machine: usize) -> bool {
        self.set_port(machine, FORWARDING)
    }

    fn set_port(&self, machine: usize, state: u8) -> bool {
        ip(&format!("-n {} link set s{machine} type bridge_slave state {state}", self.switch()))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in (0..self.machines).map(|number| self.machine(number)).chain([self.switch()]) {
            ip(&format!("netns delete {name}"));
        }
    }
}

fn ip(arguments: &str) -> bool {
    let output = Command::new("ip").args(arguments.split_whitespace()).output();
    output.is_ok_and(|output| output.status.success())
}
