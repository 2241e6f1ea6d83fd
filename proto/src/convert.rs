//! Translation between wire messages and domain messages: `From` to the wire, `TryFrom` from it.
//!
//! Every field that the domain needs is required here, so that no code behind this module ever sees an incomplete
//! message.

use std::collections::BTreeMap;
use std::time::Duration;

use ulmus_types::{
    Assignment, BadUnit, Blame, CheckpointId, CheckpointKind, Digest, ErrorKind, ExitStatus, FileEntry,
    Generation, GroupKey, GroupRequest, Heartbeat, Hello, Incarnation, Job, LeaveReason, Part, Peer, Rank,
    Ready, Repair, RunId, Section, SessionSecret, Snapshot, SourceReading, StageName, Step, StepReport,
    Subject, ToCoordinator, ToWorker, WorkerId, WorkerStatus, for_people,
};

use crate::v1;

/// A message that lacks a field, or has a field with an impossible value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A required field is missing: the other side has a different version.
    #[error("field {0} is missing from the message; use the same version on both sides")]
    Missing(&'static str),
    /// A field has an impossible value.
    #[error("field {field} is invalid: {value}; use the same version on both sides")]
    Invalid {
        /// Name of the field.
        field: &'static str,
        /// The value, or what is wrong with it.
        value: String,
    },
}

fn required<T>(field: &'static str, value: Option<T>) -> Result<T, WireError> {
    value.ok_or(WireError::Missing(field))
}

fn array<const N: usize>(field: &'static str, bytes: &[u8]) -> Result<[u8; N], WireError> {
    bytes.try_into().map_err(|_| WireError::Invalid { field, value: format!("{} bytes", bytes.len()) })
}

fn digest(field: &'static str, bytes: &[u8]) -> Result<Digest, WireError> {
    array(field, bytes).map(Digest::from_bytes)
}

/// An empty field means that there is no run.
fn run_id(field: &'static str, bytes: &[u8]) -> Result<Option<RunId>, WireError> {
    if bytes.is_empty() { Ok(None) } else { array(field, bytes).map(RunId::from_bytes).map(Some) }
}

fn generation(number: u64) -> Option<Generation> {
    (number > 0).then(|| Generation::new(number))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

// ---- parts of messages

impl From<WorkerId> for v1::WorkerId {
    fn from(id: WorkerId) -> Self {
        Self { name: id.name().to_owned(), incarnation: id.incarnation().get() }
    }
}

impl TryFrom<v1::WorkerId> for WorkerId {
    type Error = WireError;

    fn try_from(id: v1::WorkerId) -> Result<Self, WireError> {
        Self::new(id.name, Incarnation::new(id.incarnation))
            .map_err(|error| WireError::Invalid { field: "worker.name", value: error.to_string() })
    }
}

impl From<CheckpointId> for v1::Checkpoint {
    fn from(id: CheckpointId) -> Self {
        Self { step: id.step().get(), generation: id.generation().get(), training: id.training().to_string() }
    }
}

impl TryFrom<v1::Checkpoint> for CheckpointId {
    type Error = WireError;

    fn try_from(id: v1::Checkpoint) -> Result<Self, WireError> {
        let training = stage("checkpoint.training", &id.training)?;
        Ok(Self::new(training, Step::new(id.step), Generation::new(id.generation)))
    }
}

fn stage(field: &'static str, name: &str) -> Result<StageName, WireError> {
    name.parse().map_err(|_| invalid(field, name))
}

fn invalid(field: &'static str, value: &str) -> WireError {
    WireError::Invalid { field, value: format!("{:?}", for_people(value, 100)) }
}

impl From<ErrorKind> for v1::ErrorKind {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Retry => Self::Retry,
            ErrorKind::Fenced => Self::Fenced,
            ErrorKind::InvalidInput => Self::InvalidInput,
            ErrorKind::Refused => Self::Refused,
            ErrorKind::Corrupt => Self::Corrupt,
            ErrorKind::Disk => Self::Disk,
            ErrorKind::Internal => Self::Internal,
        }
    }
}

fn failure(kind: ErrorKind, message: String) -> v1::Failure {
    v1::Failure { kind: v1::ErrorKind::from(kind).into(), message }
}

fn read_failure(failure: v1::Failure) -> Result<(ErrorKind, String), WireError> {
    let kind = match failure.kind() {
        v1::ErrorKind::Retry => ErrorKind::Retry,
        v1::ErrorKind::Fenced => ErrorKind::Fenced,
        v1::ErrorKind::InvalidInput => ErrorKind::InvalidInput,
        v1::ErrorKind::Refused => ErrorKind::Refused,
        v1::ErrorKind::Corrupt => ErrorKind::Corrupt,
        v1::ErrorKind::Disk => ErrorKind::Disk,
        v1::ErrorKind::Internal => ErrorKind::Internal,
        v1::ErrorKind::Unspecified => return Err(WireError::Missing("failure.kind")),
    };
    Ok((kind, failure.message))
}

impl From<StepReport> for v1::StepReport {
    fn from(report: StepReport) -> Self {
        Self {
            step: report.step.get(),
            tokens: report.tokens,
            loss: report.loss,
            z_loss: report.z_loss,
            grad_norm: report.grad_norm,
            learning_rate: report.lr,
            held_out_loss: report.held_out_loss,
            elapsed_ns: nanos(report.elapsed),
            data_wait_ns: nanos(report.data_wait),
            communication_ns: nanos(report.communication),
            examples: report.examples,
            measures: report.measures.into_iter().collect(),
        }
    }
}

impl From<v1::StepReport> for StepReport {
    fn from(report: v1::StepReport) -> Self {
        Self {
            step: Step::new(report.step),
            tokens: report.tokens,
            loss: report.loss,
            z_loss: report.z_loss,
            grad_norm: report.grad_norm,
            lr: report.learning_rate,
            held_out_loss: report.held_out_loss,
            elapsed: Duration::from_nanos(report.elapsed_ns),
            data_wait: Duration::from_nanos(report.data_wait_ns),
            communication: Duration::from_nanos(report.communication_ns),
            examples: report.examples,
            measures: report.measures.into_iter().collect(),
        }
    }
}

impl From<SourceReading> for v1::SourceReading {
    fn from(reading: SourceReading) -> Self {
        Self {
            source: reading.source,
            epochs: reading.epochs,
            documents: reading.documents,
            tokens: reading.tokens,
            text_bytes: reading.text_bytes,
            short_characters: reading.short_characters,
            short_tokens: reading.short_tokens,
            held_out: reading.held_out,
            bad_units: reading.bad_units,
            fetched_bytes: reading.fetched_bytes,
            cached_bytes: reading.cached_bytes,
            failed_requests: reading.failed_requests,
            streams: reading.streams,
            ready: reading.ready,
            waited_ns: nanos(reading.waited),
            elapsed_ns: nanos(reading.elapsed),
        }
    }
}

impl From<v1::SourceReading> for SourceReading {
    fn from(reading: v1::SourceReading) -> Self {
        Self {
            source: reading.source,
            epochs: reading.epochs,
            documents: reading.documents,
            tokens: reading.tokens,
            text_bytes: reading.text_bytes,
            short_characters: reading.short_characters,
            short_tokens: reading.short_tokens,
            held_out: reading.held_out,
            bad_units: reading.bad_units,
            fetched_bytes: reading.fetched_bytes,
            cached_bytes: reading.cached_bytes,
            failed_requests: reading.failed_requests,
            streams: reading.streams,
            ready: reading.ready,
            waited: Duration::from_nanos(reading.waited_ns),
            elapsed: Duration::from_nanos(reading.elapsed_ns),
        }
    }
}

impl From<Subject> for v1::Subject {
    fn from(subject: Subject) -> Self {
        use v1::subject::Kind;
        let (kind, name) = match &subject {
            Subject::Stage(_) => (Kind::Stage, String::new()),
            Subject::Base => (Kind::Base, String::new()),
            Subject::Average => (Kind::Average, String::new()),
            Subject::Last(_) => (Kind::Last, String::new()),
            Subject::Milestone(_) => (Kind::Milestone, String::new()),
            Subject::Tuned(stage) => (Kind::Tuned, stage.to_string()),
            Subject::Model(place) => (Kind::Model, place.clone()),
        };
        let checkpoints = subject.checkpoints().iter().copied().map(Into::into).collect();
        Self { kind: kind.into(), checkpoints, name }
    }
}

impl TryFrom<v1::Subject> for Subject {
    type Error = WireError;

    fn try_from(subject: v1::Subject) -> Result<Self, WireError> {
        use v1::subject::Kind;
        let kind = subject.kind();
        let checkpoints: Vec<CheckpointId> =
            subject.checkpoints.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        Ok(match (kind, &checkpoints[..], &subject.name[..]) {
            (Kind::Stage, _, "") => Self::Stage(checkpoints),
            (Kind::Base, [], "") => Self::Base,
            (Kind::Average, [], "") => Self::Average,
            (Kind::Last, [id], "") => Self::Last(*id),
            (Kind::Milestone, [id], "") => Self::Milestone(*id),
            (Kind::Tuned, [], name) => Self::Tuned(stage("subject.name", name)?),
            (Kind::Model, [], place) if !place.is_empty() => Self::Model(place.to_owned()),
            (kind, checkpoints, name) => {
                let value = format!("{kind:?} {name} of {} checkpoints", checkpoints.len());
                return Err(invalid("subject", &value));
            }
        })
    }
}

impl From<Job> for v1::Job {
    fn from(job: Job) -> Self {
        let (part, parts) = job.part().map_or((0, 0), |part| (part.index(), part.of()));
        Self { stage: job.stage().to_string(), subject: Some(job.subject().clone().into()), part, parts }
    }
}

impl TryFrom<v1::Job> for Job {
    type Error = WireError;

    fn try_from(job: v1::Job) -> Result<Self, WireError> {
        let stage = stage("job.stage", &job.stage)?;
        let whole = Self::new(stage, required("job.subject", job.subject)?.try_into()?);
        match (job.parts, Part::new(job.part, job.parts)) {
            (0, _) if job.part == 0 => Ok(whole),
            (_, Some(part)) => Ok(whole.part_of(part)),
            (parts, None) => Err(invalid("job.part", &format!("{} of {parts}", job.part))),
        }
    }
}

impl From<Snapshot> for v1::Snapshot {
    fn from(snapshot: Snapshot) -> Self {
        let kind = match snapshot.kind {
            CheckpointKind::Milestone => v1::CheckpointKind::Milestone,
            CheckpointKind::Recovery => v1::CheckpointKind::Recovery,
        };
        Self {
            checkpoint: Some(snapshot.checkpoint.into()),
            kind: kind.into(),
            state: snapshot.state.as_bytes().to_vec(),
            files: snapshot.files,
        }
    }
}

impl TryFrom<v1::Snapshot> for Snapshot {
    type Error = WireError;

    fn try_from(snapshot: v1::Snapshot) -> Result<Self, WireError> {
        Ok(Self {
            kind: match snapshot.kind() {
                v1::CheckpointKind::Milestone => CheckpointKind::Milestone,
                v1::CheckpointKind::Recovery => CheckpointKind::Recovery,
                v1::CheckpointKind::Unspecified => return Err(WireError::Missing("snapshot.kind")),
            },
            checkpoint: required("snapshot.checkpoint", snapshot.checkpoint)?.try_into()?,
            state: digest("snapshot.state", &snapshot.state)?,
            files: snapshot.files,
        })
    }
}

impl From<Heartbeat> for v1::Beat {
    fn from(heartbeat: Heartbeat) -> Self {
        let section = match heartbeat.section {
            Section::Idle => v1::Section::Idle,
            Section::Forming => v1::Section::Forming,
            Section::Computing => v1::Section::Computing,
            Section::Collective => v1::Section::Collective,
            Section::Reading => v1::Section::Reading,
            Section::Measuring => v1::Section::Measuring,
            Section::Storing => v1::Section::Storing,
        };
        Self {
            collective: heartbeat.collective,
            generation: heartbeat.generation.get(),
            section: section.into(),
            since_ns: nanos(heartbeat.since),
            busy_ns: nanos(heartbeat.busy),
        }
    }
}

impl From<v1::Beat> for Heartbeat {
    fn from(beat: v1::Beat) -> Self {
        Self {
            section: match beat.section() {
                v1::Section::Idle => Section::Idle,
                v1::Section::Forming => Section::Forming,
                v1::Section::Computing => Section::Computing,
                v1::Section::Collective => Section::Collective,
                v1::Section::Reading => Section::Reading,
                v1::Section::Measuring => Section::Measuring,
                v1::Section::Storing => Section::Storing,
            },
            generation: Generation::new(beat.generation),
            collective: beat.collective,
            since: Duration::from_nanos(beat.since_ns),
            busy: Duration::from_nanos(beat.busy_ns),
        }
    }
}

fn suspect((rank, blame): (Rank, Blame)) -> v1::Suspect {
    let blame = match blame {
        Blame::Unreachable => v1::Blame::Unreachable,
        Blame::Absent => v1::Blame::Absent,
        Blame::Lost => v1::Blame::Lost,
        Blame::Silent => v1::Blame::Silent,
        Blame::Damaged => v1::Blame::Damaged,
    };
    v1::Suspect { rank: rank.get(), blame: blame.into() }
}

fn suspected(suspect: v1::Suspect) -> Result<(Rank, Blame), WireError> {
    let blame = match suspect.blame() {
        v1::Blame::Unreachable => Blame::Unreachable,
        v1::Blame::Absent => Blame::Absent,
        v1::Blame::Lost => Blame::Lost,
        v1::Blame::Silent => Blame::Silent,
        v1::Blame::Damaged => Blame::Damaged,
        v1::Blame::Unspecified => return Err(WireError::Missing("suspect.blame")),
    };
    Ok((Rank::new(suspect.rank), blame))
}

fn exit_status(code: u32) -> Result<ExitStatus, WireError> {
    ExitStatus::from_code(code).ok_or_else(|| WireError::Invalid { field: "finish", value: code.to_string() })
}

fn file_entries(files: BTreeMap<String, FileEntry>) -> Vec<v1::FileEntry> {
    files
        .into_iter()
        .map(|(name, entry)| v1::FileEntry {
            name,
            bytes: entry.bytes,
            digest: entry.digest.as_bytes().to_vec(),
        })
        .collect()
}

// ---- worker to coordinator

impl From<(Option<RunId>, ToCoordinator)> for v1::FromWorker {
    /// Converts a message and the id of the run that it is about.
    fn from((run, message): (Option<RunId>, ToCoordinator)) -> Self {
        use v1::from_worker::Message as Wire;
        let message = match message {
            ToCoordinator::Hello(hello) => Wire::Hello(v1::Hello {
                worker: Some(hello.worker.into()),
                version: hello.version,
                address: hello.address,
                device: hello.device,
                threads: hello.threads,
                pid: hello.pid,
                status: match hello.status {
                    WorkerStatus::Idle => None,
                    WorkerStatus::Training(generation) => Some(v1::hello::Status::Training(generation.get())),
                    WorkerStatus::Working(job) => Some(v1::hello::Status::Working(job.into())),
                },
                run: hello.run.map_or_else(Vec::new, |run| run.to_bytes().to_vec()),
                secret: hello.secret.map_or_else(Vec::new, |secret| secret.as_bytes().to_vec()),
                host: hello.host,
                memory: hello.memory,
                only_jobs: hello.only_jobs,
            }),
            ToCoordinator::StoreRead(read) => {
                use v1::store_read::Result as Wire;
                let result = match read {
                    Ok(nonce) => Wire::NonceDigest(nonce.as_bytes().to_vec()),
                    Err(error) => Wire::Error(error),
                };
                v1::from_worker::Message::StoreRead(v1::StoreRead { result: Some(result) })
            }
            ToCoordinator::Ready(ready) => Wire::Ready(v1::Ready {
                fingerprint: ready
                    .fingerprint
                    .map_or_else(Vec::new, |fingerprint| fingerprint.as_bytes().to_vec()),
                generation: ready.generation.map_or(0, Generation::get),
                reports: ready.reports.into_iter().map(Into::into).collect(),
                snapshots: ready.snapshots.into_iter().map(Into::into).collect(),
            }),
            ToCoordinator::Unfit { kind, message } => Wire::Unfit(failure(kind, message)),
            ToCoordinator::Draining => Wire::Draining(true),
            ToCoordinator::Heartbeat(heartbeat) => Wire::Beat(heartbeat.into()),
            ToCoordinator::Connected(generation) => {
                Wire::Connected(v1::Connected { generation: generation.get() })
            }
            ToCoordinator::Formed { generation, step } => {
                Wire::Formed(v1::Formed { generation: generation.get(), step: step.get() })
            }
            ToCoordinator::Steps { generation, reports } => Wire::Steps(v1::Steps {
                generation: generation.get(),
                reports: reports.into_iter().map(Into::into).collect(),
            }),
            ToCoordinator::Reading { step, sources } => Wire::Reading(v1::Reading {
                step: step.get(),
                sources: sources.into_iter().map(Into::into).collect(),
            }),
            ToCoordinator::Left { generation, step, reason } => {
                use v1::left::Reason;
                let suspect = match &reason {
                    LeaveReason::Lost { suspect: of, .. } => of.map(suspect),
                    _ => None,
                };
                let reason = match reason {
                    LeaveReason::Agreed => Reason::Agreed(true),
                    LeaveReason::Finished => Reason::Finished(true),
                    LeaveReason::Exhausted(source) => Reason::Exhausted(source),
                    LeaveReason::BadUnit(BadUnit { source, unit }, message) => {
                        Reason::BadUnit(v1::BadUnit { source, unit, message })
                    }
                    LeaveReason::Lost { message, .. } => Reason::Lost(message),
                    LeaveReason::Failed { kind, message } => Reason::Failed(failure(kind, message)),
                };
                let (generation, step) = (generation.get(), step.get());
                Wire::Left(v1::Left { generation, step, reason: Some(reason), suspect })
            }
            ToCoordinator::Snapshot(snapshot) => Wire::Snapshot(snapshot.into()),
            ToCoordinator::Written { checkpoint, files } => {
                Wire::Written(v1::Written { checkpoint: Some(checkpoint.into()), files: file_entries(files) })
            }
            ToCoordinator::WriteFailed { checkpoint, kind, message } => {
                let failure = Some(failure(kind, message));
                Wire::WriteFailed(v1::WriteFailed { checkpoint: Some(checkpoint.into()), failure })
            }
            ToCoordinator::Notice(text) => Wire::Notice(text),
            ToCoordinator::JobDone { job, result } => {
                Wire::JobDone(v1::JobDone { job: Some(job.into()), result })
            }
            ToCoordinator::JobFailed { job, kind, message, bad_unit, damaged } => {
                Wire::JobFailed(v1::JobFailed {
                    job: Some(job.into()),
                    failure: Some(failure(kind, message)),
                    bad_unit: bad_unit.map(|BadUnit { source, unit }| v1::BadUnit {
                        source,
                        unit,
                        message: String::new(),
                    }),
                    damaged: damaged.map(Into::into),
                })
            }
        };
        Self { message: Some(message), run: run.map_or_else(Vec::new, |run| run.to_bytes().to_vec()) }
    }
}

/// Reads a message from a worker, and the id of the run that it is about.
///
/// # Errors
/// When a field is missing or has an impossible value.
pub fn from_worker(message: v1::FromWorker) -> Result<(Option<RunId>, ToCoordinator), WireError> {
    let run = run_id("run", &message.run)?;
    Ok((run, required("message", message.message)?.try_into()?))
}

impl TryFrom<v1::from_worker::Message> for ToCoordinator {
    type Error = WireError;

    fn try_from(message: v1::from_worker::Message) -> Result<Self, WireError> {
        use v1::from_worker::Message as Wire;
        Ok(match message {
            Wire::Hello(hello) => Self::Hello(Hello {
                worker: required("hello.worker", hello.worker)?.try_into()?,
                version: hello.version,
                address: hello.address,
                device: hello.device,
                threads: hello.threads,
                pid: hello.pid,
                status: match hello.status {
                    None => WorkerStatus::Idle,
                    Some(v1::hello::Status::Training(generation)) => {
                        WorkerStatus::Training(Generation::new(generation))
                    }
                    Some(v1::hello::Status::Working(job)) => WorkerStatus::Working(job.try_into()?),
                },
                run: run_id("hello.run", &hello.run)?,
                secret: match hello.secret.as_slice() {
                    [] => None,
                    bytes => Some(SessionSecret::from_bytes(array("hello.secret", bytes)?)),
                },
                host: hello.host,
                memory: hello.memory,
                only_jobs: hello.only_jobs,
            }),
            Wire::StoreRead(read) => Self::StoreRead(match required("store_read.result", read.result)? {
                v1::store_read::Result::NonceDigest(nonce) => Ok(digest("store_read.nonce_digest", &nonce)?),
                v1::store_read::Result::Error(error) => Err(error),
            }),
            Wire::Ready(ready) => Self::Ready(Ready {
                fingerprint: match ready.fingerprint.as_slice() {
                    [] => None,
                    bytes => Some(digest("ready.fingerprint", bytes)?),
                },
                generation: generation(ready.generation),
                reports: ready.reports.into_iter().map(Into::into).collect(),
                snapshots: ready.snapshots.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            }),
            Wire::Unfit(failure) => {
                let (kind, message) = read_failure(failure)?;
                Self::Unfit { kind, message }
            }
            Wire::Draining(_) => Self::Draining,
            Wire::Beat(beat) => Self::Heartbeat(beat.into()),
            Wire::Connected(connected) => Self::Connected(Generation::new(connected.generation)),
            Wire::Formed(formed) => {
                Self::Formed { generation: Generation::new(formed.generation), step: Step::new(formed.step) }
            }
            Wire::Steps(steps) => Self::Steps {
                generation: Generation::new(steps.generation),
                reports: steps.reports.into_iter().map(Into::into).collect(),
            },
            Wire::Reading(reading) => Self::Reading {
                step: Step::new(reading.step),
                sources: reading.sources.into_iter().map(Into::into).collect(),
            },
            Wire::Left(left) => {
                use v1::left::Reason;
                let reason = match required("left.reason", left.reason)? {
                    Reason::Agreed(_) => LeaveReason::Agreed,
                    Reason::Finished(_) => LeaveReason::Finished,
                    Reason::Exhausted(source) => LeaveReason::Exhausted(source),
                    Reason::BadUnit(v1::BadUnit { source, unit, message }) => {
                        LeaveReason::BadUnit(BadUnit { source, unit }, message)
                    }
                    Reason::Lost(message) => {
                        LeaveReason::Lost { suspect: left.suspect.map(suspected).transpose()?, message }
                    }
                    Reason::Failed(failure) => {
                        let (kind, message) = read_failure(failure)?;
                        LeaveReason::Failed { kind, message }
                    }
                };
                let (generation, step) = (Generation::new(left.generation), Step::new(left.step));
                Self::Left { generation, step, reason }
            }
            Wire::Snapshot(snapshot) => Self::Snapshot(snapshot.try_into()?),
            Wire::Written(written) => {
                let mut files = BTreeMap::new();
                for file in written.files {
                    let entry = FileEntry { bytes: file.bytes, digest: digest("file.digest", &file.digest)? };
                    files.insert(file.name, entry);
                }
                Self::Written {
                    checkpoint: required("written.checkpoint", written.checkpoint)?.try_into()?,
                    files,
                }
            }
            Wire::WriteFailed(write) => {
                let (kind, message) = read_failure(required("write_failed.failure", write.failure)?)?;
                let checkpoint = required("write_failed.checkpoint", write.checkpoint)?.try_into()?;
                Self::WriteFailed { checkpoint, kind, message }
            }
            Wire::Notice(text) => Self::Notice(text),
            Wire::JobDone(done) => {
                Self::JobDone { job: required("job_done.job", done.job)?.try_into()?, result: done.result }
            }
            Wire::JobFailed(job) => {
                let (kind, message) = read_failure(required("job_failed.failure", job.failure)?)?;
                let bad_unit = job.bad_unit.map(|v1::BadUnit { source, unit, .. }| BadUnit { source, unit });
                Self::JobFailed {
                    job: required("job_failed.job", job.job)?.try_into()?,
                    kind,
                    message,
                    bad_unit,
                    damaged: job.damaged.map(TryInto::try_into).transpose()?,
                }
            }
        })
    }
}

// ---- coordinator to worker

impl From<Peer> for v1::Peer {
    fn from(peer: Peer) -> Self {
        Self { address: peer.address, worker: Some(peer.worker.into()) }
    }
}

impl TryFrom<v1::Peer> for Peer {
    type Error = WireError;

    fn try_from(peer: v1::Peer) -> Result<Self, WireError> {
        Ok(Self { address: peer.address, worker: required("peer.worker", peer.worker)?.try_into()? })
    }
}

impl From<ToWorker> for v1::FromCoordinator {
    fn from(message: ToWorker) -> Self {
        use v1::from_coordinator::Message as Wire;
        let message = match message {
            ToWorker::Welcome { run, id, secret, plan, store } => Wire::Welcome(v1::Welcome {
                run: run.into(),
                id: id.to_bytes().to_vec(),
                secret: secret.as_bytes().to_vec(),
                plan,
                store,
            }),
            ToWorker::Refused { kind, reason } => Wire::Refused(failure(kind, reason)),
            ToWorker::Assign(assignment) => Wire::Assign(v1::Assignment {
                training: assignment.training.to_string(),
                from: assignment.from.map(Into::into),
                generation: assignment.generation.get(),
                rank: assignment.rank.get(),
                size: assignment.size,
                previous: Some(assignment.previous.into()),
                next: Some(assignment.next.into()),
                first_micro_batch: assignment.micro_batches.start,
                end_micro_batch: assignment.micro_batches.end,
                recorded: assignment.recorded.get(),
                may_begin: assignment.may_begin,
                key: assignment.key.as_bytes().to_vec(),
                repair: assignment
                    .repair
                    .map_or_else(Vec::new, |repair| repair.milestones.into_iter().map(Step::get).collect()),
            }),
            ToWorker::Abort(generation) => Wire::Abort(generation.get()),
            ToWorker::Request(generation, request) => {
                let kind = match request {
                    GroupRequest::Save => v1::RequestKind::Save,
                    GroupRequest::Pause => v1::RequestKind::Pause,
                    GroupRequest::Stop => v1::RequestKind::Stop,
                };
                Wire::Request(v1::GroupRequest { generation: generation.get(), kind: kind.into() })
            }
            ToWorker::Acknowledge(training, step) => {
                Wire::Acknowledge(v1::Acknowledge { training: training.to_string(), step: step.get() })
            }
            ToWorker::Write { checkpoint, files } => {
                Wire::Write(v1::Write { checkpoint: Some(checkpoint.into()), files })
            }
            ToWorker::Release(checkpoint) => Wire::Release(checkpoint.into()),
            ToWorker::Run(job) => Wire::Run(job.into()),
            ToWorker::Finish(status) => Wire::Finish(status.code().into()),
        };
        Self { message: Some(message) }
    }
}

impl TryFrom<v1::FromCoordinator> for ToWorker {
    type Error = WireError;

    fn try_from(message: v1::FromCoordinator) -> Result<Self, WireError> {
        use v1::from_coordinator::Message as Wire;
        Ok(match required("message", message.message)? {
            Wire::Welcome(welcome) => Self::Welcome {
                run: welcome.run.parse().map_err(|error: ulmus_types::IdError| WireError::Invalid {
                    field: "welcome.run",
                    value: error.to_string(),
                })?,
                id: required("welcome.id", run_id("welcome.id", &welcome.id)?)?,
                secret: SessionSecret::from_bytes(array("welcome.secret", &welcome.secret)?),
                plan: welcome.plan,
                store: welcome.store,
            },
            Wire::Refused(refused) => {
                let (kind, reason) = read_failure(refused)?;
                Self::Refused { kind, reason }
            }
            Wire::Assign(assignment) => Self::Assign(Assignment {
                training: stage("assignment.training", &assignment.training)?,
                from: assignment.from.map(TryInto::try_into).transpose()?,
                generation: Generation::new(assignment.generation),
                rank: Rank::new(assignment.rank),
                size: assignment.size,
                key: GroupKey::from_bytes(array("assignment.key", &assignment.key)?),
                previous: required("assignment.previous", assignment.previous)?.try_into()?,
                next: required("assignment.next", assignment.next)?.try_into()?,
                micro_batches: assignment.first_micro_batch..assignment.end_micro_batch,
                recorded: Step::new(assignment.recorded),
                may_begin: assignment.may_begin,
                repair: (!assignment.repair.is_empty())
                    .then(|| Repair { milestones: assignment.repair.into_iter().map(Step::new).collect() }),
            }),
            Wire::Abort(generation) => Self::Abort(Generation::new(generation)),
            Wire::Request(request) => {
                let kind = match request.kind() {
                    v1::RequestKind::Save => GroupRequest::Save,
                    v1::RequestKind::Pause => GroupRequest::Pause,
                    v1::RequestKind::Stop => GroupRequest::Stop,
                    v1::RequestKind::Unspecified => return Err(WireError::Missing("request.kind")),
                };
                Self::Request(Generation::new(request.generation), kind)
            }
            Wire::Acknowledge(report) => {
                Self::Acknowledge(stage("acknowledge.training", &report.training)?, Step::new(report.step))
            }
            Wire::Write(write) => Self::Write {
                checkpoint: required("write.checkpoint", write.checkpoint)?.try_into()?,
                files: write.files,
            },
            Wire::Release(checkpoint) => Self::Release(checkpoint.try_into()?),
            Wire::Run(job) => Self::Run(job.try_into()?),
            Wire::Finish(code) => Self::Finish(exit_status(code)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker() -> WorkerId {
        WorkerId::new("w0", Incarnation::new(7)).unwrap()
    }

    fn checkpoint() -> CheckpointId {
        CheckpointId::new("dpo".parse().unwrap(), Step::new(50), Generation::new(2))
    }

    /// A job of a stage that reads `count` checkpoints.
    fn job(stage: &str, count: usize) -> Job {
        of(stage, Subject::Stage(vec![checkpoint(); count]))
    }

    fn of(stage: &str, subject: Subject) -> Job {
        Job::new(stage.parse().unwrap(), subject)
    }

    #[test]
    fn every_message_of_a_worker_survives_the_wire() {
        let generation = Generation::new(3);
        let report = StepReport {
            step: Step::new(1),
            tokens: 2,
            loss: 0.1 + 0.2,
            z_loss: 1e-300,
            grad_norm: f64::MAX,
            lr: 1e-6,
            held_out_loss: Some(-0.0),
            elapsed: Duration::from_nanos(1),
            data_wait: Duration::from_secs(2),
            communication: Duration::ZERO,
            examples: 11,
            measures: [("rewards/margins".to_owned(), 0.1)].into(),
        };
        let reading = SourceReading {
            source: "web".into(),
            epochs: 0.25,
            documents: 3,
            tokens: 4,
            text_bytes: 5,
            short_characters: 6,
            short_tokens: 7,
            held_out: 8,
            bad_units: 9,
            fetched_bytes: 10,
            cached_bytes: 11,
            failed_requests: 12,
            streams: 13,
            ready: 14,
            waited: Duration::from_millis(7),
            elapsed: Duration::from_secs(8),
        };
        let snapshot = Snapshot {
            checkpoint: checkpoint(),
            kind: CheckpointKind::Recovery,
            state: Digest::of(b"s"),
            files: vec!["a".into(), "b".into()],
        };
        let mut messages = vec![
            ToCoordinator::StoreRead(Ok(Digest::of(b"nonce"))),
            ToCoordinator::StoreRead(Err("no such folder".into())),
            ToCoordinator::Ready(Ready {
                fingerprint: Some(Digest::of(b"x")),
                generation: Some(generation),
                reports: vec![report.clone()],
                snapshots: vec![snapshot.clone()],
            }),
            ToCoordinator::Ready(Ready {
                fingerprint: None,
                generation: None,
                reports: Vec::new(),
                snapshots: Vec::new(),
            }),
            ToCoordinator::Unfit { kind: ErrorKind::Internal, message: "no memory".into() },
            ToCoordinator::Draining,
            ToCoordinator::Notice("a file is damaged".into()),
            ToCoordinator::Connected(generation),
            ToCoordinator::Formed { generation, step: Step::new(4) },
            ToCoordinator::Reading { step: Step::new(5), sources: vec![reading, SourceReading::default()] },
            ToCoordinator::Steps { generation, reports: vec![report] },
            ToCoordinator::Snapshot(snapshot),
            ToCoordinator::Written {
                checkpoint: checkpoint(),
                files: [("a".to_owned(), FileEntry { bytes: 1, digest: Digest::of(b"a") })].into(),
            },
            ToCoordinator::WriteFailed {
                checkpoint: checkpoint(),
                kind: ErrorKind::Internal,
                message: "full".into(),
            },
            ToCoordinator::JobDone { job: job("average", 1), result: "{}".into() },
            ToCoordinator::JobFailed {
                job: job("prepare", 0),
                kind: ErrorKind::Corrupt,
                message: "m".into(),
                bad_unit: Some(BadUnit { source: "web".into(), unit: 3 }),
                damaged: Some(checkpoint()),
            },
        ];
        let sections = [
            Section::Idle,
            Section::Forming,
            Section::Computing,
            Section::Collective,
            Section::Reading,
            Section::Measuring,
            Section::Storing,
        ];
        messages.extend(sections.map(|section| {
            let (since, busy) = (Duration::from_millis(3), Duration::from_secs(4));
            ToCoordinator::Heartbeat(Heartbeat { generation, collective: 9, section, since, busy })
        }));
        let busy = WorkerStatus::Working(job("evaluate-last", 1));
        let id = RunId::from_bytes([3; 16]);
        let secret = SessionSecret::from_bytes([4; 32]);
        for (status, run, secret) in [
            (WorkerStatus::Idle, None, None),
            (WorkerStatus::Training(generation), Some(id), Some(secret)),
            (busy, Some(id), None),
        ] {
            messages.push(ToCoordinator::Hello(Hello {
                worker: worker(),
                version: "1".into(),
                address: "h:1".into(),
                device: "cpu".into(),
                threads: 2,
                pid: 3,
                run,
                secret,
                status,
                host: "node-1".into(),
                memory: 1 << 40,
                only_jobs: run.is_none(),
            }));
        }
        for reason in [
            LeaveReason::Agreed,
            LeaveReason::Finished,
            LeaveReason::Exhausted("web".into()),
            LeaveReason::BadUnit(BadUnit { source: "web".into(), unit: 7 }, "cut".into()),
            LeaveReason::Lost { suspect: None, message: "rank 1".into() },
            LeaveReason::Failed { kind: ErrorKind::InvalidInput, message: "nan".into() },
        ] {
            messages.push(ToCoordinator::Left { generation, step: Step::new(1), reason });
        }
        for blame in [Blame::Unreachable, Blame::Absent, Blame::Lost, Blame::Silent, Blame::Damaged] {
            let reason = LeaveReason::Lost { suspect: Some((Rank::new(2), blame)), message: "gone".into() };
            messages.push(ToCoordinator::Left { generation, step: Step::new(1), reason });
        }
        for message in messages {
            for run in [None, Some(id)] {
                let wire = v1::FromWorker::from((run, message.clone()));
                assert_eq!(from_worker(wire), Ok((run, message.clone())));
            }
        }
    }

    #[test]
    fn every_message_of_the_coordinator_survives_the_wire() {
        let peer = Peer { address: "h:2".into(), worker: worker() };
        let mut messages = vec![
            ToWorker::Welcome {
                run: "r".parse().unwrap(),
                id: RunId::from_bytes([1; 16]),
                secret: SessionSecret::from_bytes([2; 32]),
                plan: "p".into(),
                store: "s".into(),
            },
            ToWorker::Refused { kind: ErrorKind::Refused, reason: "version".into() },
            ToWorker::Assign(Assignment {
                training: StageName::pretraining(),
                from: Some(Subject::Last(checkpoint())),
                generation: Generation::new(1),
                rank: Rank::new(2),
                size: 3,
                key: GroupKey::from_bytes([7; 32]),
                previous: peer.clone(),
                next: peer,
                micro_batches: 4..6,
                recorded: Step::new(7),
                may_begin: true,
                repair: Some(Repair { milestones: [Step::new(3), Step::new(6)].into() }),
            }),
            ToWorker::Abort(Generation::new(5)),
            ToWorker::Acknowledge(StageName::pretraining(), Step::new(6)),
            ToWorker::Write { checkpoint: checkpoint(), files: vec!["a".into()] },
            ToWorker::Release(checkpoint()),
            ToWorker::Finish(ExitStatus::Interrupted),
        ];
        messages.extend(
            [GroupRequest::Save, GroupRequest::Pause, GroupRequest::Stop]
                .map(|request| ToWorker::Request(Generation::new(1), request)),
        );
        messages.extend(
            [
                job("prepare", 0),
                job("average", 5),
                job("evaluate-last", 1),
                job("continuations", 3),
                job("benchmark", 0),
                of("tasks", Subject::Base),
                of("tasks", Subject::Average),
                of("tasks", Subject::Tuned("dpo".parse().unwrap())),
                of("tasks", Subject::Last(checkpoint())),
                of("tasks", Subject::Milestone(checkpoint())),
                of("tasks", Subject::Model("hf://a/b".into())),
                of("tasks", Subject::Average).part_of(Part::new(2, 3).unwrap()),
            ]
            .map(ToWorker::Run),
        );
        for message in messages {
            let wire = v1::FromCoordinator::from(message.clone());
            assert_eq!(ToWorker::try_from(wire), Ok(message));
        }
    }

    #[test]
    fn what_lacks_a_field_is_refused_by_its_name() {
        use v1::subject::Kind;
        assert_eq!(from_worker(v1::FromWorker::default()), Err(WireError::Missing("message")));
        let of = |message| from_worker(v1::FromWorker { message: Some(message), run: Vec::new() });
        let hello = v1::from_worker::Message::Hello(v1::Hello::default());
        assert_eq!(of(hello), Err(WireError::Missing("hello.worker")));
        let ready = v1::Ready { fingerprint: vec![1, 2], ..v1::Ready::default() };
        let error = of(v1::from_worker::Message::Ready(ready));
        assert!(matches!(error, Err(WireError::Invalid { field: "ready.fingerprint", .. })));
        let done = |stage: &str, kind: Kind, name: &str, count| {
            let checkpoints = vec![checkpoint().into(); count];
            let subject = Some(v1::Subject { kind: kind.into(), checkpoints, name: name.to_owned() });
            let job = Some(v1::Job { stage: stage.to_owned(), subject, ..v1::Job::default() });
            of(v1::from_worker::Message::JobDone(v1::JobDone { job, result: String::new() }))
        };
        assert!(done("export", Kind::Stage, "", 0).is_ok());
        for (stage, kind, name, count, field) in [
            ("../export", Kind::Stage, "", 0, "job.stage"),
            ("tasks", Kind::Unspecified, "", 0, "subject"),
            ("tasks", Kind::Last, "", 0, "subject"),
            ("tasks", Kind::Average, "", 1, "subject"),
            ("tasks", Kind::Average, "x", 0, "subject"),
            ("tasks", Kind::Tuned, "../x", 0, "subject.name"),
            ("tasks", Kind::Model, "hf://a/b", 1, "subject"),
            ("tasks", Kind::Model, "", 0, "subject"),
        ] {
            let error = done(stage, kind, name, count).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
