//! A group that reports, during each operation, that the trainer waits for others and not they for it.

use std::time::Duration;

use ulmus_types::{Rank, Section};

use crate::collective::{AbortHandle, Collective, CollectiveError, Data, TcpGroup, Watch};
use crate::control::Control;

/// A group, and the control by which it reports.
#[derive(Debug)]
pub(super) struct Watched {
    group: TcpGroup,
    control: Control,
}

impl Watched {
    pub(super) fn new(group: TcpGroup, control: Control) -> Self {
        Self { group, control }
    }

    fn tell<T>(&mut self, operation: impl FnOnce(&mut TcpGroup) -> T) -> T {
        let before = self.control.begin(Section::Collective);
        let done = operation(&mut self.group);
        self.control.begin(before);
        done
    }
}

impl Collective for Watched {
    fn rank(&self) -> Rank {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn all_reduce(&mut self, values: &mut [i64]) -> Result<(), CollectiveError> {
        self.tell(|group| group.all_reduce(values))
    }

    fn reduce_scatter(&mut self, values: &mut [i64]) -> Result<(), CollectiveError> {
        self.tell(|group| group.reduce_scatter(values))
    }

    fn all_gather(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.tell(|group| group.all_gather(values))
    }

    fn broadcast(&mut self, root: Rank, data: Data<'_>) -> Result<(), CollectiveError> {
        self.tell(|group| group.broadcast(root, data))
    }

    fn abort_handle(&self) -> AbortHandle {
        self.group.abort_handle()
    }

    fn watch(&self, within: Duration) -> Result<Watch, CollectiveError> {
        self.group.watch(within)
    }
}
