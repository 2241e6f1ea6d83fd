//! The workers that are connected, and what each of them does.

use std::collections::BTreeMap;
use std::time::Duration;

use ulmus_types::{Digest, Generation, Hello, Job, WorkerId};

/// What a connected worker does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Activity {
    /// It was welcomed, and has to prove that it sees the store.
    Greeted,
    /// It measures its fingerprint.
    Warming,
    /// It can take work.
    Idle,
    /// It is in the group of this generation, or on its way out of it.
    InGroup(Generation),
    /// It does a job.
    Working(Job),
}

/// A connected worker.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) hello: Hello,
    pub(crate) activity: Activity,
    pub(crate) fingerprint: Option<Digest>,
    /// When it was last heard of.
    pub(crate) heard: Duration,
}

/// All connected workers, in the order of their names.
#[derive(Debug, Default)]
pub(crate) struct Members(BTreeMap<WorkerId, Member>);

impl Members {
    pub(crate) fn welcome(&mut self, hello: Hello, now: Duration) {
        let member =
            Member { activity: Activity::Greeted, fingerprint: None, heard: now, hello: hello.clone() };
        self.0.insert(hello.worker, member);
    }

    pub(crate) fn get(&self, worker: &WorkerId) -> Option<&Member> {
        self.0.get(worker)
    }

    pub(crate) fn get_mut(&mut self, worker: &WorkerId) -> Option<&mut Member> {
        self.0.get_mut(worker)
    }

    pub(crate) fn remove(&mut self, worker: &WorkerId) -> Option<Member> {
        self.0.remove(worker)
    }

    pub(crate) fn set(&mut self, worker: &WorkerId, activity: Activity) {
        if let Some(member) = self.0.get_mut(worker) {
            member.activity = activity;
        }
    }

    pub(crate) fn ids(&self) -> Vec<WorkerId> {
        self.0.keys().cloned().collect()
    }

    /// Those that can take work.
    pub(crate) fn idle(&self) -> Vec<WorkerId> {
        self.0.iter().filter(|(_, m)| m.activity == Activity::Idle).map(|(id, _)| id.clone()).collect()
    }

    /// Another life of the same worker that is still connected.
    pub(crate) fn namesake(&self, worker: &WorkerId) -> Option<WorkerId> {
        self.0.keys().find(|other| other.name() == worker.name() && *other != worker).cloned()
    }

    /// Those that were not heard of since `now - dead_after`.
    pub(crate) fn silent(&self, now: Duration, dead_after: Duration) -> Vec<WorkerId> {
        self.0
            .iter()
            .filter(|(_, member)| now.saturating_sub(member.heard) > dead_after)
            .map(|(id, _)| id.clone())
            .collect()
    }
}
