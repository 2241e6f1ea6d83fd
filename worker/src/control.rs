//! How the agent reaches the trainer while it is busy: aborts, which make it leave its group at once, and requests for
//! the end of a step. In the other direction, the trainer records what it is doing, which the agent reports with every
//! heartbeat.
//!
//! The trainer owns everything else; this is the only state that both threads see.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use ulmus_types::{Generation, GroupRequest, Heartbeat, Section};

use crate::collective::AbortHandle;

/// Requests that have arrived for one generation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Requests {
    pub(crate) save: bool,
    pub(crate) pause: bool,
    pub(crate) stop: bool,
}

#[derive(Debug)]
struct State {
    /// Groups of generations up to this one are aborted.
    aborted: Generation,
    group: Option<(Generation, AbortHandle)>,
    requests: Requests,
    /// What the trainer is doing, and since when.
    section: (Section, Instant),
}

impl Default for State {
    fn default() -> Self {
        let section = (Section::Idle, Instant::now());
        Self { aborted: Generation::default(), group: None, requests: Requests::default(), section }
    }
}

/// State shared by the agent and the trainer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Control(Arc<Mutex<State>>);

impl Control {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is a single assignment, so a panic elsewhere leaves the state consistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The trainer enters a group. Returns `false` if that group was already aborted.
    pub(crate) fn enter(&self, generation: Generation, abort: AbortHandle) -> bool {
        let mut state = self.state();
        state.requests = Requests::default();
        state.group = Some((generation, abort));
        state.section = (Section::Forming, Instant::now());
        state.aborted < generation
    }

    /// The trainer has left its group.
    pub(crate) fn leave(&self) {
        let mut state = self.state();
        state.group = None;
        state.section = (Section::Idle, Instant::now());
    }

    /// The trainer begins a section. Returns the previous one.
    pub(crate) fn begin(&self, section: Section) -> Section {
        let mut state = self.state();
        std::mem::replace(&mut state.section, (section, Instant::now())).0
    }

    /// The next heartbeat of this process.
    pub(crate) fn heartbeat(&self) -> Heartbeat {
        let busy = clock_gettime(ClockId::ProcessCPUTime);
        let busy = Duration::new(busy.tv_sec.unsigned_abs(), u32::try_from(busy.tv_nsec).unwrap_or(0));
        let state = self.state();
        let (section, since) = state.section;
        let mut since = since.elapsed();
        let Some((generation, abort)) = &state.group else {
            return Heartbeat { generation: Generation::default(), collective: 0, section, since, busy };
        };
        // An operation that makes progress is not stuck, however slow the network is.
        if section == Section::Collective {
            since = abort.still_for().map_or(since, |still| still.min(since));
        }
        Heartbeat { generation: *generation, collective: abort.entered(), section, since, busy }
    }

    /// From now on the worker belongs to another run, whose generations have their own numbers.
    pub(crate) fn change_run(&self) {
        let mut state = self.state();
        // Until the trainer has left its group, heartbeats must not name it as a generation of the new run.
        if let Some((_, abort)) = state.group.take() {
            abort.abort();
        }
        state.aborted = Generation::default();
    }

    /// Passes a request on to the current group, if there is one.
    pub(crate) fn request_now(&self, request: GroupRequest) {
        let generation = self.state().group.as_ref().map(|(generation, _)| *generation);
        if let Some(generation) = generation {
            self.request(generation, request);
        }
    }

    /// Makes the trainer leave the group of `generation` at once, or not enter it.
    pub(crate) fn abort(&self, generation: Generation) {
        let mut state = self.state();
        state.aborted = state.aborted.max(generation);
        if let Some((of, abort)) = &state.group
            && *of <= generation
        {
            abort.abort();
        }
    }

    /// Passes a request on to the group of `generation`, if that is the current one.
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

    /// The requests that have arrived since the last call.
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
        assert!(!handle.is_aborted(), "the abort was for an older generation");
        control.abort(Generation::new(2));
        assert!(handle.is_aborted());
    }

    #[test]
    fn requests_reach_only_the_group_that_is_meant() {
        let control = Control::default();
        control.enter(Generation::new(2), AbortHandle::new().unwrap());
        control.request(Generation::new(1), GroupRequest::Stop);
        assert_eq!(control.take_requests(), Requests::default());
        control.request(Generation::new(2), GroupRequest::Pause);
        assert!(control.take_requests().pause);
        assert_eq!(control.take_requests(), Requests::default());
    }
}
