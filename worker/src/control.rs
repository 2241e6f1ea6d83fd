//! What the session tells the trainer while it is busy: to leave a group at once, or requests for the end of a step; and what
//! the trainer is doing, which the agent tells with every heartbeat.
//!
//! The trainer owns everything else; this is the only state that both threads see.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use ulmus_types::{Generation, GroupRequest, Heartbeat, Section};

use crate::collective::AbortHandle;

/// Requests that came in for one generation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Requests {
    pub(crate) save: bool,
    pub(crate) pause: bool,
    pub(crate) stop: bool,
}

#[derive(Debug)]
struct State {
    /// Every generation up to this one is to be left.
    aborted: Generation,
    group: Option<(Generation, AbortHandle)>,
    requests: Requests,
    /// What the trainer does, and since when.
    section: (Section, Instant),
}

impl Default for State {
    fn default() -> Self {
        let section = (Section::Idle, Instant::now());
        Self { aborted: Generation::default(), group: None, requests: Requests::default(), section }
    }
}

/// Shared by the session and the trainer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Control(Arc<Mutex<State>>);

impl Control {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is a single assignment, so a panic elsewhere leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The trainer enters a group. False if it was told to leave that group before it got there.
    pub(crate) fn enter(&self, generation: Generation, abort: AbortHandle) -> bool {
        let mut state = self.state();
        state.requests = Requests::default();
        state.group = Some((generation, abort));
        state.section = (Section::Forming, Instant::now());
        state.aborted < generation
    }

    /// The trainer is out of its group.
    pub(crate) fn leave(&self) {
        let mut state = self.state();
        state.group = None;
        state.section = (Section::Idle, Instant::now());
    }

    /// The trainer begins something; answers what it did until then.
    pub(crate) fn begin(&self, section: Section) -> Section {
        let mut state = self.state();
        std::mem::replace(&mut state.section, (section, Instant::now())).0
    }

    /// What the coordinator is told of this process.
    pub(crate) fn heartbeat(&self) -> Heartbeat {
        let busy = clock_gettime(ClockId::ProcessCPUTime);
        let busy = Duration::new(busy.tv_sec.unsigned_abs(), u32::try_from(busy.tv_nsec).unwrap_or(0));
        let state = self.state();
        let (section, since) = state.section;
        let mut since = since.elapsed();
        let Some((generation, abort)) = &state.group else {
            return Heartbeat { generation: Generation::default(), collective: 0, section, since, busy };
        };
        // An operation that moves on does not stand still, however slow the network is.
        if section == Section::Collective {
            since = abort.still_for().map_or(since, |still| still.min(since));
        }
        Heartbeat { generation: *generation, collective: abort.entered(), section, since, busy }
    }

    /// The worker belongs to another run from now on, whose generations are counted anew.
    pub(crate) fn change_run(&self) {
        let mut state = self.state();
        // The trainer is on its way out, and what it does until then is of no generation of this run.
        if let Some((_, abort)) = state.group.take() {
            abort.abort();
        }
        state.aborted = Generation::default();
    }

    /// Passes a request on to the group at hand, whichever it is.
    pub(crate) fn request_now(&self, request: GroupRequest) {
        let generation = self.state().group.as_ref().map(|(generation, _)| *generation);
        if let Some(generation) = generation {
            self.request(generation, request);
        }
    }

    /// Leave `generation` at once, whether it has begun or not.
    pub(crate) fn abort(&self, generation: Generation) {
        let mut state = self.state();
        state.aborted = state.aborted.max(generation);
        if let Some((of, abort)) = &state.group
            && *of <= generation
        {
            abort.abort();
        }
    }

    /// Passes a request on to the group, if it is still the one that was meant.
    pub(crate) fn request(&self, generation: Generation, request: GroupRequest) {
        let mut state = self.state();
        if state.group.as_ref().is_some_and(|(of, _)| *of == generation) {
            match request {
                GroupRequest::Save => state.requests.save = true,
                GroupRequest::Pause => state.requests.pause = true,
                GroupRequest::Stop => state.requests.stop = true,
            }
        }
    }

    /// The requests that came in since the last call.
    pub(crate) fn take_requests(&self) -> Requests {
        std::mem::take(&mut self.state().requests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abort_counts_before_and_after_the_group_is_entered() {
        let control = Control::default();
        control.abort(Generation::new(1));
        assert!(!control.enter(Generation::new(1), AbortHandle::new().unwrap()));
        let handle = AbortHandle::new().unwrap();
        assert!(control.enter(Generation::new(2), handle.clone()));
        control.abort(Generation::new(1));
        assert!(!handle.is_aborted(), "an older generation is meant");
        control.abort(Generation::new(2));
        assert!(handle.is_aborted());
    }

    #[test]
    fn wishes_reach_only_the_group_that_is_meant() {
        let control = Control::default();
        control.enter(Generation::new(2), AbortHandle::new().unwrap());
        control.request(Generation::new(1), GroupRequest::Stop);
        assert_eq!(control.take_requests(), Requests::default());
        control.request(Generation::new(2), GroupRequest::Pause);
        assert!(control.take_requests().pause);
        assert_eq!(control.take_requests(), Requests::default());
    }
}
