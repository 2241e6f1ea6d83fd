//! What must hold after every event. Debug builds check it each time; the tests of this crate rely on that.

use std::collections::BTreeSet;

use crate::coordinator::Coordinator;
use crate::group::Group;
use crate::members::Activity;

/// The first invariant that does not hold, in words.
pub(crate) fn broken(state: &Coordinator) -> Option<String> {
    let generation = state.generation;
    for worker in state.group.members() {
        if matches!(state.group, Group::Forming { .. } | Group::Training { .. }) {
            match state.members.get(&worker).map(|member| &member.activity) {
                Some(Activity::InGroup(of)) if *of == generation => {}
                other => return Some(format!("{worker} is in the group of {generation} and does {other:?}")),
            }
        }
    }
    let group: BTreeSet<_> = state.group.members().into_iter().collect();
    if group.len() != state.group.members().len() {
        return Some("a worker is twice in the group".to_owned());
    }
    let workers: BTreeSet<_> = state.jobs.running().values().collect();
    if workers.len() != state.jobs.running().len() {
        return Some("a worker does two jobs".to_owned());
    }
    for (job, worker) in state.jobs.running() {
        let does = state.members.get(worker).map(|member| &member.activity);
        if does != Some(&Activity::Working(job.clone())) {
            return Some(format!("{worker} should do {} and does {does:?}", job.name()));
        }
    }
    if !state.snapshots.all_are_held() {
        return Some("a checkpoint waits that nobody holds".to_owned());
    }
    None
}
