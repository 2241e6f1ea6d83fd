//! What must hold after every event. Debug builds check it each time, and this crate's tests rely on that.

use std::collections::BTreeSet;

use crate::group::Group;
use crate::members::Activity;
use crate::state::Coordinator;

/// Describes the first invariant that does not hold.
pub(crate) fn broken(state: &Coordinator) -> Option<String> {
    let generation = state.generation;
    for worker in state.group.members() {
        if matches!(state.group, Group::Forming { .. } | Group::Training { .. }) {
            match state.members.get(&worker).map(|member| &member.activity) {
                Some(Activity::InGroup(of)) if *of == generation => {}
                other => {
                    return Some(format!(
                        "{worker} is in the group of generation {generation}, but its activity is {other:?}"
                    ));
                }
            }
        }
    }
    let group: BTreeSet<_> = state.group.members().into_iter().collect();
    if group.len() != state.group.members().len() {
        return Some("a worker is in the group twice".to_owned());
    }
    let workers: BTreeSet<_> = state.jobs.running().values().collect();
    if workers.len() != state.jobs.running().len() {
        return Some("a worker does two jobs".to_owned());
    }
    for (job, worker) in state.jobs.running() {
        let does = state.members.get(worker).map(|member| &member.activity);
        if does != Some(&Activity::Working(job.clone())) {
            return Some(format!("{worker} should do {}, but its activity is {does:?}", job.name()));
        }
    }
    if !state.snapshots.all_are_held() {
        return Some("a checkpoint that nobody holds waits to be stored".to_owned());
    }
    None
}
